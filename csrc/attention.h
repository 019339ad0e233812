// Paged KV and causal attention over it: what one call is told, and how its work is cut. The same for all levels.
//
// Layout of one layer's KV, with blocks of `block_size` slots (a multiple of 16) and P = 2 (bfloat16) or 1 (float32):
//   keys   [blocks][kv_heads][head_dim / P][block_size][P]   lanes run over slots, P neighbouring channels together
//   values [blocks][kv_heads][block_size / P][width][P]      lanes run over channels, P neighbouring slots together
// where width is head_dim rounded up to 16. So both products stream memory in order and never sum across lanes.
#pragma once

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
  int64_t totals() const { return 2 + width(); }  // of a row: greatest score, sum of weights, weighted sum of values
};

struct BatchView {  // kernels/base.py's Batch
  int64_t rows, slices, table_width;
  const int32_t* positions;
  const int64_t* slots;
  const int32_t* starts;
  const int32_t* contexts;
  const int32_t* tables;
};

// Some rows of one slice and kv head, over partitions [first, end). A row's number is token * group + head in group.
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

  // How the work is cut (attention_plan.h).
  bool shared;  // large enough to wake other threads for
  const Unit *units, *merges;
  int64_t unit_count, merge_count;
  float* partials;  // [partials][UNIT_ROWS][totals of a row]

  int64_t group() const { return heads / kv.kv_heads; }
};

// Splits and rotates q and k, and writes k and v into their slots.
struct RotaryCall {
  Type type;
  const void* qkv;         // [rows, (heads + 2 kv_heads) * head_dim]
  const float *cos, *sin;  // [positions, head_dim / 2]
  KvView kv;
  BatchView batch;
  int64_t heads;
  const void *q_norm, *k_norm;  // [head_dim], or null
  float eps;
  void* q;  // [rows, heads * head_dim]
};

}  // namespace weft
