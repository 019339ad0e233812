// The rotation of q and k, with the write of k and v into the KV, at one level.
#include "attention.h"

#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {
namespace {

constexpr double ROTARY_COST = 0.5;  // rough nanoseconds of one thread per element, for for_rows()

// One head's q or k: normalised where `norm` is given, rotated, rounded once. x and out [2 * half].
template <class T>
WEFT_INLINE void rotate(const T* x, const T* norm, float eps, const float* cos, const float* sin, int64_t half,
                        T* out) {
  float scale = 1;
  if (norm != nullptr) {
    const float squares = sum_of_squares(2 * half, [=](int64_t i, int64_t n) { return load_some(x + i, n); });
    scale = norm_scale(squares, 2 * half, eps);
  }
  for (int64_t i = 0; i < half; i += lanes) {
    const int64_t n = half - i;
    f32v first = load_some(x + i, n), second = load_some(x + half + i, n);
    if (norm != nullptr) {
      first = first * scale * load_some(norm + i, n);
      second = second * scale * load_some(norm + half + i, n);
    }
    const f32v c = load_some(cos + i, n), s = load_some(sin + i, n);
    store_some(out + i, first * c - second * s, n);
    store_some(out + half + i, second * c + first * s, n);
  }
}

// A key's and a value's channels into their slot; see attention.h for the layout. The stores are of single elements (or
// pairs) that belong to this slot: its neighbours may be written by another thread.
void put_key(const KvView& kv, int64_t block, int64_t head, int64_t offset, const bf16* key) {
  uint32_t* to = static_cast<uint32_t*>(kv.keys) + offset;
  to += (block * kv.kv_heads + head) * kv.head_dim / 2 * kv.block_size;
  for (int64_t d = 0; d < kv.head_dim; d += 2) memcpy(to + d / 2 * kv.block_size, key + d, sizeof *to);
}

void put_key(const KvView& kv, int64_t block, int64_t head, int64_t offset, const float* key) {
  float* to = static_cast<float*>(kv.keys) + (block * kv.kv_heads + head) * kv.head_dim * kv.block_size + offset;
  for (int64_t d = 0; d < kv.head_dim; d++) to[d * kv.block_size] = key[d];
}

void put_value(const KvView& kv, int64_t block, int64_t head, int64_t offset, const bf16* value) {
  bf16* to = static_cast<bf16*>(kv.values) + (block * kv.kv_heads + head) * kv.block_size * kv.width();
  to += offset / 2 * 2 * kv.width() + offset % 2;
  for (int64_t d = 0; d < kv.head_dim; d++) to[2 * d] = value[d];
}

void put_value(const KvView& kv, int64_t block, int64_t head, int64_t offset, const float* value) {
  float* to = static_cast<float*>(kv.values) + ((block * kv.kv_heads + head) * kv.block_size + offset) * kv.width();
  memcpy(to, value, size_t(kv.head_dim) * sizeof *to);
}

template <class T>
void rotary_write_of(Pool& pool, const RotaryCall& call) {
  const KvView& kv = call.kv;
  const int64_t depth = kv.head_dim, half = depth / 2, heads = call.heads + 2 * kv.kv_heads;
  for_rows(pool, call.batch.rows, double(heads * depth) * ROTARY_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const T* x = static_cast<const T*>(call.qkv) + row * heads * depth;
      T* q = static_cast<T*>(call.q) + row * call.heads * depth;
      const float* cos = call.cos + call.batch.positions[row] * half;
      const float* sin = call.sin + call.batch.positions[row] * half;
      for (int64_t h = 0; h < call.heads; h++, x += depth)
        rotate(x, static_cast<const T*>(call.q_norm), call.eps, cos, sin, half, q + h * depth);
      const int64_t block = call.batch.slots[row] / kv.block_size, offset = call.batch.slots[row] % kv.block_size;
      for (int64_t h = 0; h < kv.kv_heads; h++, x += depth) {
        T key[MAX_HEAD_DIM];
        rotate(x, static_cast<const T*>(call.k_norm), call.eps, cos, sin, half, key);
        put_key(kv, block, h, offset, key);
      }
      for (int64_t h = 0; h < kv.kv_heads; h++, x += depth) put_value(kv, block, h, offset, x);
    }
  });
}

}  // namespace

void rotary_write(Pool& pool, const RotaryCall& call) {
  call.type == Type::bfloat16 ? rotary_write_of<bf16>(pool, call) : rotary_write_of<float>(pool, call);
}

}  // namespace weft::WEFT_LEVEL
