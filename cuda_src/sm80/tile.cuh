// Tiles in shared memory, their copies from and to global memory, and products of tiles on the tensor cores.
//
// A tile is row-major with 8 elements (16 bytes) of padding after each row. Rows of an even number of 16-byte chunks thus
// become an odd number of chunks long, so the 8 rows of an ldmatrix fall into different banks, and every address in a
// product is one register per operand plus a constant.
#pragma once

#include "common/accumulator.cuh"
#include "common/config.cuh"
#include "sm80/ptx.cuh"

template <int kRows_, int kCols_>
struct Tile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kRowElements = kCols + 8;
  static constexpr int kRowBytes = kRowElements * 2;
  alignas(128) Element data[kRows * kRowElements];
};

// ---- copies ---------------------------------------------------------------------------------------------------------

// How the threads of a block share the 16-byte chunks of a tile of kCols columns. A few lanes take a row, each of them
// every few chunks of it: a lane has one address per row, and its chunks are constants apart.
template <int kCols>
struct ChunkMap {
  static constexpr int kChunks = kCols / 8;
  static constexpr int kLanesPerRow = kChunks % 8 == 0 ? 8 : kChunks == 2 ? 2 : 4;
  static constexpr int kColsPerRound = kLanesPerRow * 8;
  static constexpr int kRowsPerPass = kNumThreads / kLanesPerRow;
  int row, col;  // of the first chunk
  FA2_DEVICE ChunkMap() : row(threadIdx.x / kLanesPerRow), col(threadIdx.x % kLanesPerRow * 8) {}
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
    const uint32_t target = smem_address(tile.data) + map.row * tile.kRowBytes + map.col * 2;
    constexpr int kPasses = ceil_div(kRows, map.kRowsPerPass);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass, source += map.kRowsPerPass * row_stride) {
      const int row = map.row + pass * map.kRowsPerPass;
      if (pass * parts / kPasses != part || (kRows % map.kRowsPerPass != 0 && row >= kRows)) continue;
#pragma unroll
      for (int col = 0; col < kCols; col += map.kColsPerRound) {
        if (kCols % map.kColsPerRound != 0 && map.col + col >= kCols) continue;
        const bool inside = (kWhole ? rows > 0 : row < rows) && map.col + col < cols;
        cp_async_16(target + pass * map.kRowsPerPass * tile.kRowBytes + col * 2, source + col, inside ? 16 : 0);
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
    const uint32_t source = smem_address(tile.data) + map.row * tile.kRowBytes + map.col * 2;
#pragma unroll
    for (int pass = 0; pass < kRows; pass += map.kRowsPerPass) {
      const int row = map.row + pass;
      if (row >= rows || (kRows % map.kRowsPerPass != 0 && row >= kRows)) continue;
      Element* target = gmem + row * row_stride + map.col;
#pragma unroll
      for (int col = 0; col < kCols; col += map.kColsPerRound)
        if (map.col + col < cols)
          *reinterpret_cast<uint4*>(target + col) = ld_shared_v4(source + pass * tile.kRowBytes + col * 2);
    }
  } else {
    for (int i = threadIdx.x; i < kRows * kCols; i += kNumThreads) {
      const int row = i / kCols, col = i % kCols;
      if (row < rows && col < cols) gmem[row * row_stride + col] = tile.data[row * tile.kRowElements + col];
    }
  }
}

// ---- operands of a product ------------------------------------------------------------------------------------------

// One operand of a product, in shared memory. load(r, i, k) reads the fragments of its 16 x 16 block (i, k), where i runs
// along the rows of the product (A) or its columns (B), and k along the sum.
//   kSumIsContiguous: stored [i][k], ldmatrix as it is; otherwise stored [k][i], ldmatrix transposes.
template <int kRowBytes, bool kIsA, bool kSumIsContiguous>
struct Operand {
  uint32_t address;  // this lane's row of block (0, 0)

  FA2_DEVICE explicit Operand(uint32_t first) {
    const int lane = lane_id();
    // A wants the 8x8 matrices (i, k) in the order (0,0) (1,0) (0,1) (1,1), B in the order (0,0) (0,1) (1,0) (1,1).
    const bool rows_first = kIsA == kSumIsContiguous;
    const int row = rows_first ? lane % 16 : lane % 8 + lane / 16 * 8;
    const int chunk = rows_first ? lane / 16 : lane / 8 % 2;
    address = first + row * kRowBytes + chunk * 16;
  }
  FA2_DEVICE void load(uint32_t (&r)[4], int i, int k) const {
    if constexpr (kSumIsContiguous) {
      ldmatrix_x4(r, address + i * 16 * kRowBytes + k * 32);
    } else {
      ldmatrix_x4_trans(r, address + k * 16 * kRowBytes + i * 32);
    }
  }
};

