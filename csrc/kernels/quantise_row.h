// One row in integers: permuted, transformed, and rounded block by block.
//
// Every operation and its order is that of comet/reference.py and comet/hadamard.py, so the bits are the same. Note that
// torch computes 127 / a as (1 / a) * 127, with two roundings.
#pragma once

#include "integer.h"

namespace weft::WEFT_LEVEL {

constexpr int VECTORS = BLOCK / lanes;
constexpr int64_t PIECE = 8;  // blocks of a row that are one item of work
constexpr float TINY = 0x1p-100f;
constexpr float WHOLE = 0x1.8p23f;  // a float this large has no fraction: adding it rounds, halves to even

typedef f32v Block[VECTORS];

// Channels of a row by their numbers, put together one by one: AMD's gather instruction takes 1.7 times as long. They are
// picked for several blocks before the first is read: a load waits until the stores that it overlaps are in the cache.
// rows: [ROWS][size], to: [ROWS][stride].
template <int ROWS, class Element>
WEFT_INLINE void pick(const Element* rows, int64_t size, const uint16_t* numbers, int64_t count, Element* to,
                      int64_t stride) {
  typedef Element Part __attribute__((vector_size(16)));
  constexpr int EACH = 16 / sizeof(Element);
  for (int64_t i = 0; i < count; i += EACH) {
    uint16_t here[EACH];
    memcpy(here, numbers + i, sizeof here);
    WEFT_UNROLL for (int r = 0; r < ROWS; r++) {
      Part part;
      WEFT_UNROLL for (int j = 0; j < EACH; j++) part[j] = rows[r * size + here[j]];
      store(to + r * stride + i, part);
    }
  }
}

// A row that is to be read out of order: no CPU sees that coming.
template <class Element>
WEFT_INLINE void prefetch(const Element* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof *row) __builtin_prefetch(row + i);
}

// Sums and differences of elements that are STRIDE apart. Within a vector by a multiply-add with 1 or -1: such a product is
// exact, so there is one rounding.
template <int STRIDE>
WEFT_INLINE void butterfly(Block& x) {
  if constexpr (STRIDE < lanes) {
    f32v signs;
    WEFT_UNROLL for (int i = 0; i < lanes; i++) signs[i] = i & STRIDE ? -1.0f : 1.0f;
    WEFT_UNROLL for (int v = 0; v < VECTORS; v++) {
      f32v other;
      WEFT_UNROLL for (int i = 0; i < lanes; i++) other[i] = x[v][i ^ STRIDE];
      x[v] = fma(x[v], signs, other);
    }
  } else {
    constexpr int APART = STRIDE / lanes;
    WEFT_UNROLL for (int v = 0; v < VECTORS; v++) {
      if (v & APART) continue;
      const f32v first = x[v], second = x[v + APART];
      x[v] = first + second;
      x[v + APART] = first - second;
    }
  }
}

WEFT_INLINE void hadamard(Block& x) {
  butterfly<1>(x);
  butterfly<2>(x);
  butterfly<4>(x);
  butterfly<8>(x);
  butterfly<16>(x);
  butterfly<32>(x);
  butterfly<64>(x);
}

template <int COUNT>
struct Integers {
  typedef int32_t Vector __attribute__((vector_size(COUNT * 4)));
};

// All lanes of x in one, by halves: narrower vectors cost less.
template <class V, class F>
WEFT_INLINE int32_t fold(V x, F join) {
  constexpr int HALF = sizeof(V) / 8;
  if constexpr (HALF == 1) {
    return join(int32_t(x[0]), int32_t(x[1]));
  } else {
    using Half = typename Integers<HALF>::Vector;
    const Half low = load<Half>(&x), high = load<Half>(reinterpret_cast<const char*>(&x) + sizeof(Half));
    return fold(join(low, high), join);
  }
}
template <class V>
WEFT_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// The largest magnitude. Of a block with an infinity or a NaN, it is that.
WEFT_INLINE float largest(const Block& x) {
  i32v most = {};  // bits of floats without a sign are in the order of the floats
  WEFT_UNROLL for (int v = 0; v < VECTORS; v++) most = larger(most, (i32v)x[v] & 0x7fffffff);
  const int32_t all = fold(most, [](auto a, auto b) { return larger(a, b); });
  float f;
  memcpy(&f, &all, sizeof f);
  return f;
}

WEFT_INLINE float lowest(const Block& x) {
  f32v least = x[0];
  for (int v = 1; v < VECTORS; v++) least = min(least, x[v]);
  return -greatest(-least);
}
WEFT_INLINE float highest(const Block& x) {
  f32v most = x[0];
  for (int v = 1; v < VECTORS; v++) most = max(most, x[v]);
  return greatest(most);
}

// To integers, halves to even.
WEFT_INLINE i32v nearest(f32v x) {
#if defined(WEFT_LEVEL_avx512)
  return (i32v)_mm512_maskz_cvtps_epi32(ALL_LANES, (__m512)x);
#else
  return (i32v)(x + splat(WHOLE)) - (i32v)splat(WHOLE);
#endif
}

