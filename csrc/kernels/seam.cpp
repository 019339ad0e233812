// The rows of a seam, at one level: sum, residual, norm and quantisation in one pass; quantised rows on their way.
//
// A row's bits are those of norm() and quantise_w4ax(), which the ranks' linear layers would otherwise call.
#include "seam_rows.h"

#include "kernels/quantise_row.h"
#include "kernels/rows.h"

namespace weft::WEFT_LEVEL {

namespace {

// Rough nanoseconds of one thread per element, for for_rows().
constexpr double JOIN_COST = 0.2, WIRE_COST = 0.05;

// A block of integers on its way: 128 bytes, or 64, of which byte j holds channel j (low nibble) and 64 + j, each plus 8.
char* put_block(const int8_t* values, bool four, char* wire) {
  if (!four) {
    memcpy(wire, values, BLOCK);
    return wire + BLOCK;
  }
  for (int j = 0; j < BLOCK / 2; j++) wire[j] = char(uint8_t(values[j] + 8) | uint8_t(values[BLOCK / 2 + j] + 8) << 4);
  return wire + BLOCK / 2;
}

const char* take_block(const char* wire, bool four, int8_t* values) {
  if (!four) {
    memcpy(values, wire, BLOCK);
    return wire + BLOCK;
  }
  for (int j = 0; j < BLOCK / 2; j++) {
    const uint8_t both = uint8_t(wire[j]);
    values[j] = int8_t((both & 15) - 8);
    values[BLOCK / 2 + j] = int8_t((both >> 4) - 8);
  }
  return wire + BLOCK / 2;
}

int32_t total_of(const int8_t* values) {
  int32_t total = 0;
  for (int64_t i = 0; i < BLOCK; i++) total += values[i];
  return total;
}

template <class Element>
void encode_row(const W4AxWeights& form, const Element* x, char* wire) {
  alignas(64) int8_t values[PIECE * BLOCK];
  float scales[PIECE];
  int32_t totals[PIECE];
  char* wire_scales = wire + form.wire_integers();
  for (int64_t first = 0; first < form.blocks(); first += PIECE) {
    quantise_piece(form, x, first, [&](int64_t b) {
      return Result{values + (b - first) * BLOCK, scales + (b - first), totals + (b - first)};
    });
    const int64_t left = form.blocks() - first, count = left < PIECE ? left : PIECE;
    for (int64_t i = 0; i < count; i++) wire = put_block(values + i * BLOCK, form.four(first + i), wire);
    memcpy(wire_scales + first * 4, scales, size_t(count) * 4);
  }
}

void decode_row(const W4AxWeights& form, const char* wire, const QuantisedRows& to, int64_t row) {
  const char* scale = wire + form.wire_integers();
  for (int64_t b = 0; b < form.blocks(); b++, scale += 4) {
    const int64_t at = b * to.stride + row;
    wire = take_block(wire, form.four(b), to.values + at * BLOCK);
    memcpy(to.scales + at, scale, 4);
    to.totals[at] = total_of(to.values + at * BLOCK);
  }
}

template <class T, class Part>
WEFT_INLINE void join_row(const JoinCall& call, int64_t row) {
  const int64_t size = call.size, start = row * size;
  const auto part = [&](int64_t number) { return static_cast<const Part*>(call.parts[number]) + start; };
  T* residual = static_cast<T*>(call.residual) + start;
  T* out = static_cast<T*>(call.out) + start;
  const T* weight = static_cast<const T*>(call.weight);
  const float squares = sum_of_squares(size, [&](int64_t i, int64_t n) {
    f32v total = load_some(part(0) + i, n);
    for (int64_t number = 1; number < call.count; number++) total = total + load_some(part(number) + i, n);
    store_some(residual + i, total + load_some(residual + i, n), n);
    return load_some(residual + i, n);  // as it was rounded
  });
  const float scale = norm_scale(squares, size, call.eps);
  for (int64_t i = 0; i < size; i += lanes)
    store_some(out + i, load_some(residual + i, size - i) * scale * load_some(weight + i, size - i), size - i);
  if (call.wire == nullptr) return;
  if (call.form == nullptr)
    memcpy(call.wire + start * int64_t(sizeof(T)), out, size_t(size) * sizeof(T));
  else
    encode_row(*call.form, out, call.wire + row * call.form->wire_bytes());
}

template <class T, class Part>
void join_of(Pool& pool, const JoinCall& call) {
  const double cost = double(call.size) * JOIN_COST + (call.form == nullptr ? 0 : quantise_cost(*call.form));
  for_rows(pool, call.rows, cost, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) join_row<T, Part>(call, row);
  });
}

template <class Element>
void encode_of(Pool& pool, const W4AxWeights& form, const Element* x, int64_t rows, char* wire) {
  for_rows(pool, rows, quantise_cost(form), [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) encode_row(form, x + row * form.in, wire + row * form.wire_bytes());
  });
}

}  // namespace

void join_rows(Pool& pool, const JoinCall& call) {
  if (call.type == Type::float32) return join_of<float, float>(pool, call);
  call.part_type == Type::float32 ? join_of<bf16, float>(pool, call) : join_of<bf16, bf16>(pool, call);
}

void encode_rows(Pool& pool, const W4AxWeights& form, const void* x, Type type, int64_t rows, char* wire) {
  if (type == Type::float32)
    encode_of(pool, form, static_cast<const float*>(x), rows, wire);
  else
    encode_of(pool, form, static_cast<const bf16*>(x), rows, wire);
}

void decode_rows(Pool& pool, const W4AxWeights& form, const char* wire, int64_t first, int64_t count,
                 const QuantisedRows& to) {
  for_rows(pool, count, double(form.in) * WIRE_COST, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) decode_row(form, wire + row * form.wire_bytes(), to, first + row);
  });
}

}  // namespace weft::WEFT_LEVEL
