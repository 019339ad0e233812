#include "links.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "patience.h"

namespace weft {

namespace {

constexpr int64_t ENOUGH = 1 << 20;  // bytes that must have come, at most, before a sleeper is woken
constexpr double TICK = 0.05;        // seconds between two looks at what has come without waking anybody
constexpr size_t PIECES = 8;         // of one system call

std::string seconds_text(double seconds) {
  std::string text = std::to_string(seconds);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text + " s";
}

}  // namespace

Links::Links(int rank, std::vector<int> files, double timeout)
    : rank_(rank), timeout_(timeout), peers_(files.size()) {
  for (size_t other = 0; other < files.size(); other++)
    if (int(other) != rank) peers_[other].file = files[other];
}

void Links::leave() {
  for (Peer& peer : peers_) {
    if (peer.file >= 0) ::close(peer.file);
    peer.file = -1;
  }
  if (failed_.empty()) failed_ = "rank " + std::to_string(rank_) + " has left its group";
}

void Links::give_up(const std::string& why) {
  failed_ = "seam " + std::to_string(seam_) + ": " + why;
  call_.reset();
  leave();
  throw std::runtime_error(failed_);
}

void Links::start(Backend&, SeamCall call) {
  if (call_) throw std::invalid_argument("a seam is in flight already");
  begin(call.plan);
  call_ = std::move(call);
  const int64_t part = call_->part_bytes(), own = call_->owned(rank_) * part;
  room_.resize(size_t(own) * peers_.size());
  for (int other = 0; other < ranks(); other++) {
    if (other == rank_) continue;
    send(other, call_->partial + call_->bounds[size_t(other)] * part, call_->owned(other) * part);
    receive(other, room_.data() + own * other, own);
  }
  move();
}

void Links::finish(Backend& backend) {
  if (!call_) throw std::invalid_argument("no seam is in flight");
  complete();
  join(backend);
  exchange_rows();
  complete();
  if (call_->form != nullptr)
    backend.kernels().decode_rows(backend.pool(), *call_->form, wire_.data(), 0, call_->bounds.back(),
                                  {call_->quantised, call_->bounds.back(), call_->form->blocks()});
  call_.reset();
}

void Links::gather(Backend&, const Segment::Plan& plan, const char* from, int64_t bytes, char* out) {
  if (call_) throw std::invalid_argument("a seam is in flight");
  begin(plan);
  for (int other = 0; other < ranks(); other++) {
    if (other == rank_) {
      if (bytes > 0) memcpy(out + other * bytes, from, size_t(bytes));
      continue;
    }
    send(other, from, bytes);
    receive(other, out + other * bytes, bytes);
  }
  complete();
}

// The owner's work: its rows of the residual and of the norm, where they are sent from.
void Links::join(Backend& backend) {
  const int64_t first = call_->bounds[size_t(rank_)], own = call_->owned(rank_);
  parts_.clear();
  for (int other = 0; other < ranks(); other++)
    parts_.push_back(other == rank_ ? call_->partial + first * call_->part_bytes()
                                    : room_.data() + own * call_->part_bytes() * other);
  const bool plain = call_->form == nullptr;
  if (!plain) {
    scratch_.resize(size_t(own * call_->row_bytes()));
    wire_.resize(size_t(call_->bounds.back() * call_->wire_bytes()));
  }
  backend.kernels().join_rows(backend.pool(), {
      .type = call_->type,
      .part_type = call_->part_type,
      .parts = parts_.data(),
      .count = int64_t(parts_.size()),
      .residual = call_->residual,
      .weight = call_->weight,
      .eps = call_->eps,
      .rows = own,
      .size = call_->size,
      .out = plain ? call_->hidden + first * call_->row_bytes() : scratch_.data(),
      .wire = plain ? nullptr : wire_.data() + first * call_->wire_bytes(),
      .form = call_->form,
  });
}

void Links::exchange_rows() {
  char* rows = call_->form == nullptr ? call_->hidden : wire_.data();
  const int64_t bytes = call_->wire_bytes();
  for (int other = 0; other < ranks(); other++) {
    if (other == rank_) continue;
    send(other, rows + call_->bounds[size_t(rank_)] * bytes, call_->owned(rank_) * bytes);
    receive(other, rows + call_->bounds[size_t(other)] * bytes, call_->owned(other) * bytes);
  }
}

// Heads to and from all.
void Links::begin(const Segment::Plan& plan) {
  if (!failed_.empty()) throw std::runtime_error(failed_);
  seam_++;
  own_ = plan;
  for (int other = 0; other < ranks(); other++) {
    if (other == rank_) continue;
    peers_[size_t(other)].compared = false;
    send(other, &own_, sizeof own_);
    receive(other, &peers_[size_t(other)].head, sizeof own_);
  }
}

void Links::send(int rank, const void* from, int64_t bytes) {
  if (bytes > 0) peers_[size_t(rank)].out.push_back({static_cast<char*>(const_cast<void*>(from)), bytes});
}

void Links::receive(int rank, void* to, int64_t bytes) {
  if (bytes > 0) peers_[size_t(rank)].into.push_back({static_cast<char*>(to), bytes});
}

// Whether anything was moved. What came before another rank has left is still taken.
bool Links::move() {
  bool moved = false;
  for (int other = 0; other < ranks(); other++) {
    Peer& peer = peers_[size_t(other)];
    if (other == rank_) continue;
    moved |= push(peer);
    moved |= pull(peer);
    compare(other);
  }
  return moved;
}

namespace {

// The first pieces of a queue, for one system call.
template <class Queue>
size_t first_pieces(const Queue& queue, iovec* pieces) {
  const size_t count = std::min(queue.size(), PIECES);
  for (size_t i = 0; i < count; i++) pieces[i] = {queue[i].at, size_t(queue[i].left)};
  return count;
}

template <class Queue>
void drop(Queue& queue, int64_t bytes) {
  while (bytes > 0) {
    auto& first = queue.front();
    const int64_t some = std::min(bytes, first.left);
    first.at += some, first.left -= some, bytes -= some;
    if (first.left == 0) queue.pop_front();
  }
}

}  // namespace

bool Links::push(Peer& peer) {
  bool moved = false;
  while (!peer.out.empty() && peer.error.empty()) {
    iovec pieces[PIECES];
    msghdr message{};
    message.msg_iov = pieces;
    message.msg_iovlen = first_pieces(peer.out, pieces);
    const ssize_t sent = sendmsg(peer.file, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) peer.error = std::strerror(errno);
    if (sent <= 0) break;
    drop(peer.out, sent);
    moved = true;
  }
  return moved;
}

bool Links::pull(Peer& peer) {
  bool moved = false;
  while (!peer.into.empty()) {
    iovec pieces[PIECES];
    msghdr message{};
    message.msg_iov = pieces;
    message.msg_iovlen = first_pieces(peer.into, pieces);
    int64_t wanted = 0;
    for (size_t i = 0; i < message.msg_iovlen; i++) wanted += int64_t(pieces[i].iov_len);
    const ssize_t came = recvmsg(peer.file, &message, MSG_DONTWAIT);
    if (came < 0 && errno == EINTR) continue;
    if (came == 0) peer.error = "the connection is closed";
    if (came < 0 && errno != EAGAIN && errno != EWOULDBLOCK) peer.error = std::strerror(errno);
    if (came <= 0) break;
    drop(peer.into, came);
    moved = true;
    if (came < wanted) break;
  }
  return moved;
}

// Once its head has come: of a plan that is another, nothing more is believed.
void Links::compare(int rank) {
  Peer& peer = peers_[size_t(rank)];
  const char* head = reinterpret_cast<const char*>(&peer.head);
  if (peer.compared || (!peer.into.empty() && peer.into.front().at >= head && peer.into.front().at < head + sizeof peer.head))
    return;
  peer.compared = true;
  if (peer.head.fingerprint != own_.fingerprint || peer.head.rows != own_.rows)
    give_up("rank " + std::to_string(rank) + " came with another plan: its rows are " + std::to_string(peer.head.rows) +
            ", those here " + std::to_string(own_.rows));
}

// Until all that was asked for has come, and all is on its way that was to be sent.
void Links::complete() {
  Patience patience(timeout_);
  for (;;) {
    if (move()) patience.restart();
    std::string late, gone;  // all of those: one may have left because of another
    for (int other = 0; other < ranks(); other++) {
      const Peer& peer = peers_[size_t(other)];
      if (!missing(peer)) continue;
      const std::string who = "rank " + std::to_string(other);
      late += (late.empty() ? "" : " and ") + who;
      if (!peer.error.empty()) gone += (gone.empty() ? "" : "; ") + who + " has ended or left: " + peer.error;
    }
    if (!gone.empty()) give_up(gone);
    if (late.empty()) return;
    const double left = patience.left();
    if (left <= 0) give_up(late + " did not come within " + seconds_text(timeout_));
    sleep(std::min(left, TICK));
  }
}

void Links::sleep(double seconds) {
  std::vector<pollfd> waiting;
  for (Peer& peer : peers_) {
    if (!missing(peer)) continue;
    int64_t coming = 0;
    for (const Piece& piece : peer.into) coming += piece.left;
    const int enough = int(std::min(coming, ENOUGH));
    if (enough > 0 && enough != peer.enough) {
      setsockopt(peer.file, SOL_SOCKET, SO_RCVLOWAT, &enough, sizeof enough);
      peer.enough = enough;
    }
    waiting.push_back({peer.file, short((peer.into.empty() ? 0 : POLLIN) | (peer.out.empty() ? 0 : POLLOUT)), 0});
  }
  poll(waiting.data(), waiting.size(), int(seconds * 1000) + 1);
}

}  // namespace weft
