// Which tokens may win the exponential race by which models/sampler.py draws, where no filter takes tokens out before.
#pragma once

#include "kernels.h"

namespace weft {

constexpr int64_t RACE_CHUNK = 1024;  // logits

struct RaceCall {
  const float* logits;  // [size]; none is NaN
  int64_t size;
  float peak;           // the largest of them, finite
  float inverse;        // of the temperature, finite
  uint32_t low, high;   // the keys of the draw
  float* bounds;        // room for one number for each chunk
};

}  // namespace weft
