// The kernel calls of a model, recorded once and replayed for any number of rows: a step is one call from Python.
//
// Values live in two arenas: one has a row for each token of the batch, one for each token that is sampled after (which
// may be none: calls with no rows are left out). The
// place of a value is an offset in bytes per row, a multiple of a cache line: with n rows it begins n times as far from
// the arena's start. So one program serves every number of rows, and few rows lie close together.
//
// A program belongs to one lane, and only its thread runs it. Whoever records it keeps weights, KV and tables alive,
// and sees to it that the shapes fit; a batch is checked by run(), before memory is touched.
#pragma once

#include <functional>
#include <vector>

#include "elementwise.h"
#include "packed.h"
#include "seam.h"
#include "step_batch.h"

namespace weft {

// Rows of the two arenas.
enum class Domain : int { tokens = 0, sampled = 1 };

// What one run is told.
struct Step {
  Backend& backend;
  const BatchView& batch;
  const int64_t* tokens;
  const std::vector<int64_t>& sampled;  // rows of the batch
  char* arenas[2];

  const Kernels& kernels() const { return backend.kernels(); }
  int64_t rows(Domain domain) const { return domain == Domain::tokens ? batch.rows : int64_t(sampled.size()); }
  template <class T = void>
  T* at(int64_t place, Domain domain = Domain::tokens) const {
    return reinterpret_cast<T*>(arenas[int(domain)] + place * rows(domain));
  }
};

// The norm of a row, with the residual added first; as in NormCall.
struct NormForm {
  Type type;
  const void* weight;
  float eps;
  int64_t size;
};

struct RotaryForm {
  const float *cos, *sin;
  int64_t max_positions, heads;
  const void *q_norm, *k_norm;
  float eps;
};

struct AttentionForm {
  int64_t heads;
  float scale;
  int64_t window;
};

class Program {
 public:
  // Arenas for so many rows at most.
  Program(char* arena, int64_t max_rows, char* sampled_arena, int64_t max_sampled)
      : arenas_{arena, sampled_arena}, max_rows_{max_rows, max_sampled} {}

  // Recording: each appends one call. Numbers are places; `residual` is negative for none.
  void embed(const PackedEmbedding& table, Type type, int64_t out);
  void norm(const NormForm& form, Domain domain, int64_t x, int64_t residual, int64_t out);
  void linear(const PackedLinear& packed, Domain domain, int64_t x, int64_t y, Type type);
  void quantise(const PackedW4Ax& packed, Domain domain, int64_t x, Type type, int64_t out);
  // A norm, or a gated activation, and quantise() of what it gives, in one pass. `between`: room for that, and not kept.
  void norm_quantise(const NormForm& form, Domain domain, int64_t x, int64_t residual, int64_t between,
                     const PackedW4Ax& packed, int64_t out);
  void silu_mul_quantise(Type type, Domain domain, int64_t gate_up, int64_t size, int64_t between,
                         const PackedW4Ax& packed, int64_t out);
  void multiply(const PackedW4Ax& packed, Domain domain, int64_t x, int64_t y, Type type);
  void rotary_write(const LayerKv& kv, const RotaryForm& form, int64_t qkv, int64_t q);
  void attention(const LayerKv& kv, const AttentionForm& form, int64_t q, int64_t out);
  void silu_mul(Type type, Domain domain, int64_t gate_up, int64_t size, int64_t out);
  void best(int64_t x, int64_t size);  // of each sampled row of floats
  void take(int64_t x, int64_t row_bytes, int64_t out);  // the sampled rows of a value
  // A seam of ranks (weave/collective.py), between rows that are evenly owned. The residual has this rank's own rows only,
  // from its place on.
  void seam(Seams& group, const NormForm& form, Domain domain, int64_t x, int64_t residual, int64_t out);
  void own_rows(Seams& group, int64_t x, int64_t row_bytes, int64_t out);         // of all rows: the first residual
  void take_own(Seams& group, int64_t residual, int64_t row_bytes, int64_t out);  // those that are sampled

  // Replays the calls from `first` to before `last`: a step may be cut anywhere, if its parts follow each other with the
  // same batch. Throws std::invalid_argument for a batch that does not fit.
  void run(Backend& backend, const BatchView& batch, const int64_t* tokens, const std::vector<int64_t>& sampled,
           size_t first, size_t last);

  // The same, and adds the seconds of each call to seconds().
  void run_timed(Backend& backend, const BatchView& batch, const int64_t* tokens, const std::vector<int64_t>& sampled,
                 size_t first, size_t last);
  // Of each sampled row of the last run.
  const std::vector<Best>& best() const { return best_; }
  StepBatch& batch() { return batch_; }  // for whoever runs it to fill
  const std::vector<double>& seconds() const { return seconds_; }

 private:
  using Call = std::function<void(const Step&)>;

  void add(Domain domain, Call call);  // whose rows it computes
  void check(const BatchView& batch, const int64_t* tokens, const std::vector<int64_t>& sampled, size_t first,
             size_t last) const;

  char* arenas_[2];
  int64_t max_rows_[2];
  std::vector<Call> calls_;
  std::vector<double> seconds_;  // of each call
  std::vector<Best> best_;
  StepBatch batch_;
  const PackedEmbedding* embedding_ = nullptr;
  bool ranked_ = false;  // sampled rows must be in ascending order
  // One KV with each of the checks that a batch must pass: layers of one model differ in nothing that they look at.
  const LayerKv* kv_ = nullptr;
  int64_t max_positions_ = 0;
};

}  // namespace weft
