// The accumulators of mma (m16n8k16 and m16n8k8): what softmax, masks and stores have to know about them.
#pragma once

#include "common/config.cuh"

FA2_DEVICE int lane_id() { return threadIdx.x % 32; }
FA2_DEVICE int warp_id() { return threadIdx.x / 32; }

// A matrix of 16 * kMTiles rows and 8 * kNTiles columns in the registers of a warp: element (i, j) of a thread is
// in row 16 i + lane / 4 + 8 (e / 2), column 8 j + 2 (lane % 4) + e % 2, e = 0..3.
template <int kMTiles, int kNTiles>
struct Accumulator {
  Real x[kMTiles][kNTiles][4];
  FA2_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[i][j][e] = 0;
  }
};

FA2_DEVICE int accumulator_row() { return lane_id() / 4; }
FA2_DEVICE int accumulator_col() { return lane_id() % 4 * 2; }
// Row and column of element (i, j, e) from this thread's first one on.
FA2_DEVICE constexpr int row_of(int i, int e) { return 16 * i + e / 2 * 8; }
FA2_DEVICE constexpr int col_of(int j, int e) { return 8 * j + e % 2; }
