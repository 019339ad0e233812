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
// finite is computed again alone, with zeros in the place of such values.
#include "kernels/attention_tiles.h"

namespace weft::WEFT_LEVEL {
namespace {

constexpr int64_t VECTORS = PARTITION / lanes;  // a partition's positions, in vectors
constexpr float NO_SCORE = -1e30f;              // the greatest score of a row that has seen nothing yet
constexpr float LOG2_E = 1.44269504f;
constexpr int64_t DECODE_ROWS = 12;             // so few rows are most likely those of one token
constexpr int64_t PADDED_ROWS = (UNIT_ROWS + lanes - 1) / lanes * lanes;

// One thread's working memory for one unit.
template <class T>
struct Work {
  using Factor = typename Product<T>::Factor;
  alignas(64) float scores[UNIT_ROWS][PARTITION];
  alignas(64) Factor weights[UNIT_ROWS][PARTITION];
  alignas(64) Factor queries[UNIT_ROWS * MAX_HEAD_DIM];  // [rows][head_dim]
  alignas(64) float totals[UNIT_ROWS * (VALUES + MAX_HEAD_DIM)];
  alignas(64) float keep[PADDED_ROWS], add[PADDED_ROWS];  // factors of the old totals and of a partition's
  int64_t from[UNIT_ROWS], until[UNIT_ROWS];  // the positions that each row sees
  const T* keys[VECTORS];                     // of each vector of positions
  const T* values[VECTORS];
};

void clear_totals(float* totals, int64_t rows, int64_t size) {
  for (int64_t i = 0; i < rows * size; i++) totals[i] = 0;
  for (int64_t row = 0; row < rows; row++) totals[row * size + TOP] = NO_SCORE;
}

// Where each vector of positions of the partition lies, from the block table.
template <class T>
void find_vectors(const AttentionCall& call, const Unit& unit, int64_t start, int64_t first, int64_t end,
                  Work<T>& work) {
  const KvView& kv = call.kv;
  const int32_t* table = call.batch.tables + unit.slice * call.batch.table_width;
  for (int64_t v = first; v < end; v++) {
    const int64_t position = start + v * lanes;
    const int64_t place = int64_t{table[position / kv.block_size]} * kv.kv_heads + unit.kv_head;
    const int64_t slot = position % kv.block_size;
    work.keys[v] = static_cast<const T*>(kv.keys) + place * kv.head_dim * kv.block_size + slot * Product<T>::P;
    work.values[v] = static_cast<const T*>(kv.values) + place * kv.block_size * kv.width() + slot * kv.width();
  }
}

template <class T>
void score(const AttentionCall& call, const Unit& unit, int64_t first, int64_t end, Work<T>& work) {
  const int64_t depth = call.kv.head_dim;
  const bool decode = unit.rows <= DECODE_ROWS;
  for (int64_t v = first; v < end; v += TILE_VECTORS) {
    const int64_t count = end - v < TILE_VECTORS ? end - v : TILE_VECTORS;
    for_tiles(unit.rows, [&](int64_t row, int64_t rows) {
      TILES<T>.score[rows][count](work.queries + row * depth, depth, work.keys + v, call.kv.block_size,
                                  decode ? work.values + v : nullptr, &work.scores[row][v * lanes]);
    });
  }
}

// Scores -> weights of one row that sees positions [from, until) of the partition. Returns the greatest score, scaled,
// and the sum of the weights.
template <class T>
void weigh(float* scores, typename Product<T>::Factor* weights, int64_t first, int64_t end, int64_t from, int64_t until,
           float factor, float& top, float& sum_of_weights) {
  f32v greatest_yet = splat(-__builtin_inff());
  for (int64_t v = first; v < end; v++) {
    f32v x = load<f32v>(scores + v * lanes);
    const int64_t begin = from - v * lanes, stop = until - v * lanes;
    if (begin > 0 || stop < lanes) {
      x = lanes_or(x, int(begin), int(stop), splat(-__builtin_inff()));
      store(scores + v * lanes, x);
    }
    greatest_yet = max(x, greatest_yet);
  }
  top = greatest(greatest_yet) * factor;
  if (!(top > NO_SCORE)) top = NO_SCORE;
  f32v total{};
  for (int64_t v = first; v < end; v++) {
    const f32v x = exp2(fma(load<f32v>(scores + v * lanes), splat(factor), splat(-top)));
    total = total + Product<T>::put(weights + v * lanes, x);
  }
  sum_of_weights = sum(total);
}

// Softmax over the partition, and the factors by which its sums and the rows' totals join: totals are brought to the
// greater of both tops.
template <class T>
void weigh_rows(const AttentionCall& call, const Unit& unit, int64_t start, int64_t first, int64_t end, Work<T>& work,
                float* totals) {
  const int64_t size = call.kv.totals();
  float sums[UNIT_ROWS];
  for (int64_t row = 0; row < unit.rows; row++) {
    float top;
    weigh<T>(work.scores[row], work.weights[row], first, end, work.from[row] - start, work.until[row] - start,
             call.scale * LOG2_E, top, sums[row]);
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

template <class T>
void add_values(const AttentionCall& call, const Unit& unit, int64_t first, int64_t end, Work<T>& work, float* totals) {
  const int64_t width = call.kv.width(), vectors = width / lanes;
  for (int64_t v = 0; v < vectors; v += TILE_VECTORS) {
    const int64_t count = vectors - v < TILE_VECTORS ? vectors - v : TILE_VECTORS;
    for_tiles(unit.rows, [&](int64_t row, int64_t rows) {
      TILES<T>.value[rows][count](&work.weights[row][first * lanes], end - first, work.values + first, v * lanes, width,
                                  work.keep + row, work.add + row, totals + row * call.kv.totals());
    });
  }
}

// The values of a vector of positions, with zeros at those outside [from, until).
template <class T>
void copy_seen(const T* values, int64_t from, int64_t until, int64_t width, T* copy) {
  constexpr int P = Product<T>::P;
  for (int64_t i = 0; i < lanes; i++)
    for (int64_t c = 0; c < width; c++) {
      const int64_t at = (i / P * width + c) * P + i % P;
      copy[at] = i >= from && i < until ? values[at] : T{};
    }
}

// Joins one partition to the rows' totals. `alone`: one row, of which no unseen value may be touched.
template <class T>
void attend_partition(const AttentionCall& call, const Unit& unit, int64_t partition, bool alone, Work<T>& work,
                      float* totals) {
  const int64_t start = partition * PARTITION;
  const int64_t seen_from = work.from[0] - start, seen_until = work.until[unit.rows - 1] - start;
  const int64_t first = seen_from > 0 ? seen_from / lanes : 0;
  const int64_t end = seen_until < PARTITION ? (seen_until + lanes - 1) / lanes : VECTORS;
  find_vectors(call, unit, start, first, end, work);
  score(call, unit, first, end, work);
  weigh_rows(call, unit, start, first, end, work, totals);
  T copies[2][lanes * MAX_HEAD_DIM];
  if (alone)  // only the first and the last vector can hold values that the row does not see
    for (int64_t i = 0, v = first; i < (first < end - 1 ? 2 : 1); i++, v = end - 1) {
      copy_seen(work.values[v], seen_from - v * lanes, seen_until - v * lanes, call.kv.width(), copies[i]);
      work.values[v] = copies[i];
    }
  add_values(call, unit, first, end, work, totals);
}

// The rows' queries, and the positions that each row sees.
template <class T>
void prepare(const AttentionCall& call, const Unit& unit, Work<T>& work) {
  const BatchView& batch = call.batch;
  const int64_t depth = call.kv.head_dim, group = call.group();
  for (int64_t row = 0; row < unit.rows; row++) {
    const int64_t token = (unit.first_row + row) / group, head = unit.kv_head * group + (unit.first_row + row) % group;
    const int64_t end = batch.starts[unit.slice + 1];
    work.until[row] = batch.contexts[unit.slice] - (end - batch.starts[unit.slice]) + token + 1;
    const bool all = call.window == 0 || call.window >= work.until[row];
    work.from[row] = all ? 0 : work.until[row] - call.window;
    const T* q = static_cast<const T*>(call.q) + ((batch.starts[unit.slice] + token) * call.heads + head) * depth;
    for (int64_t d = 0; d < depth; d++) Product<T>::factor(&work.queries[row * depth + d], q[d]);
  }
}

template <class T>
void attend_alone(const AttentionCall& call, const Unit& unit, int64_t row);

// Writes the rows out. A row that is not finite is done again, if `retry`: see the invariant above.
template <class T>
void finish(const AttentionCall& call, const Unit& unit, const float* totals, bool retry) {
  const int64_t depth = call.kv.head_dim, group = call.group(), size = call.kv.totals();
  for (int64_t row = 0; row < unit.rows; row++) {
    const int64_t token = (unit.first_row + row) / group, head = unit.kv_head * group + (unit.first_row + row) % group;
    T* out = static_cast<T*>(call.out) + ((call.batch.starts[unit.slice] + token) * call.heads + head) * depth;
    const float* values = totals + row * size + VALUES;
    f32v zero_if_finite{};
    for (int64_t c = 0; c < depth; c += lanes) {
      // + 0 makes of -0, which a sum of underflows may give, the +0 that another tile gives
      const f32v x = load<f32v>(values + c) / splat(totals[row * size + SUM]) + splat(0.0f);
      store_some(out + c, x, depth - c);
      zero_if_finite = fma(lanes_or(x, 0, int(depth - c), f32v{}), f32v{}, zero_if_finite);
    }
    if (retry && sum(zero_if_finite) != 0) attend_alone<T>(call, unit, row);
  }
}

template <class T>
void attend_alone(const AttentionCall& call, const Unit& unit, int64_t row) {
  Work<T> work;
  const Unit one = {unit.slice, unit.kv_head, unit.first_row + row, 1, 0, 0, -1};
  prepare(call, one, work);
  clear_totals(work.totals, 1, call.kv.totals());
  for (int64_t p = work.from[0] / PARTITION; p * PARTITION < work.until[0]; p++)
    attend_partition(call, one, p, true, work, work.totals);
  finish<T>(call, one, work.totals, false);
}

template <class T>
void attend(const AttentionCall& call, const Unit& unit) {
  Work<T> work;
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
  if (unit.partial < 0) finish<T>(call, unit, work.totals, true);
}

// Joins the partitions of a split unit in order, with the operations of weigh_rows and value_tile.
template <class T>
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
  finish<T>(call, unit, totals, true);
}

template <class T>
void attend_all(Pool& pool, const AttentionCall& call) {
  if (!call.shared) {
    for (int64_t i = 0; i < call.unit_count; i++) attend<T>(call, call.units[i]);
    return;
  }
  pool.run(call.unit_count, [&](int64_t i, int) { attend<T>(call, call.units[i]); });
  pool.run(call.merge_count, [&](int64_t i, int) { merge<T>(call, call.merges[i]); });
}

}  // namespace

void attention(Pool& pool, const AttentionCall& call) {
  call.type == Type::bfloat16 ? attend_all<bf16>(pool, call) : attend_all<float>(pool, call);
}

}  // namespace weft::WEFT_LEVEL
