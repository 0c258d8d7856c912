// Tiles in shared memory, their copies from and to global memory, and products of tiles on the tensor cores.
//
// A tile is row-major with 16 bytes of padding after each row (of doubles 32). Rows of an even number of 16-byte chunks thus
// become an odd number of chunks long, so the 8 rows of an ldmatrix fall into different banks, and every address in a
// product is one register per operand plus a constant.
#pragma once

#include "common/accumulator.cuh"
#include "common/config.cuh"
#include "sm80/operand.cuh"
#include "sm80/operand_f32.cuh"
#include "sm80/operand_f64.cuh"

template <int kRows_, int kCols_, int kPad = Fragment<Element>::kPad>
struct Tile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kRowElements = kCols + kPad;
  static constexpr int kRowBytes = kRowElements * kElementBytes;
  alignas(128) Element data[kRows * kRowElements];
};

// Of scores, transposed: keys x queries. Other lanes read and write them together than those of the other tiles.
template <int kKeys, int kQueries>
using ScoreTile = Tile<kKeys, kQueries, Fragment<Element>::kScorePad>;

// ---- copies ---------------------------------------------------------------------------------------------------------

// How the threads of a block share the 16-byte chunks of a tile of kCols columns. A few lanes take a row, each of them
// every few chunks of it: a lane has one address per row, and its chunks are constants apart.
template <int kCols>
struct ChunkMap {
  static constexpr int kChunks = kCols / kPiece;
  static constexpr int kLanesPerRow = kChunks % 8 == 0 ? 8 : kChunks == 2 ? 2 : 4;
  static constexpr int kColsPerRound = kLanesPerRow * kPiece;
  static constexpr int kRowsPerPass = kNumThreads / kLanesPerRow;
  int row, col;  // of the first chunk
  FA2_DEVICE ChunkMap() : row(threadIdx.x / kLanesPerRow), col(threadIdx.x % kLanesPerRow * kPiece) {}
};

// tile = rows [0, rows) x columns [0, cols) of gmem, zeros elsewhere. Asynchronous where rows are aligned: the caller
// commits, waits and synchronises either way. Of `parts` calls with part = 0, 1, ..., each copies some of the rows.
// kWhole: rows is known to be 0 or >= kRows.
template <bool kWhole = false, int kRows, int kCols>
FA2_DEVICE void load_tile(Tile<kRows, kCols>& tile, const Element* gmem, int64_t row_stride, int rows, int cols,
                          int part = 0, int parts = 1) {
  if constexpr (kAligned) {
    const ChunkMap<kCols> map;
    const Element* source = gmem + map.row * row_stride + map.col;
    const uint32_t target = smem_address(tile.data) + map.row * tile.kRowBytes + map.col * kElementBytes;
    constexpr int kPasses = ceil_div(kRows, map.kRowsPerPass);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass, source += map.kRowsPerPass * row_stride) {
      const int row = map.row + pass * map.kRowsPerPass;
      if (pass * parts / kPasses != part || (kRows % map.kRowsPerPass != 0 && row >= kRows)) continue;
#pragma unroll
      for (int col = 0; col < kCols; col += map.kColsPerRound) {
        if (kCols % map.kColsPerRound != 0 && map.col + col >= kCols) continue;
        const bool inside = (kWhole ? rows > 0 : row < rows) && map.col + col < cols;
        cp_async_16(target + pass * map.kRowsPerPass * tile.kRowBytes + col * kElementBytes, source + col, inside ? 16 : 0);
      }
    }
  } else if (part == 0) {
    for (int i = threadIdx.x; i < kRows * kCols; i += kNumThreads) {
      const int row = i / kCols, col = i % kCols;
      const bool inside = row < rows && col < cols;
      tile.data[row * tile.kRowElements + col] = inside ? gmem[row * row_stride + col] : Element{0};
    }
  }
}

