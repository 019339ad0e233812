// The W4Ax linear layer on GPUs with INT4 tensor cores (sm_80, 86, 89): layouts, and what a call is told.
//
// Everything is nibbles. 128 channels of one row or column in 4 bits are a *chunk* of 64 bytes, the first channel in the
// low half of the first byte. A block whose values have 8 bits is two chunks, by value = 16 * upper + lower: the upper
// nibble has the sign, the lower has none. So a product of 128 channels is one, two or four *pieces*, each one chunk of
// rows times one chunk of weights on the INT4 units:
//   rows 4 bits, weights 4   r * w
//   rows 8 bits, weights 4   16 (r1 * w) + (r0 * w)
//   rows 8 bits, weights 8   16 (16 (r1 * w1) + (r1 * w0) + (r0 * w1)) + (r0 * w0)
// evaluated from the left in one set of integers. A piece is also the unit of cost.
//
// Blocks come in this order: `wide` (8-bit weights and rows), then up to `eight` (8-bit rows), then 4 bits alone.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define WEFT_BOTH __host__ __device__ __forceinline__
#else
#define WEFT_BOTH inline
#endif

namespace weft::cuda {

constexpr int BLOCK = 128;                 // channels that share a scale
constexpr int CHUNK = 64;                  // bytes of 128 nibbles
constexpr int COLUMNS = 128;               // outputs of a tile; weights are padded to a multiple
constexpr int WEIGHT_CHUNK = COLUMNS * CHUNK;  // bytes of one chunk of all columns of a tile
constexpr int MOST_SEGMENTS = 16;

// One product of chunks.
struct Piece {
  int block;
  int row_chunk, weight_chunk;
  bool row_unsigned, weight_unsigned;
  bool shift;  // 16 times the sum so far, before this piece
  bool last;   // of its block
};

struct W4AxCall {
  const uint8_t* rows;       // [m][blocks + eight] chunks
  const float* row_scales;   // [m][blocks]
  const int32_t* row_totals;  // [m][blocks], of the values; read only where there are zeros
  const uint8_t* weights;    // [padded_n / COLUMNS][blocks + wide][WEIGHT_CHUNK], in the order of `weight_place`
  const float* scales;       // [blocks][padded_n]
  const int8_t* zeros;       // [blocks][padded_n] or null
  const float* bias;         // [n] or null
  void* y;                   // [m][n]
  float* partial;            // where there are several segments: [segments][m][n] if spread, else [m][n]
  int32_t* sums;             // null, or [blocks][m][n]: the accumulators, for tests
  int32_t m, n, padded_n;
  int32_t blocks, wide, eight;
  int32_t segments;  // the blocks are summed in so many runs, and the runs' sums in order
  int32_t cuts[MOST_SEGMENTS + 1];  // segment s has the blocks from cuts[s] to cuts[s + 1]
  int32_t spread;  // the segments of a tile run in thread blocks of their own: the same bits, for few rows
  int32_t bf16;    // y is bfloat16, else float32

  WEFT_BOTH int row_chunks() const { return blocks + eight; }
  WEFT_BOTH int weight_chunks() const { return blocks + wide; }

  // The first piece of a block; of `blocks`: the number of all pieces.
  WEFT_BOTH int first_piece(int block) const {
    if (block <= wide) return 4 * block;
    if (block <= eight) return 2 * (wide + block);
    return 2 * wide + eight + block;
  }

  WEFT_BOTH Piece piece(int index) const {
    if (index < 4 * wide) {
      const int block = index >> 2, upper = (index >> 1) & 1, right = index & 1;
      return {block, 2 * block + upper, 2 * block + right, upper != 0, right != 0, right != 0, upper && right};
    }
    if (index < 2 * (wide + eight)) {
      const int block = (index >> 1) - wide, lower = index & 1;
      return {block, 2 * block + lower, wide + block, lower != 0, false, lower != 0, lower != 0};
    }
    const int block = index - 2 * wide - eight;
    return {block, eight + block, wide + block, false, false, false, true};
  }
};

// In shared memory, a row's 16-byte units are exchanged so that eight rows that are read at once lie in different banks.
WEFT_BOTH int swizzled(int row, int unit) { return row * CHUNK + ((unit ^ ((row >> 1) & 3)) << 4); }

// Weights lie as the lanes of a warp want them: a lane reads 16 bytes for 8 columns and all of a chunk. Word q of lane l
// for the columns 8 t ... 8 t + 7 holds column 8 t + l / 4, channels 32 q + 8 (l % 4) ... + 7: for m16n8k64, both
// registers of B for the first 64 channels, then those for the other 64.
WEFT_BOTH int weight_place(int tile, int lane) { return (tile * 32 + lane) * 16; }

}  // namespace weft::cuda
