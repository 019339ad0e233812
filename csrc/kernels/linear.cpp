// x [rows, in] times packed weights -> y [rows, out].
//
// The lanes of an accumulator are output columns, and one accumulator runs over all of `in` in ascending order, for every
// number of rows and threads. So a row's bits do not depend on the rows beside it, by construction.
//
// Work is cut into items of one panel (64 columns) and a range of rows. Within an item, tiles of up to ROWS rows follow
// one another and the panel stays in the L2 cache; meanwhile they prefetch the next panel, so that reading memory and
// computing overlap. One tile (few rows) is bound by memory, and there the hardware's prefetcher is the better one.
#include <type_traits>

#include "multiply.h"

namespace weft::WEFT_LEVEL {

namespace {

constexpr int PANEL_VECTORS = PANEL / lanes;
constexpr int64_t STEP_BYTES = PANEL * 4;  // of a panel, in one step

// Accumulators fill the registers: 32 of them with AVX-512, else 16, of which a pair of bfloat16 takes more.
#if defined(WEFT_LEVEL_avx512)
constexpr int ROWS = 6;
constexpr int vectors(int) { return PANEL_VECTORS; }
#else
constexpr int ROWS = 4;
constexpr int vectors(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#endif

// Out: the element of y, T's own or float.
template <class T, class Out>
struct Job {
  using Element = typename T::Element;
  const LinearWeights& weights;
  const Element* x;
  Out* y;

  int64_t steps() const { return (weights.in + T::DEPTH - 1) / T::DEPTH; }
  const char* panel(int64_t i) const { return static_cast<const char*>(weights.panels) + i * weights.panel_bytes(); }
};

// COUNT vectors of `count` valid columns, with the bias, to one row of y.
template <class Out, int COUNT>
WEFT_INLINE void finish(const f32v (&sums)[COUNT], const float* bias, Out* y, int64_t count) {
  Out part[COUNT * lanes];
  Out* to = count >= COUNT * lanes ? y : part;
  WEFT_UNROLL for (int v = 0; v < COUNT; v++)
    store_from_float(to + v * lanes, bias != nullptr ? sums[v] + load<f32v>(bias + v * lanes) : sums[v]);
  if (to == part && count > 0) memcpy(y, part, size_t(count) * sizeof *y);
}

#if !defined(WEFT_LEVEL_avx512)

// Channels of a row that are floats at a time: those of a tile, and its sums, stay in the L1 cache.
constexpr int64_t CHUNK = 512;

// Becomes `count` floats, and a zero behind an odd number of them.
WEFT_INLINE void widen_row(const bf16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load_bf16(from + i));
  for (; i < count; i++) to[i] = widen(from[i]);
  to[i] = 0;
}

// So many steps along `in`, for WIDTH vectors of columns. What there is more of, rows or columns, is held only in sums.
// Fetches LINES of every EVERY-th step of `next` on the way.
template <int HEIGHT, int WIDTH, int LINES, int EVERY>
WEFT_INLINE void add_widened(const char* w, const float (&x)[HEIGHT][CHUNK + 2], int64_t steps, float* sums,
                             const char* next) {
  f32v part[HEIGHT][WIDTH];
  WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
    WEFT_UNROLL for (int v = 0; v < WIDTH; v++) part[r][v] = load<f32v>(sums + r * PANEL + v * lanes);
  }
  const auto add = [&](int r, int v, u32v weights, f32v first, f32v second) {
    part[r][v] = fma((f32v)(weights << 16), first, part[r][v]);
    part[r][v] = fma((f32v)(weights & 0xffff0000u), second, part[r][v]);
  };
  for (int64_t step = 0; step < steps; step++, w += STEP_BYTES) {
    const char* ahead = next + step / EVERY * EVERY * STEP_BYTES;
    WEFT_UNROLL for (int line = 0; line < LINES; line++) __builtin_prefetch(ahead + line * 64, 0, 2);
    if constexpr (HEIGHT > WIDTH) {
      u32v weights[WIDTH];
      WEFT_UNROLL for (int v = 0; v < WIDTH; v++) weights[v] = load<u32v>(w + v * sizeof(u32v));
      WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
        const f32v first = splat(x[r][2 * step]), second = splat(x[r][2 * step + 1]);
        WEFT_UNROLL for (int v = 0; v < WIDTH; v++) add(r, v, weights[v], first, second);
      }
    } else {
      f32v first[HEIGHT], second[HEIGHT];
      WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
        first[r] = splat(x[r][2 * step]);
        second[r] = splat(x[r][2 * step + 1]);
      }
      WEFT_UNROLL for (int v = 0; v < WIDTH; v++) {
        const u32v weights = load<u32v>(w + v * sizeof(u32v));
        WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) add(r, v, weights, first[r], second[r]);
      }
    }
  }
  WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
    WEFT_UNROLL for (int v = 0; v < WIDTH; v++) store(sums + r * PANEL + v * lanes, part[r][v]);
  }
}