// Rows [0, rows) x columns [0, cols) of gmem = tile. The caller has synchronised.
template <int kRows, int kCols>
FA2_DEVICE void store_tile(Element* gmem, int64_t row_stride, int rows, int cols, const Tile<kRows, kCols>& tile) {
  if constexpr (kAligned) {
    const ChunkMap<kCols> map;
    const uint32_t source = smem_address(tile.data) + map.row * tile.kRowBytes + map.col * kElementBytes;
#pragma unroll
    for (int pass = 0; pass < kRows; pass += map.kRowsPerPass) {
      const int row = map.row + pass;
      if (row >= rows || (kRows % map.kRowsPerPass != 0 && row >= kRows)) continue;
      Element* target = gmem + row * row_stride + map.col;
#pragma unroll
      for (int col = 0; col < kCols; col += map.kColsPerRound)
        if (map.col + col < cols)
          *reinterpret_cast<uint4*>(target + col) = ld_shared_v4(source + pass * tile.kRowBytes + col * kElementBytes);
    }
  } else {
    for (int i = threadIdx.x; i < kRows * kCols; i += kNumThreads) {
      const int row = i / kCols, col = i % kCols;
      if (row < rows && col < cols) gmem[row * row_stride + col] = tile.data[row * tile.kRowElements + col];
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// The block of `tile` that starts at (row, col), as an operand. "transposed": A has its rows down the columns of the tile, B its
// columns down the rows.
template <typename AnyTile>
FA2_DEVICE uint32_t block_address(const AnyTile& tile, int row, int col) {
  return smem_address(tile.data) + row * tile.kRowBytes + col * kElementBytes;
}
template <int kRows, int kCols>
FA2_DEVICE auto operand_a(const Tile<kRows, kCols>& tile, int row, int col) {
  return Operand<Element, Tile<kRows, kCols>::kRowBytes, true, true>(block_address(tile, row, col));
}
template <int kRows, int kCols>
FA2_DEVICE auto operand_b_transposed(const Tile<kRows, kCols>& tile, int row, int col) {
  return Operand<Element, Tile<kRows, kCols>::kRowBytes, false, true>(block_address(tile, row, col));
}
// The sum runs over keys or queries: that of P or dS with the rows of another tile. Both sides take its terms in the order in which
// the accumulators of scores have them.
template <int kRows, int kCols>
FA2_DEVICE auto operand_b(const Tile<kRows, kCols>& tile, int row, int col) {
  return Operand<Element, Tile<kRows, kCols>::kRowBytes, false, false>(block_address(tile, row, col));
}
template <int kKeys, int kQueries>
FA2_DEVICE auto operand_a_of_scores(const ScoreTile<kKeys, kQueries>& tile, int row, int col) {
  return ScoreOperand<Element, ScoreTile<kKeys, kQueries>::kRowBytes, true>(block_address(tile, row, col));
}
template <int kKeys, int kQueries>
FA2_DEVICE auto operand_a_of_scores_transposed(const ScoreTile<kKeys, kQueries>& tile, int row, int col) {
  return ScoreOperand<Element, ScoreTile<kKeys, kQueries>::kRowBytes, false>(block_address(tile, row, col));
}

// An A operand that is in registers already.
template <int kMTiles, int kKSteps>
struct Fragments {
  using Words = typename Fragment<Element>::Words;
  Words r[kMTiles][kKSteps];
  FA2_DEVICE void load(Words& out, int i, int k) const { Fragment<Element>::copy(out, r[i][k]); }
};

struct NoCopy {
  FA2_DEVICE void operator()(int) const {}
};

// acc += A B, the sum running over kKSteps blocks of 16. copy(k) is called before block k: so the copy of another tile is
// spread over the product, instead of holding up its first loads from shared memory.
template <int kKSteps, int kMTiles, int kNTiles, typename A, typename B, typename Copy = NoCopy>
FA2_DEVICE void gemm(Accumulator<kMTiles, kNTiles>& acc, const A& a, const B& b, const Copy& copy = {}) {
  using F = Fragment<Element>;
#pragma unroll
  for (int k = 0; k < kKSteps; ++k) {
    copy(k);
    typename F::A frag_a[kMTiles];
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
      a.load(F::words(frag_a[i]), i, k);
      F::prepare(frag_a[i]);
    }
#pragma unroll
    for (int j = 0; j < kNTiles / F::kTilesB; ++j) F::multiply(acc.x, j, frag_a, b, k);
  }
}

// An A operand whose first kKept blocks of 16 columns stay in registers; the others are read from shared memory each time.
template <int kRowBytes, int kMTiles, int kKept>
struct KeptOperand {
  Operand<Element, kRowBytes, true, true> smem;
  Fragments<kMTiles, kKept == 0 ? 1 : kKept> kept;

  FA2_DEVICE void keep() {
#pragma unroll
    for (int k = 0; k < kKept; ++k)
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) smem.load(kept.r[i][k], i, k);
  }
  FA2_DEVICE void load(typename Fragment<Element>::Words& r, int i, int k) const {
    if (k < kKept) {
      kept.load(r, i, k);
    } else {
      smem.load(r, i, k);
    }
  }
};

// The accumulators of scores are the A fragments of the next product.
template <typename T = Element, int kMTiles, int kNTiles>
FA2_DEVICE Fragments<kMTiles, ceil_div(kNTiles, 2)> to_fragments(const Accumulator<kMTiles, kNTiles>& acc) {
  Fragments<kMTiles, ceil_div(kNTiles, 2)> frag;
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int k = 0; k < kNTiles / 2; ++k)
      Fragment<T>::of_scores(frag.r[i][k], acc.x[i][2 * k], acc.x[i][2 * k + 1]);
  return frag;
}

