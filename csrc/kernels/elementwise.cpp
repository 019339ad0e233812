// Norms and the gated activation, at one level.
// Each row takes one pass over memory, two where the first gives a sum.
#include "elementwise.h"

#include "kernels/rows.h"

namespace weft::WEFT_LEVEL {
namespace {

template <class T>
void norm_of(Pool& pool, const NormCall& call) {
  for_rows(pool, call.rows, double(call.size) * NORM_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) norm_row<T>(call, row);
  });
}

template <class T>
void silu_mul_of(Pool& pool, const GateCall& call) {
  for_rows(pool, call.rows, double(call.size) * GATE_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) silu_mul_row<T>(call, row);
  });
}

}  // namespace

void norm(Pool& pool, const NormCall& call) {
  call.type == Type::bfloat16 ? norm_of<bf16>(pool, call) : norm_of<float>(pool, call);
}

void silu_mul(Pool& pool, const GateCall& call) {
  call.type == Type::bfloat16 ? silu_mul_of<bf16>(pool, call) : silu_mul_of<float>(pool, call);
}

}  // namespace weft::WEFT_LEVEL
