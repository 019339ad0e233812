// The multiply-add of packed weights (kernels.h) and inputs, by type: `lanes` columns and one step along `in`.
#pragma once

#include "simd.h"

namespace weft::WEFT_LEVEL {

// One step multiplies one element of each row...
struct Float32 {
  using Element = float;
  static constexpr int DEPTH = 1;
  WEFT_INLINE f32v input(const float* x) { return splat(*x); }
  WEFT_INLINE f32v last_input(const float* x) { return splat(*x); }
  WEFT_INLINE f32v multiply_add(f32v weights, f32v x, f32v sum) { return fma(weights, x, sum); }
};

// ... or two neighbours.
struct BFloat16 {
  using Element = bf16;
  static constexpr int DEPTH = 2;
  WEFT_INLINE u32v input(const bf16* x) { return splat(load<uint32_t>(x)); }
  WEFT_INLINE u32v last_input(const bf16* x) { return splat(uint32_t(*x)); }
  WEFT_INLINE f32v multiply_add(f32v weights, u32v x, f32v sum) {
    const u32v w = (u32v)weights;
#if defined(WEFT_LEVEL_avx512)
    return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
    sum = fma((f32v)(w << 16), (f32v)(x << 16), sum);
    return fma((f32v)(w & 0xffff0000u), (f32v)(x & 0xffff0000u), sum);
#endif
  }
};

}  // namespace weft::WEFT_LEVEL
