// Quantised rows times 4-bit weights on INT4 tensor cores (call.h) -> y [m, n].
//
// A thread block owns a tile of y and runs its whole loop over K, 8-bit blocks first. What a block costs depends on its
// channels alone, so that all tiles cost the same, and there is nothing to balance between the multiprocessors.
// With few rows there are too few tiles for a GPU; then the blocks of a tile are cut into segments of equal cost (in
// pieces: an 8-bit block counts twice), which run in thread blocks of their own (`spread`). Their sums are added in order
// by a kernel after them. Where the cuts are belongs to the weight, and one thread block that runs all segments adds in
// the same order: the bits of a row do not depend on the rows beside it.
//
// The 8-bit blocks are sliced into nibbles, not multiplied on INT8 units, which have half the rate: a slice costs what
// half an INT8 product does. Weights then need no conversion in the loop and no second layout, the loop has one kind of
// stage, and the sums of all slices share registers (64 integers and 64 floats a thread are half of the file). Four
// variants of the inner loop differ only in the signs.
//
// Bits: the sum of a block is exact in int32; the floating-point sum over blocks is
//     total += float(sum) * (scale of the row * scale of the column)
// each operation rounded by itself. With one segment these are the bits of comet/reference.py.
#include "call.h"

#if defined(__CUDACC__)
#include "device.h"
#else
#include "emulate.h"
#endif

namespace weft::cuda {

constexpr int STAGES = 4;        // pieces in shared memory: one in use, the others on their way
constexpr int COLUMN_WARPS = 4;  // each has COLUMN_TILES * 8 columns of a tile
constexpr int COLUMN_TILES = 4;

// ROW_WARPS x COLUMN_WARPS warps; each has ROW_TILES x COLUMN_TILES products of 16 x 8.
template <int ROW_TILES_, int ROW_WARPS_>
struct Shape {
  static constexpr int ROW_TILES = ROW_TILES_;
  static constexpr int ROW_WARPS = ROW_WARPS_;
  static constexpr int ROWS = ROW_WARPS * ROW_TILES * 16;
  static constexpr int THREADS = ROW_WARPS * COLUMN_WARPS * 32;
  // A stage: a chunk of the rows, a chunk of the weights, the scales of their block.
  static constexpr int WEIGHTS = ROWS * CHUNK;
  static constexpr int ROW_SCALES = WEIGHTS + WEIGHT_CHUNK;
  static constexpr int SCALES = ROW_SCALES + ROWS * int(sizeof(float));
  static constexpr int STAGE = SCALES + COLUMNS * int(sizeof(float));
};

// Where a thread stands.
template <class S>
struct Place {
  int thread = thread_index();
  int lane = thread % 32;
  int warp_row = (thread / 32) / COLUMN_WARPS;
  int warp_column = (thread / 32) % COLUMN_WARPS;
  int first_row = group().x * S::ROWS;
  int column_tile = group().y;

