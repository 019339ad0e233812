// The two matrix products of attention, on tiles of sums that stay in registers. Each sum runs over the same terms in
// the same order whatever the tile.
#pragma once

#include "attention.h"

#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {
namespace {

// One factor of a product is a vector of `lanes` packs of P elements; of the other factor P are broadcast to all lanes.
template <class T>
struct Product;

template <>
struct Product<float> {
  static constexpr int P = 1;
  using Factor = float;
  using Pack = f32v;
  WEFT_INLINE Pack read(const float* from) { return load<f32v>(from); }
  WEFT_INLINE f32v add(f32v sum, Pack pack, const float* factor) { return fma(pack, splat(*factor), sum); }
  WEFT_INLINE f32v put(float* to, f32v x) { return store(to, x), x; }
  WEFT_INLINE void factor(float* to, float x) { *to = x; }
};

#if defined(WEFT_LEVEL_avx512)
template <>
struct Product<bf16> {
  static constexpr int P = 2;
  using Factor = bf16;
  using Pack = u32v;
  WEFT_INLINE Pack read(const bf16* from) { return load<u32v>(from); }
  WEFT_INLINE f32v add(f32v sum, Pack pack, const bf16* factor) {
    uint32_t pair;
    memcpy(&pair, factor, sizeof pair);
    return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pack, (__m512bh)splat(pair));
  }
  // Stores x rounded, and returns what was stored.
  WEFT_INLINE f32v put(bf16* to, f32v x) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    store(to, half);
    return (f32v)((u32v)_mm512_maskz_cvtepu16_epi32(ALL_LANES, half) << 16);
  }
  WEFT_INLINE void factor(bf16* to, bf16 x) { *to = x; }
};
#else
template <>
struct Product<bf16> {
  static constexpr int P = 2;
  using Factor = float;
  struct Pack {
    f32v even, odd;
  };
  WEFT_INLINE Pack read(const bf16* from) {
    const u32v pairs = load<u32v>(from);
    return {(f32v)(pairs << 16), (f32v)(pairs & 0xffff0000u)};
  }
  WEFT_INLINE f32v add(f32v sum, Pack pack, const float* factor) {
    return fma(pack.odd, splat(factor[1]), fma(pack.even, splat(factor[0]), sum));
  }
  WEFT_INLINE f32v put(float* to, f32v x) { return store(to, x), x; }
  WEFT_INLINE void factor(float* to, bf16 x) { *to = widen(x); }
};
#endif

// The sums that a product keeps in registers: rows times vectors.
#if defined(WEFT_LEVEL_avx512)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif

// Totals of one row: the greatest score (times scale * log2 e), the sum of weights, the weighted sum of values [width].
constexpr int64_t TOP = 0, SUM = 1, VALUES = 2;

// The sums stay in registers only where every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 8")

// scores[R][positions] = queries[R][depth] . keys, for N vectors of positions.
// Decode waits for memory: with `values` (or null) it asks in time for the positions' values, [depth * lanes] each.
template <class T, int R, int N>
void score_tile(const typename Product<T>::Factor* queries, int64_t depth, const T* const* keys, int64_t stride,
                const T* const* values, float* scores) {
  using X = Product<T>;
  f32v sums[R][N] = {};
  for (int64_t d = 0; d < depth; d += X::P) {
    typename X::Pack packs[N];
    if (values != nullptr) UNROLL for (int n = 0; n < N; n++) __builtin_prefetch(values[n] + d * lanes);
    UNROLL for (int n = 0; n < N; n++) packs[n] = X::read(keys[n] + d * stride);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int n = 0; n < N; n++) sums[r][n] = X::add(sums[r][n], packs[n], queries + r * depth + d);
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) store(scores + r * PARTITION + n * lanes, sums[r][n]);
}

// totals[R] = totals[R] * keep[R] + (weights[R][positions] . values) * add[R], for N vectors of channels
template <class T, int R, int N>
void value_tile(const typename Product<T>::Factor* weights, int64_t vectors, const T* const* values, int64_t channel,
                int64_t width, const float* keep, const float* add, float* totals) {
  using X = Product<T>;
  f32v sums[R][N] = {};
  for (int64_t v = 0; v < vectors; v++)
    for (int64_t i = 0; i < lanes; i += X::P) {
      typename X::Pack packs[N];
      UNROLL for (int n = 0; n < N; n++) packs[n] = X::read(values[v] + i * width + (channel + n * lanes) * X::P);
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++)
          sums[r][n] = X::add(sums[r][n], packs[n], weights + r * PARTITION + v * lanes + i);
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) {
      float* total = totals + r * (VALUES + width) + VALUES + channel + n * lanes;
      store(total, fma(load<f32v>(total), splat(keep[r]), sums[r][n] * add[r]));
    }
}

template <class T>
using ScoreTile = void (*)(const typename Product<T>::Factor*, int64_t, const T* const*, int64_t, const T* const*,
                           float*);
template <class T>
using ValueTile = void (*)(const typename Product<T>::Factor*, int64_t, const T* const*, int64_t, int64_t, const float*,
                           const float*, float*);

template <class T, int R, int N>
constexpr void find_tile(int rows, int vectors, ScoreTile<T>& score, ValueTile<T>& value) {
  if (rows == R && vectors == N) {
    score = score_tile<T, R, N>;
    value = value_tile<T, R, N>;
  } else if constexpr (N > 1) {
    find_tile<T, R, N - 1>(rows, vectors, score, value);
  } else if constexpr (R > 1) {
    find_tile<T, R - 1, TILE_VECTORS>(rows, vectors, score, value);
  }
}

// Every shape of tile by its numbers of rows and vectors.
template <class T>
struct Tiles {
  ScoreTile<T> score[TILE_ROWS + 1][TILE_VECTORS + 1] = {};
  ValueTile<T> value[TILE_ROWS + 1][TILE_VECTORS + 1] = {};
  constexpr Tiles() {
    for (int r = 1; r <= TILE_ROWS; r++)
      for (int n = 1; n <= TILE_VECTORS; n++)
        find_tile<T, TILE_ROWS, TILE_VECTORS>(r, n, score[r][n], value[r][n]);
  }
};

template <class T>
constexpr Tiles<T> TILES;

// Calls body(first, count) for tiles of rows of as equal a size as can be.
template <class F>
WEFT_INLINE void for_tiles(int64_t rows, F body) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t first = rows * i / tiles;
    body(first, rows * (i + 1) / tiles - first);
  }
}

}  // namespace
}  // namespace weft::WEFT_LEVEL
