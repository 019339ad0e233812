// Checks of a batch against the KV, and how its attention is cut into units.
#pragma once

#include <vector>

#include "attention.h"
#include "backend.h"

namespace weft {

// Throws std::invalid_argument, before memory is touched, where a batch reaches outside of the KV or is no batch.
void check_slices(const BatchView& batch, const KvView& kv);
void check_rows(const BatchView& batch, const KvView& kv, int64_t max_positions);

struct AttentionPlan {
  std::vector<Unit> units;
  std::vector<Unit> merges;  // each split unit as a whole
  int64_t partials = 0;      // partitions of which the totals are kept
  bool shared = false;
};

// Results do not depend on the number of threads that it plans for.
AttentionPlan plan_attention(const AttentionCall& call, int threads);

// Checks the call, plans how its work is cut (the fields below `window`) and carries it out.
void attend(Backend& backend, AttentionCall& call);

}  // namespace weft
