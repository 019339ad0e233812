// What Python holds of a model: packed weights and paged KV. Each owns its memory, which may be given back early.
//
// Everything is made by the threads of a backend, and may then be used by the backends of all lanes.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "backend.h"
#include "embedding.h"
#include "w4ax.h"

namespace weft {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Owns the panels and the padded bias.
class PackedLinear {
 public:
  PackedLinear(Backend& backend, uintptr_t weight, int64_t row_stride, uintptr_t bias, int64_t out, int64_t in, int type)
      : weights_{Type(type), in, out, nullptr, nullptr} {
    Pool& pool = backend.pool();
    panels_ = Memory(size_t(weights_.panel_count() * weights_.panel_bytes()));
    backend.kernels().pack_linear(pool, weights_, at<void>(weight), row_stride, panels_.data());
    weights_.panels = panels_.data();
    if (bias == 0) return;
    bias_ = Memory(size_t(weights_.panel_count() * PANEL) * sizeof(float));
    const float* given = at<const float>(bias);
    for (int64_t i = 0; i < out; i++) bias_.as<float>()[i] = given[i];
    weights_.bias = bias_.as<float>();
  }

  const LinearWeights& weights() const {
    if (weights_.panels == nullptr) throw std::runtime_error("the packed weights are released");
    return weights_;
  }
  size_t bytes() const { return panels_.bytes() + bias_.bytes(); }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(panels_.data()); }
  void release() {
    panels_.release();
    bias_.release();
    weights_.panels = weights_.bias = nullptr;
  }

 private:
  Memory panels_, bias_;
  LinearWeights weights_;
};

// Owns the panels, the padded bias and the permutation.
class PackedW4Ax {
 public:
  PackedW4Ax(Backend& backend, uintptr_t values, uintptr_t scales, uintptr_t zeros, uintptr_t bias,
             uintptr_t permutation, int64_t out, int64_t in, int64_t outlier_blocks, int64_t wide_blocks, bool hadamard,
             bool exact_a4, bool general)
      : weights_{in, out, outlier_blocks, wide_blocks, hadamard, exact_a4, general, nullptr, BLOCK, nullptr, nullptr} {
    Pool& pool = backend.pool();
    panels_ = Memory(size_t(weights_.panel_count() * weights_.panel_bytes()));
    backend.kernels().pack_w4ax(
        pool, weights_, {at<const int8_t>(values), at<const float>(scales), at<const int8_t>(zeros)}, panels_.data());
    weights_.panels = panels_.data();
    if (bias != 0) weights_.bias = copy<float>(bias_, at<const float>(bias), out, weights_.panel_count() * PANEL);
    if (permutation == 0) return;
    if (in > 65536)
      throw std::invalid_argument("a permutation of " + std::to_string(in) + " channels; numbers of 16 bits reach 65536");
    weights_.permutation = copy<uint16_t>(permutation_, at<const int32_t>(permutation), in, in);
    for (int64_t i = 1; i < in; i++)
      while (i % weights_.run != 0 && weights_.permutation[i] != weights_.permutation[i - 1] + 1) weights_.run /= 2;
  }

  const W4AxWeights& weights() const {
    if (weights_.panels == nullptr) throw std::runtime_error("the packed weights are released");
    return weights_;
  }
  size_t bytes() const { return panels_.bytes() + bias_.bytes() + permutation_.bytes(); }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(panels_.data()); }
  void release() {
    panels_.release();
    bias_.release();
    permutation_.release();
    weights_.panels = nullptr;
  }

 private:
  template <class T, class From>
  static const T* copy(Memory& to, const From* from, int64_t count, int64_t room) {
    to = Memory(size_t(room) * sizeof(T));
    for (int64_t i = 0; i < count; i++) to.as<T>()[i] = T(from[i]);
    return to.as<T>();
  }

  Memory panels_, bias_, permutation_;
  W4AxWeights weights_;
};

// Owns the embedding table and its scales.
class PackedEmbedding {
 public:
  PackedEmbedding(Backend& backend, uintptr_t data, uintptr_t scales, int64_t rows, int64_t size, int stored)
      : table_{Stored(stored), rows, size, nullptr, nullptr} {
    table_.data = copy(backend.pool(), data_, at<const char>(data), table_.row_bytes()).data();
    if (scales != 0)
      table_.scales = copy(backend.pool(), scales_, at<const char>(scales), table_.row_scales() * 4).as<float>();
  }

