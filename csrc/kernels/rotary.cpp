// The rotation of q and k, with the write of k and v into the KV, at one level.
#include "kernels/kv_codes.h"

namespace weft::WEFT_LEVEL {
namespace {

constexpr double ROTARY_COST = 0.5;  // rough nanoseconds of one thread per element, for for_rows()

// One head's q or k: normalised where `norm` is given, rotated, rounded once to Out. x and out [2 * half].
template <class T, class Out>
WEFT_INLINE void rotate(const T* x, const T* norm, float eps, const float* cos, const float* sin, int64_t half,
                        Out* out) {
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

// Where a slot of one head lies; see attention.h for the layout. The stores are of what belongs to this slot alone: its
// neighbours may be written by another thread.
struct Place {
  int64_t head, offset;  // of all heads of all blocks; within the block
};

template <class T>
void put_key(const KvView& kv, const Place& at, const T* key) {
  constexpr int64_t C = 4 / sizeof(T);
  char* to = kv.keys + (at.head * kv.head_dim / C * kv.block_size + at.offset) * 4;
  for (int64_t d = 0; d < kv.head_dim; d += C) memcpy(to + d / C * kv.block_size * 4, key + d, 4);
}

template <class T>
void put_value(const KvView& kv, const Place& at, const T* value) {
  constexpr int64_t S = 4 / sizeof(T);
  T* to = reinterpret_cast<T*>(kv.values) + (at.head * kv.block_size + at.offset / S * S) * kv.width() + at.offset % S;
  for (int64_t d = 0; d < kv.head_dim; d++) to[S * d] = value[d];
}

template <int BITS>
void put_key_codes(const KvView& kv, const Place& at, const uint8_t* codes) {
  constexpr int64_t C = 32 / BITS;
  char* to = kv.keys + (at.head * kv.head_dim / C * kv.block_size + at.offset) * 4;
  for (int64_t d = 0; d < kv.head_dim; d += C) {
    uint32_t word = 0;
    WEFT_UNROLL for (int i = 0; i < C; i++) word |= uint32_t(codes[d + i]) << (i / 2 * BITS + i % 2 * 16);
    memcpy(to + d / C * kv.block_size * 4, &word, 4);
  }
}

template <int BITS>
void put_value_codes(const KvView& kv, const Place& at, const uint8_t* codes) {
  constexpr int64_t V = BITS == 4 ? 2 : 1;
  const int64_t byte = at.offset % 4 / 2 + at.offset % 2 * 2;
  uint8_t* to = reinterpret_cast<uint8_t*>(kv.values) + byte;
  to += (at.head * kv.block_size + at.offset / 4 * 4) * kv.width() / V;
  if (BITS == 8)
    for (int64_t d = 0; d < kv.head_dim; d++) to[4 * d] = codes[d];
  else
    for (int64_t d = 0; d < kv.head_dim; d += 32)
      for (int64_t i = d; i < d + 16; i++) to[4 * (i - d / 2)] = uint8_t(codes[i] | codes[i + 16] << 4);
}

// Key or value: its codes, and the numbers that go with them. x [head_dim] and room for a vector; not kept.
template <int BITS>
void put_codes(const KvView& kv, const Place& at, bool key, float* x) {
  if (kv.spread()) spread(x, kv.head_dim);
  Codes codes;
  memset(codes.codes, 0, sizeof codes.codes);  // channels beyond head_dim share bytes with those within
  quantise<BITS>(x, kv.head_dim, codes);
  key ? put_key_codes<BITS>(kv, at, codes.codes) : put_value_codes<BITS>(kv, at, codes.codes);
  KvNumbers& numbers = kv.numbers[at.head * (kv.block_size / NUMBERS) + at.offset / NUMBERS];
  (key ? numbers.key_scales : numbers.value_scales)[at.offset % NUMBERS] = codes.scale;
  (key ? numbers.key_zeros : numbers.value_zeros)[at.offset % NUMBERS] = codes.zero;
}

// How a KV of BITS takes heads of T (0 bits: as they are).
template <class T, int BITS>
struct Writer {
  WEFT_INLINE void query(const RotaryCall& call, const T* x, const float* cos, const float* sin, T* q) {
    const int64_t depth = call.kv.head_dim;
    const T* norm = static_cast<const T*>(call.q_norm);
    if (BITS == 0 || !call.kv.spread()) return rotate(x, norm, call.eps, cos, sin, depth / 2, q);
    alignas(64) float turned[MAX_HEAD_DIM];
    rotate(x, norm, call.eps, cos, sin, depth / 2, turned);
    spread(turned, depth);
    for (int64_t d = 0; d < depth; d += lanes) store_some(q + d, load<f32v>(turned + d) * (1.0f / float(depth)), depth - d);
  }
  WEFT_INLINE void key(const RotaryCall& call, const T* x, const float* cos, const float* sin, const Place& at) {
    const T* norm = static_cast<const T*>(call.k_norm);
    if constexpr (BITS == 0) {
      T turned[MAX_HEAD_DIM];
      rotate(x, norm, call.eps, cos, sin, call.kv.head_dim / 2, turned);
      put_key(call.kv, at, turned);
    } else {
      alignas(64) float turned[MAX_HEAD_DIM];
      rotate(x, norm, call.eps, cos, sin, call.kv.head_dim / 2, turned);
      put_codes<BITS>(call.kv, at, true, turned);
    }
  }
  WEFT_INLINE void value(const RotaryCall& call, const T* x, const Place& at) {
    if constexpr (BITS == 0) {
      put_value(call.kv, at, x);
    } else {
      alignas(64) float floats[MAX_HEAD_DIM];
      for (int64_t d = 0; d < call.kv.head_dim; d += lanes)
        store(floats + d, load_some(x + d, call.kv.head_dim - d));
      put_codes<BITS>(call.kv, at, false, floats);
    }
  }
};

template <class T, int BITS>
void rotary_write_of(Pool& pool, const RotaryCall& call) {
  using To = Writer<T, BITS>;
  const KvView& kv = call.kv;
  const int64_t depth = kv.head_dim, half = depth / 2, heads = call.heads + 2 * kv.kv_heads;
  for_rows(pool, call.batch.rows, double(heads * depth) * ROTARY_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const T* x = static_cast<const T*>(call.qkv) + row * heads * depth;
      T* q = static_cast<T*>(call.q) + row * call.heads * depth;
      const float* cos = call.cos + call.batch.positions[row] * half;
      const float* sin = call.sin + call.batch.positions[row] * half;
      for (int64_t h = 0; h < call.heads; h++, x += depth) To::query(call, x, cos, sin, q + h * depth);
      const int64_t block = call.batch.slots[row] / kv.block_size, offset = call.batch.slots[row] % kv.block_size;
      for (int64_t h = 0; h < kv.kv_heads; h++, x += depth)
        To::key(call, x, cos, sin, {block * kv.kv_heads + h, offset});
      for (int64_t h = 0; h < kv.kv_heads; h++, x += depth) To::value(call, x, {block * kv.kv_heads + h, offset});
    }
  });
}

template <class T>
void rotary_write_as(Pool& pool, const RotaryCall& call) {
  if (call.kv.bits == 4) return rotary_write_of<T, 4>(pool, call);
  if (call.kv.bits == 8) return rotary_write_of<T, 8>(pool, call);
  rotary_write_of<T, 0>(pool, call);
}

}  // namespace

void rotary_write(Pool& pool, const RotaryCall& call) {
  call.type == Type::bfloat16 ? rotary_write_as<bf16>(pool, call) : rotary_write_as<float>(pool, call);
}

}  // namespace weft::WEFT_LEVEL
