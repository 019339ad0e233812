// x [rows, in] -> quantised rows (w4ax.h): permuted, transformed, and rounded to integers block by block; by itself, or
// in one pass with the norm or the gated activation that gives x.
#include "kernels/quantise_row.h"
#include "kernels/rows.h"

namespace weft::WEFT_LEVEL {

namespace {

// Where the blocks of a row go.
auto places(const QuantisedRows& to, int64_t row) {
  return [&to, row](int64_t b) {
    const int64_t at = b * to.stride + row;
    return Result{to.values + at * BLOCK, to.scales + at, to.totals + at};
  };
}

template <class Element>
void quantise_row(const W4AxWeights& form, const Element* x, const QuantisedRows& to, int64_t row) {
  for (int64_t b = 0; b < form.blocks(); b += PIECE) quantise_piece(form, x, b, places(to, row));
}

template <class Element>
void quantise(Pool& pool, const W4AxWeights& form, const Element* x, const QuantisedRows& to) {
  const int64_t pieces = (form.blocks() + PIECE - 1) / PIECE;
  for_rows(pool, to.rows * pieces, quantise_cost(form) / double(pieces), [&](int64_t first, int64_t end) {
    for (int64_t item = first; item < end; item++) {
      const int64_t row = item / pieces, piece = item % pieces;
      if (form.permutation != nullptr) prefetch(x + (row + 1) * form.in + piece * PIECE * BLOCK, PIECE * BLOCK);
      quantise_piece(form, x + row * form.in, piece * PIECE, places(to, row));
    }
  });
}

// Rows whose channels are picked together: so many share the numbers of the channels, and two are in one word of 32 bits.
constexpr int TOGETHER = 4, PAIRS = TOGETHER / 2;

// Rows [row, row + TOGETHER) of a norm, quantised. pairs: room for [PAIRS][in].
void norm_quantise_together(const NormCall& call, const W4AxWeights& form, const QuantisedRows& to, int64_t row,
                            uint32_t* pairs) {
  const int64_t size = call.size;
  const bf16* weight = static_cast<const bf16*>(call.weight);
  Normed<bf16> rows[TOGETHER];
  for (int r = 0; r < TOGETHER; r++) rows[r] = norm_begin<bf16>(call, row + r);
  for (int64_t i = 0; i < size; i += lanes) {
    const f32v factor = load_bf16(weight + i);
    WEFT_UNROLL for (int p = 0; p < PAIRS; p++) {
      u32v bits[2];
      WEFT_UNROLL for (int half = 0; half < 2; half++) {
        const auto& [x, scale] = rows[2 * p + half];
        bits[half] = rounded_bits(load_bf16(x + i) * scale * factor);
      }
      store(pairs + p * size + i, bits[0] >> 16 | bits[1]);
    }
  }
  alignas(64) uint32_t picked[PAIRS][PIECE * BLOCK];
  for (int64_t first = 0; first < form.blocks(); first += PIECE) {
    const int64_t end = first + PIECE < form.blocks() ? first + PIECE : form.blocks();
    pick<PAIRS>(pairs, size, form.permutation + first * BLOCK, (end - first) * BLOCK, picked[0], PIECE * BLOCK);
    for (int p = 0; p < PAIRS; p++) {
      const uint32_t* from = picked[p] - first * BLOCK;
      quantise_blocks(form, first, end, [=](int64_t i) { return (f32v)(load<u32v>(from + i) << 16); },
                      places(to, row + 2 * p));
      quantise_blocks(form, first, end, [=](int64_t i) { return (f32v)(load<u32v>(from + i) & 0xffff0000); },
                      places(to, row + 2 * p + 1));
    }
  }
}

template <class T>
void norm_quantise_of(Pool& pool, const NormCall& call, const W4AxWeights& form, const QuantisedRows& to) {
  for_rows(pool, to.rows, double(call.size) * NORM_COST + quantise_cost(form), [&](int64_t first, int64_t end) {
    T* room = static_cast<T*>(call.out) + first * call.size;  // the same for all rows: it stays in the L1 cache
    int64_t row = first;
    if constexpr (sizeof(T) == sizeof(bf16))
      for (; form.run < lanes && row + TOGETHER <= end; row += TOGETHER)
        norm_quantise_together(call, form, to, row, reinterpret_cast<uint32_t*>(room));
    for (; row < end; row++) {
      norm_row(call, row, room);
      quantise_row(form, room, to, row);
    }
  });
}

template <class T>
void silu_mul_quantise_of(Pool& pool, const GateCall& call, const W4AxWeights& form, const QuantisedRows& to) {
  const int64_t size = call.size;
  for_rows(pool, to.rows, double(size) * GATE_COST + quantise_cost(form), [&](int64_t first, int64_t end) {
    T* room = static_cast<T*>(call.out) + first * size;
    for (int64_t row = first; row < end; row++) {
      if (form.permutation != nullptr) {
        silu_mul_row(call, row, room);
        quantise_row(form, room, to, row);
        continue;
      }
      const T* gates = static_cast<const T*>(call.gate_up) + row * 2 * size;
      const auto at = [=](int64_t i) {
        return rounded_to(gated(gates + i, gates + size + i, int64_t(lanes)), gates);
      };
      for (int64_t b = 0; b < form.blocks(); b += PIECE)
        quantise_blocks(form, b, b + PIECE < form.blocks() ? b + PIECE : form.blocks(), at, places(to, row));
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

void norm_quantise(Pool& pool, const NormCall& call, const W4AxWeights& form, const QuantisedRows& to) {
  const auto of_type = call.type == Type::bfloat16 ? norm_quantise_of<bf16> : norm_quantise_of<float>;
  of_type(pool, call, form, to);
}

void silu_mul_quantise(Pool& pool, const GateCall& call, const W4AxWeights& form, const QuantisedRows& to) {
  const auto of_type = call.type == Type::bfloat16 ? silu_mul_quantise_of<bf16> : silu_mul_quantise_of<float>;
  of_type(pool, call, form, to);
}

}  // namespace weft::WEFT_LEVEL
