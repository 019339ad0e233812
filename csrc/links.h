// A seam between ranks of any hosts: as in seam.h, over one TCP connection for each pair of ranks.
//
//   round 1   every rank sends each owner a head, which says what it is about to do, and its part of the owner's rows;
//   round 2   every owner sends its joined rows to all.
//
// There is no thread here: who waits moves all messages, as far as the system takes them and has them, and then sleeps
// until most of what is missing has come (SO_RCVLOWAT). Every wake-up and every copy is taken from a computation that may
// share the core. Messages have no lengths: both sides know from the plan what comes, once heads were compared.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "seam.h"

namespace weft {

class Links final : public Seams {
 public:
  // files: of connected sockets, one for each rank (and anything for this one); they are closed here. Seconds of
  // `timeout` are waited at most for the next byte.
  Links(int rank, std::vector<int> files, double timeout);
  ~Links() override { leave(); }
  Links(const Links&) = delete;
  Links& operator=(const Links&) = delete;

  int rank() const override { return rank_; }
  int ranks() const override { return int(peers_.size()); }
  void start(Backend& backend, SeamCall call) override;
  void finish(Backend& backend) override;
  void gather(Backend& backend, const Segment::Plan& plan, const char* from, int64_t bytes, char* out) override;
  void leave() override;

 private:
  struct Piece {
    char* at;
    int64_t left;
  };
  struct Peer {
    int file = -1;
    std::deque<Piece> out, into;  // what is to be moved, in order
    Segment::Plan head{};         // that it has sent
    bool compared = true;
    int enough = 1;     // bytes that must have come before a sleeper is woken
    std::string error;  // why nothing is moved any more
  };

  void begin(const Segment::Plan& plan);
  void send(int rank, const void* from, int64_t bytes);
  void receive(int rank, void* to, int64_t bytes);
  bool move();
  bool push(Peer& peer);
  bool pull(Peer& peer);
  void compare(int rank);
  bool missing(const Peer& peer) const { return !peer.out.empty() || !peer.into.empty(); }
  void complete();
  void sleep(double seconds);
  void join(Backend& backend);
  void exchange_rows();
  [[noreturn]] void give_up(const std::string& why);

  const int rank_;
  const double timeout_;
  std::vector<Peer> peers_;
  Segment::Plan own_{};  // this rank's head
  std::optional<SeamCall> call_;
  int64_t seam_ = 0;
  std::string failed_;  // why nothing works any more
  std::vector<char> room_, wire_, scratch_;
  std::vector<const void*> parts_;
};

}  // namespace weft