// A tile (below) where the CPU multiplies floats only: inputs become floats once for all columns, chunk by chunk, and sums
// wait in memory meanwhile, which changes no bit of them. A lone tile fetches the next chunk: it passes over each of them
// several times, in steps that are too far apart for the hardware's prefetcher. Each pass fetches its part, so that memory
// is read all the time.
template <class Out, int HEIGHT, bool PREFETCH>
void widened_tile(const Job<BFloat16, Out>& job, int64_t panel, int64_t row, const char* next) {
  constexpr int WIDTH = vectors(HEIGHT), PASSES = PANEL_VECTORS / WIDTH;
  // Of the four lines of a step that lies ahead, so many in all passes together.
  constexpr int LINES = PREFETCH ? 2 : PASSES > 1 ? 4 : 0;
  constexpr int EVERY = LINES > 0 && PASSES > LINES ? PASSES / LINES : 1, EACH = LINES * EVERY / PASSES;
  const int64_t in = job.weights.in;
  alignas(64) float x[HEIGHT][CHUNK + 2];
  alignas(64) float sums[HEIGHT * PANEL] = {};
  for (int64_t begin = 0; begin < in; begin += CHUNK) {
    const int64_t count = in - begin < CHUNK ? in - begin : CHUNK, bytes = begin / 2 * STEP_BYTES;
    for (int r = 0; r < HEIGHT; r++) widen_row(job.x + (row + r) * in + begin, count, x[r]);
    const char* w = job.panel(panel) + bytes;
    const char* ahead = PREFETCH ? next + bytes : w + CHUNK / 2 * STEP_BYTES;
    for (int pass = 0; pass < PASSES; pass++) {
      const char* part = ahead + pass / EVERY * EACH * 64 + pass % EVERY * STEP_BYTES;
      const int first = pass * WIDTH;
      add_widened<HEIGHT, WIDTH, EACH, EVERY>(w + first * sizeof(f32v), x, (count + 1) / 2, sums + first * lanes, part);
    }
  }
  const int64_t column = panel * PANEL;
  const float* bias = job.weights.bias == nullptr ? nullptr : job.weights.bias + column;
  for (int r = 0; r < HEIGHT; r++) {
    f32v all[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; v++) all[v] = load<f32v>(sums + r * PANEL + v * lanes);
    finish<Out, PANEL_VECTORS>(all, bias, job.y + (row + r) * job.weights.out + column, job.weights.out - column);
  }
}

#endif

// HEIGHT rows from `row` on, all columns of a panel. PREFETCH: fetches half of the lines of `next` on the way.
template <class T, class Out, int HEIGHT, bool PREFETCH>
void tile(const Job<T, Out>& job, int64_t panel, int64_t row, const char* next) {
#if !defined(WEFT_LEVEL_avx512)
  if constexpr (std::is_same_v<T, BFloat16>) return widened_tile<Out, HEIGHT, PREFETCH>(job, panel, row, next);
#endif
  constexpr int WIDTH = vectors(HEIGHT);
  const int64_t in = job.weights.in, full = in / T::DEPTH;
  const typename T::Element* x = job.x + row * in;
  for (int first = 0; first < PANEL_VECTORS; first += WIDTH) {
    const char* w = job.panel(panel) + first * sizeof(f32v);
    f32v sums[HEIGHT][WIDTH] = {};
    for (int64_t step = 0; step < full; step++, w += STEP_BYTES) {
      if (PREFETCH && first == 0) {
        __builtin_prefetch(next + step * STEP_BYTES, 0, 2);
        __builtin_prefetch(next + step * STEP_BYTES + 64, 0, 2);
      }
      WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
        const auto input = T::input(x + r * in + step * T::DEPTH);
        WEFT_UNROLL for (int v = 0; v < WIDTH; v++)
          sums[r][v] = T::multiply_add(load<f32v>(w + v * sizeof(f32v)), input, sums[r][v]);
      }
    }
    if (full < job.steps()) {
      WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
        const auto input = T::last_input(x + r * in + in - 1);
        WEFT_UNROLL for (int v = 0; v < WIDTH; v++)
          sums[r][v] = T::multiply_add(load<f32v>(w + v * sizeof(f32v)), input, sums[r][v]);
      }
    }
    const int64_t column = panel * PANEL + first * lanes;
    const float* bias = job.weights.bias == nullptr ? nullptr : job.weights.bias + column;
    WEFT_UNROLL for (int r = 0; r < HEIGHT; r++)
      finish<Out, WIDTH>(sums[r], bias, job.y + (row + r) * job.weights.out + column, job.weights.out - column);
  }
}

