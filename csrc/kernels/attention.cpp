// Paged causal attention at one level. Prefill and decode are the same routine over some rows of one kv head.
//
// Work per row and sixteen positions at head_dim D: 2 * 16 D flops for the scores, as many for the values, and about
// twenty vector instructions for the softmax. With AVX-512 BF16 and D = 64 that is 32 + 32 dot products of a register,
// a cycle each, and ten to twenty cycles: some seven tenths of the time goes into the products. K and V come from L2
// once per unit of up to UNIT_ROWS rows. Decode reads them from memory, 4 D bytes per position and kv head, against 100
// cycles for sixteen positions of each of its query heads.
//
// Invariant: a row's bits depend on its own query and on the keys and values that it sees, and on nothing else. Its
// sums run over lanes and partitions that absolute positions fix (attention.h). A position that it does not see weighs
// exactly 0 in them; adding 0 changes nothing, so it does not matter how many of those a unit computes for its other
// rows. Only a NaN or infinity in a value that the row must not see could matter (0 * NaN): so a row that comes out not
// finite is computed again alone, with zeros in the place of such values. Codes are finite always; the scales of positions
// that a row does not see are kept from it.
//
// A KV of codes (kernels/kv.py): with scale s and zero z of a position, q . k = s (q . code - z sum(q)); with AVX-512 and
// activations of bfloat16 q is rounded to 8 bits for it, row by row, and the products are integers. A value's scale
// goes into its weight, w s, and what its zero takes off, sum(w s z), is the same for all channels.
#include "kernels/attention_tiles.h"
#include "kernels/kv_codes.h"

namespace weft::WEFT_LEVEL {
namespace {

constexpr int64_t VECTORS = PARTITION / lanes;  // a partition's positions, in vectors
constexpr float NO_SCORE = -1e30f;              // the greatest score of a row that has seen nothing yet
constexpr float LOG2_E = 1.44269504f;
constexpr int64_t DECODE_ROWS = 12;             // so few rows are most likely those of one token
constexpr int64_t PADDED_ROWS = (UNIT_ROWS + lanes - 1) / lanes * lanes;


template <class X>
constexpr bool CODES = X::C > 2;

// One thread's working memory for one unit.
template <class X>
struct Work {
  using Factor = typename X::Factor;
  alignas(64) float scores[UNIT_ROWS][PARTITION];
  alignas(64) Factor weights[UNIT_ROWS][PARTITION];
  alignas(64) typename X::QueryFactor queries[UNIT_ROWS * MAX_HEAD_DIM];  // [rows][head_dim]
  alignas(64) float totals[UNIT_ROWS * (VALUES + MAX_HEAD_DIM)];
  alignas(64) float keep[PADDED_ROWS], add[PADDED_ROWS];  // factors of the old totals and of a partition's
  int64_t from[UNIT_ROWS], until[UNIT_ROWS];  // the positions that each row sees
  const char* keys[VECTORS + TILE_VECTORS];   // of each vector of positions, and of the next ones: see look_ahead
  const char* values[VECTORS];

  float steps[UNIT_ROWS];  // what each row's query, and so its scores, are counted in

  // Where they are codes: what belongs to the positions (zeros in steps of a code), and for each row minus the sum of
  // its query, and the sum of its weights with the zeros of the values.
  alignas(64) float key_scales[PARTITION], key_zeros[PARTITION], value_scales[PARTITION];
  alignas(64) Factor value_zeros[PARTITION] = {};  // finite everywhere
  float minus[UNIT_ROWS], zeros[UNIT_ROWS];
};

void clear_totals(float* totals, int64_t rows, int64_t size) {
  for (int64_t i = 0; i < rows * size; i++) totals[i] = 0;
  for (int64_t row = 0; row < rows; row++) totals[row * size + TOP] = NO_SCORE;
}

// Zeros as they are stored -> in steps of a code.
template <class X>
WEFT_INLINE f32v load_zeros(const uint8_t* from) {
  return __builtin_convertvector(load_bytes(from), f32v) * (1 / ZERO_STEPS<32 / X::C>);
}

// Slots of a sequence in the order of its positions, by the block table. Divides once only.
class Slots {
 public:
  WEFT_INLINE Slots from(const AttentionCall& call, const Unit& unit, int64_t position) {
    const int32_t* table = call.batch.tables + unit.slice * call.batch.table_width;
    return {call.kv, table + position / call.kv.block_size, unit.kv_head, position % call.kv.block_size};
  }
  void advance(int64_t slots) {
    offset_ += slots;
    if (offset_ == kv_.block_size) block_++, offset_ = 0;
  }
  template <class X>
  const char* keys() const {
    return kv_.keys + (head() * kv_.head_dim / X::C * kv_.block_size + offset_) * 4;
  }
  template <class X>
  const char* values() const {
    return kv_.values + (head() * kv_.block_size + offset_) / X::S * (kv_.width() / X::V) * 4;
  }
  const KvNumbers* numbers() const { return kv_.numbers + (head() * kv_.block_size + offset_) / NUMBERS; }
  int64_t offset() const { return offset_; }

