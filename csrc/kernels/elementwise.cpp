// Norms and the gated activation, at one level.
// Each row takes one pass over memory, two where the first gives a sum.
#include "elementwise.h"

#include "kernels/rows.h"

namespace weft::WEFT_LEVEL {
namespace {

template <class T>
void norm_of(Pool& pool, const NormCall& call) {
  for_rows(pool, call.rows, double(call.size) * NORM_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) norm_row(call, row, static_cast<T*>(call.out) + row * call.size);
  });
}

template <class T>
void silu_mul_of(Pool& pool, const GateCall& call) {
  for_rows(pool, call.rows, double(call.size) * GATE_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) silu_mul_row(call, row, static_cast<T*>(call.out) + row * call.size);
  });
}

// Two passes: what the greatest is, and where it is.
Best best_of(const float* x, int64_t size) {
  const f32v least = splat(-__builtin_inff());
  f32v most = least;
  i32v strange{};
  for (int64_t i = 0; i < size; i += lanes) {
    const f32v part = size - i >= lanes ? load<f32v>(x + i) : lanes_or(load_some(x + i, size - i), 0, int(size - i), least);
    most = max(part, most);  // a NaN leaves it
    strange |= part != part;
  }
  bool any = false;
  for (int i = 0; i < lanes; i++) any |= strange[i] != 0;
  const float wanted = greatest(most);
  for (int64_t i = 0; i < size; i++)
    if (any ? x[i] != x[i] : x[i] == wanted) return {i, x[i]};
  return {0, x[0]};
}

}  // namespace

void best_of_rows(Pool& pool, const BestCall& call) {
  for_rows(pool, call.rows, double(call.size) * 0.1, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) call.out[row] = best_of(call.x + row * call.size, call.size);
  });
}

void norm(Pool& pool, const NormCall& call) {
  call.type == Type::bfloat16 ? norm_of<bf16>(pool, call) : norm_of<float>(pool, call);
}

void silu_mul(Pool& pool, const GateCall& call) {
  call.type == Type::bfloat16 ? silu_mul_of<bf16>(pool, call) : silu_mul_of<float>(pool, call);
}

}  // namespace weft::WEFT_LEVEL
