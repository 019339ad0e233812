// Big blocks of zeroed memory, on huge pages where the kernel gives them.
//
// A packed weight takes some megabytes, so in a mapping of its own much of it would lie on small pages at either end,
// and be read more slowly. Therefore blocks are cut one after the other from regions of many huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "threads.h"

namespace weft {

class Region;

// Owns one block; its pages are given back to the system by release() or the destructor.
class Memory {
 public:
  Memory() = default;
  // Aligned to a cache line at least; zeroed. Throws std::bad_alloc.
  explicit Memory(size_t bytes);
  ~Memory() { release(); }
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  void release();
  // Makes the pool's threads touch every page, so that each page exists and lies near the cores that use it.
  void touch(Pool& pool);

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::shared_ptr<Region> region_;
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace weft