 private:
  Slots(const KvView& kv, const int32_t* block, int64_t kv_head, int64_t offset)
      : kv_(kv), block_(block), kv_head_(kv_head), offset_(offset) {}
  int64_t head() const { return *block_ * kv_.kv_heads + kv_head_; }  // of all heads of all blocks

  const KvView& kv_;
  const int32_t* block_;
  int64_t kv_head_, offset_;
};

// Where each vector of positions of the partition lies.
template <class X>
void find_vectors(const AttentionCall& call, const Unit& unit, int64_t start, int64_t first, int64_t end,
                  Work<X>& work) {
  Slots slots = Slots::from(call, unit, start + first * lanes);
  for (int64_t v = first; v < end; v++, slots.advance(lanes)) {
    work.keys[v] = slots.keys<X>();
    work.values[v] = slots.values<X>();
    if constexpr (CODES<X>) {
      const KvNumbers& from = *slots.numbers();
      const int64_t i = slots.offset() % NUMBERS, at = v * lanes;
      store(work.key_scales + at, load_bf16(from.key_scales + i));
      store(work.key_zeros + at, load_zeros<X>(from.key_zeros + i) + (X::INTEGERS ? 0 : X::EXCESS));
      store(work.value_scales + at, load_bf16(from.value_scales + i));
      X::put_factors(work.value_zeros + at, load_zeros<X>(from.value_zeros + i));
    }
  }
}

// What the next partition begins with, for decode to ask for in time: its first keys, and all numbers.
template <class X>
void look_ahead(const AttentionCall& call, const Unit& unit, int64_t start, int64_t end, Work<X>& work) {
  for (int64_t i = 0; i < TILE_VECTORS; i++) work.keys[end + i] = work.keys[end - 1];
  const int64_t seen = work.until[unit.rows - 1] - (start + PARTITION);  // positions of the next ones
  if (seen <= 0) return;
  Slots slots = Slots::from(call, unit, start + PARTITION);
  for (int64_t v = 0; v < VECTORS && v * lanes < seen; v++, slots.advance(lanes)) {
    if (v < TILE_VECTORS) work.keys[end + v] = slots.keys<X>();
    __builtin_prefetch(slots.numbers());
    __builtin_prefetch(reinterpret_cast<const char*>(slots.numbers() + 1) - 1);
  }
}

template <class X>
void score(const AttentionCall& call, const Unit& unit, int64_t first, int64_t end, Work<X>& work) {
  const int64_t depth = call.kv.head_dim;
  const bool decode = unit.rows <= DECODE_ROWS;
  for (int64_t from = first; from < end; from += TILE_VECTORS)  // so many keys stay in L1 for all rows
    for_tiles<X>(unit.rows, [&](int64_t row, int64_t rows) {
      const int64_t until = end < from + TILE_VECTORS ? end : from + TILE_VECTORS, most = X::vectors(int(rows));
      for (int64_t v = from; v < until; v += most)
        TILES<X>.score[rows][until - v < most ? until - v : most](
            work.queries + row * depth, depth, work.keys + v, call.kv.block_size * 4,
            decode && row == 0 ? work.values + v : nullptr,
            {work.key_scales + v * lanes, work.key_zeros + v * lanes, work.minus + row}, &work.scores[row][v * lanes]);
    });
}

// The vectors of positions that a row sees only in part, or not at all.
struct Seen {
  int64_t from, until;  // of the partition's positions

