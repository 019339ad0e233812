// Dot products of small integers: `lanes` columns, 128 channels, into 32 bits. Exact at every level.
#pragma once

#include "simd.h"
#include "w4ax.h"

namespace weft::WEFT_LEVEL {

typedef int8_t i8v __attribute__((vector_size(lanes)));
typedef int16_t i16v __attribute__((vector_size(lanes * 4)));

// What to fetch while a block meets some rows: so many cache lines from here on, a few with each 8 channels, because the
// CPU waits where there are many of them at once.
struct Ahead {
  static constexpr int ALL = PANEL / lanes;  // vectors of a panel
  const char* from;
  int64_t lines;
  // What of it to fetch with so many vectors of columns, from `first` on.
  Ahead part(int first, int vectors) const {
    const int64_t begin = lines * first / ALL, end = lines * (first + vectors) / ALL;
    return {from + begin * 64, end - begin};
  }
  __attribute__((always_inline)) void fetch(int64_t eight) const {
    for (int64_t line = eight; line < lines; line += BLOCK / 8) __builtin_prefetch(from + line * 64, 0, 3);
  }
};

WEFT_INLINE i32v splat(int32_t x) { return i32v{} + x; }
WEFT_INLINE u32v low_nibbles(u32v x) { return x & 0x0f0f0f0fu; }

#if defined(WEFT_LEVEL_avx512)

constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 sums, 4 weights, an input and a mask, of 32 registers
// So many rows or more fetch what is ahead. Fewer are bound by memory; here they pass over a block once, in order, and
// the hardware's prefetcher is the better one.
constexpr int FETCH_ROWS = 3;

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
    ahead.fetch(pair);
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

constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 sums of 16 bits, 2 weights, an input and a mask, of 16 registers
constexpr int FETCH_ROWS = 1;  // here they pass over it several times, which the hardware does not see through

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

// A value that is in a register by now. GCC would change the order of the sums, and have all products in memory first.
WEFT_INLINE void settle([[maybe_unused]] i16v& x) {
#if defined(WEFT_LEVEL_avx2)
  __asm__("" : "+x"(x));
#endif
}

// Adds the products of four channels of each column, and of each row of x, to sums of 16 bits.
template <int BITS, int HEIGHT>
WEFT_INLINE void add_quad(const u32v (&weights)[TILE_VECTORS], const int8_t* x, i16v (&sums)[HEIGHT][TILE_VECTORS]) {
  WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
    const u32v input = splat(load<uint32_t>(x + r * BLOCK));
    WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
      sums[r][v] += add_pairs<BITS>(weights[v], input);
      settle(sums[r][v]);
    }
  }
}

template <int HEIGHT, int BITS>
WEFT_INLINE void multiply_block(const char* weights, const int8_t* x, i32v (&sums)[HEIGHT][TILE_VECTORS],
                                const Ahead& ahead) {
  constexpr int STEP = BITS == 4 ? 32 : 4;  // channels that 16 bits hold: 32 / 2 * 15 * 127 < 2^15
  for (int first = 0; first < BLOCK; first += STEP) {
    i16v narrow[HEIGHT][TILE_VECTORS] = {};
    u32v bytes[TILE_VECTORS], w[TILE_VECTORS];
    WEFT_UNROLL for (int k = first; k < first + STEP; k += 32 / BITS) {
      if (k % 8 == 0) ahead.fetch(k / 8);
      WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++)
        bytes[v] = load<u32v>(weights + k * PANEL * BITS / 8 + v * sizeof(u32v));
      if (BITS == 8) {
        WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) w[v] = bytes[v] ^ 0x80808080u;  // less 128
        add_quad<BITS>(w, x + k, narrow);
      } else {
        WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) w[v] = low_nibbles(bytes[v]);
        add_quad<BITS>(w, x + k, narrow);
        WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) w[v] = low_nibbles(bytes[v] >> 4);
        add_quad<BITS>(w, x + k + 4, narrow);
      }
    }
    WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
      WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] += widen_pairs(narrow[r][v]);
    }
  }
}

#endif

}  // namespace weft::WEFT_LEVEL
