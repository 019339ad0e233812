// The threads of one lane: fork-join over numbered items.
//
// A pool of n cores has n - 1 worker threads, pinned to cores[1..]; the thread that calls run() is member 0. The pool
// does not pin its caller: the owner of that thread does (the device pins each lane's thread to cores[0]), because an
// affinity is inherited by every thread and process that the caller starts later.
//
// Invariant: what an item computes must not depend on the member that runs it or on the number of members.
#pragma once

#include <signal.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace weft {

// Lets a thread run on these cores only. Returns false when the system refuses.
bool pin(std::thread& thread, const std::vector<int>& cores);

// For threads that are started meanwhile: Python's signal handlers belong to its main thread, and no other must be the one
// that a signal interrupts.
class SignalsBlocked {
 public:
  SignalsBlocked();
  ~SignalsBlocked();
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

class Pool {
 public:
  // Runs one item; must not throw. `member` is in [0, size()) and no two items with one member run at the same time.
  using Body = void (*)(void* context, int64_t item, int member);

  explicit Pool(const std::vector<int>& cores);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // From the next run() on. Waits for a run() under way in another thread.
  void set_cores(const std::vector<int>& cores);

  // Calls body for every item in [0, count), and returns when all are done. Each member starts on a contiguous share
  // of its own and then helps with what is left of the others'. Items are taken in ascending order within a share.
  // A worker that the system does not run at the moment takes no part, and nobody waits for it.
  void run(int64_t count, Body body, void* context);

  // The same for a callable body(item, member).
  template <class F>
  void run(int64_t count, F&& body) {
    using Function = std::remove_reference_t<F>;
    run(
        count, [](void* context, int64_t item, int member) { (*static_cast<Function*>(context))(item, member); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  static constexpr int MAX_MEMBERS = 1024;
  static constexpr uint32_t OPEN = 1u << 31, WAITING = 1u << 30;

  void serve(int member, uint32_t seen);
  void work(int member);
  bool enter();
  void leave();
  void finish();
  void resize(int size);

  std::mutex mutex_;  // one run() or set_cores() at a time
  std::vector<std::thread> workers_;
  std::vector<Share> shares_;
  int size_ = 1;
  Body body_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int> limit_{1};     // workers with a number from here on end
  std::atomic<int> sleepers_{0};  // workers that sleep, or are about to
  // One higher with every job; idle workers sleep on it.
  alignas(64) std::atomic<uint32_t> generation_{0};
  // OPEN: workers may join the job. WAITING: the caller sleeps until they are done. Below: how many are in it.
  alignas(64) std::atomic<uint32_t> state_{0};
};

}  // namespace weft
