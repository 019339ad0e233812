#include "seam_thread.h"

#include <pthread.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "threads.h"

namespace weft {

SeamThread::SeamThread(Seams& seams, const std::vector<int>& cores) : seams_(seams) {
  SignalsBlocked blocked;
  thread_ = std::thread([this] { serve(); });
#ifdef __linux__
  pthread_setname_np(thread_.native_handle(), ("weft-seams-" + std::to_string(rank() % 1000)).c_str());
#endif
  if (cores.empty()) return;
  try {
    set_cores(cores);
  } catch (...) {
    leave();
    throw;
  }
}

void SeamThread::set_cores(const std::vector<int>& cores) {
  if (!thread_.joinable()) throw std::invalid_argument("the thread of the seams has ended");
  if (cores.empty()) throw std::invalid_argument("the thread of the seams needs a core");
  if (!pin(thread_, cores))
    throw std::invalid_argument("the thread of the seams may not run on core " + std::to_string(cores.front()));
}

void SeamThread::start(Backend& backend, SeamCall call) {
  const std::lock_guard lock(mutex_);
  if (leaving_) throw std::runtime_error("rank " + std::to_string(rank()) + " has left its group");
  waiting_.push_back({&backend, std::move(call)});
  flying_++;
  given_.notify_one();
}

void SeamThread::finish(Backend&) {
  std::unique_lock lock(mutex_);
  if (flying_ == 0) throw std::invalid_argument("no seam is in flight");
  done_.wait(lock, [this] { return leaving_ || !over_.empty(); });
  if (over_.empty()) throw std::runtime_error("rank " + std::to_string(rank()) + " has left its group");
  const std::exception_ptr thrown = over_.front();
  over_.pop_front();
  flying_--;
  if (thrown) std::rethrow_exception(thrown);
}

// In the caller's thread: that of the seams has nothing to do.
void SeamThread::gather(Backend& backend, const Segment::Plan& plan, const char* from, int64_t bytes, char* out) {
  {
    const std::lock_guard lock(mutex_);
    if (flying_ > 0) throw std::invalid_argument("a seam is in flight");
  }
  seams_.gather(backend, plan, from, bytes, out);
}

void SeamThread::leave() {
  {
    const std::lock_guard lock(mutex_);
    leaving_ = true;
  }
  given_.notify_one();
  done_.notify_all();
  if (thread_.joinable()) thread_.join();
  seams_.leave();
}

void SeamThread::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    given_.wait(lock, [this] { return leaving_ || !waiting_.empty(); });
    if (leaving_) return;
    Job job = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    std::exception_ptr thrown;
    try {
      seams_.start(*job.backend, std::move(job.call));
      seams_.finish(*job.backend);
    } catch (...) {
      thrown = std::current_exception();
    }
    lock.lock();
    over_.push_back(thrown);
    done_.notify_one();
  }
}

}  // namespace weft
