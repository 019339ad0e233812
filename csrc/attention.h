// Paged KV and causal attention over it: what one call is told, and how its work is cut. The same for all levels.
//
// Layout of one layer's KV, with blocks of `block_size` slots (a multiple of 16) and P = 2 (bfloat16) or 1 (float32):
//   keys   [blocks][kv_heads][head_dim / P][block_size][P]   lanes run over slots, P neighbouring channels together
//   values [blocks][kv_heads][block_size / P][width][P]      lanes run over channels, P neighbouring slots together
// where width is head_dim rounded up to 16. So both products stream memory in order and never sum across lanes.
#pragma once

#include <vector>

#include "kernels.h"

namespace weft {

// The softmax of a row is computed over partitions of this many positions, counted from position 0, and the partitions
// are merged in order. That, and nothing about the batch, fixes the order of every sum.
constexpr int64_t PARTITION = 256;
constexpr int64_t UNIT_ROWS = 18;  // most rows of a unit: their scores and weights of one partition fit L1
constexpr int64_t MAX_HEAD_DIM = 256;

struct KvView {
  void* keys;
  void* values;
  int64_t blocks, block_size, kv_heads, head_dim;

  int64_t width() const { return (head_dim + 15) / 16 * 16; }
};

struct BatchView {  // kernels/base.py's Batch
  int64_t rows, slices, table_width;
  const int32_t* positions;
  const int64_t* slots;
  const int32_t* starts;
  const int32_t* contexts;
  const int32_t* tables;
};

// Some rows of one slice and kv head, over partitions [first, end). A row is numbered token * group + head in the group.
// partial < 0: these are all partitions that the rows see. Otherwise the totals of each partition are kept, from number
// `partial` on, and merged later.
struct Unit {
  int64_t slice, kv_head, first_row, rows, first_partition, end_partition, partial;
};

struct AttentionCall {
  Type type;
  const void* q;
  void* out;
  KvView kv;
  BatchView batch;
  int64_t heads;
  float scale;
  int64_t window;  // 0: none

  int64_t group() const { return heads / kv.kv_heads; }
};

struct AttentionPlan {
  std::vector<Unit> units;
  std::vector<Unit> merges;  // each split unit as a whole
  int64_t partials = 0;      // partitions of which the totals are kept
  double work = 0;           // flops
};

// A table, slice or context that reaches outside of the KV throws std::invalid_argument, before memory is touched.
void check_slices(const BatchView& batch, const KvView& kv);
void check_rows(const BatchView& batch, const KvView& kv, int64_t max_positions);

AttentionPlan plan_attention(const AttentionCall& call, int64_t threads);

}  // namespace weft
