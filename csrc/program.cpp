#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "attention_plan.h"
#include "elementwise.h"

namespace weft {

namespace {

NormCall norm_call(const Step& step, const NormForm& form, Domain domain, int64_t x, int64_t residual, int64_t out) {
  void* sum = residual < 0 ? nullptr : step.at(residual, domain);
  return {form.type, step.at(x, domain),  sum,      form.weight,
          form.eps,  step.rows(domain), form.size, step.at(out, domain)};
}

// Rank r owns rows bounds[r] to bounds[r + 1]: evenly of all rows; of those that are sampled, those it owned before.
std::vector<int64_t> bounds_of(const Step& step, Domain domain, int ranks) {
  std::vector<int64_t> bounds;
  for (int rank = 0; rank <= ranks; rank++) {
    const int64_t bound = rank * step.batch.rows / ranks;
    const auto& rows = step.sampled;
    bounds.push_back(domain == Domain::tokens ? bound : std::lower_bound(rows.begin(), rows.end(), bound) - rows.begin());
  }
  return bounds;
}

// What all ranks must be about to do: the call of this number, for these rows.
uint64_t fingerprint(uint64_t number, int64_t size, const std::vector<int64_t>& bounds) {
  uint64_t mixed = 0xcbf29ce484222325;
  const auto mix = [&mixed](uint64_t word) { mixed = (mixed ^ word) * 0x100000001b3; };
  mix(number), mix(uint64_t(size));
  for (int64_t bound : bounds) mix(uint64_t(bound));
  return mixed;
}

GateCall gate_call(const Step& step, Type type, Domain domain, int64_t gate_up, int64_t size, int64_t out) {
  return {type, step.at(gate_up, domain), step.rows(domain), size, step.at(out, domain)};
}

}  // namespace

void Program::add(Domain domain, Call call) {
  calls_.push_back([domain, call = std::move(call)](const Step& step) {
    if (step.rows(domain) > 0) call(step);
  });
  seconds_.push_back(0);
}

void Program::embed(const PackedEmbedding& table, Type type, int64_t out) {
  embedding_ = &table;
  add(Domain::tokens, [&table, type, out](const Step& step) {
    step.kernels().embed(step.backend.pool(), table.table(), {type, step.tokens, step.batch.rows, step.at(out)});
  });
}

void Program::norm(const NormForm& form, Domain domain, int64_t x, int64_t residual, int64_t out) {
  add(domain, [=](const Step& step) {
    step.kernels().norm(step.backend.pool(), norm_call(step, form, domain, x, residual, out));
  });
}

void Program::linear(const PackedLinear& packed, Domain domain, int64_t x, int64_t y, Type type) {
  add(domain, [=, &packed](const Step& step) {
    step.kernels().linear(step.backend.pool(), packed.weights(), step.at(x, domain), step.rows(domain),
                          step.at(y, domain), type);
  });
}

void Program::quantise(const PackedW4Ax& packed, Domain domain, int64_t x, Type type, int64_t out) {
  add(domain, [=, &packed](const Step& step) {
    const W4AxWeights& weights = packed.weights();
    step.kernels().quantise_w4ax(step.backend.pool(), weights, step.at(x, domain), type,
                                 {step.at(out, domain), step.rows(domain), weights.blocks()});
  });
}

void Program::norm_quantise(const NormForm& form, Domain domain, int64_t x, int64_t residual, int64_t between,
                            const PackedW4Ax& packed, int64_t out) {
  add(domain, [=, &packed](const Step& step) {
    const W4AxWeights& weights = packed.weights();
    step.kernels().norm_quantise(step.backend.pool(), norm_call(step, form, domain, x, residual, between), weights,
                                 {step.at(out, domain), step.rows(domain), weights.blocks()});
  });
}

void Program::silu_mul_quantise(Type type, Domain domain, int64_t gate_up, int64_t size, int64_t between,
                                const PackedW4Ax& packed, int64_t out) {
  add(domain, [=, &packed](const Step& step) {
    const W4AxWeights& weights = packed.weights();
    step.kernels().silu_mul_quantise(step.backend.pool(), gate_call(step, type, domain, gate_up, size, between),
                                     weights, {step.at(out, domain), step.rows(domain), weights.blocks()});
  });
}

void Program::multiply(const PackedW4Ax& packed, Domain domain, int64_t x, int64_t y, Type type) {
  add(domain, [=, &packed](const Step& step) {
    const W4AxWeights& weights = packed.weights();
    step.kernels().multiply_w4ax(step.backend.pool(), weights,
                                 {step.at(x, domain), step.rows(domain), weights.blocks()}, step.at(y, domain), type);
  });
}

void Program::rotary_write(const LayerKv& kv, const RotaryForm& form, int64_t qkv, int64_t q) {
  kv_ = &kv;
  max_positions_ = form.max_positions;
  add(Domain::tokens, [=, &kv](const Step& step) {
    step.kernels().rotary_write(step.backend.pool(), {kv.type(), step.at(qkv), form.cos, form.sin, kv.view(), step.batch,
                                                      form.heads, form.q_norm, form.k_norm, form.eps, step.at(q)});
  });
}

void Program::attention(const LayerKv& kv, const AttentionForm& form, int64_t q, int64_t out) {
  add(Domain::tokens, [=, &kv](const Step& step) {
    AttentionCall call{};
    call.type = kv.type();
    call.q = step.at(q);
    call.out = step.at(out);
    call.kv = kv.view();
    call.batch = step.batch;
    call.heads = form.heads;
    call.scale = form.scale;
    call.window = form.window;
    attend(step.backend, call);
  });
}

void Program::silu_mul(Type type, Domain domain, int64_t gate_up, int64_t size, int64_t out) {
  add(domain, [=](const Step& step) {
    step.kernels().silu_mul(step.backend.pool(), gate_call(step, type, domain, gate_up, size, out));
  });
}

void Program::best(int64_t x, int64_t size) {
  add(Domain::sampled, [=, this](const Step& step) {
    const int64_t rows = step.rows(Domain::sampled);
    best_.resize(size_t(rows));
    step.kernels().best_of_rows(step.backend.pool(), {step.at<float>(x, Domain::sampled), rows, size, best_.data()});
  });
}

void Program::take(int64_t x, int64_t row_bytes, int64_t out) {
  add(Domain::sampled, [=](const Step& step) {
    const char* from = step.at<char>(x);
    char* to = step.at<char>(out, Domain::sampled);
    for (int64_t row : step.sampled) {
      memcpy(to, from + row * row_bytes, size_t(row_bytes));
      to += row_bytes;
    }
  });
}

void Program::seam(Seams& group, const NormForm& form, Domain domain, int64_t x, int64_t residual, int64_t out) {
  ranked_ = true;
  add(domain, [=, &group, number = calls_.size()](const Step& step) {
    const std::vector<int64_t> bounds = bounds_of(step, domain, group.ranks());
    group.start(step.backend, {
        .plan = {fingerprint(number, form.size, bounds), bounds.back()},
        .type = form.type,
        .part_type = form.type,
        .partial = step.at<char>(x, domain),
        .bounds = bounds,
        .residual = step.at<char>(residual, domain),
        .weight = form.weight,
        .eps = form.eps,
        .size = form.size,
        .hidden = step.at<char>(out, domain),
        .quantised = nullptr,
        .form = nullptr,
    });
    group.finish(step.backend);
  });
}

void Program::own_rows(Seams& group, int64_t x, int64_t row_bytes, int64_t out) {
  add(Domain::tokens, [=, &group](const Step& step) {
    const int rank = group.rank();
    const std::vector<int64_t> bounds = bounds_of(step, Domain::tokens, group.ranks());
    const int64_t first = bounds[size_t(rank)], own = bounds[size_t(rank) + 1] - first;
    if (own > 0) memcpy(step.at<char>(out), step.at<char>(x) + first * row_bytes, size_t(own * row_bytes));
  });
}

void Program::take_own(Seams& group, int64_t residual, int64_t row_bytes, int64_t out) {
  ranked_ = true;
  add(Domain::sampled, [=, &group](const Step& step) {
    const int rank = group.rank();
    const int64_t first = bounds_of(step, Domain::tokens, group.ranks())[size_t(rank)];
    const std::vector<int64_t> bounds = bounds_of(step, Domain::sampled, group.ranks());
    const char* from = step.at<char>(residual);
    char* to = step.at<char>(out, Domain::sampled);
    for (int64_t i = bounds[size_t(rank)]; i < bounds[size_t(rank) + 1]; i++, to += row_bytes)
      memcpy(to, from + (step.sampled[size_t(i)] - first) * row_bytes, size_t(row_bytes));
  });
}

void Program::check(const BatchView& batch, const int64_t* tokens, const std::vector<int64_t>& sampled, size_t first,
                    size_t last) const {
  if (first > last || last > calls_.size())
    throw std::invalid_argument("calls " + std::to_string(first) + " to " + std::to_string(last) +
                                "; the program has " + std::to_string(calls_.size()));
  if (batch.rows > max_rows_[0] || int64_t(sampled.size()) > max_rows_[1])
    throw std::invalid_argument("a step of " + std::to_string(batch.rows) + " rows, " + std::to_string(sampled.size()) +
                                " of them sampled; the program was made for " + std::to_string(max_rows_[0]) +
                                " and " + std::to_string(max_rows_[1]));
  for (int64_t row : sampled)
    if (row < 0 || row >= batch.rows)
      throw std::invalid_argument("there is no row " + std::to_string(row) + " to sample after; the batch has " +
                                  std::to_string(batch.rows));
  if (ranked_ && !std::is_sorted(sampled.begin(), sampled.end()))
    throw std::invalid_argument("the rows to sample after must be in ascending order");
  if (embedding_ != nullptr) embedding_->check(tokens, batch.rows);
  if (kv_ == nullptr) return;
  check_slices(batch, kv_->view());
  check_rows(batch, kv_->view(), max_positions_);
}

void Program::run(Backend& backend, const BatchView& batch, const int64_t* tokens,
                  const std::vector<int64_t>& sampled, size_t first, size_t last) {
  check(batch, tokens, sampled, first, last);
  best_.clear();
  const Step step{backend, batch, tokens, sampled, {arenas_[0], arenas_[1]}};
  for (size_t i = first; i < last; i++) calls_[i](step);
}

void Program::run_timed(Backend& backend, const BatchView& batch, const int64_t* tokens,
                        const std::vector<int64_t>& sampled, size_t first, size_t last) {
  using Clock = std::chrono::steady_clock;
  check(batch, tokens, sampled, first, last);
  best_.clear();
  const Step step{backend, batch, tokens, sampled, {arenas_[0], arenas_[1]}};
  for (size_t i = first; i < last; i++) {
    const auto begin = Clock::now();
    calls_[i](step);
    seconds_[i] += std::chrono::duration<double>(Clock::now() - begin).count();
  }
}

}  // namespace weft
