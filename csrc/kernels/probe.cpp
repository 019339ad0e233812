// What the machine reaches now: the limits that the other kernels are measured against.
#include "integer.h"
#include "multiply.h"

namespace weft::WEFT_LEVEL {

namespace {

// Sums in registers, all independent: enough to hide the latency of an addition.
constexpr int SUMS = lanes == 16 ? 16 : 10;
volatile float sink;  // so that the work has a use

f32v total(const f32v (&sums)[SUMS]) {
  f32v all = {};
  for (int i = 0; i < SUMS; i++) all += sums[i];
  return all;
}

template <class T>
void multiply(int64_t steps) {
  f32v sums[SUMS] = {}, weights = {};
  typename T::Element element[T::DEPTH] = {};
  __asm__ volatile("" : "+m"(weights), "+m"(element));  // the compiler must not know that they are zero
  const auto x = T::input(element);
  for (int64_t step = 0; step < steps; step++) {
    WEFT_UNROLL for (int i = 0; i < SUMS; i++) sums[i] = T::multiply_add(weights, x, sums[i]);
  }
  sink = sum(total(sums));
}

void multiply_integers(int64_t steps) {
  i32v all = {};
  u32v weights = {};
#if defined(WEFT_LEVEL_avx512)
  i32v sums[SUMS] = {};
  u32v x = {};
  __asm__ volatile("" : "+m"(weights), "+m"(x), "+m"(sums));  // nor that they are equal: it would keep one sum
  for (int64_t step = 0; step < steps; step++) {
    WEFT_UNROLL for (int i = 0; i < SUMS; i++) sums[i] = dot(sums[i], weights, x);
  }
  for (int i = 0; i < SUMS; i++) all += sums[i];
#else
  i16v sums[SUMS] = {};  // products of products, so that none is left out
  __asm__ volatile("" : "+m"(weights), "+m"(sums));
  for (int64_t step = 0; step < steps; step++) {
    WEFT_UNROLL for (int i = 0; i < SUMS; i++) sums[i] = add_pairs<4>(weights, (u32v)sums[i]);
  }
  for (int i = 0; i < SUMS; i++) all += widen_pairs(sums[i]);
#endif
  sink = sum(__builtin_convertvector(all, f32v));
}

void read(const char* from, int64_t bytes) {
  constexpr int64_t STEP = 8 * sizeof(f32v);
  f32v sums[SUMS] = {};
  for (int64_t at = 0; at + STEP <= bytes; at += STEP) {
    WEFT_UNROLL for (int i = 0; i < 8; i++) sums[i] += load<f32v>(from + at + i * sizeof(f32v));
  }
  sink = sum(total(sums));
}

}  // namespace

// Reads memory [bytes] once, in items of 256 KiB.
void probe_read(Pool& pool, const void* memory, int64_t bytes) {
  constexpr int64_t ITEM = 256 << 10;
  pool.run((bytes + ITEM - 1) / ITEM, [&](int64_t item, int) {
    const int64_t start = item * ITEM;
    read(static_cast<const char*>(memory) + start, start + ITEM < bytes ? ITEM : bytes - start);
  });
}

// Multiplies and adds in registers only. Returns the floating-point operations.
int64_t probe_multiply(Pool& pool, Type type, int64_t steps) {
  const int64_t items = 16 * pool.size();
  const bool half = type == Type::bfloat16;
  pool.run(items, [&](int64_t, int) { half ? multiply<BFloat16>(steps) : multiply<Float32>(steps); });
  return items * steps * SUMS * lanes * (half ? 4 : 2);
}

// The same in integers of 8 bits, as the products of 4-bit weights are computed.
int64_t probe_integers(Pool& pool, int64_t steps) {
  const int64_t items = 16 * pool.size();
  pool.run(items, [&](int64_t, int) { multiply_integers(steps); });
  return items * steps * SUMS * lanes * 8;
}

}  // namespace weft::WEFT_LEVEL
