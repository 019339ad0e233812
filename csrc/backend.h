// What Python holds for one lane: the kernels of a level and the lane's threads.
#pragma once

#include <memory>
#include <stdexcept>

#include "levels.h"
#include "memory.h"

namespace weft {

class Backend {
 public:
  Backend(const std::string& level, const std::vector<int>& cores)
      : kernels_(find_kernels(level)), pool_(std::make_unique<Pool>(cores)) {
    if (kernels_ == nullptr) throw std::invalid_argument("this CPU cannot run the kernels of level " + level);
  }

  // Throws after close().
  Pool& pool() const {
    if (!pool_) throw std::runtime_error("the kernels are closed");
    return *pool_;
  }
  const Kernels& kernels() const { return *kernels_; }
  void close() { pool_.reset(); }  // idempotent; ends the threads

 private:
  const Kernels* kernels_;
  std::unique_ptr<Pool> pool_;
};

}  // namespace weft
