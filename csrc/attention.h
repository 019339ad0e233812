// Paged KV and causal attention over it: what one call is told, and how its work is cut. The same for all levels.
//
// One layer's KV consists of words of 32 bits, with blocks of `block_size` slots (a multiple of 16):
//   keys   [blocks][kv_heads][head_dim / C][block_size]   lanes run over slots; a word has C channels of one slot
//   values [blocks][kv_heads][block_size / S][width / V]  lanes run over channels; a word has S slots of V channels
//                 float32  bfloat16  8 bits  4 bits
//   C                1         2        4       8
//   S, V            1, 1      2, 1     4, 1    4, 2
//   width: head_dim rounded up to 16 V
// So both products stream memory in order and never sum across lanes. In a word of 8- or 4-bit codes (what they stand for
// is in kernels/kv.py), neighbours that belong to one pair lie 16 bits apart:
//   channels 2 j and 2 j + 1 of a key word     at bits j * bits and j * bits + 16
//   slots 2 j and 2 j + 1 of a value word      at bits 8 j and 8 j + 16
// and of values of 4 bits, channel c (c % 32 < 16) has the lower and channel c + 16 the upper half of each byte. No byte
// belongs to two slots, for these may be written by two threads.
#pragma once

#include "kernels.h"

namespace weft {

// The softmax of a row is computed over partitions of this many positions, counted from position 0, and the partitions
// are merged in order. That, and nothing about the batch, fixes the order of every sum.
constexpr int64_t PARTITION = 256;
constexpr int64_t UNIT_ROWS = 18;  // most rows of a unit: their scores and weights of one partition fit L1
constexpr int64_t MAX_HEAD_DIM = 256;

constexpr int64_t NUMBERS = 16;  // slots whose scales and zeros lie together

struct KvNumbers {
  bf16 key_scales[NUMBERS], value_scales[NUMBERS];
  uint8_t key_zeros[NUMBERS], value_zeros[NUMBERS];
};

struct KvView {
  char* keys;
  char* values;
  KvNumbers* numbers;  // [blocks][kv_heads][block_size / NUMBERS], where bits > 0
  int64_t blocks, block_size, kv_heads, head_dim;
  int bits;  // of a code: 8 or 4; 0 where keys and values have the type of the activations

  int64_t width() const { return bits == 4 ? (head_dim + 31) / 32 * 32 : (head_dim + 15) / 16 * 16; }
  bool spread() const { return bits > 0 && (head_dim & (head_dim - 1)) == 0; }  // by a Hadamard transform
  int64_t channel_bytes(Type type, int64_t channels) const {
    return bits > 0 ? channels * bits / 8 : channels * (type == Type::bfloat16 ? 2 : 4);
  }
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