// The block of `tile` that starts at (row, col), as an operand. "kn": the sum runs down the rows of the tile.
template <int kRows, int kCols>
FA2_DEVICE uint32_t block_address(const Tile<kRows, kCols>& tile, int row, int col) {
  return smem_address(tile.data) + row * tile.kRowBytes + col * 2;
}
template <int kRows, int kCols>
FA2_DEVICE auto operand_a(const Tile<kRows, kCols>& tile, int row, int col) {
  return Operand<Tile<kRows, kCols>::kRowBytes, true, true>(block_address(tile, row, col));
}
template <int kRows, int kCols>
FA2_DEVICE auto operand_a_transposed(const Tile<kRows, kCols>& tile, int row, int col) {
  return Operand<Tile<kRows, kCols>::kRowBytes, true, false>(block_address(tile, row, col));
}
template <int kRows, int kCols>
FA2_DEVICE auto operand_b_transposed(const Tile<kRows, kCols>& tile, int row, int col) {
  return Operand<Tile<kRows, kCols>::kRowBytes, false, true>(block_address(tile, row, col));
}
template <int kRows, int kCols>
FA2_DEVICE auto operand_b(const Tile<kRows, kCols>& tile, int row, int col) {
  return Operand<Tile<kRows, kCols>::kRowBytes, false, false>(block_address(tile, row, col));
}

// An A operand that is in registers already.
template <int kMTiles, int kKSteps>
struct Fragments {
  uint32_t r[kMTiles][kKSteps][4];
  FA2_DEVICE void load(uint32_t (&out)[4], int i, int k) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = r[i][k][j];
  }
};

struct NoCopy {
  FA2_DEVICE void operator()(int) const {}
};

// acc += A B, the sum running over kKSteps blocks of 16. copy(k) is called before block k: so the copy of another tile is
// spread over the product, instead of holding up its first loads from shared memory.
template <int kKSteps, int kMTiles, int kNTiles, typename A, typename B, typename Copy = NoCopy>
FA2_DEVICE void gemm(Accumulator<kMTiles, kNTiles>& acc, const A& a, const B& b, const Copy& copy = {}) {
#pragma unroll
  for (int k = 0; k < kKSteps; ++k) {
    copy(k);
    uint32_t frag_a[kMTiles][4];
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) a.load(frag_a[i], i, k);
#pragma unroll
    for (int j = 0; j < kNTiles / 2; ++j) {
      uint32_t frag_b[4];
      b.load(frag_b, j, k);
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
        mma_m16n8k16<Element>(acc.x[i][2 * j], frag_a[i], frag_b[0], frag_b[1]);
        mma_m16n8k16<Element>(acc.x[i][2 * j + 1], frag_a[i], frag_b[2], frag_b[3]);
      }
    }
  }
}

// An A operand whose first kKept blocks of 16 columns stay in registers; the others are read from shared memory each time.
template <int kRowBytes, int kMTiles, int kKept>
struct KeptOperand {
  Operand<kRowBytes, true, true> smem;
  Fragments<kMTiles, kKept == 0 ? 1 : kKept> kept;

  FA2_DEVICE void keep() {
#pragma unroll
    for (int k = 0; k < kKept; ++k)
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) smem.load(kept.r[i][k], i, k);
  }
  FA2_DEVICE void load(uint32_t (&r)[4], int i, int k) const {
    if (k < kKept) {
      kept.load(r, i, k);
    } else {
      smem.load(r, i, k);
    }
  }
};

// The accumulators of one product, rounded, are the A fragments of the next: no data moves.
template <typename T = Element, int kMTiles, int kNTiles>
FA2_DEVICE Fragments<kMTiles, kNTiles / 2> to_fragments(const Accumulator<kMTiles, kNTiles>& acc) {
  Fragments<kMTiles, kNTiles / 2> frag;
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int k = 0; k < kNTiles / 2; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float(&pair)[4] = acc.x[i][2 * k + r / 2];
        frag.r[i][k][r] = cvt_pack<T>(pair[r % 2 * 2], pair[r % 2 * 2 + 1]);
      }
  return frag;
}

// tile[row.., col..] = what has been rounded already.
template <int kMTiles, int kSteps, int kRows, int kCols>
FA2_DEVICE void store_fragments(Tile<kRows, kCols>& tile, int row, int col, const Fragments<kMTiles, kSteps>& frag) {
  const uint32_t target = block_address(tile, row + accumulator_row(), col + accumulator_col());
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        st_shared_b32(target + (16 * i + r % 2 * 8) * tile.kRowBytes + (2 * k + r / 2) * 16, frag.r[i][k][r]);
}

// tile[row.., col..] = acc, rounded.
template <int kMTiles, int kNTiles, int kRows, int kCols>
FA2_DEVICE void store_accumulator(Tile<kRows, kCols>& tile, int row, int col, const Accumulator<kMTiles, kNTiles>& acc) {
  const uint32_t target = block_address(tile, row + accumulator_row(), col + accumulator_col());
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        st_shared_b32(target + (16 * i + 8 * h) * tile.kRowBytes + j * 16,
                      cvt_pack<Element>(acc.x[i][j][2 * h], acc.x[i][j][2 * h + 1]));
}