template <class T, class Out, bool PREFETCH>
void tile(const Job<T, Out>& job, int64_t panel, int64_t row, int64_t height, const char* next) {
  switch (height) {
    case 1: return tile<T, Out, 1, PREFETCH>(job, panel, row, next);
    case 2: return tile<T, Out, 2, PREFETCH>(job, panel, row, next);
    case 3: return tile<T, Out, 3, PREFETCH>(job, panel, row, next);
    case 4: return tile<T, Out, 4, PREFETCH>(job, panel, row, next);
#if defined(WEFT_LEVEL_avx512)
    case 5: return tile<T, Out, 5, PREFETCH>(job, panel, row, next);
    case 6: return tile<T, Out, 6, PREFETCH>(job, panel, row, next);
#endif
  }
}

template <class T, class Out>
void multiply(Pool& pool, const LinearWeights& weights, const void* x, int64_t rows, void* y) {
  using Element = typename T::Element;
  const Job<T, Out> job{weights, static_cast<const Element*>(x), static_cast<Out*>(y)};
  const int64_t panels = weights.panel_count(), tiles = (rows + ROWS - 1) / ROWS;
  // Rows are cut as well when there are too few panels to keep all threads busy to the end.
  int64_t cuts = 1;
  while (panels * cuts < 4 * pool.size() && cuts * 4 <= tiles) cuts *= 2;
  pool.run(panels * cuts, [&](int64_t item, int) {
    const int64_t panel = item / cuts, cut = item % cuts;
    const int64_t first = tiles * cut / cuts, end = tiles * (cut + 1) / cuts;
    const char* next = job.panel(panel + 1 < panels ? panel + 1 : panel);
    for (int64_t t = first; t < end; t++) {
      // Tiles of nearly equal height: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
      const int64_t row = rows * t / tiles, height = rows * (t + 1) / tiles - row;
      if (end - first > 1 && t - first < 2)
        tile<T, Out, true>(job, panel, row, height, next + (t - first) * 128);
      else
        tile<T, Out, false>(job, panel, row, height, next);
    }
  });
}

template <class T>
void pack(Pool& pool, const LinearWeights& shape, const void* weight, int64_t row_stride, void* panels) {
  using Element = typename T::Element;
  pool.run(shape.panel_count(), [&](int64_t panel, int) {
    Element* to = reinterpret_cast<Element*>(static_cast<char*>(panels) + panel * shape.panel_bytes());
    const Element* from = static_cast<const Element*>(weight) + panel * PANEL * row_stride;
    const int64_t left = shape.out - panel * PANEL, columns = left < PANEL ? left : PANEL;
    constexpr int64_t CHUNK = 64 / sizeof(Element);  // a cache line of each row at a time
    for (int64_t start = 0; start < shape.in; start += CHUNK) {
      const int64_t end = start + CHUNK < shape.in ? start + CHUNK : shape.in;
      for (int64_t column = 0; column < columns; column++)
        for (int64_t k = start; k < end; k++)
          to[(k / T::DEPTH * PANEL + column) * T::DEPTH + k % T::DEPTH] = from[column * row_stride + k];
    }
  });
}

}  // namespace

void pack_linear(Pool& pool, const LinearWeights& shape, const void* weight, int64_t row_stride, void* panels) {
  const auto pack_type = shape.type == Type::float32 ? pack<Float32> : pack<BFloat16>;
  pack_type(pool, shape, weight, row_stride, panels);
}

void linear(Pool& pool, const LinearWeights& weights, const void* x, int64_t rows, void* y, Type type) {
  const auto multiply_type = weights.type == Type::float32 ? multiply<Float32, float>
                             : type == Type::float32       ? multiply<BFloat16, float>
                                                           : multiply<BFloat16, bf16>;
  multiply_type(pool, weights, x, rows, y);
}

}  // namespace weft::WEFT_LEVEL
