// Big blocks of zeroed memory, on huge pages where the kernel gives them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "threads.h"

namespace weft {

// Owns one anonymous mapping; given back to the system by release() or the destructor.
class Memory {
 public:
  Memory() = default;
  // Aligned to a page at least, so to a cache line; zeroed. Throws std::bad_alloc.
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
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace weft
