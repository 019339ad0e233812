// The layout of a step, made from its slices one after the other: kernels/base.py's Batch, as models/batch.py makes it.
// Its memory is used again from step to step.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "attention.h"

namespace weft {

class StepBatch {
 public:
  void clear() {
    tokens.clear(), slots_.clear(), positions_.clear(), contexts_.clear(), blocks_.clear(), table_ends_.clear();
    starts_.assign(1, 0);
  }

  // Tokens of a sequence from position `start` on: append them to `tokens` and its blocks to blocks() first. Throws
  // std::invalid_argument where there are none, or too few blocks for them.
  void add_slice(int64_t start, int64_t block_size) {
    const int64_t first = starts_.back(), end = int64_t(tokens.size()), context = start + end - first;
    const size_t table = table_ends_.empty() ? 0 : table_ends_.back();
    if (end == first) throw std::invalid_argument("a step needs slices, and each of them tokens");
    if (start < 0 || context > int64_t(blocks_.size() - table) * block_size)
      throw std::invalid_argument("the block table of a slice is too short for its tokens");
    for (int64_t position = start; position < context; position++) {
      positions_.push_back(int32_t(position));
      slots_.push_back(blocks_[table + size_t(position / block_size)] * block_size + position % block_size);
    }
    starts_.push_back(int32_t(end));
    contexts_.push_back(int32_t(context));
    table_ends_.push_back(blocks_.size());
  }

  // Valid until the next change.
  BatchView view() {
    const int64_t slices = int64_t(contexts_.size());
    if (slices == 0) throw std::invalid_argument("a step needs slices, and each of them tokens");
    size_t width = 0;
    for (size_t s = 0, begin = 0; s < table_ends_.size(); begin = table_ends_[s++])
      width = std::max(width, table_ends_[s] - begin);
    tables_.assign(width * size_t(slices), -1);
    for (size_t s = 0, begin = 0; s < table_ends_.size(); begin = table_ends_[s++])
      std::copy(blocks_.begin() + int64_t(begin), blocks_.begin() + int64_t(table_ends_[s]),
                tables_.begin() + int64_t(s * width));
    return {int64_t(tokens.size()), slices,           int64_t(width),   positions_.data(),
            slots_.data(),          starts_.data(), contexts_.data(), tables_.data()};
  }

  std::vector<int64_t> tokens;
  std::vector<int32_t>& blocks() { return blocks_; }

 private:
  std::vector<int64_t> slots_;
  std::vector<int32_t> positions_, starts_, contexts_, blocks_, tables_;
  std::vector<size_t> table_ends_;  // in blocks_, of each slice
};

}  // namespace weft