  // In the tile, of register r of product (i, j): the layout of C of m16n8k64.
  WEFT_DEVICE int row(int i, int r) const { return (warp_row * S::ROW_TILES + i) * 16 + (r >> 1) * 8 + lane / 4; }
  WEFT_DEVICE int column(int j, int r) const { return (warp_column * COLUMN_TILES + j) * 8 + (lane % 4) * 2 + (r & 1); }
};

// Asks for what a piece needs.
template <class S>
WEFT_DEVICE void fetch(const W4AxCall& call, const Place<S>& place, int index, uint8_t* stage) {
  const Piece piece = call.piece(index);
  for (int unit = place.thread; unit < S::ROWS * CHUNK / 16; unit += S::THREADS) {
    const int row = unit / 4, m = place.first_row + row;
    const bool valid = m < call.m;
    const int64_t chunk = int64_t(valid ? m : 0) * call.row_chunks() + piece.row_chunk;
    copy16(stage + swizzled(row, unit % 4), call.rows + chunk * CHUNK + (unit % 4) * 16, valid);
  }
  const int64_t chunk = int64_t(place.column_tile) * call.weight_chunks() + piece.weight_chunk;
  for (int unit = place.thread; unit < WEIGHT_CHUNK / 16; unit += S::THREADS)
    copy16(stage + S::WEIGHTS + unit * 16, call.weights + chunk * WEIGHT_CHUNK + unit * 16, true);
  if (!piece.last) return;
  for (int row = place.thread; row < S::ROWS; row += S::THREADS) {
    const int m = place.first_row + row;
    const bool valid = m < call.m;
    copy4(stage + S::ROW_SCALES + row * 4, call.row_scales + int64_t(valid ? m : 0) * call.blocks + piece.block, valid);
  }
  const float* scales = call.scales + int64_t(piece.block) * call.padded_n + place.column_tile * COLUMNS;
  for (int unit = place.thread; unit < COLUMNS / 4; unit += S::THREADS)
    copy16(stage + S::SCALES + unit * 16, scales + unit * 4, true);
}

template <class S>
struct Sums {
  int32_t integers[S::ROW_TILES][COLUMN_TILES][4];  // of the block
  float floats[S::ROW_TILES][COLUMN_TILES][4];      // of the segment
};

// integers += the products of a piece.
template <class S, bool ROW_UNSIGNED, bool WEIGHT_UNSIGNED>
WEFT_DEVICE void multiply_piece(const Place<S>& place, const uint8_t* stage, Sums<S>& sums) {
  uint32_t weights[COLUMN_TILES][4];
  WEFT_UNROLL for (int j = 0; j < COLUMN_TILES; j++)
      load16(weights[j], stage + S::WEIGHTS + weight_place(place.warp_column * COLUMN_TILES + j, place.lane));
  WEFT_UNROLL for (int half = 0; half < 2; half++) {  // 64 channels each
    WEFT_UNROLL for (int i = 0; i < S::ROW_TILES; i++) {
      uint32_t rows[4];
      const int row = (place.warp_row * S::ROW_TILES + i) * 16 + place.lane % 16;
      load_matrices(rows, stage + swizzled(row, 2 * half + place.lane / 16));
      WEFT_UNROLL for (int j = 0; j < COLUMN_TILES; j++)
          multiply<ROW_UNSIGNED, WEIGHT_UNSIGNED>(sums.integers[i][j], rows, weights[j][2 * half],
                                                  weights[j][2 * half + 1]);
    }
  }
}

template <class S>
WEFT_DEVICE void multiply_piece(const Piece& piece, const Place<S>& place, const uint8_t* stage, Sums<S>& sums) {
  if (piece.shift) {
    WEFT_UNROLL for (int i = 0; i < S::ROW_TILES; i++)
        WEFT_UNROLL for (int j = 0; j < COLUMN_TILES; j++)
            WEFT_UNROLL for (int r = 0; r < 4; r++) sums.integers[i][j][r] *= 16;
  }
  if (piece.row_unsigned) {
    if (piece.weight_unsigned) multiply_piece<S, true, true>(place, stage, sums);
    else multiply_piece<S, true, false>(place, stage, sums);
  } else {
    if (piece.weight_unsigned) multiply_piece<S, false, true>(place, stage, sums);
    else multiply_piece<S, false, false>(place, stage, sums);
  }
}

WEFT_DEVICE int32_t general_sum(const W4AxCall& call, int block, int m, int n, int32_t value) {
  if (m >= call.m) return value;
  if (call.zeros != nullptr)
    value -= call.row_totals[int64_t(m) * call.blocks + block] * call.zeros[int64_t(block) * call.padded_n + n];
  if (call.sums != nullptr && n < call.n) call.sums[(int64_t(block) * call.m + m) * call.n + n] = value;
  return value;
}

// Moves the integers of a block into the floats. GENERAL: there may be zeros, and the accumulators may be asked for.
template <class S, bool GENERAL>
WEFT_DEVICE void end_block(const W4AxCall& call, const Place<S>& place, int block, const uint8_t* stage, Sums<S>& sums) {
  const float* row_scales = reinterpret_cast<const float*>(stage + S::ROW_SCALES);
  const float* scales = reinterpret_cast<const float*>(stage + S::SCALES);
  WEFT_UNROLL for (int i = 0; i < S::ROW_TILES; i++) {
    WEFT_UNROLL for (int j = 0; j < COLUMN_TILES; j++) {
      WEFT_UNROLL for (int r = 0; r < 4; r++) {
        const int row = place.row(i, r), column = place.column(j, r);
        const int m = place.first_row + row, n = place.column_tile * COLUMNS + column;
        int32_t value = sums.integers[i][j][r];
        if constexpr (GENERAL) value = general_sum(call, block, m, n, value);
        const float scale = product(row_scales[row], scales[column]);
        sums.floats[i][j][r] = sum(sums.floats[i][j][r], product(float(value), scale));
        sums.integers[i][j][r] = 0;
      }
    }
  }
}

WEFT_DEVICE void store_output(const W4AxCall& call, int64_t at, int n, float value) {
  if (call.bias != nullptr) value = sum(value, call.bias[n]);
  if (!call.bf16) {
    static_cast<float*>(call.y)[at] = value;
    return;
  }
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, halves to even
  static_cast<uint16_t*>(call.y)[at] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}

// Moves the floats of a segment on: to y where it is the last one of this thread block's, and no kernel comes after.
template <class S>
WEFT_DEVICE void end_segment(const W4AxCall& call, const Place<S>& place, int segment, Sums<S>& sums) {
  const bool last = segment + 1 == call.segments;
  const int first_row = opaque(place.first_row);
  WEFT_UNROLL for (int i = 0; i < S::ROW_TILES; i++) {
    WEFT_UNROLL for (int j = 0; j < COLUMN_TILES; j++) {
      WEFT_UNROLL for (int r = 0; r < 4; r++) {
        const int m = first_row + place.row(i, r), n = place.column_tile * COLUMNS + place.column(j, r);
        float value = sums.floats[i][j][r];
        sums.floats[i][j][r] = 0;
        if (m >= call.m || n >= call.n) continue;
        const int64_t at = int64_t(m) * call.n + n;
        if (call.spread) {
          call.partial[int64_t(segment) * call.m * call.n + at] = value;
          continue;
        }
        if (segment > 0) value = sum(call.partial[at], value);
        if (last) store_output(call, at, n, value);
        else call.partial[at] = value;
      }
    }
  }
}

template <class S, bool GENERAL>
WEFT_KERNEL(S::THREADS) w4ax_kernel(const W4AxCall call) {
  const Place<S> place;
  uint8_t* const memory = shared_memory();
  int segment = call.spread ? group().z : 0;
  const int begin = call.first_piece(call.cuts[segment]);
  const int end = call.first_piece(call.cuts[call.spread ? segment + 1 : call.segments]);
  Sums<S> sums = {};

  // A group of copies for every piece, empty ones too, so that the number of groups on their way is always the same.
  for (int index = begin; index < begin + STAGES - 1; index++) {
    if (index < end) fetch(call, place, index, memory + (index - begin) * S::STAGE);
    end_copies();
  }
  WEFT_LOOP for (int index = begin; index < end; index++) {
    await_copies<STAGES - 2>();
    barrier();  // everybody's copies of this piece are here, and nobody reads the piece before it any more
    const int ahead = index + STAGES - 1;
    if (ahead < end) fetch(call, place, ahead, memory + (ahead - begin) % STAGES * S::STAGE);
    end_copies();
    const Piece piece = call.piece(index);
    const uint8_t* stage = memory + (index - begin) % STAGES * S::STAGE;
    multiply_piece(piece, place, stage, sums);
    if (!piece.last) continue;
    end_block<S, GENERAL>(call, place, piece.block, stage, sums);
    if (piece.block + 1 == call.cuts[segment + 1]) end_segment(call, place, segment++, sums);
  }
}

constexpr int ADD_THREADS = 256;

// y = the sums of the segments, in order.
WEFT_KERNEL(ADD_THREADS) add_segments_kernel(const W4AxCall call) {
  const int64_t size = int64_t(call.m) * call.n;
  const int64_t at = int64_t(group().x) * ADD_THREADS + thread_index();
  if (at >= size) return;
  float value = call.partial[at];
  for (int segment = 1; segment < call.segments; segment++) value = sum(value, call.partial[segment * size + at]);
  store_output(call, at, int(at % call.n), value);
}

template <class S, bool GENERAL>
int run(const W4AxCall& call, void* stream) {
  const Grid grid{(call.m + S::ROWS - 1) / S::ROWS, call.padded_n / COLUMNS, call.spread ? call.segments : 1};
  const int error = launch(w4ax_kernel<S, GENERAL>, grid, S::THREADS, STAGES * S::STAGE, stream, call);
  if (error != 0 || !call.spread) return error;
  const int64_t groups = (int64_t(call.m) * call.n + ADD_THREADS - 1) / ADD_THREADS;
  return launch(add_segments_kernel, Grid{int(groups), 1, 1}, ADD_THREADS, 0, stream, call);
}

template <bool GENERAL>
int run(const W4AxCall& call, void* stream) {
  if (call.m <= 16) return run<Shape<1, 1>, GENERAL>(call, stream);
  if (call.m <= 32) return run<Shape<2, 1>, GENERAL>(call, stream);
  if (call.m <= 64) return run<Shape<2, 2>, GENERAL>(call, stream);
  return run<Shape<4, 2>, GENERAL>(call, stream);
}

}  // namespace weft::cuda

// Starts the product on a stream (null: the default one). Returns 0 or a cudaError_t. The caller has checked the shapes:
// m, n >= 1, wide <= eight <= blocks, cuts ascending from 0 to blocks.
extern "C" int weft_w4ax(const weft::cuda::W4AxCall* call, void* stream) {
  const bool general = call->zeros != nullptr || call->sums != nullptr;
  return general ? weft::cuda::run<true>(*call, stream) : weft::cuda::run<false>(*call, stream);
}

// So that a caller can see that it has the struct of this build.
extern "C" int weft_w4ax_call_bytes() { return int(sizeof(weft::cuda::W4AxCall)); }