  const EmbeddingTable& table() const {
    if (table_.data == nullptr) throw std::runtime_error("the embedding is released");
    return table_;
  }
  // Throws std::invalid_argument for a token that the table does not have.
  void check(const int64_t* tokens, int64_t count) const {
    for (int64_t i = 0; i < count; i++)
      if (tokens[i] < 0 || tokens[i] >= table_.rows)
        throw std::invalid_argument("there is no token " + std::to_string(tokens[i]) + " for row " + std::to_string(i) +
                                    "; the embedding has " + std::to_string(table_.rows));
  }
  size_t bytes() const { return data_.bytes() + scales_.bytes(); }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_.data()); }
  void release() {
    data_.release();
    scales_.release();
    table_.data = nullptr;
  }

 private:
  Memory& copy(Pool& pool, Memory& to, const char* from, int64_t row_bytes) {
    to = Memory(size_t(table_.rows * row_bytes));
    pool.run(table_.rows, [&](int64_t row, int) {
      memcpy(to.data() + row * row_bytes, from + row * row_bytes, size_t(row_bytes));
    });
    return to;
  }

  Memory data_, scales_;
  EmbeddingTable table_;
};

// One layer's keys and values: see attention.h for the layout.
class LayerKv {
 public:
  // type: of the activations. bits: 8, 4, or 0 for keys and values of that type.
  LayerKv(Backend& backend, int64_t blocks, int64_t block_size, int64_t kv_heads, int64_t head_dim, int type, int bits)
      : type_(Type(type)), view_{nullptr, nullptr, nullptr, blocks, block_size, kv_heads, head_dim, bits} {
    if (bits != 0 && bits != 8 && bits != 4)
      throw std::invalid_argument("codes of " + std::to_string(bits) + " bits; there are those of 8 and of 4");
    if (blocks < 1 || block_size < 16 || block_size % 16 != 0 || kv_heads < 1)
      throw std::invalid_argument("blocks of a multiple of 16 slots, and at least one of them, are needed");
    if (head_dim < 8 || head_dim > MAX_HEAD_DIM || head_dim % 8 != 0)
      throw std::invalid_argument("head_dim is " + std::to_string(head_dim) +
                                  "; the kernels take multiples of 8 up to " + std::to_string(MAX_HEAD_DIM));
    const int64_t slots = blocks * block_size * kv_heads;
    keys_ = slots * view_.channel_bytes(type_, head_dim);
    values_ = slots * view_.channel_bytes(type_, view_.width());
    numbers_ = bits == 0 ? 0 : slots / NUMBERS * int64_t(sizeof(KvNumbers));
    memory_ = Memory(size_t(keys_ + values_ + numbers_));
    memory_.touch(backend.pool());
    view_.keys = memory_.data();
    view_.values = view_.keys + keys_;
    view_.numbers = reinterpret_cast<KvNumbers*>(view_.values + values_);
  }

  const KvView& view() const {
    if (memory_.data() == nullptr) throw std::runtime_error("the KV is released");
    return view_;
  }
  Type type() const { return type_; }
  // Copies whole blocks to others, none of which is read or written meanwhile.
  void copy(const std::vector<int64_t>& source, const std::vector<int64_t>& target) const {
    if (source.size() != target.size()) throw std::invalid_argument("as many blocks to copy to as to copy from are needed");
    const KvView& kv = view();
    for (const auto& list : {source, target})
      for (int64_t block : list)
        if (block < 0 || block >= kv.blocks) throw std::invalid_argument("there is no block " + std::to_string(block));
    char* area = memory_.data();
    for (int64_t size : {keys_, values_, numbers_}) {
      const int64_t each = size / kv.blocks;
      for (size_t i = 0; i < source.size(); i++) memcpy(area + target[i] * each, area + source[i] * each, size_t(each));
      area += size;
    }
  }
  size_t bytes() const { return memory_.bytes(); }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(memory_.data()); }
  void release() { memory_.release(); }

 private:
  Type type_;
  int64_t keys_, values_, numbers_;  // bytes of each
  KvView view_;
  Memory memory_;
};

}  // namespace weft
