// What attention and the elementwise kernels need beyond simd.h: 2^x, lanes chosen by number, and rows whose length is
// not a multiple of the vector's.
#pragma once

#include "kernels/simd.h"

namespace weft::WEFT_LEVEL {

// The lanes [first, end) of x, `other` in the rest.
WEFT_INLINE f32v lanes_or(f32v x, int first, int end, f32v other) {
  i32v lane{};
  for (int i = 0; i < lanes; i++) lane[i] = i;
  return lane >= first && lane < end ? x : other;
}

// 2^x to 2e-7 of itself. Exactly 1 at 0, 0 at -infinity and below the range of floats, infinity from 128 up, NaN of NaN.
WEFT_INLINE f32v exp2(f32v x) {
#if defined(WEFT_LEVEL_avx512)
  const f32v rest = (f32v)_mm512_maskz_reduce_ps(ALL_LANES, (__m512)x, 0);  // x - (nearest integer), 0 of an infinity
#else
  constexpr float shift = 12583039;  // 1.5 * 2^23 + 127: the sum with it ends in the bits of the nearest integer + 127
  const f32v t = min(splat(128.0f), max(splat(-127.0f), x));  // a NaN passes both; 2^-127 is taken for 0
  const f32v shifted = t + shift;
  const f32v rest = t - (shifted - shift);
#endif
  f32v p = splat(0x1.5bba14p-10f);  // minimax polynomial of 2^rest on [-1/2, 1/2]
  p = fma(p, rest, splat(0x1.3cea88p-7f));
  p = fma(p, rest, splat(0x1.c6b752p-5f));
  p = fma(p, rest, splat(0x1.ebf9bcp-3f));
  p = fma(p, rest, splat(0x1.62e42ap-1f));
  p = fma(p, rest, splat(1.0f));
#if defined(WEFT_LEVEL_avx512)
  const __m512 whole = _mm512_maskz_roundscale_ps(ALL_LANES, (__m512)x, 0);
  return (f32v)_mm512_maskz_scalef_ps(ALL_LANES, (__m512)p, whole);
#else
  return p * (f32v)((u32v)shifted << 23);
#endif
}

// The first `count` of up to `lanes` values, and zeros.
template <class T>
WEFT_INLINE f32v load_some(const T* from, int64_t count) {
  if (count >= lanes) return load_as_float(from);
  T padded[lanes] = {};
  memcpy(padded, from, size_t(count) * sizeof(T));
  return load_as_float(padded);
}

template <class T>
WEFT_INLINE void store_some(T* to, f32v x, int64_t count) {
  if (count >= lanes) return store_from_float(to, x);
  T padded[lanes];
  store_from_float(padded, x);
  memcpy(to, padded, size_t(count) * sizeof(T));
}

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

// Below this many nanoseconds (of one thread, roughly) waking others costs more than it saves.
constexpr double WORTH_SHARING = 15e3;

// body(first, end) for parts of [0, rows), on the pool when that pays.
template <class F>
WEFT_INLINE void for_rows(Pool& pool, int64_t rows, double nanoseconds_per_row, F body) {
  if (pool.size() == 1 || double(rows) * nanoseconds_per_row < WORTH_SHARING) return body(0, rows);
  const int64_t parts = rows < 8 * pool.size() ? rows : 8 * pool.size();
  pool.run(parts, [&](int64_t i, int) { body(rows * i / parts, rows * (i + 1) / parts); });
}

}  // namespace weft::WEFT_LEVEL
