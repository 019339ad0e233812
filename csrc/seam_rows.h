// What the kernels of a seam are told: rows of several ranks become one rank's rows of the residual and of the norm, and
// these travel to the others.
#pragma once

#include "kernels.h"

namespace weft {

struct JoinCall {
  Type type;                 // of residual, weight and out
  Type part_type;            // of the parts
  const void* const* parts;  // one for each rank, in order: [rows, size]
  int64_t count;
  void* residual;  // [rows, size]: += the sum of the parts
  const void* weight;
  float eps;
  int64_t rows, size;
  void* out;                // [rows, size]: RMSNorm(residual) * weight
  char* wire;               // the same rows as they travel, or null
  const W4AxWeights* form;  // how they travel: null for copies of out
};

}  // namespace weft
