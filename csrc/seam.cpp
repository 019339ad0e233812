#include "seam.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace weft {

namespace {

// On the pool where that pays.
void copy(Pool& pool, char* to, const char* from, int64_t bytes) {
  constexpr int64_t PART = 1 << 16;
  if (pool.size() == 1 || bytes < 2 * PART) {
    if (bytes > 0) memcpy(to, from, size_t(bytes));
    return;
  }
  pool.run((bytes + PART - 1) / PART, [&](int64_t item, int) {
    memcpy(to + item * PART, from + item * PART, size_t(std::min(PART, bytes - item * PART)));
  });
}

}  // namespace

// Those of a rank in a chunk; maybe none.
SeamGroup::Rows SeamGroup::rows(int rank, int64_t chunk) const {
  const int64_t first = std::min(chunk * chunk_rows_, call_->owned(rank));
  return {first, std::min(first + chunk_rows_, call_->owned(rank)) - first};
}

// Where rank `from` puts what it gives to rank `to`.
char* SeamGroup::given(int from, int to, uint32_t chunk) const {
  const int64_t place = to < from ? to : to - 1;
  return segment_.slot(from, Segment::GIVEN, chunk) + place * chunk_rows_ * call_->part_bytes();
}

// How many chunks, and of how many rows: as few as the slots allow, and of equal size.
void SeamGroup::cut(const SeamCall& call) {
  const int64_t others = std::max(1, segment_.ranks() - 1), slot = segment_.slot_bytes();
  const int64_t most = std::min(slot / (others * call_->part_bytes()), slot / call_->wire_bytes());
  if (most < 1)
    throw std::invalid_argument("a row of " + std::to_string(others * call_->part_bytes()) + " bytes does not fit into slots of " +
                                std::to_string(slot));
  int64_t rows = 0;
  for (int rank = 0; rank < segment_.ranks(); rank++) rows = std::max(rows, call_->owned(rank));
  chunks_ = std::max<int64_t>(1, (rows + most - 1) / most);  // one at least: the ranks compare their plans
  chunk_rows_ = (rows + chunks_ - 1) / chunks_;
  if (call.form != nullptr) scratch_.resize(size_t(chunk_rows_ * call.size * bytes_of(call.type)));
}

void SeamGroup::start(Backend& backend, SeamCall call) {
  if (call_) throw std::invalid_argument("a seam is in flight already");
  call_ = std::move(call);
  try {
    cut(*call_);
    segment_.announce(call_->plan);
    give(backend, 0);
  } catch (...) {
    call_.reset();
    throw;
  }
  segment_.publish(Segment::GIVEN, done_ + 1);
}

void SeamGroup::finish(Backend& backend) {
  if (!call_) throw std::invalid_argument("no seam is in flight");
  const Segment::Plan plan = call_->plan;
  try {
    run(
        plan, chunks_, [&](int64_t chunk) { give(backend, chunk); }, [&](int64_t chunk) { join(backend, chunk); },
        [&](int64_t chunk) { take(backend, chunk); });
  } catch (...) {
    call_.reset();
    throw;
  }
  call_.reset();
}

void SeamGroup::gather(Backend& backend, const Segment::Plan& plan, const char* from, int64_t bytes, char* out) {
  if (call_) throw std::invalid_argument("a seam is in flight");
  const int64_t slot = segment_.slot_bytes(), chunks = std::max<int64_t>(1, (bytes + slot - 1) / slot);
  const auto size = [&](int64_t chunk) { return std::min(slot, bytes - chunk * slot); };
  segment_.announce(plan);
  segment_.publish(Segment::GIVEN, done_ + 1);
  run(
      plan, chunks, [](int64_t) {},
      [&](int64_t chunk) {
        copy(backend.pool(), segment_.slot(segment_.rank(), Segment::JOINED, done_ + uint32_t(chunk)),
             from + chunk * slot, size(chunk));
      },
      [&](int64_t chunk) {
        for (int rank = 0; rank < segment_.ranks(); rank++)
          copy(backend.pool(), out + rank * bytes + chunk * slot,
               segment_.slot(rank, Segment::JOINED, done_ + uint32_t(chunk)), size(chunk));
      });
}

// All chunks, of which the first is given already. A rank that cannot go on leaves: the others wait for it.
template <class Give, class Join, class Take>
void SeamGroup::run(const Segment::Plan& plan, int64_t chunks, Give give, Join join, Take take) try {
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const uint32_t ready = done_ + uint32_t(chunk) + 1;
    if (chunk + 1 < chunks) {
      give(chunk + 1);
      segment_.publish(Segment::GIVEN, ready + 1);
    }
    segment_.wait(Segment::GIVEN, ready);
    if (chunk == 0) segment_.compare(plan);
    join(chunk);
    segment_.publish(Segment::JOINED, ready);
    segment_.wait(Segment::JOINED, ready);
    take(chunk);
  }
  done_ += uint32_t(chunks);
} catch (...) {
  segment_.leave();
  throw;
}

void SeamGroup::give(Backend& backend, int64_t chunk) {
  for (int rank = 0; rank < segment_.ranks(); rank++) {
    if (rank == segment_.rank()) continue;
    const Rows part = rows(rank, chunk);
    copy(backend.pool(), given(segment_.rank(), rank, done_ + uint32_t(chunk)),
         call_->partial + (call_->bounds[size_t(rank)] + part.first) * call_->part_bytes(), part.count * call_->part_bytes());
  }
}

void SeamGroup::join(Backend& backend, int64_t chunk) {
  const int own = segment_.rank();
  const Rows part = rows(own, chunk);
  const int64_t row_bytes = call_->row_bytes(), first = call_->bounds[size_t(own)] + part.first;
  parts_.clear();
  for (int rank = 0; rank < segment_.ranks(); rank++)
    parts_.push_back(rank == own ? call_->partial + first * call_->part_bytes()
                                 : given(rank, own, done_ + uint32_t(chunk)));
  backend.kernels().join_rows(backend.pool(), {
      .type = call_->type,
      .part_type = call_->part_type,
      .parts = parts_.data(),
      .count = int64_t(parts_.size()),
      .residual = call_->residual + part.first * row_bytes,
      .weight = call_->weight,
      .eps = call_->eps,
      .rows = part.count,
      .size = call_->size,
      .out = call_->form == nullptr ? call_->hidden + first * row_bytes : scratch_.data(),
      .wire = segment_.slot(own, Segment::JOINED, done_ + uint32_t(chunk)),
      .form = call_->form,
  });
}

// Hidden rows of this rank are in place already; quantised ones are laid out like those of the others.
void SeamGroup::take(Backend& backend, int64_t chunk) {
  for (int rank = 0; rank < segment_.ranks(); rank++) {
    const Rows part = rows(rank, chunk);
    const char* from = segment_.slot(rank, Segment::JOINED, done_ + uint32_t(chunk));
    const int64_t first = call_->bounds[size_t(rank)] + part.first;
    if (call_->form != nullptr)
      backend.kernels().decode_rows(backend.pool(), *call_->form, from, first, part.count,
                                    {call_->quantised, call_->bounds.back(), call_->form->blocks()});
    else if (rank != segment_.rank())
      copy(backend.pool(), call_->hidden + first * call_->wire_bytes(), from, part.count * call_->wire_bytes());
  }
}

}  // namespace weft
