#include "threads.h"

#include <pthread.h>

#include <chrono>
#include <stdexcept>
#include <string>

namespace weft {

namespace {

// How long an idle thread looks for more work before it sleeps. The steps of a model follow one another within some
// microseconds of Python; an engine without work must leave the core to the server's processes.
constexpr std::chrono::microseconds SPIN{40};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// True as soon as done() is, false when the time is up.
template <class F>
bool spin_until(F&& done) {
  const auto end = std::chrono::steady_clock::now() + SPIN;
  do {
    for (int i = 0; i < 32; i++) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

void name_thread(int member) {
#ifdef __linux__
  pthread_setname_np(pthread_self(), ("weft-" + std::to_string(member)).c_str());
#else
  (void)member;
#endif
}

}  // namespace

bool pin(std::thread& thread, const std::vector<int>& cores) {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int core : cores) CPU_SET(core, &set);
  return pthread_setaffinity_np(thread.native_handle(), sizeof set, &set) == 0;
#else
  (void)thread, (void)cores;  // no pinning on this system: the scheduler places the threads
  return true;
#endif
}

SignalsBlocked::SignalsBlocked() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before_);
}

SignalsBlocked::~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

Pool::Pool(const std::vector<int>& cores) {
  try {
    set_cores(cores);
  } catch (...) {
    resize(1);
    throw;
  }
}

Pool::~Pool() { resize(1); }

void Pool::set_cores(const std::vector<int>& cores) {
  if (cores.empty() || cores.size() > MAX_MEMBERS)
    throw std::invalid_argument("a pool needs between 1 and " + std::to_string(MAX_MEMBERS) + " cores, not " +
                                std::to_string(cores.size()));
  for (int core : cores)
#ifdef __linux__
    if (core < 0 || core >= CPU_SETSIZE) throw std::invalid_argument("there is no core " + std::to_string(core));
#else
    if (core < 0) throw std::invalid_argument("there is no core " + std::to_string(core));
#endif
  std::lock_guard<std::mutex> guard(mutex_);
  resize(int(cores.size()));
  for (size_t i = 0; i < workers_.size(); i++)
    if (!pin(workers_[i], {cores[i + 1]}))
      throw std::invalid_argument("this process may not run on core " + std::to_string(cores[i + 1]));
}

void Pool::resize(int size) {
  limit_.store(size);
  if (size < size_) {
    generation_.fetch_add(1);
    generation_.notify_all();
    while (int(workers_.size()) > size - 1) {
      workers_.back().join();
      workers_.pop_back();
    }
  }
  SignalsBlocked blocked;
  while (int(workers_.size()) < size - 1) {
    const int member = int(workers_.size()) + 1;
    workers_.emplace_back([this, member, seen = generation_.load()] { serve(member, seen); });
  }
  if (size != size_) shares_ = std::vector<Share>(size_t(size));
  size_ = size;
}

void Pool::run(int64_t count, Body body, void* context) {
  std::lock_guard<std::mutex> guard(mutex_);
  if (size_ == 1 || count <= 1) {
    for (int64_t item = 0; item < count; item++) body(context, item, 0);
    return;
  }
  body_ = body;
  context_ = context;
  for (int member = 0; member < size_; member++) {
    shares_[member].next.store(count * member / size_, std::memory_order_relaxed);
    shares_[member].end = count * (member + 1) / size_;
  }
  state_.store(OPEN, std::memory_order_release);
  generation_.fetch_add(1);
  // Sequentially consistent against serve(): either it sees the new generation or we see the sleeper.
  if (sleepers_.load() > 0) generation_.notify_all();
  work(0);
  finish();
}

// Closes the job to late workers and waits for those that are in it: each has an item under way.
void Pool::finish() {
  if ((state_.fetch_and(~OPEN, std::memory_order_acq_rel) & ~OPEN) == 0) return;
  if (spin_until([&] { return state_.load(std::memory_order_acquire) == 0; })) return;
  uint32_t state = state_.fetch_or(WAITING, std::memory_order_acq_rel) | WAITING;
  while (state != WAITING) {
    state_.wait(state);
    state = state_.load(std::memory_order_acquire);
  }
  state_.store(0, std::memory_order_relaxed);
}

bool Pool::enter() {
  uint32_t state = state_.load(std::memory_order_relaxed);
  while (state & OPEN)
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) return true;
  return false;
}

void Pool::leave() {
  if (state_.fetch_sub(1, std::memory_order_acq_rel) == (WAITING | 1)) state_.notify_one();
}

void Pool::work(int member) {
  for (int i = 0; i < size_; i++) {
    Share& share = shares_[(member + i) % size_];
    for (int64_t item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
      body_(context_, item, member);
  }
}

void Pool::serve(int member, uint32_t seen) {
  name_thread(member);
  for (;;) {
    if (!spin_until([&] { return generation_.load(std::memory_order_acquire) != seen; })) {
      sleepers_.fetch_add(1);
      generation_.wait(seen);
      sleepers_.fetch_sub(1);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (member >= limit_.load()) return;
    if (enter()) {
      work(member);
      leave();
    }
  }
}

}  // namespace weft
