#include "segment.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "patience.h"

#ifdef __linux__
#include <linux/futex.h>
#endif

namespace weft {

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t MAGIC = 0x7765667473656731;
constexpr int64_t PAGE = 4096;
constexpr double TICK = 0.05;  // seconds between two looks at whether another process lives

int64_t pages(int64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::string seconds_text(double seconds) {
  std::string text = std::to_string(seconds);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text + " s";
}

std::runtime_error system_error(const std::string& what) {
  return std::runtime_error(what + ": " + std::strerror(errno));
}

// Of processes, not of threads: the word is in shared memory.
void sleep_on(std::atomic<uint32_t>& word, uint32_t seen, double seconds) {
#ifdef __linux__
  const auto whole = std::floor(seconds);
  const timespec limit{time_t(whole), long((seconds - whole) * 1e9)};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &limit, nullptr, 0);
#else
  (void)word, (void)seen, (void)seconds;
  std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Closes itself.
struct File {
  int number;
  explicit File(int number) : number(number) {}
  File(const File&) = delete;
  ~File() {
    if (number >= 0) ::close(number);
  }
};

}  // namespace

// The file's name, while other ranks may need it.
struct Segment::Name {
  std::string path;
  ~Name() {
    if (!path.empty()) unlink(path.c_str());
  }
};

struct alignas(64) Segment::Line {
  std::atomic<uint32_t> flags[FLAGS];
  std::atomic<uint32_t> sleepers;  // threads that sleep on one of them, or are about to
  std::atomic<uint32_t> state;
  std::atomic<int32_t> process;
  std::atomic<int32_t> culprit;  // whom this rank gave up for, plus 1
  std::atomic<uint64_t> fingerprint;
  std::atomic<int64_t> rows;
};

struct alignas(64) Segment::Header {
  std::atomic<uint64_t> magic;  // written last
  int64_t ranks, slot_bytes;
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

Segment::Segment(const std::string& path, int rank, int ranks, int64_t slot_bytes, double timeout, double spin)
    : rank_(rank), ranks_(ranks), slot_bytes_(pages(slot_bytes)), timeout_(timeout), spin_(spin) {
  if (ranks < 1 || rank < 0 || rank >= ranks || slot_bytes < 1 || !(timeout > 0) || !(spin >= 0))
    throw std::invalid_argument("no rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " with slots of " +
                                std::to_string(slot_bytes) + " bytes, " + seconds_text(timeout) + " to wait and " +
                                seconds_text(spin) + " to spin");
  bytes_ = size_t(pages(int64_t(sizeof(Header)) + ranks * int64_t(sizeof(Line))) + ranks * 2 * FLAGS * slot_bytes_);
  try {
    Name name;
    rank == 0 ? open(path, name) : attach(path);
    join();
  } catch (...) {
    leave();
    if (memory_ != nullptr) munmap(memory_, bytes_);
    throw;
  }
}

Segment::~Segment() {
  leave();
  munmap(memory_, bytes_);
  for (int file : watched_)
    if (file >= 0) ::close(file);
}

// Rank 0. A name that is taken is somebody else's, and stays.
void Segment::open(const std::string& path, Name& name) {
  const File file(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (file.number < 0) throw system_error("cannot make " + path);
  name.path = path;
  if (ftruncate(file.number, off_t(bytes_)) != 0) throw system_error("cannot size " + path);
  map(file.number);
  auto* header = reinterpret_cast<Header*>(memory_);
  header->ranks = ranks_;
  header->slot_bytes = slot_bytes_;
  reserve(file.number);
  header->magic.store(MAGIC, std::memory_order_release);
}

void Segment::attach(const std::string& path) {
  const auto end = after(timeout_);
  const auto again = [&] {
    if (Clock::now() >= end)
      throw std::runtime_error("rank 0 did not make " + path + " within " + seconds_text(timeout_));
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  int number;
  while ((number = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW)) < 0) {
    if (errno != ENOENT) throw system_error("cannot open " + path);
    again();
  }
  const File file(number);
  struct stat status;
  if (fstat(number, &status) != 0) throw system_error("cannot look at " + path);
  if (status.st_uid != geteuid() || (status.st_mode & 077) != 0)
    throw std::runtime_error(path + " belongs to another user, or is open to others");
  while (status.st_size == 0) {  // rank 0 has not come further
    again();
    if (fstat(number, &status) != 0) throw system_error("cannot look at " + path);
  }
  if (size_t(status.st_size) != bytes_)
    throw std::runtime_error(path + " has " + std::to_string(status.st_size) + " bytes, not the " +
                             std::to_string(bytes_) + " of " + std::to_string(ranks_) + " ranks with slots of " +
                             std::to_string(slot_bytes_));
  map(number);
  const auto* header = reinterpret_cast<const Header*>(memory_);
  while (header->magic.load(std::memory_order_acquire) != MAGIC) again();
  if (header->ranks != ranks_ || header->slot_bytes != slot_bytes_)
    throw std::runtime_error(path + " was made for " + std::to_string(header->ranks) + " ranks with slots of " +
                             std::to_string(header->slot_bytes));
  reserve(number);
}

void Segment::map(int file) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) throw system_error("cannot map shared memory");
  memory_ = static_cast<char*>(memory);
}

// This rank's slots get their memory now, near its cores: where there is none left, a write would be a bus error.
void Segment::reserve(int file) const {
#ifdef __linux__
  const int64_t first = slot(rank_, GIVEN, 0) - memory_;
  const int64_t begin = rank_ == 0 ? 0 : first, end = first + 2 * FLAGS * slot_bytes_;
  int error;
  do error = posix_fallocate(file, off_t(begin), off_t(end - begin));
  while (error == EINTR);
  if (error == 0) return;
  errno = error;
  throw system_error("no " + std::to_string(end - begin) + " bytes of shared memory (in a container: --shm-size)");
#else
  (void)file;
#endif
}

// Takes this rank's line, waits until all ranks have theirs, and takes hold of their processes.
void Segment::join() {
  uint32_t nobody = NOBODY;
  if (!line(rank_).state.compare_exchange_strong(nobody, HERE))
    throw std::runtime_error("there has been a rank " + std::to_string(rank_) + " in this group before");
  here_ = true;
  line(rank_).process.store(getpid());
  const auto end = after(timeout_);
  for (int rank = 0; rank < ranks_; rank++)
    while (line(rank).process.load() == 0) {
      if (Clock::now() >= end)
        throw std::runtime_error("rank " + std::to_string(rank) + " did not attach within " + seconds_text(timeout_));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  watched_.assign(size_t(ranks_), -1);
#ifdef SYS_pidfd_open
  for (int rank = 0; rank < ranks_; rank++)
    if (rank != rank_) watched_[size_t(rank)] = int(syscall(SYS_pidfd_open, line(rank).process.load(), 0));
#endif
}

Segment::Line& Segment::line(int rank) const {
  return *reinterpret_cast<Line*>(memory_ + sizeof(Header) + size_t(rank) * sizeof(Line));
}

char* Segment::slot(int rank, Flag flag, uint32_t chunk) const {
  const int64_t start = pages(int64_t(sizeof(Header)) + ranks_ * int64_t(sizeof(Line)));
  return memory_ + start + ((rank * FLAGS + flag) * 2 + int64_t(chunk % 2)) * slot_bytes_;
}

void Segment::set_spin(double seconds) {
  if (!(seconds >= 0)) throw std::invalid_argument("no rank spins for " + seconds_text(seconds));
  spin_ = seconds;
}

void Segment::announce(const Plan& plan) {
  if (!failed_.empty()) throw std::runtime_error(failed_);
  line(rank_).fingerprint.store(plan.fingerprint, std::memory_order_relaxed);
  line(rank_).rows.store(plan.rows, std::memory_order_relaxed);
  seam_++;
}

void Segment::publish(Flag flag, uint32_t chunks) {
  Line& own = line(rank_);
  // Sequentially consistent against wait_for(): either it sees the flag or we see the sleeper.
  own.flags[flag].store(chunks);
  if (own.sleepers.load() > 0) wake_all(own.flags[flag]);
}

bool Segment::ready(int rank, Flag flag, uint32_t chunks) const {
  return int32_t(line(rank).flags[flag].load(std::memory_order_acquire) - chunks) >= 0;  // numbers may wrap around
}

void Segment::wait(Flag flag, uint32_t chunks) {
  for (int rank = 0; rank < ranks_; rank++)
    if (rank != rank_ && !ready(rank, flag, chunks)) wait_for(rank, flag, chunks);
}

void Segment::wait_for(int rank, Flag flag, uint32_t chunks) {
  for (const auto end = after(spin_); Clock::now() < end;)
    for (int i = 0; i < 32; i++, pause())
      if (ready(rank, flag, chunks)) return;
  Line& other = line(rank);
  struct Sleeper {
    std::atomic<uint32_t>& count;
    explicit Sleeper(std::atomic<uint32_t>& count) : count(count) { count.fetch_add(1); }
    ~Sleeper() { count.fetch_sub(1); }
  } sleeper(other.sleepers);
  Patience patience(timeout_);
  for (;;) {
    const bool gone = other.state.load() == LEFT || ended(rank);  // before the flag: it may have come first
    const uint32_t seen = other.flags[flag].load();
    if (int32_t(seen - chunks) >= 0) return;
    if (gone && other.culprit.load() != 0)
      give_up(other.culprit.load() - 1, "rank " + std::to_string(rank) + " gave up because of " +
                                            who(other.culprit.load() - 1));
    if (gone) give_up(rank, who(rank) + (other.state.load() == LEFT ? " has left" : " has ended"));
    const double left = patience.left();
    if (left <= 0) {
      std::string late;
      for (int one = 0; one < ranks_; one++)
        if (one != rank_ && !ready(one, flag, chunks)) late += (late.empty() ? "" : " and ") + who(one);
      give_up(rank, late + " did not come within " + seconds_text(timeout_));
    }
    sleep_on(other.flags[flag], seen, left < TICK ? left : TICK);
  }
}

void Segment::compare(const Plan& plan) {
  for (int rank = 0; rank < ranks_; rank++) {
    if (line(rank).fingerprint.load(std::memory_order_relaxed) == plan.fingerprint) continue;
    give_up(rank, who(rank) + " came with another plan: its rows are " + std::to_string(line(rank).rows.load()) +
                      ", those here " + std::to_string(plan.rows));
  }
}

void Segment::leave() {
  if (!here_) return;
  here_ = false;
  Line& own = line(rank_);
  own.state.store(LEFT);
  if (failed_.empty()) failed_ = "rank " + std::to_string(rank_) + " has left its group";
  for (auto& flag : own.flags) wake_all(flag);
}

bool Segment::ended(int rank) const {
  if (watched_[size_t(rank)] < 0) return false;
  pollfd one{watched_[size_t(rank)], POLLIN, 0};
  return poll(&one, 1, 0) == 1;
}

std::string Segment::who(int rank) const {
  return "rank " + std::to_string(rank) + " (process " + std::to_string(line(rank).process.load()) + ")";
}

void Segment::give_up(int culprit, const std::string& why) {
  failed_ = "seam " + std::to_string(seam_) + ": " + why;
  line(rank_).culprit.store(culprit + 1);
  leave();
  throw std::runtime_error(failed_);
}

}  // namespace weft
