#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

namespace weft {

namespace {
constexpr int64_t HUGE_PAGE = 2 << 20, SMALL_PAGE = 4096;
}

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(mapped);
#ifdef MADV_HUGEPAGE
  // A hint: without huge pages everything works on small ones, a little slower.
  if (bytes >= size_t(HUGE_PAGE)) madvise(mapped, bytes, MADV_HUGEPAGE);
#endif
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void Memory::release() {
  if (data_ != nullptr) munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

void Memory::touch(Pool& pool) {
  const int64_t size = int64_t(bytes_);
  pool.run((size + HUGE_PAGE - 1) / HUGE_PAGE, [&](int64_t item, int) {
    const int64_t end = std::min(size, (item + 1) * HUGE_PAGE);
    for (int64_t at = item * HUGE_PAGE; at < end; at += SMALL_PAGE) static_cast<volatile char*>(data_)[at] = 0;
  });
}

}  // namespace weft