  WEFT_INLINE f32v or_else(f32v x, int64_t v, float other, const Seen& seen) {
    const int64_t begin = seen.from - v * lanes, end = seen.until - v * lanes;
    return begin > 0 || end < lanes ? lanes_or(x, int(begin), int(end), splat(other)) : x;
  }
};

// Scores -> weights of one row. Returns the greatest score, scaled, and the sum of the weights. Vectors are taken in
// pairs, so that there may be one more at either end: nothing in it is seen.
template <class X>
void weigh(Work<X>& work, int64_t row, int64_t first, int64_t end, const Seen& seen, float factor, float& top,
           float& sum_of_weights) {
  float* scores = work.scores[row];
  first = first / 2 * 2;
  f32v greatest_yet = splat(-__builtin_inff());
  for (int64_t v = first; v < end; v += 2)
    for (int64_t i = v; i < v + 2; i++) {
      const f32v x = Seen::or_else(load<f32v>(scores + i * lanes), i, -__builtin_inff(), seen);
      store(scores + i * lanes, x);
      greatest_yet = max(x, greatest_yet);
    }
  top = greatest(greatest_yet) * factor;
  if (!(top > NO_SCORE)) top = NO_SCORE;
  f32v total{}, zeros{}, stored_total{};
  for (int64_t v = first; v < end; v += 2) {
    f32v x[2];
    for (int i = 0; i < 2; i++) x[i] = exp2(fma(load<f32v>(scores + (v + i) * lanes), splat(factor), splat(-top)));
    typename X::Factor* weights = work.weights[row] + v * lanes;
    if constexpr (CODES<X>) {
      total = total + x[0] + x[1];
      for (int i = 0; i < 2; i++)
        x[i] = x[i] * Seen::or_else(load<f32v>(work.value_scales + (v + i) * lanes), v + i, 0.0f, seen);
      const typename X::Stored stored = X::put(weights, x[0], x[1]);
      zeros = X::add_stored(zeros, stored, work.value_zeros + v * lanes);
      if (X::EXCESS != 0) stored_total = X::add_stored(stored_total, stored);
    } else {
      total = X::add_stored(total, X::put(weights, x[0], x[1]));
    }
  }
  sum_of_weights = sum(total);
  if constexpr (CODES<X>) work.zeros[row] = sum(fma(stored_total, splat(X::EXCESS), zeros));
}

// Softmax over the partition, and the factors by which its sums and the rows' totals join: totals are brought to the
// greater of both tops.
template <class X>
void weigh_rows(const AttentionCall& call, const Unit& unit, int64_t start, int64_t first, int64_t end, Work<X>& work,
                float* totals) {
  const int64_t size = call.kv.totals();
  float sums[UNIT_ROWS];
  for (int64_t row = 0; row < unit.rows; row++) {
    float top;
    weigh(work, row, first, end, {work.from[row] - start, work.until[row] - start}, call.scale * LOG2_E * work.steps[row], top,
          sums[row]);
    float& total = totals[row * size + TOP];
    const float greater = top > total ? top : total;
    work.keep[row] = total - greater;
    work.add[row] = top - greater;
    total = greater;
  }
  for (int64_t row = 0; row < unit.rows; row += lanes) {
    store(work.keep + row, exp2(load<f32v>(work.keep + row)));
    store(work.add + row, exp2(load<f32v>(work.add + row)));
  }
  for (int64_t row = 0; row < unit.rows; row++) {
    float& total = totals[row * size + SUM];
    total = total * work.keep[row] + sums[row] * work.add[row];
  }
}

template <class X>
void add_values(const AttentionCall& call, const Unit& unit, int64_t first, int64_t end, Work<X>& work, float* totals) {
  const int64_t width = call.kv.width(), vectors = width / lanes;
  for_tiles<X>(unit.rows, [&](int64_t row, int64_t rows) {
    const int64_t most = X::vectors(int(rows));
    const Joint joint = {work.keep + row, work.add + row, work.zeros + row};
    for (int64_t v = 0; v < vectors; v += most)
      TILES<X>.value[rows][vectors - v < most ? vectors - v : most](&work.weights[row][first * lanes], end - first,
                                                                    work.values + first, v, width, joint,
                                                                    totals + row * call.kv.totals());
  });
}

// The values of a vector of positions, with zeros at those outside [from, until).
template <class T>
void copy_seen(const char* values, int64_t from, int64_t until, int64_t width, T* copy) {
  constexpr int S = 4 / sizeof(T);
  memcpy(copy, values, size_t(lanes * width) * sizeof(T));
  for (int64_t i = 0; i < lanes; i++)
    if (i < from || i >= until)
      for (int64_t c = 0; c < width; c++) copy[(i / S * width + c) * S + i % S] = 0;
}

// Joins one partition to the rows' totals. `alone`: one row, of which no unseen value may be touched.
template <class X>
void attend_partition(const AttentionCall& call, const Unit& unit, int64_t partition, bool alone, Work<X>& work,
                      float* totals) {
  const int64_t start = partition * PARTITION;
  const int64_t seen_from = work.from[0] - start, seen_until = work.until[unit.rows - 1] - start;
  const int64_t first = seen_from > 0 ? seen_from / lanes : 0;
  const int64_t end = seen_until < PARTITION ? (seen_until + lanes - 1) / lanes : VECTORS;
  find_vectors(call, unit, start, first, end, work);
  if (CODES<X> && unit.rows <= DECODE_ROWS) look_ahead(call, unit, start, end, work);
  score(call, unit, first, end, work);
  weigh_rows(call, unit, start, first, end, work, totals);
  typename X::Query copies[2][CODES<X> ? 1 : lanes * MAX_HEAD_DIM];
  if (!CODES<X> && alone)  // only the first and the last vector can hold values that the row does not see
    for (int64_t i = 0, v = first; i < (first < end - 1 ? 2 : 1); i++, v = end - 1) {
      copy_seen(work.values[v], seen_from - v * lanes, seen_until - v * lanes, call.kv.width(), copies[i]);
      work.values[v] = reinterpret_cast<const char*>(copies[i]);
    }
  add_values(call, unit, first, end, work, totals);
}

// Where a row of the unit is in queries and outputs, which are [tokens][heads][head_dim].
int64_t place_of(const AttentionCall& call, const Unit& unit, int64_t row) {
  const int64_t group = call.group(), number = unit.first_row + row;
  const int64_t token = call.batch.starts[unit.slice] + number / group;
  return (token * call.heads + unit.kv_head * group + number % group) * call.kv.head_dim;
}

// The rows' queries, and the positions that each row sees.
template <class X>
void prepare(const AttentionCall& call, const Unit& unit, Work<X>& work) {
  using Query = typename X::Query;
  const BatchView& batch = call.batch;
  const int64_t depth = call.kv.head_dim;
  const auto* queries = static_cast<const Query*>(call.q);
  for (int64_t row = 0; row < unit.rows; row++)  // they are no longer in L1
    for (int64_t d = 0; d < depth; d += 64 / int64_t(sizeof(Query)))
      __builtin_prefetch(queries + place_of(call, unit, row) + d);
  for (int64_t row = 0; row < unit.rows; row++) {
    const int64_t token = (unit.first_row + row) / call.group();
    const int64_t end = batch.starts[unit.slice + 1];
    work.until[row] = batch.contexts[unit.slice] - (end - batch.starts[unit.slice]) + token + 1;
    const bool all = call.window == 0 || call.window >= work.until[row];
    work.from[row] = all ? 0 : work.until[row] - call.window;
    const QueryNumbers numbers = X::take(queries + place_of(call, unit, row), depth, work.queries + row * depth);
    work.steps[row] = numbers.step;
    work.minus[row] = numbers.minus;
  }
}

template <class X>
void attend_alone(const AttentionCall& call, const Unit& unit, int64_t row);

// The same for one row over codes, [width] -> [head_dim]: what was spread is gathered.
template <class T>
void finish_codes(const KvView& kv, const float* values, float sum_of_weights, T* out) {
  alignas(64) float floats[MAX_HEAD_DIM];
  for (int64_t c = 0; c < kv.head_dim; c += lanes)
    store(floats + c, load<f32v>(values + c) * splat(1 / sum_of_weights) + splat(0.0f));
  if (kv.spread()) gather(floats, kv.head_dim);
  for (int64_t c = 0; c < kv.head_dim; c += lanes) store_some(out + c, load<f32v>(floats + c), kv.head_dim - c);
}

// Writes the rows out. A row that is not finite is done again, if `retry`: see the invariant above.
template <class X>
void finish(const AttentionCall& call, const Unit& unit, const float* totals, bool retry) {
  const int64_t depth = call.kv.head_dim, size = call.kv.totals();
  for (int64_t row = 0; row < unit.rows; row++) {
    auto* out = static_cast<typename X::Query*>(call.out) + place_of(call, unit, row);
    const float* values = totals + row * size + VALUES;
    if constexpr (CODES<X>) {
      finish_codes(call.kv, values, totals[row * size + SUM], out);
      continue;
    }
    f32v zero_if_finite{};
    for (int64_t c = 0; c < depth; c += lanes) {
      // + 0 makes of -0, which a sum of underflows may give, the +0 that another tile gives
      const f32v x = load<f32v>(values + c) / splat(totals[row * size + SUM]) + splat(0.0f);
      store_some(out + c, x, depth - c);
      zero_if_finite = fma(lanes_or(x, 0, int(depth - c), f32v{}), f32v{}, zero_if_finite);
    }
    if (retry && sum(zero_if_finite) != 0) attend_alone<X>(call, unit, row);
  }
}

template <class X>
void attend_alone(const AttentionCall& call, const Unit& unit, int64_t row) {
  Work<X> work;
  const Unit one = {unit.slice, unit.kv_head, unit.first_row + row, 1, 0, 0, -1};
  prepare(call, one, work);
  clear_totals(work.totals, 1, call.kv.totals());
  for (int64_t p = work.from[0] / PARTITION; p * PARTITION < work.until[0]; p++)
    attend_partition(call, one, p, true, work, work.totals);
  finish<X>(call, one, work.totals, false);
}

template <class X>
void attend(const AttentionCall& call, const Unit& unit) {
  Work<X> work;
  prepare(call, unit, work);
  const int64_t size = call.kv.totals();
  if (unit.partial < 0) clear_totals(work.totals, unit.rows, size);
  for (int64_t p = unit.first_partition; p < unit.end_partition; p++) {
    float* totals = work.totals;
    if (unit.partial >= 0) {
      totals = call.partials + (unit.partial + p - unit.first_partition) * UNIT_ROWS * size;
      clear_totals(totals, unit.rows, size);
    }
    attend_partition(call, unit, p, false, work, totals);
  }
  if (unit.partial < 0) finish<X>(call, unit, work.totals, true);
}

// Joins the partitions of a split unit in order, with the operations of weigh_rows and value_tile.
template <class X>
void merge(const AttentionCall& call, const Unit& unit) {
  const int64_t size = call.kv.totals();
  float* totals = call.partials + unit.partial * UNIT_ROWS * size;
  for (int64_t p = 1; p < unit.end_partition - unit.first_partition; p++)
    for (int64_t row = 0; row < unit.rows; row++) {
      float* total = totals + row * size;
      const float* part = total + p * UNIT_ROWS * size;
      const float greater = part[TOP] > total[TOP] ? part[TOP] : total[TOP];
      const float keep = exp2(splat(total[TOP] - greater))[0], add = exp2(splat(part[TOP] - greater))[0];
      total[TOP] = greater;
      total[SUM] = total[SUM] * keep + part[SUM] * add;
      for (int64_t c = VALUES; c < size; c += lanes)
        store(total + c, fma(load<f32v>(total + c), splat(keep), load<f32v>(part + c) * add));
    }
  finish<X>(call, unit, totals, true);
}

template <class X>
void attend_all(Pool& pool, const AttentionCall& call) {
  if (!call.shared) {
    for (int64_t i = 0; i < call.unit_count; i++) attend<X>(call, call.units[i]);
    return;
  }
  pool.run(call.unit_count, [&](int64_t i, int) { attend<X>(call, call.units[i]); });
  pool.run(call.merge_count, [&](int64_t i, int) { merge<X>(call, call.merges[i]); });
}

template <class T>
void attend_as(Pool& pool, const AttentionCall& call) {
  if (call.kv.bits == 4) return attend_all<Product<T, 4>>(pool, call);
  if (call.kv.bits == 8) return attend_all<Product<T, 8>>(pool, call);
  attend_all<Product<T, 0>>(pool, call);
}

}  // namespace

void attention(Pool& pool, const AttentionCall& call) {
  call.type == Type::bfloat16 ? attend_as<bf16>(pool, call) : attend_as<float>(pool, call);
}

}  // namespace weft::WEFT_LEVEL
