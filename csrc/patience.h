// How long a rank waits for another.
#pragma once

#include <algorithm>
#include <chrono>

namespace weft {

// Seconds in which this process could see what it waits for. It looks every 50 ms or sooner; where it did not look
// for longer, it was paused (a frozen container, a stopped job), and the others likely with it: none of them is late
// because of that. So the time between two looks counts as `PAUSE` at most.
class Patience {
 public:
  explicit Patience(double seconds) : all_(seconds), left_(seconds) {}

  // After a look that has found nothing: the seconds that are left; none or less: there is no more waiting.
  double left() {
    const Clock::time_point now = Clock::now();
    left_ -= std::min(PAUSE, std::chrono::duration<double>(now - looked_).count());
    looked_ = now;
    return left_;
  }

  void restart() {
    left_ = all_;
    looked_ = Clock::now();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr double PAUSE = 1.0;

  const double all_;
  double left_;
  Clock::time_point looked_ = Clock::now();
};

}  // namespace weft
