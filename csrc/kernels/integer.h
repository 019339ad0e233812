// Dot products of small integers: `lanes` columns, 128 channels, into 32 bits. Exact at every level.
#pragma once

#include "simd.h"
#include "w4ax.h"

namespace weft::WEFT_LEVEL {

typedef int8_t i8v __attribute__((vector_size(lanes)));
typedef int16_t i16v __attribute__((vector_size(lanes * 4)));

// What to fetch during a tile: so many cache lines for each 8 channels, from here on.
struct Ahead {
  const char* from;
  int64_t lines;
};

WEFT_INLINE i32v splat(int32_t x) { return i32v{} + x; }
WEFT_INLINE u32v low_nibbles(u32v x) { return x & 0x0f0f0f0fu; }

#if defined(WEFT_LEVEL_avx512)

constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 sums, 4 weights, an input and a mask, of 32 registers

// What the weights have too much, for they are the unsigned operand. The sums begin with -excess * (sum of the row).
template <int BITS>
constexpr int32_t excess = BITS == 4 ? 8 : 128;

// Four channels of each column.
WEFT_INLINE i32v dot(i32v sum, u32v weights, u32v x) {
  return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
}

// weights: a block from the first of TILE_VECTORS columns on. x: [HEIGHT][BLOCK]. Adds to the sums.
template <int HEIGHT, int BITS>
WEFT_INLINE void multiply_block(const char* weights, const int8_t* x, i32v (&sums)[HEIGHT][TILE_VECTORS],
                                const Ahead& ahead) {
  for (int pair = 0; pair < BLOCK / 8; pair++) {
    for (int64_t line = pair; line < ahead.lines; line += BLOCK / 8) __builtin_prefetch(ahead.from + line * 64, 0, 3);
    WEFT_UNROLL for (int half = 0; half < 2; half++) {
      u32v w[TILE_VECTORS];
      WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
        const char* from = weights + v * sizeof(u32v);
        if (BITS == 8)
          w[v] = load<u32v>(from + (2 * pair + half) * PANEL * 4);
        else
          w[v] = low_nibbles(load<u32v>(from + pair * PANEL * 4) >> (4 * half));
      }
      WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
        const u32v input = splat(load<uint32_t>(x + r * BLOCK + pair * 8 + half * 4));
        WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] = dot(sums[r][v], w[v], input);
      }
    }
  }
}

#else

constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;  // 8 sums of 16 bits, 2 weights, an input and masks, of 16 registers

template <int BITS>
constexpr int32_t excess = BITS == 4 ? 8 : 0;

// Products of neighbouring bytes, added in 16 bits: at most 2 * 128 * 127, or 2 * 15 * 127 with nibbles. maddubs takes an
// unsigned and a signed operand, and would saturate at 2 * 255 * 127; so 8-bit weights are signed, and lend x their sign.
template <int BITS>
WEFT_INLINE i16v add_pairs(u32v weights, u32v x) {
#if defined(WEFT_LEVEL_avx2)
  if (BITS == 4) return (i16v)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x);
  const __m256i w = (__m256i)weights;
  return (i16v)_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8((__m256i)x, w));
#else
  const i16v w = (i16v)weights, input = (i16v)x;
  return (w << 8 >> 8) * (input << 8 >> 8) + (w >> 8) * (input >> 8);
#endif
}

// Neighbouring 16 bits, added.
WEFT_INLINE i32v widen_pairs(i16v x) {
#if defined(WEFT_LEVEL_avx2)
  return (i32v)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#else
  return ((i32v)x << 16 >> 16) + ((i32v)x >> 16);
#endif
}

template <int BITS>
constexpr int QUADS = BITS == 4 ? 8 : 1;  // that 16 bits hold: 8 * 2 * 15 * 127 < 2^15

template <int HEIGHT, int BITS>
WEFT_INLINE void multiply_block(const char* weights, const int8_t* x, i32v (&sums)[HEIGHT][TILE_VECTORS],
                                const Ahead& ahead) {
  for (int64_t line = 0; line < ahead.lines; line++) __builtin_prefetch(ahead.from + line * 64, 0, 3);
  for (int first = 0; first < BLOCK / 4; first += QUADS<BITS>) {
    i16v narrow[HEIGHT][TILE_VECTORS] = {};
    for (int quad = first; quad < first + QUADS<BITS>; quad++) {
      u32v w[TILE_VECTORS];
      WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
        const char* from = weights + v * sizeof(u32v);
        if (BITS == 8)
          w[v] = load<u32v>(from + quad * PANEL * 4) ^ 0x80808080u;  // less 128
        else
          w[v] = low_nibbles(load<u32v>(from + quad / 2 * PANEL * 4) >> (quad % 2 * 4));
      }
      WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
        const u32v input = splat(load<uint32_t>(x + r * BLOCK + quad * 4));
        WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) narrow[r][v] += add_pairs<BITS>(w[v], input);
      }
    }
    WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
      WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] += widen_pairs(narrow[r][v]);
    }
  }
}

#endif

}  // namespace weft::WEFT_LEVEL
