// The table of token embeddings, and what a look-up is told.
#pragma once

#include "kernels.h"

namespace weft {

// A row is kept as floats, or as integers with a float32 scale for each 128 channels (EMBEDDING_GROUP):
//   int8   a byte for each channel
//   int4   of each group 64 bytes; byte j holds channel j (low nibble) and 64 + j, each plus 8
enum class Stored : int { float32 = 0, bfloat16 = 1, int8 = 2, int4 = 3 };

constexpr int64_t EMBEDDING_GROUP = 128;

struct EmbeddingTable {
  Stored stored;
  int64_t rows, size;
  const char* data;     // [rows][row_bytes]
  const float* scales;  // [rows, size / EMBEDDING_GROUP], of integers

  int64_t row_bytes() const {
    switch (stored) {
      case Stored::float32: return size * 4;
      case Stored::bfloat16: return size * 2;
      case Stored::int8: return size;
      default: return size / 2;
    }
  }
  int64_t row_scales() const { return stored < Stored::int8 ? 0 : size / EMBEDDING_GROUP; }
};

struct EmbedCall {
  Type type;  // of the output
  const int64_t* tokens;
  int64_t count;
  void* out;  // [count, size]
};

}  // namespace weft
