// Norms, the gated activation, and the rotation of q and k with the write of k and v into the KV, at one level.
// Each row takes one pass over memory, two where the first gives a sum.
#include "elementwise.h"

#include "attention.h"
#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {
namespace {

constexpr float LOG2_E = 1.44269504f;

// Rough nanoseconds of one thread, for for_rows().
constexpr double NORM_COST = 0.1, GATE_COST = 0.4, ROTARY_COST = 0.5;  // per element

// Sum of squares of a row, after `see` has changed or stored its vectors. Four sums, so that additions overlap.
template <class F>
WEFT_INLINE float sum_of_squares(int64_t size, F vector_at) {
  f32v sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= size; i += 4 * lanes)
    for (int k = 0; k < 4; k++) {
      const f32v x = vector_at(i + k * lanes, int64_t(lanes));
      sums[k] = fma(x, x, sums[k]);
    }
  for (; i < size; i += lanes) {
    const f32v x = vector_at(i, size - i);
    sums[0] = fma(x, x, sums[0]);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// 1 / sqrt(mean of squares + eps)
WEFT_INLINE float norm_scale(float squares, int64_t size, float eps) {
  return 1.0f / __builtin_sqrtf(squares / float(size) + eps);
}

template <class T>
WEFT_INLINE void scale_row(const T* x, const T* weight, float scale, int64_t size, T* out) {
  for (int64_t i = 0; i < size; i += lanes)
    store_some(out + i, load_some(x + i, size - i) * scale * load_some(weight + i, size - i), size - i);
}

template <class T>
void norm_of(Pool& pool, const NormCall& call) {
  const int64_t size = call.size;
  const T* weight = static_cast<const T*>(call.weight);
  for_rows(pool, call.rows, double(size) * NORM_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const T* x = static_cast<const T*>(call.x) + row * size;
      T* residual = static_cast<T*>(call.residual) + row * size;
      T* out = static_cast<T*>(call.out) + row * size;
      float squares;
      if (call.residual == nullptr) {
        squares = sum_of_squares(size, [=](int64_t i, int64_t n) { return load_some(x + i, n); });
      } else {
        squares = sum_of_squares(size, [=](int64_t i, int64_t n) {
          store_some(residual + i, load_some(x + i, n) + load_some(residual + i, n), n);
          return load_some(residual + i, n);  // as it was rounded
        });
        x = residual;
      }
      const float scale = norm_scale(squares, size, call.eps);
      for (int64_t i = 0; i < size; i += lanes)
        store_some(out + i, load_some(x + i, size - i) * scale * load_some(weight + i, size - i), size - i);
    }
  });
}

template <class T>
void silu_mul_of(Pool& pool, const GateCall& call) {
  const int64_t size = call.size;
  for_rows(pool, call.rows, double(size) * GATE_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const T* gates = static_cast<const T*>(call.gate_up) + row * 2 * size;
      T* out = static_cast<T*>(call.out) + row * size;
      for (int64_t i = 0; i < size; i += lanes) {
        const f32v gate = load_some(gates + i, size - i), up = load_some(gates + size + i, size - i);
        store_some(out + i, gate / (exp2(gate * -LOG2_E) + 1.0f) * up, size - i);
      }
    }
  });
}

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

void norm(Pool& pool, const NormCall& call) {
  call.type == Type::bfloat16 ? norm_of<bf16>(pool, call) : norm_of<float>(pool, call);
}

void silu_mul(Pool& pool, const GateCall& call) {
  call.type == Type::bfloat16 ? silu_mul_of<bf16>(pool, call) : silu_mul_of<float>(pool, call);
}

void rotary_write(Pool& pool, const RotaryCall& call) {
  call.type == Type::bfloat16 ? rotary_write_of<bf16>(pool, call) : rotary_write_of<float>(pool, call);
}

}  // namespace weft::WEFT_LEVEL
