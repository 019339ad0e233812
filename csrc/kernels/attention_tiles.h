// The two matrix products of attention, on tiles of sums that stay in registers. Each sum runs over the same terms in
// the same order whatever the tile. Keys and values of 8 or 4 bits become factors in registers, as codes: their scales
// and zeros are left to whoever calls.
#pragma once

#include "attention.h"

#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {
namespace {

// One factor of a product is a vector of `lanes` packs of P elements; of the other factor P are broadcast to all lanes.
// First as it is without an instruction for pairs: two vectors of floats.
struct FloatPairs {
  static constexpr int P = 2;
  using Factor = float;
  struct Pack {
    f32v even, odd;
  };
  WEFT_INLINE f32v add(f32v sum, Pack pack, const float* factor) {
    return fma(pack.odd, splat(factor[1]), fma(pack.even, splat(factor[0]), sum));
  }

  // Stores the weights of two vectors of positions, and returns what was stored.
  struct Stored {
    f32v first, second;
  };
  WEFT_INLINE Stored put(float* to, f32v first, f32v second) {
    store(to, first);
    store(to + lanes, second);
    return {first, second};
  }
  WEFT_INLINE f32v add_stored(f32v sum, Stored weights) { return sum + weights.first + weights.second; }
  WEFT_INLINE f32v add_stored(f32v sum, Stored weights, const float* factors) {
    return fma(weights.second, load<f32v>(factors + lanes), fma(weights.first, load<f32v>(factors), sum));
  }
  WEFT_INLINE void put_factors(float* to, f32v x) { store(to, x); }

  // bfloat16, or codes at bit `at` and 16 bits above, of each word
  WEFT_INLINE Pack pairs(u32v word) { return {(f32v)(word << 16), (f32v)(word & 0xffff0000u)}; }
  template <int BITS>
  WEFT_INLINE Pack codes(u32v word, int at) {
    constexpr uint32_t MASK = (1 << BITS) - 1;
    return {__builtin_convertvector((i32v)(word >> at & MASK), f32v),
            __builtin_convertvector((i32v)(word >> (at + 16) & MASK), f32v)};
  }
  template <int BITS>
  static constexpr float OFFSET = 0;  // what the factors made of codes have too much
};

#if defined(WEFT_LEVEL_avx512)
struct BFloat16Pairs {
  static constexpr int P = 2;
  using Factor = bf16;
  using Pack = u32v;
  WEFT_INLINE f32v add(f32v sum, Pack pack, const bf16* factor) {
    uint32_t pair;
    memcpy(&pair, factor, sizeof pair);
    return dot(sum, pack, splat(pair));
  }

  using Stored = u32v;  // rounded
  WEFT_INLINE Stored put(bf16* to, f32v first, f32v second) {
    const Stored pairs = (u32v)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    store(to, pairs);
    return pairs;
  }
  WEFT_INLINE f32v dot(f32v sum, u32v pairs, u32v factors) {
    return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)factors);
  }
  WEFT_INLINE f32v add_stored(f32v sum, Stored weights) { return dot(sum, weights, splat(0x3f803f80u)); }
  WEFT_INLINE f32v add_stored(f32v sum, Stored weights, const bf16* factors) {
    return dot(sum, weights, load<u32v>(factors));
  }
  WEFT_INLINE void put_factors(bf16* to, f32v x) { store_bf16(to, x); }  // zeros, of which no bit is lost

  WEFT_INLINE Pack pairs(u32v word) { return word; }
  template <int BITS>
  WEFT_INLINE Pack codes(u32v word, int at) {
    if (BITS == 4) return (word >> at & 0x000f000fu) | 0x43004300u;  // 128 + code: the last bit of that bfloat16 is 1
    // The upper half of a small whole float is its bfloat16.
    const FloatPairs::Pack floats = FloatPairs::codes<BITS>(word, at);
    return (u32v)floats.even >> 16 | (u32v)floats.odd;
  }
  template <int BITS>
  static constexpr float OFFSET = BITS == 4 ? 128 : 0;
};
#else
using BFloat16Pairs = FloatPairs;
#endif

// Of a row of queries: what it is counted in, and minus its sum, in these steps.
struct QueryNumbers {
  float step, minus;
};

