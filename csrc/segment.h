// Memory that the ranks of one host share, and the flags by which they wait for one another.
//
// Every rank has a line of flags, which only it writes, and four slots: two for what it gives to the others, two for what
// it has joined. Work goes in chunks, numbered alike on all ranks; chunk n uses the slots n % 2. A flag is the number of
// chunks that are ready, published with release and read with acquire order, so nothing is ever reset.
//
// A rank that waits spins a little and then sleeps on the flag (a futex), waking now and then to see whether the other
// process lives. It waits no longer than the time-out. Whoever gives up says so in its line, so the others do not wait
// for it in turn.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace weft {

class Segment {
 public:
  // What a rank is about to do; all ranks must be about to do the same.
  struct Plan {
    uint64_t fingerprint;
    int64_t rows;
  };
  enum Flag { GIVEN, JOINED, FLAGS };

  // Rank 0 makes the file `path` (readable by its user only) and removes its name once all ranks have it. Seconds of
  // `timeout` bound every wait; those of `spin` are spent looking before a sleep.
  // Throws std::invalid_argument for what cannot be, std::runtime_error for what the system or another rank refuses.
  Segment(const std::string& path, int rank, int ranks, int64_t slot_bytes, double timeout, double spin);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  int64_t slot_bytes() const { return slot_bytes_; }
  char* slot(int rank, Flag flag, uint32_t chunk) const;
  double spin() const { return spin_; }
  // While nobody waits. Throws std::invalid_argument for less than none.
  void set_spin(double seconds);

  // Before the first chunk of a seam is published.
  void announce(const Plan& plan);
  void publish(Flag flag, uint32_t chunks);
  // Until every rank has published so many. Throws std::runtime_error, which names the ranks that did not come and the
  // seam, and leaves.
  void wait(Flag flag, uint32_t chunks);
  // Once every rank has published the seam's first chunk.
  void compare(const Plan& plan);
  // Idempotent. Ranks that still wait for this one get an error.
  void leave();

 private:
  struct Line;
  struct Header;
  struct Name;
  enum State : uint32_t { NOBODY, HERE, LEFT };

  void open(const std::string& path, Name& name);
  void attach(const std::string& path);
  void map(int file);
  void reserve(int file) const;
  void join();
  Line& line(int rank) const;
  bool ready(int rank, Flag flag, uint32_t chunks) const;
  void wait_for(int rank, Flag flag, uint32_t chunks);
  bool ended(int rank) const;
  std::string who(int rank) const;
  [[noreturn]] void give_up(int culprit, const std::string& why);

  const int rank_, ranks_;
  const int64_t slot_bytes_;
  const double timeout_;
  double spin_;
  char* memory_ = nullptr;
  size_t bytes_ = 0;
  bool here_ = false;          // this rank has its line, and has not left
  int64_t seam_ = 0;           // seams announced so far: the number in messages
  std::vector<int> watched_;   // a pidfd for each rank, or -1
  std::string failed_;         // why nothing works any more
};

}  // namespace weft
