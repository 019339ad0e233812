// Seams over a link with more latency than there is: each takes so many seconds longer, in which nobody computes anything.
// For measuring and tests, where the system cannot delay packets.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#include "seam.h"

namespace weft {

class DistantSeams final : public Seams {
 public:
  explicit DistantSeams(Seams& seams) : seams_(seams) {}

  int rank() const override { return seams_.rank(); }
  int ranks() const override { return seams_.ranks(); }
  double seconds() const { return seconds_; }
  void set_seconds(double seconds) { seconds_ = seconds; }
  void start(Backend& backend, SeamCall call) override { seams_.start(backend, std::move(call)); }
  void finish(Backend& backend) override {
    seams_.finish(backend);
    if (seconds_ > 0) std::this_thread::sleep_for(std::chrono::duration<double>(seconds_));
  }
  void gather(Backend& backend, const Segment::Plan& plan, const char* from, int64_t bytes, char* out) override {
    seams_.gather(backend, plan, from, bytes, out);
  }
  void leave() override { seams_.leave(); }

 private:
  Seams& seams_;
  std::atomic<double> seconds_ = 0;
};

}  // namespace weft
