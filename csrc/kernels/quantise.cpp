// x [rows, in] -> quantised rows (w4ax.h): permuted, transformed, and rounded to integers block by block.
//
// Every operation and its order is that of comet/reference.py and comet/hadamard.py, so the bits are the same. Note that
// torch computes 127 / a as (1 / a) * 127, with two roundings.
#include "integer.h"

namespace weft::WEFT_LEVEL {

namespace {

constexpr int VECTORS = BLOCK / lanes;
constexpr int64_t PIECE = 16;  // blocks of a row that are one item of work: about a microsecond
constexpr float TINY = 0x1p-100f;
constexpr float WHOLE = 0x1.8p23f;  // a float this large has no fraction: adding it rounds, halves to even

typedef f32v Block[VECTORS];

template <class Element>
WEFT_INLINE void gather(const Element* row, const int32_t* permutation, int64_t block, Block& x) {
  if (permutation == nullptr) {
    for (int v = 0; v < VECTORS; v++) x[v] = load_as_float(row + block * BLOCK + v * lanes);
    return;
  }
  float part[BLOCK];
  for (int i = 0; i < BLOCK; i++) part[i] = to_float(row[permutation[block * BLOCK + i]]);
  for (int v = 0; v < VECTORS; v++) x[v] = load<f32v>(part + v * lanes);
}

// Sums and differences of elements that are STRIDE apart.
template <int STRIDE>
WEFT_INLINE void butterfly(Block& x) {
  if constexpr (STRIDE < lanes) {
    u32v minus;
    WEFT_UNROLL for (int i = 0; i < lanes; i++) minus[i] = i & STRIDE ? 1u << 31 : 0;
    for (int v = 0; v < VECTORS; v++) {
      f32v other;
      WEFT_UNROLL for (int i = 0; i < lanes; i++) other[i] = x[v][i ^ STRIDE];
      x[v] = other + (f32v)((u32v)x[v] ^ minus);
    }
  } else {
    constexpr int APART = STRIDE / lanes;
    for (int v = 0; v < VECTORS; v++) {
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

// The largest magnitude, as the bits of a float. Those of an infinity or a NaN are INFINITE at least.
constexpr uint32_t INFINITE = 0x7f800000;
WEFT_INLINE float largest(const Block& x) {
  u32v most = {};
  for (int v = 0; v < VECTORS; v++) {
    const u32v bits = (u32v)x[v] & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  uint32_t all = 0;
  for (int i = 0; i < lanes; i++) all = most[i] > all ? most[i] : all;
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

// What belongs to one block of one row.
struct Result {
  int8_t* values;
  float* scale;
  int32_t* total;
};

WEFT_INLINE void round_block(const Block& x, float inverse, int low, int high, const Result& to) {
  i32v total = {};
  for (int v = 0; v < VECTORS; v++) {
    const i32v rounded = (i32v)(x[v] * splat(inverse) + splat(WHOLE)) - (i32v)splat(WHOLE);
    const i32v above = rounded < low ? splat(low) : rounded, value = above > high ? splat(high) : above;
    store(to.values + v * lanes, __builtin_convertvector(value, i8v));
    total += value;
  }
  int32_t all = 0;
  for (int i = 0; i < lanes; i++) all += total[i];
  *to.total = all;
}

WEFT_INLINE void quantise_block(const Block& x, bool four, const Result& to) {
  const float most = largest(x);
  uint32_t bits;
  memcpy(&bits, &most, sizeof bits);
  const bool finite = bits < INFINITE;
  if (!finite || most < TINY) {
    memset(to.values, 0, BLOCK);
    *to.total = 0;
    *to.scale = finite ? 0.0f : __builtin_nanf("");
  } else if (four) {
    const float low = lowest(x), high = highest(x), extreme = -low >= high ? low : high;
    *to.scale = extreme / -8.0f;
    round_block(x, 1.0f / extreme * -8.0f, -8, 7, to);
  } else {
    *to.scale = most / 127.0f;
    round_block(x, 1.0f / most * 127.0f, -127, 127, to);
  }
}

template <class Element>
void quantise(Pool& pool, const W4AxWeights& form, const Element* x, const QuantisedRows& to) {
  const int64_t blocks = form.blocks(), pieces = (blocks + PIECE - 1) / PIECE;
  pool.run(to.rows * pieces, [&](int64_t item, int) {
    const int64_t row = item / pieces, first = item % pieces * PIECE;
    const int64_t end = first + PIECE < blocks ? first + PIECE : blocks;
    for (int64_t b = first; b < end; b++) {
      Block block;
      gather(x + row * form.in, form.permutation, b, block);
      const bool outlier = b < form.outlier_blocks;
      if (form.hadamard && !outlier) hadamard(block);
      const int64_t at = b * to.rows + row;
      quantise_block(block, form.exact_a4 && !outlier, {to.values + at * BLOCK, to.scales + at, to.totals + at});
    }
  });
}

}  // namespace

void quantise_w4ax(Pool& pool, const W4AxWeights& form, const void* x, Type type, const QuantisedRows& to) {
  if (type == Type::float32)
    quantise(pool, form, static_cast<const float*>(x), to);
  else
    quantise(pool, form, static_cast<const bf16*>(x), to);
}

}  // namespace weft::WEFT_LEVEL
