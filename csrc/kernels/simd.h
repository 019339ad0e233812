// Vectors of floats, so that one source serves every level: `lanes` is 16 (avx512), 8 (avx2) or 4 (portable).
//
// Plain arithmetic (+ - * / < & |) works on the vector types directly (GCC's and Clang's vector extensions). Here is what
// they lack: loads and stores without alignment, splat, fused multiply-add, bfloat16 in and out, and sums.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace weft::WEFT_LEVEL {

#if defined(WEFT_LEVEL_avx512)
constexpr int lanes = 16;
#elif defined(WEFT_LEVEL_avx2)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float f32v __attribute__((vector_size(lanes * 4)));
typedef uint32_t u32v __attribute__((vector_size(lanes * 4)));
typedef int32_t i32v __attribute__((vector_size(lanes * 4)));
typedef uint16_t u16v __attribute__((vector_size(lanes * 2)));

#define WEFT_INLINE static inline __attribute__((always_inline))

// Before a loop of constant length over an array of vectors that must stay in registers.
#if defined(__clang__)
#define WEFT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define WEFT_UNROLL _Pragma("GCC unroll 16")
#endif

template <class V>
WEFT_INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
WEFT_INLINE void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

WEFT_INLINE f32v splat(float x) { return x - f32v{}; }  // 0 + x would be an addition, for 0 + -0 is not -0
WEFT_INLINE u32v splat(uint32_t x) { return u32v{} + x; }

// a * b + c; one rounding where the CPU has it (always the same within one level).
WEFT_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(WEFT_LEVEL_avx512)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(WEFT_LEVEL_avx2)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// a > b ? a : b and a < b ? a : b: where one of them is NaN, the answer is b.
#if defined(WEFT_LEVEL_avx512)
// The forms with a mask (of all lanes: no instruction more), for GCC 12 warns of the others' code in its own header.
constexpr __mmask16 ALL_LANES = 0xffff;
WEFT_INLINE f32v max(f32v a, f32v b) { return (f32v)_mm512_maskz_max_ps(ALL_LANES, (__m512)a, (__m512)b); }
WEFT_INLINE f32v min(f32v a, f32v b) { return (f32v)_mm512_maskz_min_ps(ALL_LANES, (__m512)a, (__m512)b); }
#elif defined(WEFT_LEVEL_avx2)
WEFT_INLINE f32v max(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
WEFT_INLINE f32v min(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
#else
WEFT_INLINE f32v max(f32v a, f32v b) { return a > b ? a : b; }
WEFT_INLINE f32v min(f32v a, f32v b) { return a < b ? a : b; }
#endif

// bfloat16 -> float, exact.
WEFT_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
#if defined(WEFT_LEVEL_avx512)  // GCC 12 makes two halves of a conversion, or single elements
WEFT_INLINE f32v widen(u16v x) { return (f32v)((u32v)_mm512_maskz_cvtepu16_epi32(ALL_LANES, (__m256i)x) << 16); }
#else
WEFT_INLINE f32v widen(u16v x) { return (f32v)(__builtin_convertvector(x, u32v) << 16); }
#endif
WEFT_INLINE f32v load_bf16(const bf16* from) { return widen(load<u16v>(from)); }

// float -> bfloat16, to nearest, ties to even; NaN stays NaN. The scalar form gives the vector form's bits.
WEFT_INLINE bf16 narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return bf16(bits >> 16 | 64);
  return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
WEFT_INLINE u16v narrow_by_bits(f32v x) {
  const u32v bits = (u32v)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 64;
  return __builtin_convertvector((u32v)(x != x ? quiet : rounded), u16v);
}
#if defined(WEFT_LEVEL_avx512)
// The instruction takes subnormal numbers for zeros.
WEFT_INLINE u16v narrow(f32v x) {
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, 0x20) != 0, 0)) return narrow_by_bits(x);
  return (u16v)_mm512_cvtneps_pbh((__m512)x);
}
#else
WEFT_INLINE u16v narrow(f32v x) { return narrow_by_bits(x); }
#endif
WEFT_INLINE void store_bf16(bf16* to, f32v x) { store(to, narrow(x)); }

// The bits of x rounded to bfloat16, as narrow() rounds. A NaN must be bfloat16's or the CPU's own: its lower half is zero.
WEFT_INLINE u32v rounded_bits(f32v x) {
  const u32v bits = (u32v)x;
  return (bits + (0x7fff + (bits >> 16 & 1))) & 0xffff0000;
}

// By T (float or bf16): what a kernel for both types loads and stores.
WEFT_INLINE f32v load_as_float(const float* from) { return load<f32v>(from); }
WEFT_INLINE f32v load_as_float(const bf16* from) { return load_bf16(from); }
WEFT_INLINE void store_from_float(float* to, f32v x) { store(to, x); }
WEFT_INLINE void store_from_float(bf16* to, f32v x) { store_bf16(to, x); }
WEFT_INLINE f32v rounded_to(f32v x, const float*) { return x; }
WEFT_INLINE f32v rounded_to(f32v x, const bf16*) { return (f32v)rounded_bits(x); }
WEFT_INLINE float to_float(float x) { return x; }
WEFT_INLINE float to_float(bf16 x) { return widen(x); }
WEFT_INLINE void from_float(float* to, float x) { *to = x; }
WEFT_INLINE void from_float(bf16* to, float x) { *to = narrow(x); }

// Lane i of the result is lane i + W of x, around the end. One shuffle, once compilers have seen the constants.
template <int W>
WEFT_INLINE f32v turned(f32v x) {
  f32v y;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i++) y[i] = x[(i + W) % lanes];
  return y;
}

// Sum and greatest of all lanes, in a fixed order (a tree over halves).
WEFT_INLINE float sum(f32v x) {
  if constexpr (lanes > 8) x = x + turned<8>(x);
  if constexpr (lanes > 4) x = x + turned<4>(x);
  x = x + turned<2>(x);
  return (x + turned<1>(x))[0];
}
WEFT_INLINE float greatest(f32v x) {
  if constexpr (lanes > 8) x = max(x, turned<8>(x));
  if constexpr (lanes > 4) x = max(x, turned<4>(x));
  x = max(x, turned<2>(x));
  return max(x, turned<1>(x))[0];
}

}  // namespace weft::WEFT_LEVEL