// As it comes.
template <class To>
struct PlainQueries {
  using QueryFactor = To;
  static constexpr bool INTEGERS = false;
  template <class T>
  WEFT_INLINE QueryNumbers take(const T* q, int64_t depth, To* to) {
    f32v total{};
    for (int64_t d = 0; d < depth; d += lanes) {
      const f32v x = load_some(q + d, depth - d);
      store_some(to + d, x, depth - d);
      total = total + x;
    }
    return {1, -sum(total)};
  }
};

#if defined(WEFT_LEVEL_avx512)
// In 8 bits, for keys of codes: a dot product of bytes takes twice as many channels as one of bfloat16, and codes need not
// become numbers first. Queries are spread as keys are (where head_dim is a power of two), so no channel stands out: the
// rounding is 0.7 % of a query, where that of a key is 11 % with 4 bits, and 0.7 % with 8. A query that is not finite gives
// NaN, in its own row.
template <int BITS>
struct IntegerQueries {
  using QueryFactor = int8_t;
  static constexpr bool INTEGERS = true;
  template <class T>
  WEFT_INLINE QueryNumbers take(const T* q, int64_t depth, int8_t* to) {
    constexpr float TINY = 1e-30f;
    f32v most{}, zero_if_finite{};
    for (int64_t d = 0; d < depth; d += lanes) {
      const f32v x = load_some(q + d, depth - d);
      most = max(max(x, -x), most);
      zero_if_finite = fma(x, f32v{}, zero_if_finite);
    }
    const bool finite = sum(zero_if_finite) == 0;
    const float top = greatest(most);
    const f32v steps = splat(finite && top > TINY ? 127 / top : 0.0f);
    i32v total{};
    for (int64_t d = 0; d < depth; d += lanes) {
      const f32v x = finite ? load_some(q + d, depth - d) : f32v{};
      const __m512i codes = _mm512_maskz_cvtps_epi32(ALL_LANES, (__m512)(x * steps));
      total += (i32v)codes;
      store(to + d, _mm_shuffle_epi8(_mm512_maskz_cvtepi32_epi8(ALL_LANES, codes), order()));
    }
    const float step = !finite ? __builtin_nanf("") : top > TINY ? top / 127 : 1;
    return {step, -sum(__builtin_convertvector(total, f32v))};
  }

  // Channels in the order of the bytes of a word of keys.
  WEFT_INLINE __m128i order() {
    if (BITS == 8) return _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    return _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  }
  // Four channels of each position.
  WEFT_INLINE u32v quad(u32v word, int half) { return BITS == 8 ? word : word >> (4 * half) & 0x0f0f0f0fu; }
  WEFT_INLINE i32v add_quad(i32v sum, u32v quads, const int8_t* factors) {
    uint32_t four;
    memcpy(&four, factors, sizeof four);
    return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)quads, (__m512i)splat(four));
  }
};
#endif

// The sums that a product keeps in registers: rows times vectors.
#if defined(WEFT_LEVEL_avx512)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif

// Products with queries and weights of T, and a KV of BITS (0: of T as well). C, S and V are attention.h's.
template <class T, int BITS>
struct Product : BFloat16Pairs, PlainQueries<BFloat16Pairs::Factor> {
  using Query = T;
  static constexpr int C = 2, S = 2, V = 1;
  WEFT_INLINE Pack key(u32v word, int) { return pairs(word); }
  WEFT_INLINE Pack value(u32v word, int, int) { return pairs(word); }
  static constexpr int ROWS = TILE_ROWS;
  static constexpr int vectors(int) { return TILE_VECTORS; }
};

template <>
struct Product<float, 0> : FloatPairs, PlainQueries<float> {
  using Query = float;
  static constexpr int P = 1, C = 1, S = 1, V = 1;
  using Pack = f32v;
  WEFT_INLINE f32v add(f32v sum, Pack pack, const float* factor) { return fma(pack, splat(*factor), sum); }
  WEFT_INLINE Pack key(u32v word, int) { return (f32v)word; }
  WEFT_INLINE Pack value(u32v word, int, int) { return (f32v)word; }
  static constexpr int ROWS = TILE_ROWS;
  static constexpr int vectors(int) { return TILE_VECTORS; }
};

