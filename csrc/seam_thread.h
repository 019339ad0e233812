// Seams that progress while the caller computes (tokenweave.md §6), in a thread without Python: on a core that both share,
// an interpreter with cold caches would take as long as the messages themselves.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "seam.h"

namespace weft {

// Any Seams, carried out by one thread of its own, in the order of the calls. The thread sleeps while there is nothing to
// do. A backend is used by this thread until finish() has returned: give it one that does not compute meanwhile.
class SeamThread final : public Seams {
 public:
  // seams: used by nobody else from now on. cores: where the thread runs; none: where its maker may.
  SeamThread(Seams& seams, const std::vector<int>& cores);
  ~SeamThread() override { leave(); }
  SeamThread(const SeamThread&) = delete;
  SeamThread& operator=(const SeamThread&) = delete;

  // Where the thread runs from now on. Throws std::invalid_argument for a core that it may not run on, or once it has left.
  void set_cores(const std::vector<int>& cores);

  int rank() const override { return seams_.rank(); }
  int ranks() const override { return seams_.ranks(); }
  // Any number may be started before the first is finished.
  void start(Backend& backend, SeamCall call) override;
  // The first that was started and is not finished yet. Throws what carrying it out has thrown.
  void finish(Backend& backend) override;
  // No seam may be in flight.
  void gather(Backend& backend, const Segment::Plan& plan, const char* from, int64_t bytes, char* out) override;
  // Waits for the seam that is carried out, which a time-out bounds; those that wait for their turn are given up.
  void leave() override;

 private:
  struct Job {
    Backend* backend;
    SeamCall call;
  };

  void serve();

  Seams& seams_;
  std::mutex mutex_;
  std::condition_variable given_, done_;
  std::deque<Job> waiting_;
  std::deque<std::exception_ptr> over_;  // of seams that were carried out, and are not finished: what was thrown, or null
  int flying_ = 0;                       // started and not finished
  bool leaving_ = false;
  std::thread thread_;
};

}  // namespace weft
