// A seam between the ranks of one host: reduce-scatter by tokens, residual, norm, quantisation and all-gather, through
// shared memory, chunk by chunk of rows. tokenweave.md §4, with rows owned as weave/collective.py says.
//
// For each chunk a rank
//   gives   to every other rank the partial sums of rows that this one owns;
//   joins   its own rows: sums the ranks' parts in their order, adds the residual, normalises, [quantises];
//   takes   the joined rows of all ranks.
// Slots (segment.h) alternate, and chunk n + 1 is given before chunk n is joined. So nothing is overwritten that another
// rank may still read: chunk n + 2 is given after chunk n was taken, which is after all have joined it; and it is joined
// once all have given it, which is after they have taken chunk n. And a chunk is small enough to stay in the caches: of
// what crosses, nothing goes to memory.
#pragma once

#include <optional>
#include <vector>

#include "backend.h"
#include "seam_rows.h"
#include "segment.h"
#include "w4ax.h"

namespace weft {

inline int64_t bytes_of(Type type) { return type == Type::bfloat16 ? 2 : 4; }

struct SeamCall {
  Segment::Plan plan;
  Type type, part_type;
  const char* partial;          // [rows, size]
  std::vector<int64_t> bounds;  // rank r owns rows [bounds[r], bounds[r + 1])
  char* residual;               // [own, size]
  const void* weight;
  float eps;
  int64_t size;
  char* hidden;             // [rows, size], where form is null
  void* quantised;          // QuantisedRows of all rows, otherwise
  const W4AxWeights* form;

  int64_t owned(int rank) const { return bounds[size_t(rank) + 1] - bounds[size_t(rank)]; }
  int64_t part_bytes() const { return size * bytes_of(part_type); }  // of a row
  int64_t row_bytes() const { return size * bytes_of(type); }
  int64_t wire_bytes() const { return form == nullptr ? row_bytes() : form->wire_bytes(); }
};

// One rank of a group. All ranks make the same calls, one after the other. std::runtime_error: a rank that did not come,
// has ended, or came with another plan; nothing works after that.
class Seams {
 public:
  virtual ~Seams() = default;
  virtual int rank() const = 0;
  virtual int ranks() const = 0;
  // What the call points to is used until finish() has returned. Throws std::invalid_argument before anything is given.
  virtual void start(Backend& backend, SeamCall call) = 0;
  virtual void finish(Backend& backend) = 0;
  // bytes of this rank -> out, [ranks][bytes] of all.
  virtual void gather(Backend& backend, const Segment::Plan& plan, const char* from, int64_t bytes, char* out) = 0;
  // Idempotent. Ranks that wait for this one get an error.
  virtual void leave() = 0;
};

class SeamGroup final : public Seams {
 public:
  // As Segment.
  SeamGroup(const std::string& path, int rank, int ranks, int64_t slot_bytes, double timeout, double spin)
      : segment_(path, rank, ranks, slot_bytes, timeout, spin) {}

  int rank() const override { return segment_.rank(); }
  int ranks() const override { return segment_.ranks(); }
  double spin() const { return segment_.spin(); }
  void set_spin(double seconds) { segment_.set_spin(seconds); }
  // Gives the first chunk. Throws std::invalid_argument for rows that no slot can hold.
  void start(Backend& backend, SeamCall call) override;
  // The rest of the call that was started.
  void finish(Backend& backend) override;
  void gather(Backend& backend, const Segment::Plan& plan, const char* from, int64_t bytes, char* out) override;
  void leave() override { segment_.leave(); }

 private:
  struct Rows {
    int64_t first, count;
  };

  Rows rows(int rank, int64_t chunk) const;
  char* given(int from, int to, uint32_t chunk) const;
  void cut(const SeamCall& call);
  void give(Backend& backend, int64_t chunk);
  void join(Backend& backend, int64_t chunk);
  void take(Backend& backend, int64_t chunk);
  template <class Give, class Join, class Take>
  void run(const Segment::Plan& plan, int64_t chunks, Give give, Join join, Take take);

  Segment segment_;
  std::optional<SeamCall> call_;  // in flight
  int64_t chunks_ = 0;            // of the call
  int64_t chunk_rows_ = 0;        // of a rank in one chunk, at most
  uint32_t done_ = 0;             // chunks before the call
  std::vector<char> scratch_;     // a chunk of hidden rows that travel quantised
  std::vector<const void*> parts_;
};

}  // namespace weft