template <class Pairs, int BITS>
struct CodeProduct : Pairs {
  using typename Pairs::Pack;
  static constexpr int C = 32 / BITS, S = 4, V = 8 / BITS;
  WEFT_INLINE Pack key(u32v word, int pair) { return Pairs::template codes<BITS>(word, pair * BITS); }
  WEFT_INLINE Pack value(u32v word, int pair, int half) {
    return Pairs::template codes<BITS>(word, pair * 8 + half * BITS);
  }
  static constexpr float EXCESS = Pairs::template OFFSET<BITS>;  // of values; of keys where queries are no integers
  // Taking codes apart is to be worth its while: more rows, fewer vectors.
  static constexpr int ROWS = lanes == 16 ? 9 : TILE_ROWS;
  static constexpr int vectors(int rows) { return rows > 4 ? 2 : TILE_VECTORS; }
};
#if !defined(WEFT_LEVEL_avx512)
template <int BITS>
using IntegerQueries = PlainQueries<float>;
#endif
template <>
struct Product<bf16, 8> : CodeProduct<BFloat16Pairs, 8>, IntegerQueries<8> {
  using Query = bf16;
};
template <>
struct Product<bf16, 4> : CodeProduct<BFloat16Pairs, 4>, IntegerQueries<4> {
  using Query = bf16;
};
template <>
struct Product<float, 8> : CodeProduct<FloatPairs, 8>, PlainQueries<float> {
  using Query = float;
};
template <>
struct Product<float, 4> : CodeProduct<FloatPairs, 4>, PlainQueries<float> {
  using Query = float;
};

// Totals of one row: the greatest score (times scale * log2 e), the sum of weights, the weighted sum of values [width].
constexpr int64_t TOP = 0, SUM = 1, VALUES = 2;

// The sums stay in registers only where every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 8")

// What makes keys of codes, from the first position on: scores are (sums + zeros * minus) * scales.
struct KeyNumbers {
  const float *scales, *zeros;
  const float* minus;  // of each row: minus the sum of its query
};

// The keys of N vectors of positions, in words. stride: bytes from words to words.
// Decode waits for memory: with `values` (or null) it asks in time for the positions' values, and where keys are codes,
// whose runs are too short for the CPU to see them coming, for those of the vectors TILE_VECTORS further on.
template <class X, int N>
WEFT_INLINE void load_keys(const char* const* keys, int64_t stride, const char* const* values, int64_t word,
                           u32v (&words)[N]) {
  if (values != nullptr)
    UNROLL for (int n = 0; n < N; n++) {
      __builtin_prefetch(values[n] + word * lanes * 4);
      if (X::C > 2) __builtin_prefetch(keys[n + TILE_VECTORS] + word * stride);
    }
  UNROLL for (int n = 0; n < N; n++) words[n] = load<u32v>(keys[n] + word * stride);
}

// sums[R][N vectors of positions] = queries[R][depth] . keys
template <class X, int R, int N>
WEFT_INLINE void multiply_keys(const typename X::QueryFactor* queries, int64_t depth, const char* const* keys,
                               int64_t stride, const char* const* values, f32v (&sums)[R][N]) {
  u32v words[N];
  if constexpr (X::INTEGERS) {
    i32v integers[R][N] = {};
    for (int64_t d = 0; d < depth; d += X::C) {
      load_keys<X>(keys, stride, values, d / X::C, words);
      UNROLL for (int half = 0; half < X::C / 4; half++) {
        u32v quads[N];
        UNROLL for (int n = 0; n < N; n++) quads[n] = X::quad(words[n], half);
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int n = 0; n < N; n++)
            integers[r][n] = X::add_quad(integers[r][n], quads[n], queries + r * depth + d + 4 * half);
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int n = 0; n < N; n++) sums[r][n] = __builtin_convertvector(integers[r][n], f32v);
  } else {
    for (int64_t d = 0; d < depth; d += X::C) {
      load_keys<X>(keys, stride, values, d / X::C, words);
      UNROLL for (int c = 0; c < X::C; c += X::P) {
        typename X::Pack packs[N];
        UNROLL for (int n = 0; n < N; n++) packs[n] = X::key(words[n], c / X::P);
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int n = 0; n < N; n++) sums[r][n] = X::add(sums[r][n], packs[n], queries + r * depth + d + c);
      }
    }
  }
}

