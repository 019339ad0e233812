#include "attention_plan.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace weft {
namespace {

constexpr double WORTH_SHARING = 2e6;  // flops; less than that is done before another thread wakes

std::string in_slice(int64_t slice) { return " in slice " + std::to_string(slice); }

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check_table(const BatchView& batch, const KvView& kv, int64_t slice) {
  const int64_t context = batch.contexts[slice];
  const int64_t needed = (context + kv.block_size - 1) / kv.block_size;
  if (needed > batch.table_width)
    refuse("a context of " + std::to_string(context) + " needs " + std::to_string(needed) + " blocks, the table has " +
           std::to_string(batch.table_width) + in_slice(slice));
  const int32_t* table = batch.tables + slice * batch.table_width;
  for (int64_t i = 0; i < needed; i++)
    if (table[i] < 0 || table[i] >= kv.blocks)
      refuse("there is no block " + std::to_string(table[i]) + in_slice(slice) + "; the KV has " +
             std::to_string(kv.blocks));
}

// The unit of these rows, over all partitions that they see.
Unit whole_unit(const AttentionCall& call, int64_t slice, int64_t kv_head, int64_t first_row, int64_t rows) {
  const BatchView& batch = call.batch;
  const int64_t before = int64_t{batch.contexts[slice]} - (batch.starts[slice + 1] - batch.starts[slice]);
  const int64_t first = before + first_row / call.group();
  const int64_t last = before + (first_row + rows - 1) / call.group();
  const int64_t seen_from = call.window > 0 ? std::max<int64_t>(0, first - call.window + 1) : 0;
  return {slice, kv_head, first_row, rows, seen_from / PARTITION, last / PARTITION + 1, -1};
}

double work_of(const AttentionCall& call, const Unit& unit) {
  const int64_t positions = (unit.end_partition - unit.first_partition) * PARTITION;
  return 4.0 * double(unit.rows) * double(positions) * double(call.kv.head_dim);
}

}  // namespace

void check_slices(const BatchView& batch, const KvView& kv) {
  if (batch.starts[0] != 0 || batch.starts[batch.slices] != batch.rows)
    refuse("starts must go from 0 to the number of rows, " + std::to_string(batch.rows));
  for (int64_t s = 0; s < batch.slices; s++) {
    const int64_t rows = int64_t{batch.starts[s + 1]} - batch.starts[s];
    if (rows < 0 || batch.contexts[s] < rows)
      refuse(std::to_string(rows) + " rows with a context of " + std::to_string(batch.contexts[s]) + in_slice(s));
    check_table(batch, kv, s);
  }
}

void check_rows(const BatchView& batch, const KvView& kv, int64_t max_positions) {
  const int64_t slots = kv.blocks * kv.block_size;
  for (int64_t row = 0; row < batch.rows; row++) {
    if (batch.slots[row] < 0 || batch.slots[row] >= slots)
      refuse("there is no slot " + std::to_string(batch.slots[row]) + " for row " + std::to_string(row) +
             "; the KV has " + std::to_string(slots));
    if (batch.positions[row] < 0 || batch.positions[row] >= max_positions)
      refuse("row " + std::to_string(row) + " is at position " + std::to_string(batch.positions[row]) +
             "; the rotary tables have " + std::to_string(max_positions));
  }
}

namespace {

// Units of at most UNIT_ROWS rows, whole; their work is added to `work`.
std::vector<Unit> whole_units(const AttentionCall& call, double& work) {
  std::vector<Unit> units;
  for (int64_t s = 0; s < call.batch.slices; s++) {
    const int64_t rows = (call.batch.starts[s + 1] - call.batch.starts[s]) * call.group();
    const int64_t pieces = (rows + UNIT_ROWS - 1) / UNIT_ROWS;
    for (int64_t head = 0; head < call.kv.kv_heads; head++)
      for (int64_t i = 0; i < pieces; i++) {  // of sizes that differ by one at most
        const int64_t first = rows * i / pieces, end = rows * (i + 1) / pieces;
        units.push_back(whole_unit(call, s, head, first, end - first));
        work += work_of(call, units.back());
      }
  }
  return units;
}

void split(const Unit& unit, int64_t pieces, AttentionPlan& plan) {
  const int64_t span = unit.end_partition - unit.first_partition;
  plan.merges.push_back(unit);
  plan.merges.back().partial = plan.partials;
  for (int64_t i = 0; i < pieces; i++) {
    const int64_t first = span * i / pieces, end = span * (i + 1) / pieces;
    plan.units.push_back({unit.slice, unit.kv_head, unit.first_row, unit.rows, unit.first_partition + first,
                          unit.first_partition + end, plan.partials + first});
  }
  plan.partials += span;
}

}  // namespace

AttentionPlan plan_attention(const AttentionCall& call, int threads) {
  AttentionPlan plan;
  double work = 0;
  std::vector<Unit> whole = whole_units(call, work);
  plan.shared = threads > 1 && work > WORTH_SHARING;
  if (!plan.shared) {
    plan.units = std::move(whole);
    return plan;
  }
  // A unit that would keep one thread busy when the others have nothing left is split over the sequence.
  const double fair = work / (4 * threads);
  plan.units.reserve(whole.size());
  for (const Unit& unit : whole) {
    const int64_t pieces = std::min(unit.end_partition - unit.first_partition, int64_t(work_of(call, unit) / fair));
    if (pieces > 1)
      split(unit, pieces, plan);
    else
      plan.units.push_back(unit);
  }
  return plan;
}

void attend(Backend& backend, AttentionCall& call) {
  check_slices(call.batch, call.kv);
  const AttentionPlan plan = plan_attention(call, backend.pool().size());
  std::unique_ptr<float[]> partials;
  if (plan.partials > 0) partials.reset(new float[size_t(plan.partials * UNIT_ROWS * call.kv.totals())]);
  call.shared = plan.shared;
  call.units = plan.units.data();
  call.unit_count = int64_t(plan.units.size());
  call.merges = plan.merges.data();
  call.merge_count = int64_t(plan.merges.size());
  call.partials = partials.get();
  backend.kernels().attention(backend.pool(), call);
}

}  // namespace weft
