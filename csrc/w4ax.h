// The linear layer with 4-bit weights and integer activations: what a call is told. comet/reference.py is the truth.
#pragma once

#include "kernels.h"

namespace weft {

constexpr int64_t BLOCK = 128;  // channels that share a scale

// Weights [out, in] as panels of 64 columns (outputs), each a run of `in / 128` blocks, so that a panel is read once and
// in order. A block is the integers of 128 channels, and then one bfloat16 scale for each column:
//   4 bits   [16][PANEL][4] bytes; byte j of pair p holds channel 8 p + j (low nibble) and 8 p + 4 + j, each plus 8
//   8 bits   [32][PANEL][4] bytes; byte j of quad q holds channel 4 q + j, plus 128
// That is 4.125 bits a weight, and a block begins on a cache line. Weights of the general form (those of others, mostly)
// have float32 scales instead, and then a zero point for each column, int8: 4.3125 bits.
struct W4AxWeights {
  int64_t in, out;
  int64_t outlier_blocks;  // so many leading blocks have 8-bit activations even where exact_a4
  int64_t wide_blocks;     // so many leading blocks have 8-bit weights
  bool hadamard;           // of the blocks that are no outlier blocks
  bool exact_a4;           // these have 4-bit activations, too
  bool general;            // scales of 32 bits, and zero points
  const uint16_t* permutation;  // [in], or null
  int64_t run;                  // its channels come in whole runs of so many neighbours (a power of two up to BLOCK)
  const char* panels;
  const float* bias;  // [panels * PANEL], or null

  static constexpr int64_t integer_bytes(bool wide) { return BLOCK * PANEL / (wide ? 1 : 2); }
  static constexpr int64_t block_bytes(bool wide, bool general) {
    return integer_bytes(wide) + PANEL * (general ? 5 : 2);
  }
  int64_t blocks() const { return in / BLOCK; }
  bool four(int64_t block) const { return exact_a4 && block >= outlier_blocks; }  // bits of its activations
  // A quantised row on its way between ranks: its integers, block after block, and one float32 scale for each block. What
  // has 4 bits takes half a byte.
  int64_t wire_integers() const { return in - (exact_a4 ? blocks() - outlier_blocks : 0) * (BLOCK / 2); }
  int64_t wire_bytes() const { return wire_integers() + blocks() * 4; }
  int64_t panel_count() const { return (out + PANEL - 1) / PANEL; }
  int64_t panel_bytes() const {
    return wide_blocks * block_bytes(true, general) + (blocks() - wide_blocks) * block_bytes(false, general);
  }
};

// What weights are packed from.
struct W4AxSource {
  const int8_t* values;  // [out, in]
  const float* scales;   // [out, in / 128]
  const int8_t* zeros;   // [out, in / 128], or null; only in the general form
};

// The quantised input of a layer, in one piece of memory: block after block, so that a tile of rows reads it in order.
struct QuantisedRows {
  int64_t rows, stride;
  int8_t* values;   // [blocks][stride][BLOCK]
  float* scales;    // [blocks][stride]
  int32_t* totals;  // [blocks][stride], of the values

  QuantisedRows(void* memory, int64_t rows, int64_t blocks)
      : rows(rows),
        stride(stride_of(rows)),
        values(static_cast<int8_t*>(memory)),
        scales(reinterpret_cast<float*>(values + blocks * stride * BLOCK)),
        totals(reinterpret_cast<int32_t*>(scales + blocks * stride)) {}

  // A row is written block by block. Were the blocks a multiple of 4 KiB apart, all of them would want the same few places
  // of the caches. So there is room for a row more where rows are many; kernels/quantised.py counts 144 bytes for each.
  static int64_t stride_of(int64_t rows) { return rows >= 32 && rows % 8 == 0 ? rows + 1 : rows; }
};

}  // namespace weft
