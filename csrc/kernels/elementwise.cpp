// Norms and the gated activation, at one level.
// Each row takes one pass over memory, two where the first gives a sum.
#include "elementwise.h"

#include "kernels/vector_math.h"

namespace weft::WEFT_LEVEL {
namespace {

constexpr float LOG2_E = 1.44269504f;

// Rough nanoseconds of one thread, for for_rows().
constexpr double NORM_COST = 0.1, GATE_COST = 0.4;  // per element

template <class T>
WEFT_INLINE void scale_row(const T* x, const T* weight, float scale, int64_t size, T* out) {
  for (int64_t i = 0; i < size; i += lanes)
    store_some(out + i, load_some(x + i, size - i) * scale * load_some(weight + i, size - i), size - i);
}

template <class T>
void norm_of(Pool& pool, const NormCall& call) {
  const int64_t size = call.size;
  const T* weight = static_cast<const T*>(call.weight);
  for_rows(pool, call.rows, double(size) * NORM_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const T* x = static_cast<const T*>(call.x) + row * size;
      T* residual = static_cast<T*>(call.residual) + row * size;
      T* out = static_cast<T*>(call.out) + row * size;
      float squares;
      if (call.residual == nullptr) {
        squares = sum_of_squares(size, [=](int64_t i, int64_t n) { return load_some(x + i, n); });
      } else {
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
  });
}

template <class T>
void silu_mul_of(Pool& pool, const GateCall& call) {
  const int64_t size = call.size;
  for_rows(pool, call.rows, double(size) * GATE_COST, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; row++) {
      const T* gates = static_cast<const T*>(call.gate_up) + row * 2 * size;
      T* out = static_cast<T*>(call.out) + row * size;
      for (int64_t i = 0; i < size; i += lanes) {
        const f32v gate = load_some(gates + i, size - i), up = load_some(gates + size + i, size - i);
        store_some(out + i, gate / (exp2(gate * -LOG2_E) + 1.0f) * up, size - i);
      }
    }
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