// What belongs to one block of one row.
struct Result {
  int8_t* values;
  float* scale;
  int32_t* total;
};

// Values from -128 to 127 as bytes; returns their sum.
WEFT_INLINE int32_t store_bytes(int8_t* to, const i32v (&x)[VECTORS]) {
  i32v total = {};
#if defined(WEFT_LEVEL_avx512)
  // Packing joins two vectors within each 128 bits. So after two of them, these are the fours in order.
  const i32v order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  WEFT_UNROLL for (int v = 0; v < VECTORS; v += 4) {
    const __m512i low = _mm512_maskz_packs_epi32(~__mmask32{}, (__m512i)x[v], (__m512i)x[v + 1]);
    const __m512i high = _mm512_maskz_packs_epi32(~__mmask32{}, (__m512i)x[v + 2], (__m512i)x[v + 3]);
    const __m512i bytes = _mm512_maskz_packs_epi16(~__mmask64{}, low, high);
    store(to + v * lanes, _mm512_maskz_permutexvar_epi32(ALL_LANES, (__m512i)order, bytes));
    total = dot(total, splat(0x01010101u), (u32v)bytes);
  }
#else
  WEFT_UNROLL for (int v = 0; v < VECTORS; v++) {
    store(to + v * lanes, __builtin_convertvector(x[v], i8v));
    total += x[v];
  }
#endif
  return fold(total, [](auto a, auto b) { return a + b; });
}

// CLIP: to -8..7. Otherwise x * inverse is known to be within -127.00001 and 127.00001.
template <bool CLIP>
WEFT_INLINE void round_block(const Block& x, float inverse, const Result& to) {
  i32v values[VECTORS];
  WEFT_UNROLL for (int v = 0; v < VECTORS; v++) {
    values[v] = nearest(x[v] * splat(inverse));
    if (CLIP) {
      values[v] = values[v] < -8 ? splat(-8) : values[v];
      values[v] = values[v] > 7 ? splat(7) : values[v];
    }
  }
  *to.total = store_bytes(to.values, values);
}

WEFT_INLINE void quantise_block(const Block& x, float most, bool four, const Result& to) {
  const bool finite = most < __builtin_inff();
  if (!finite || most < TINY) {
    memset(to.values, 0, BLOCK);
    *to.total = 0;
    *to.scale = finite ? 0.0f : __builtin_nanf("");
  } else if (four) {
    const float low = lowest(x), high = highest(x), extreme = -low >= high ? low : high;
    *to.scale = extreme / -8.0f;
    round_block<true>(x, 1.0f / extreme * -8.0f, to);
  } else {
    *to.scale = most / 127.0f;
    round_block<false>(x, 1.0f / most * 127.0f, to);
  }
}

// At most PIECE blocks of a row, [first, end). at(channel): a vector of it. place(b): where block b goes. Two passes, for
// the largest of a block is long in coming: meanwhile other blocks are transformed.
template <class At, class F>
WEFT_INLINE void quantise_blocks(const W4AxWeights& form, int64_t first, int64_t end, At at, F place) {
  Block blocks[PIECE];
  float most[PIECE];
  for (int64_t b = first; b < end; b++) {
    const int8_t* values = place(b).values;  // written when all blocks are here: bursts of stores would wait
    WEFT_UNROLL for (int line = 0; line < BLOCK; line += 64) __builtin_prefetch(values + line, 1);
    Block block;
    WEFT_UNROLL for (int v = 0; v < VECTORS; v++) block[v] = at(b * BLOCK + v * lanes);
    if (form.hadamard && b >= form.outlier_blocks) hadamard(block);
    most[b - first] = largest(block);
    WEFT_UNROLL for (int v = 0; v < VECTORS; v++) blocks[b - first][v] = block[v];
  }
  for (int64_t b = first; b < end; b++) quantise_block(blocks[b - first], most[b - first], form.four(b), place(b));
}

// At most PIECE blocks from `first` on of a row, x.
template <class Element, class F>
WEFT_INLINE void quantise_piece(const W4AxWeights& form, const Element* x, int64_t first, F place) {
  const int64_t end = first + PIECE < form.blocks() ? first + PIECE : form.blocks();
  if (form.permutation == nullptr)
    return quantise_blocks(form, first, end, [=](int64_t i) { return load_as_float(x + i); }, place);
  if (form.run >= lanes)
    return quantise_blocks(form, first, end, [&](int64_t i) { return load_as_float(x + form.permutation[i]); }, place);
  alignas(64) Element picked[PIECE * BLOCK];
  pick<1>(x, form.in, form.permutation + first * BLOCK, (end - first) * BLOCK, picked, PIECE * BLOCK);
  quantise_blocks(form, first, end, [&](int64_t i) { return load_as_float(picked + i - first * BLOCK); }, place);
}

// Rough nanoseconds of one thread, for for_rows().
WEFT_INLINE double quantise_cost(const W4AxWeights& form) {
  return double(form.blocks()) * (20 + (form.permutation == nullptr ? 0 : 40) + (form.hadamard ? 20 : 0));
}

}  // namespace weft::WEFT_LEVEL
