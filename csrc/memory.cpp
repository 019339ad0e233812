#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>

namespace weft {

namespace {

constexpr size_t HUGE_PAGE = 2 << 20, SMALL_PAGE = 4096, LINE = 64;
constexpr size_t REGION = 64 << 20;  // addresses only: a page exists once it is touched

size_t up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

// One mapping, of which blocks are cut from the front. Nothing is used twice, so every block is zeroed.
class Region {
 public:
  explicit Region(size_t bytes) : mapped_bytes_(up(bytes, HUGE_PAGE) + HUGE_PAGE) {
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    next_ = reinterpret_cast<char*>(up(reinterpret_cast<uintptr_t>(mapped_), HUGE_PAGE));
    end_ = static_cast<char*>(mapped_) + mapped_bytes_;
#ifdef MADV_HUGEPAGE
    // A hint: without huge pages everything works on small ones, a little slower.
    if (bytes >= HUGE_PAGE) madvise(mapped_, mapped_bytes_, MADV_HUGEPAGE);
#endif
  }
  ~Region() { munmap(mapped_, mapped_bytes_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Null where there is no more room.
  char* cut(size_t bytes) {
    const size_t unit = bytes < SMALL_PAGE ? LINE : SMALL_PAGE, size = up(bytes, unit);
    char* start = reinterpret_cast<char*>(up(reinterpret_cast<uintptr_t>(next_), unit));
    if (start > end_ || size_t(end_ - start) < size) return nullptr;
    next_ = start + size;
    return start;
  }

 private:
  size_t mapped_bytes_;
  void* mapped_;
  char *next_, *end_;
};

namespace {

// A block, and the region that it keeps alive. The last region is kept here for the next blocks.
std::pair<std::shared_ptr<Region>, char*> allocate(size_t bytes) {
  static std::mutex mutex;
  static std::shared_ptr<Region> last;
  if (bytes > REGION / 2) {
    auto own = std::make_shared<Region>(bytes);
    return {own, own->cut(bytes)};
  }
  std::lock_guard<std::mutex> guard(mutex);
  char* data = last ? last->cut(bytes) : nullptr;
  if (data == nullptr) {
    last = std::make_shared<Region>(REGION);
    data = last->cut(bytes);
  }
  return {last, data};
}

}  // namespace

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes != 0) std::tie(region_, data_) = allocate(bytes);
}

Memory::Memory(Memory&& other) noexcept
    : region_(std::move(other.region_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(region_, other.region_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void Memory::release() {
  // Whole pages of ours go at once; the rest with the region, when its last block goes.
  if (bytes_ >= SMALL_PAGE) madvise(data_, bytes_ / SMALL_PAGE * SMALL_PAGE, MADV_DONTNEED);
  region_.reset();
  data_ = nullptr;
  bytes_ = 0;
}

void Memory::touch(Pool& pool) {
  const int64_t size = int64_t(bytes_), part = HUGE_PAGE;
  pool.run((size + part - 1) / part, [&](int64_t item, int) {
    const int64_t end = std::min(size, (item + 1) * part);
    for (int64_t at = item * part; at < end; at += SMALL_PAGE) static_cast<volatile char*>(data_)[at] = 0;
  });
}

}  // namespace weft
