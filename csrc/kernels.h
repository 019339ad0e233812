// The kernels of one level, as a table of functions. Each level compiles csrc/kernels/*.cpp once and fills one table.
//
// Rules for a file in csrc/kernels (it is compiled for CPUs that may not be the one it runs on):
//   - everything is in namespace weft::WEFT_LEVEL, helpers are static or in an unnamed namespace;
//   - it includes C headers (cmath, cstring, cstdint) and weft's own only: an inline function of the C++ library
//     compiled with AVX-512 here could be the copy that the linker keeps for everybody;
//   - every row of an output depends on that row's inputs only, in a fixed order of operations.
#pragma once

#include <cstdint>

#include "threads.h"

namespace weft {

using bf16 = uint16_t;  // the upper half of a float

enum class Type : int { float32 = 0, bfloat16 = 1 };

constexpr int PANEL = 64;  // columns (output features) in one panel of packed weights

// A packed weight matrix [out, in], padded with zeros to whole panels.
//   float32:  [panels][in][PANEL]
//   bfloat16: [panels][(in + 1) / 2][PANEL][2], pairs along `in`, as vdpbf16ps takes them
struct LinearWeights {
  Type type;
  int64_t in, out;
  const void* panels;
  const float* bias;  // [panels * PANEL], or null

  int64_t panel_count() const { return (out + PANEL - 1) / PANEL; }
  int64_t panel_bytes() const { return type == Type::float32 ? in * PANEL * 4 : (in + 1) / 2 * PANEL * 4; }
};

struct EmbeddingTable;  // embedding.h
struct EmbedCall;
struct NormCall;  // elementwise.h
struct GateCall;
struct BestCall;
struct RotaryCall;  // attention.h
struct AttentionCall;
struct W4AxWeights;  // w4ax.h
struct W4AxSource;
struct QuantisedRows;
struct JoinCall;  // seam_rows.h
struct RaceCall;  // race.h

struct Kernels {
  // weight [out, in] with row_stride elements between rows -> panels, laid out as `shape` says.
  void (*pack_linear)(Pool& pool, const LinearWeights& shape, const void* weight, int64_t row_stride, void* panels);
  // x [rows, in] of the weights' type -> y [rows, out] of that type or float32, both contiguous.
  void (*linear)(Pool& pool, const LinearWeights& weights, const void* x, int64_t rows, void* y, Type type);
  // 4-bit weights -> panels, which are zero before.
  void (*pack_w4ax)(Pool& pool, const W4AxWeights& shape, const W4AxSource& from, char* panels);
  // x [to.rows, in] -> integers, as the weights want them.
  void (*quantise_w4ax)(Pool& pool, const W4AxWeights& form, const void* x, Type type, const QuantisedRows& to);
  // The same of the rows that a norm or a gated activation gives. call.out is room for them, and not kept.
  void (*norm_quantise)(Pool& pool, const NormCall& call, const W4AxWeights& form, const QuantisedRows& to);
  void (*silu_mul_quantise)(Pool& pool, const GateCall& call, const W4AxWeights& form, const QuantisedRows& to);
  // Their product y [x.rows, out].
  void (*multiply_w4ax)(Pool& pool, const W4AxWeights& weights, const QuantisedRows& x, void* y, Type type);
  // The rows of a seam. Quantised rows on their way are in one piece each (W4AxWeights::wire_bytes): made of
  // x [rows, in], and back into rows [first, first + count) of a layer's input.
  void (*join_rows)(Pool& pool, const JoinCall& call);
  void (*encode_rows)(Pool& pool, const W4AxWeights& form, const void* x, Type type, int64_t rows, char* wire);
  void (*decode_rows)(Pool& pool, const W4AxWeights& form, const char* wire, int64_t first, int64_t count,
                      const QuantisedRows& to);
  // Limits of the machine: reads memory once; multiplies in registers and returns the floating-point operations.
  void (*probe_read)(Pool& pool, const void* memory, int64_t bytes);
  int64_t (*probe_multiply)(Pool& pool, Type type, int64_t steps);
  int64_t (*probe_integers)(Pool& pool, int64_t steps);
  // Rows of the table of which the tokens are known to be there.
  void (*embed)(Pool& pool, const EmbeddingTable& table, const EmbedCall& call);
  void (*norm)(Pool& pool, const NormCall& call);
  void (*best_of_rows)(Pool& pool, const BestCall& call);
  // The numbers of the tokens that may win, ascending; of more than `most` the first. Returns how many there are.
  int64_t (*contenders)(const RaceCall& call, int64_t* out, int64_t most);
  void (*silu_mul)(Pool& pool, const GateCall& call);
  void (*rotary_write)(Pool& pool, const RotaryCall& call);
  void (*attention)(Pool& pool, const AttentionCall& call);
};

}  // namespace weft