// scores[R][positions] = queries[R][depth] . keys, in the queries' steps, for N vectors of positions
template <class X, int R, int N>
void score_tile(const typename X::QueryFactor* queries, int64_t depth, const char* const* keys, int64_t stride,
                const char* const* values, const KeyNumbers& numbers, float* scores) {
  f32v sums[R][N] = {};
  multiply_keys<X, R, N>(queries, depth, keys, stride, values, sums);
  if constexpr (X::C > 2) {
    UNROLL for (int n = 0; n < N; n++) {
      const f32v scales = load<f32v>(numbers.scales + n * lanes), zeros = load<f32v>(numbers.zeros + n * lanes);
      UNROLL for (int r = 0; r < R; r++) sums[r][n] = fma(zeros, splat(numbers.minus[r]), sums[r][n]) * scales;
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) store(scores + r * PARTITION + n * lanes, sums[r][n]);
}

// The first channel of vector n of a row of values, counted as the words have them: see attention.h.
template <class X>
WEFT_INLINE int64_t channel_of(int64_t n) {
  if (X::V == 1) return n * lanes;
  constexpr int64_t EACH = 16 / lanes;  // vectors of words for 32 channels
  const int64_t words = n / 2;
  return words / EACH * 32 + words % EACH * lanes + n % 2 * 16;
}

// How a partition's sums and totals join, for each row.
struct Joint {
  const float *keep, *add;
  const float* zeros;  // what the sums have too much, where values are codes
};

// totals[R] = totals[R] * keep[R] + (weights[R][positions] . values) * add[R], for N vectors of channels from `first` on
template <class X, int R, int N>
void value_tile(const typename X::Factor* weights, int64_t vectors, const char* const* values, int64_t first,
                int64_t width, const Joint& joint, float* totals) {
  constexpr int M = N / X::V;  // vectors of words
  f32v sums[R][N] = {};
  for (int64_t v = 0; v < vectors; v++)
    for (int64_t i = 0; i < lanes; i += X::S) {
      u32v words[M];
      const char* from = values[v] + (i / X::S * width + first * lanes) / X::V * 4;
      UNROLL for (int m = 0; m < M; m++) words[m] = load<u32v>(from + m * lanes * 4);
      UNROLL for (int s = 0; s < X::S; s += X::P) {
        typename X::Pack packs[N];
        UNROLL for (int n = 0; n < N; n++) packs[n] = X::value(words[n / X::V], s / X::P, n % X::V);
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int n = 0; n < N; n++)
            sums[r][n] = X::add(sums[r][n], packs[n], weights + r * PARTITION + v * lanes + i + s);
      }
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int n = 0; n < N; n++) {
      float* total = totals + r * (VALUES + width) + VALUES + channel_of<X>(first + n);
      if (X::C > 2) sums[r][n] = sums[r][n] - splat(joint.zeros[r]);
      store(total, fma(load<f32v>(total), splat(joint.keep[r]), sums[r][n] * joint.add[r]));
    }
}

template <class X>
using ScoreTile = void (*)(const typename X::QueryFactor*, int64_t, const char* const*, int64_t, const char* const*,
                           const KeyNumbers&, float*);
template <class X>
using ValueTile = void (*)(const typename X::Factor*, int64_t, const char* const*, int64_t, int64_t, const Joint&,
                           float*);

// Every shape of tile by its numbers of rows and vectors.
template <class X>
struct Tiles {
  ScoreTile<X> score[X::ROWS + 1][TILE_VECTORS + 1] = {};
  ValueTile<X> value[X::ROWS + 1][TILE_VECTORS + 1] = {};
  constexpr Tiles() { fill<X::ROWS, X::vectors(X::ROWS)>(); }

  template <int R, int N>
  constexpr void fill() {
    score[R][N] = score_tile<X, R, N>;
    if constexpr (N % X::V == 0) value[R][N] = value_tile<X, R, N>;
    if constexpr (N > 1)
      fill<R, N - 1>();
    else if constexpr (R > 1)
      fill<R - 1, X::vectors(R - 1)>();
  }
};

template <class X>
constexpr Tiles<X> TILES;

// Calls body(first, count) for tiles of rows of as equal a size as can be.
template <class X, class F>
WEFT_INLINE void for_tiles(int64_t rows, F body) {
  const int64_t tiles = (rows + X::ROWS - 1) / X::ROWS;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t first = rows * i / tiles;
    body(first, rows * (i + 1) / tiles - first);
  }
}

}  // namespace
}  // namespace weft::WEFT_LEVEL
