// Quantised rows times 4-bit weights (w4ax.h) -> y [rows, out].
//
// Two limits. A panel of a layer must arrive from memory: 4.125 bits a weight. And every weight meets every row in one
// multiply-add of 8 bits: there is no arithmetic of 4 bits here, so the peak is that of 8 (AVX-512: 64 a cycle). Up to
// about 7 rows memory is the slower one; so a tile of few rows reads the panel once, in order, and unpacks nibbles in
// registers. With many rows, a block of weights (4 KiB) meets all rows of a group while it is in the L1 cache, tile by
// tile, and meanwhile they fetch the next block.
//
// Bits: an integer sum of a block is exact. The floating-point sum over blocks is
//     total += float(sum) * (scale of the row * scale of the column)
// block after block, each operation rounded by itself: the same bits as comet/reference.py, at every level, for every
// number of rows and threads. (A fused multiply-add would save nothing that counts: 3 operations on 32 products.)
#include "integer.h"

namespace weft::WEFT_LEVEL {

namespace {

// Rows whose totals (128 KiB, in L2) are kept while a panel passes: so many that x is read in order.
constexpr int64_t GROUP = 512;

// The rows of a tile: one block of them.
struct Rows {
  const int8_t* values;
  const float* scales;
  const int32_t* totals;
};

// What a block says of its columns, after the integers.
template <bool GENERAL>
struct Columns {
  const bf16* scales;
  explicit Columns(const char* from) : scales(reinterpret_cast<const bf16*>(from)) {}
  f32v scale(int64_t column) const { return load_bf16(scales + column); }
  i32v zero(int64_t) const { return i32v{}; }
};

template <>
struct Columns<true> {
  const float* scales;
  const int8_t* zeros;
  explicit Columns(const char* from)
      : scales(reinterpret_cast<const float*>(from)), zeros(reinterpret_cast<const int8_t*>(scales + PANEL)) {}
  f32v scale(int64_t column) const { return load<f32v>(scales + column); }
  i32v zero(int64_t column) const { return __builtin_convertvector(load<i8v>(zeros + column), i32v); }
};

// Adds a block's products to the sums [HEIGHT][PANEL] in float, which the first block makes, and fetches what is ahead.
template <int HEIGHT, int BITS, bool GENERAL>
void tile(const char* block, const Rows& rows, bool first_block, float* sums, const Ahead& ahead) {
  const Columns<GENERAL> columns(block + W4AxWeights::integer_bytes(BITS == 8));
  for (int first = 0; first < PANEL / lanes; first += TILE_VECTORS) {
    i32v products[HEIGHT][TILE_VECTORS];
    WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
      const i32v zero = splat(excess<BITS>) + columns.zero((first + v) * lanes);
      WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) products[r][v] = zero * splat(-rows.totals[r]);
    }
    const char* weights = block + first * sizeof(u32v);
    // A part that is all of it would be the same, but GCC would have it in a copy, and order the loop otherwise.
    if constexpr (TILE_VECTORS == PANEL / lanes)
      multiply_block<HEIGHT, BITS>(weights, rows.values, products, ahead);
    else
      multiply_block<HEIGHT, BITS>(weights, rows.values, products, ahead.part(first, TILE_VECTORS));
    f32v scales[TILE_VECTORS];
    WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) scales[v] = columns.scale((first + v) * lanes);
    WEFT_UNROLL for (int r = 0; r < HEIGHT; r++) {
      const f32v scale = splat(rows.scales[r]);
      WEFT_UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
        float* sum = sums + r * PANEL + (first + v) * lanes;
        const f32v before = first_block ? f32v{} : load<f32v>(sum);
        store(sum, before + __builtin_convertvector(products[r][v], f32v) * (scale * scales[v]));
      }
    }
  }
}

template <int BITS, bool GENERAL>
void tile(const char* block, const Rows& rows, int64_t height, bool first_block, float* sums, const Ahead& ahead) {
  switch (height) {
    case 1: return tile<1, BITS, GENERAL>(block, rows, first_block, sums, ahead);
    case 2: return tile<2, BITS, GENERAL>(block, rows, first_block, sums, ahead);
    case 3: return tile<3, BITS, GENERAL>(block, rows, first_block, sums, ahead);
    case 4: return tile<4, BITS, GENERAL>(block, rows, first_block, sums, ahead);
    case 5: return tile<5, BITS, GENERAL>(block, rows, first_block, sums, ahead);
    case 6: return tile<6, BITS, GENERAL>(block, rows, first_block, sums, ahead);
  }
}

// A block of weights with `count` rows of a group, starting at x; done(row, end) after each tile. The tiles fetch the next
// block meanwhile, evenly.
template <int BITS, bool GENERAL, class Done>
void multiply_rows(const char* block, const Rows& x, int64_t count, bool first_block, float* sums, Done done) {
  constexpr int64_t BYTES = W4AxWeights::block_bytes(BITS == 8, GENERAL);
  const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t lines = count < FETCH_ROWS ? 0 : (BYTES / 64 + tiles - 1) / tiles;
  for (int64_t t = 0, row = 0, end; t < tiles; t++, row = end) {
    // Tiles of nearly equal height: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
    end = count * (t + 1) / tiles;
    const Rows rows{x.values + row * BLOCK, x.scales + row, x.totals + row};
    tile<BITS, GENERAL>(block, rows, end - row, first_block, sums + row * PANEL,
                        {block + BYTES + t * lines * 64, lines});
    done(row, end);
  }
}

