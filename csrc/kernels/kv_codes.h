// From floats to the codes of an 8- or 4-bit KV, and back to where they came from; kernels/kv.py has every operation in
// this order, so the bits are the same.
#pragma once

#include "attention.h"

#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {
namespace {

typedef uint8_t u8v __attribute__((vector_size(lanes)));

WEFT_INLINE i32v load_bytes(const uint8_t* from) {
#if defined(WEFT_LEVEL_avx512)
  return (i32v)_mm512_maskz_cvtepu8_epi32(ALL_LANES, load<__m128i>(from));
#elif defined(WEFT_LEVEL_avx2)
  return (i32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(load<u8v>(from), i32v);
#endif
}

// One sum of two elements that are STRIDE lanes apart, and their difference.
template <int STRIDE>
WEFT_INLINE f32v butterfly(f32v x) {
  u32v minus;
  f32v other;
  WEFT_UNROLL for (int i = 0; i < lanes; i++) minus[i] = i & STRIDE ? 1u << 31 : 0;
  WEFT_UNROLL for (int i = 0; i < lanes; i++) other[i] = x[i ^ STRIDE];
  return other + (f32v)((u32v)x ^ minus);
}

// The Hadamard transform of VECTORS vectors in registers; of 8 channels where they do not fill one.
template <int VECTORS>
WEFT_INLINE void hadamard(f32v (&x)[VECTORS], bool eight) {
  WEFT_UNROLL for (int v = 0; v < VECTORS; v++) {
    x[v] = butterfly<2>(butterfly<1>(x[v]));
    if constexpr (lanes > 4) x[v] = butterfly<4>(x[v]);
    if constexpr (lanes > 8)
      if (!eight) x[v] = butterfly<8>(x[v]);
  }
  WEFT_UNROLL for (int stride = 1; stride < VECTORS; stride *= 2)
    WEFT_UNROLL for (int v = 0; v < VECTORS; v++) {
      if (v & stride) continue;
      const f32v first = x[v], second = x[v + stride];
      x[v] = first + second;
      x[v + stride] = first - second;
    }
}

// -1 for the channels that the pattern of kernels/kv.py has it for.
struct Signs {
  uint32_t flips[MAX_HEAD_DIM];
  constexpr Signs() : flips() {
    for (int i = 0; i < MAX_HEAD_DIM; i++) flips[i] = __builtin_parity(i & i >> 1 & 0x55) ? 1u << 31 : 0;
  }
};
constexpr Signs SIGNS;

template <int VECTORS>
WEFT_INLINE void transform(float* x, int64_t size, bool forth) {
  f32v v[VECTORS];
  const f32v factor = splat(1.0f / float(size));
  WEFT_UNROLL for (int i = 0; i < VECTORS; i++) {
    v[i] = load<f32v>(x + i * lanes);
    if (forth) v[i] = (f32v)((u32v)v[i] ^ load<u32v>(SIGNS.flips + i * lanes));
  }
  hadamard(v, size == 8);
  WEFT_UNROLL for (int i = 0; i < VECTORS; i++) {
    if (!forth) v[i] = (f32v)((u32v)v[i] ^ load<u32v>(SIGNS.flips + i * lanes)) * factor;
    store(x + i * lanes, v[i]);
  }
}

template <int VECTORS>
WEFT_INLINE void transform_any(float* x, int64_t size, bool forth) {
  if constexpr (VECTORS > 1)
    if (size < VECTORS * lanes) return transform_any<VECTORS / 2>(x, size, forth);
  transform<VECTORS>(x, size, forth);
}

// x [size], and room for a whole vector; size: a power of two, 8 at least.
WEFT_INLINE void spread(float* x, int64_t size) { transform_any<MAX_HEAD_DIM / lanes>(x, size, true); }
WEFT_INLINE void gather(float* x, int64_t size) { transform_any<MAX_HEAD_DIM / lanes>(x, size, false); }

// A head's codes.
struct Codes {
  alignas(64) uint8_t codes[MAX_HEAD_DIM];
  bf16 scale;
  uint8_t zero;
};

template <int BITS>
constexpr float ZERO_STEPS = BITS == 4 ? 16 : 1;  // of a zero, to one of a code

template <int BITS>
WEFT_INLINE void quantise(const float* x, int64_t size, Codes& to) {
  constexpr float TOP = (1 << BITS) - 1, TINY = 0x1p-100f;
  constexpr float WHOLE = 0x1.8p23f;  // a float this large has no fraction: adding it rounds, halves to even
  f32v least{}, most{}, zero_if_finite{};
  for (int64_t i = 0; i < size; i += lanes) {
    const f32v v = load_some(x + i, size - i);
    least = min(v, least);
    most = max(v, most);
    zero_if_finite = fma(v, f32v{}, zero_if_finite);
  }
  const float low = -greatest(-least), high = greatest(most);
  const bool finite = sum(zero_if_finite) == 0;
  to.scale = narrow(high / TOP - low / TOP);
  const float step = widen(to.scale);
  if (!finite || step < TINY) {
    memset(to.codes, 0, sizeof to.codes);
    to.zero = 0;
    to.scale = finite ? 0 : 0x7fc0;  // NaN
    return;
  }
  const float place = -low / step * ZERO_STEPS<BITS> + WHOLE - WHOLE;
  to.zero = uint8_t(place < 255 ? place : 255);
  const f32v zero = splat(float(to.zero) / ZERO_STEPS<BITS>), divisor = splat(step);
  for (int64_t i = 0; i < size; i += lanes) {
    const f32v code = load_some(x + i, size - i) / divisor + zero;
    const f32v whole = max(f32v{}, min(splat(TOP), code + WHOLE - WHOLE));
    store(to.codes + i, __builtin_convertvector(__builtin_convertvector(whole, i32v), u8v));
  }
}

}  // namespace
}  // namespace weft::WEFT_LEVEL
