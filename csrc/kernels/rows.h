// One row of the norm and of the gated activation: by themselves, or with the quantisation that follows.
#pragma once

#include "elementwise.h"
#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {

// Rough nanoseconds of one thread per element, for for_rows().
constexpr double NORM_COST = 0.1, GATE_COST = 0.4;

template <class T>
WEFT_INLINE void norm_row(const NormCall& call, int64_t row) {
  const int64_t size = call.size;
  const T* weight = static_cast<const T*>(call.weight);
  const T* x = static_cast<const T*>(call.x) + row * size;
  T* out = static_cast<T*>(call.out) + row * size;
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
  const float scale = norm_scale(squares, size, call.eps);
  for (int64_t i = 0; i < size; i += lanes)
    store_some(out + i, load_some(x + i, size - i) * scale * load_some(weight + i, size - i), size - i);
}

template <class T>
WEFT_INLINE void silu_mul_row(const GateCall& call, int64_t row) {
  constexpr float LOG2_E = 1.44269504f;
  const int64_t size = call.size;
  const T* gates = static_cast<const T*>(call.gate_up) + row * 2 * size;
  T* out = static_cast<T*>(call.out) + row * size;
  for (int64_t i = 0; i < size; i += lanes) {
    const f32v gate = load_some(gates + i, size - i), up = load_some(gates + size + i, size - i);
    store_some(out + i, gate / (exp2(gate * -LOG2_E) + 1.0f) * up, size - i);
  }
}

}  // namespace weft::WEFT_LEVEL
