// x [rows, in] -> quantised rows (w4ax.h): permuted, transformed, and rounded to integers block by block; by itself, or
// in one pass with the norm or the gated activation that gives x.
#include "kernels/quantise_row.h"
#include "kernels/rows.h"

namespace weft::WEFT_LEVEL {

namespace {

// At most PIECE blocks from `first` on of a row of x.
template <class Element>
void quantise_piece_to(const W4AxWeights& form, const Element* x, const QuantisedRows& to, int64_t row, int64_t first) {
  quantise_piece(form, x + row * form.in, first, [&](int64_t b) {
    const int64_t at = b * to.stride + row;
    return Result{to.values + at * BLOCK, to.scales + at, to.totals + at};
  });
}

template <class Element>
void quantise(Pool& pool, const W4AxWeights& form, const Element* x, const QuantisedRows& to) {
  const int64_t pieces = (form.blocks() + PIECE - 1) / PIECE;
  for_rows(pool, to.rows * pieces, quantise_cost(form) / double(pieces), [&](int64_t first, int64_t end) {
    for (int64_t item = first; item < end; item++) {
      const int64_t row = item / pieces, piece = item % pieces;
      if (form.permutation != nullptr) prefetch(x + (row + 1) * form.in + piece * PIECE * BLOCK, PIECE * BLOCK);
      quantise_piece_to(form, x, to, row, piece * PIECE);
    }
  });
}

// make(row) writes a row of x, which is then quantised while it is in the L1 cache.
template <class Element, class F>
void make_and_quantise(Pool& pool, const W4AxWeights& form, const Element* x, const QuantisedRows& to, double cost,
                       F make) {
  for_rows(pool, to.rows, cost + quantise_cost(form), [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      make(row);
      for (int64_t b = 0; b < form.blocks(); b += PIECE) quantise_piece_to(form, x, to, row, b);
    }
  });
}

template <class T>
void norm_quantise_of(Pool& pool, const NormCall& call, const W4AxWeights& form, const QuantisedRows& to) {
  make_and_quantise(pool, form, static_cast<const T*>(call.out), to, double(call.size) * NORM_COST,
                    [&](int64_t row) { norm_row<T>(call, row); });
}

template <class T>
void silu_mul_quantise_of(Pool& pool, const GateCall& call, const W4AxWeights& form, const QuantisedRows& to) {
  make_and_quantise(pool, form, static_cast<const T*>(call.out), to, double(call.size) * GATE_COST,
                    [&](int64_t row) { silu_mul_row<T>(call, row); });
}

}  // namespace

void quantise_w4ax(Pool& pool, const W4AxWeights& form, const void* x, Type type, const QuantisedRows& to) {
  if (type == Type::float32)
    quantise(pool, form, static_cast<const float*>(x), to);
  else
    quantise(pool, form, static_cast<const bf16*>(x), to);
}

void norm_quantise(Pool& pool, const NormCall& call, const W4AxWeights& form, const QuantisedRows& to) {
  const auto of_type = call.type == Type::bfloat16 ? norm_quantise_of<bf16> : norm_quantise_of<float>;
  of_type(pool, call, form, to);
}

void silu_mul_quantise(Pool& pool, const GateCall& call, const W4AxWeights& form, const QuantisedRows& to) {
  const auto of_type = call.type == Type::bfloat16 ? silu_mul_quantise_of<bf16> : silu_mul_quantise_of<float>;
  of_type(pool, call, form, to);
}

}  // namespace weft::WEFT_LEVEL
