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

// The greatest element of each row and its number, the lowest among equals; of a row with a NaN the first NaN.
struct Best {
  int64_t number;
  float value;
};

struct BestCall {
  const float* x;  // [rows, size]
  int64_t rows, size;
  Best* out;  // [rows]
};

struct GateCall {
  Type type;
  const void* gate_up;  // [rows, 2 * size]
  int64_t rows, size;
  void* out;  // [rows, size]
};

}  // namespace weft
