// One row of the norm and of the gated activation: by themselves, or with the quantisation that follows.
#pragma once

#include "elementwise.h"
#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {

// Rough nanoseconds of one thread per element, for for_rows().
constexpr double NORM_COST = 0.1, GATE_COST = 0.4;

// Adds the residual of a row where there is one; what is to be normalised, and what it is to be multiplied with.
template <class T>
struct Normed {
  const T* x;
  float scale;
};

template <class T>
WEFT_INLINE Normed<T> norm_begin(const NormCall& call, int64_t row) {
  const int64_t size = call.size;
  const T* x = static_cast<const T*>(call.x) + row * size;
  float squares;
  if (call.residual == nullptr) {
    squares = sum_of_squares(size, [=](int64_t i, int64_t n) { return load_some(x + i, n); });
  } else {
    T* residual = static_cast<T*>(call.residual) + row * size;
    squares = sum_of_squares(size, [=](int64_t i, int64_t n) {
      store_some(residual + i, load_some(x + i, n) + load_some(residual + i, n), n);
      return load_some(residual + i, n);  // as it was rounded
    });
    x = residual;
  }
  return {x, norm_scale(squares, size, call.eps)};
}

template <class T>
WEFT_INLINE void norm_row(const NormCall& call, int64_t row, T* out) {
  const int64_t size = call.size;
  const T* weight = static_cast<const T*>(call.weight);
  const auto [x, scale] = norm_begin<T>(call, row);
  for (int64_t i = 0; i < size; i += lanes)
    store_some(out + i, load_some(x + i, size - i) * scale * load_some(weight + i, size - i), size - i);
}

// silu(gate) * up of up to `lanes` values.
template <class T>
WEFT_INLINE f32v gated(const T* gate, const T* up, int64_t count) {
  constexpr float LOG2_E = 1.44269504f;
  const f32v x = load_some(gate, count);
  return x / (exp2(x * -LOG2_E) + 1.0f) * load_some(up, count);
}

template <class T>
WEFT_INLINE void silu_mul_row(const GateCall& call, int64_t row, T* out) {
  const int64_t size = call.size;
  const T* gates = static_cast<const T*>(call.gate_up) + row * 2 * size;
  for (int64_t i = 0; i < size; i += lanes)
    store_some(out + i, gated(gates + i, gates + size + i, size - i), size - i);
}

}  // namespace weft::WEFT_LEVEL