template <class Out>
void finish(const float* sums, const float* bias, Out* y) {
  for (int c = 0; c < PANEL; c += lanes) {
    const f32v sum = load<f32v>(sums + c);
    store_from_float(y + c, bias == nullptr ? sum : sum + load<f32v>(bias + c));
  }
}

// The same where so many columns are left of the last panel.
template <class Out>
void finish(const float* sums, const float* bias, Out* y, int64_t columns) {
  if (columns >= PANEL) return finish(sums, bias, y);
  Out part[PANEL];
  finish(sums, bias, part);
  memcpy(y, part, size_t(columns) * sizeof *y);
}

template <bool GENERAL, class Out>
void multiply_panel(const W4AxWeights& weights, const QuantisedRows& x, int64_t panel, int64_t row, int64_t count,
                    Out* y) {
  alignas(64) float sums[GROUP * PANEL];
  const char* block = weights.panels + panel * weights.panel_bytes();
  const float* bias = weights.bias == nullptr ? nullptr : weights.bias + panel * PANEL;
  const int64_t blocks = weights.blocks();
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t at = b * x.stride + row;
    const Rows rows{x.values + at * BLOCK, x.scales + at, x.totals + at};
    // Totals leave when their last block is done, while they are in L1.
    const auto done = [&](int64_t first, int64_t end) {
      if (b == blocks - 1)
        for (int64_t r = first; r < end; r++)
          finish(sums + r * PANEL, bias, y + (row + r) * weights.out + panel * PANEL, weights.out - panel * PANEL);
    };
    const bool wide = b < weights.wide_blocks;
    if (wide)
      multiply_rows<8, GENERAL>(block, rows, count, b == 0, sums, done);
    else
      multiply_rows<4, GENERAL>(block, rows, count, b == 0, sums, done);
    block += W4AxWeights::block_bytes(wide, GENERAL);
  }
}

template <bool GENERAL, class Out>
void multiply(Pool& pool, const W4AxWeights& weights, const QuantisedRows& x, Out* y) {
  const int64_t panels = weights.panel_count(), groups = (x.rows + GROUP - 1) / GROUP;
  if (groups == 0) return;
  // Rows are cut into more items when there are too few panels to keep all threads busy to the end.
  int64_t cuts = 1;
  while (panels * cuts < 4 * pool.size() && x.rows >= cuts * 4 * TILE_ROWS) cuts *= 2;
  const int64_t parts = groups > cuts ? groups : cuts;
  pool.run(panels * cuts, [&](int64_t item, int) {
    const int64_t panel = item / cuts, cut = item % cuts;
    for (int64_t part = parts * cut / cuts; part < parts * (cut + 1) / cuts; part++) {
      const int64_t row = x.rows * part / parts, end = x.rows * (part + 1) / parts;
      multiply_panel<GENERAL>(weights, x, panel, row, end - row, y);
    }
  });
}

void pack_block(const int8_t* from, int64_t row_stride, int64_t columns, bool wide, uint8_t* to) {
  for (int64_t column = 0; column < columns; column++)
    for (int64_t k = 0; k < BLOCK; k++) {
      const int value = from[column * row_stride + k];
      if (wide)
        to[(k / 4 * PANEL + column) * 4 + k % 4] = uint8_t(value + 128);
      else
        to[(k / 8 * PANEL + column) * 4 + k % 4] |= uint8_t((value + 8) << (k / 4 % 2 * 4));
    }
}

}  // namespace

void pack_w4ax(Pool& pool, const W4AxWeights& shape, const W4AxSource& from, char* panels) {
  pool.run(shape.panel_count(), [&](int64_t panel, int) {
    char* to = panels + panel * shape.panel_bytes();
    const int64_t first = panel * PANEL, left = shape.out - first, columns = left < PANEL ? left : PANEL;
    for (int64_t b = 0; b < shape.blocks(); b++) {
      const bool wide = b < shape.wide_blocks;
      const int8_t* values = from.values + first * shape.in + b * BLOCK;
      pack_block(values, shape.in, columns, wide, reinterpret_cast<uint8_t*>(to));
      char* scales = to + W4AxWeights::integer_bytes(wide);
      for (int64_t column = 0; column < columns; column++) {
        const int64_t at = (first + column) * shape.blocks() + b;
        if (shape.general) {
          reinterpret_cast<float*>(scales)[column] = from.scales[at];
          scales[PANEL * 4 + column] = char(from.zeros == nullptr ? 0 : from.zeros[at]);
        } else {
          reinterpret_cast<bf16*>(scales)[column] = narrow(from.scales[at]);
        }
      }
      to += W4AxWeights::block_bytes(wide, shape.general);
    }
  });
}

void multiply_w4ax(Pool& pool, const W4AxWeights& weights, const QuantisedRows& x, void* y, Type type) {
  const auto into = [&](auto* out) {
    weights.general ? multiply<true>(pool, weights, x, out) : multiply<false>(pool, weights, x, out);
  };
  if (type == Type::float32)
    into(static_cast<float*>(y));
  else
    into(static_cast<bf16*>(y));
}

}  // namespace weft::WEFT_LEVEL
