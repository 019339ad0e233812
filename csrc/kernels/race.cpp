// A token wins by the largest weight / E, with E = -ln(1 - v) of a random v. To know who may win, no logarithm is needed:
//     v <= E <= v / (1 - v)
// so no token is better than weight / v, and some token is as good as the largest weight (1 - v) / v. Those whose upper bound
// is not below that are a handful of a hundred thousand; whoever draws computes their weights and E's exactly.
//
// Per vector: a table-less 2^x and four multiplications of 32 bits, some 60 instructions for 16 tokens; the logits are read
// twice, the second time only in the chunks that have such a token.
#include "race.h"

#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {
namespace {

// Weights here are off by 2e-5 at most, for an exponent of 87 that is rounded twice.
constexpr float MARGIN = 1e-3f;
constexpr float LOG2_E = 1.44269504f;

// v of the tokens from `first` on: the random numbers of models/sampler.py.
WEFT_INLINE f32v uniform(const RaceCall& call, int64_t first) {
  u32v x{};
  for (int i = 0; i < lanes; i++) x[i] = uint32_t(i);
  x = (x + uint32_t(first)) * 0x9E3779B9u + call.low;
  x = (x ^ x >> 17) * 0xED5AD4BBu;
  x = (x ^ x >> 11) + call.high;
  x = x * 0xAC4C1B51u;
  x = (x ^ x >> 15) * 0x31848BABu;
  x = x ^ x >> 14;
  return min(splat(1 - 0x1p-24f), max(splat(0x1p-33f), __builtin_convertvector(x, f32v) * 0x1p-32f));
}

// No token from `first` on is better than this; 0 behind the last.
WEFT_INLINE f32v upper(const RaceCall& call, int64_t first, f32v v) {
  const int64_t left = call.size - first;
  const f32v weight = exp2((load_some(call.logits + first, left) - splat(call.peak)) * splat(call.inverse * LOG2_E));
  const f32v bound = weight / v;
  return left >= lanes ? bound : lanes_or(bound, 0, int(left), f32v{});
}

}  // namespace

int64_t contenders(const RaceCall& call, int64_t* out, int64_t most) {
  f32v reached{};
  for (int64_t start = 0; start < call.size; start += RACE_CHUNK) {
    const int64_t end = start + RACE_CHUNK < call.size ? start + RACE_CHUNK : call.size;
    f32v best{};
    for (int64_t i = start; i < end; i += lanes) {
      const f32v v = uniform(call, i), bound = upper(call, i, v);
      best = max(bound, best);
      reached = max(bound * (1.0f - v), reached);
    }
    call.bounds[start / RACE_CHUNK] = greatest(best);
  }
  const float least = greatest(reached) * (1 - MARGIN);
  int64_t count = 0;
  for (int64_t start = 0; start < call.size; start += RACE_CHUNK) {
    if (call.bounds[start / RACE_CHUNK] < least) continue;
    const int64_t end = start + RACE_CHUNK < call.size ? start + RACE_CHUNK : call.size;
    for (int64_t i = start; i < end; i += lanes) {
      const f32v bound = upper(call, i, uniform(call, i));
      for (int64_t lane = 0; lane < lanes && i + lane < end; lane++) {
        if (bound[lane] < least) continue;
        if (count < most) out[count] = i + lane;
        count++;
      }
    }
  }
  return count;
}

}  // namespace weft::WEFT_LEVEL