// Row h of two of a thread's blocks whose columns are interleaved.
FA2_DEVICE float4 four_of_row(const Real (&even)[4], const Real (&odd)[4], int h) {
  const float x = even[2 * h], y = odd[2 * h], z = even[2 * h + 1], w = odd[2 * h + 1];
  return {x, y, z, w};
}

// tile[row.., col..] = scores that are fragments already, of kNTiles blocks of 8 columns.
template <int kNTiles, int kMTiles, int kSteps, int kKeys, int kQueries>
FA2_DEVICE void store_fragments(ScoreTile<kKeys, kQueries>& tile, int row, int col, const Fragments<kMTiles, kSteps>& frag) {
  const uint32_t target = block_address(tile, row + accumulator_row(), col + accumulator_col());
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        Fragment<Element>::store_pair_of(target + (16 * i + h * 8) * tile.kRowBytes + j * 8 * kElementBytes, frag.r[i][j / 2],
                                         j % 2, h);
}

// tile[row.., col..] = acc, rounded.
template <int kMTiles, int kNTiles, typename AnyTile>
FA2_DEVICE void store_scores(AnyTile& tile, int row, int col, const Accumulator<kMTiles, kNTiles>& acc) {
  const uint32_t target = block_address(tile, row + accumulator_row(), col + accumulator_col());
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        Fragment<Element>::store_pair(target + (16 * i + 8 * h) * tile.kRowBytes + j * 8 * kElementBytes,
                                      acc.x[i][j][2 * h], acc.x[i][j][2 * h + 1]);
}

// The same of sums. kOfTransposed: of a product with operand_a_of_scores_transposed.
template <bool kOfTransposed = false, int kMTiles, int kNTiles, int kRows, int kCols>
FA2_DEVICE void store_accumulator(Tile<kRows, kCols>& tile, int row, int col, const Accumulator<kMTiles, kNTiles>& acc) {
  if constexpr (Fragment<Element>::kInterleaved) {
    constexpr int kRowsApart = kOfTransposed ? 1 : 8;
    const int first_row = row + (kOfTransposed ? 2 : 1) * accumulator_row();
    const uint32_t target = block_address(tile, first_row, col + 2 * accumulator_col());
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int j = 0; j < kNTiles; j += 2)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4 x = four_of_row(acc.x[i][j], acc.x[i][j + 1], h);
          st_shared_v4(target + (16 * i + kRowsApart * h) * tile.kRowBytes + j * 32, __builtin_bit_cast(uint4, x));
        }
  } else {
    store_scores(tile, row, col, acc);
  }
}
