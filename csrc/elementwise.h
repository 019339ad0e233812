// What the norm and the gated activation are told.
#pragma once

#include "kernels.h"

namespace weft {

struct NormCall {
  Type type;
  const void* x;       // [rows, size]
  void* residual;      // [rows, size]: x is added to it first, and the sum is normalised; or null
  const void* weight;  // [size]
  float eps;
  int64_t rows, size;
  void* out;  // [rows, size]
};

struct GateCall {
  Type type;
  const void* gate_up;  // [rows, 2 * size]
  int64_t rows, size;
  void* out;  // [rows, size]
};

}  // namespace weft
