// The order of dq_accum: dQ in float32, summed over key blocks by flash_bwd and turned into rows by
// flash_bwd_postprocess. A tile of kBlockM query rows is stored as the accumulators of the warps that add to it, so that an
// addition is one coalesced burst and nothing is reordered in the main loop.
#pragma once

#include "common/config.cuh"

constexpr int kDqWarpsD = kDqWarps / kDqWarpsM;       // warps along its columns
constexpr int kDqMTiles = kBlockM / 16 / kDqWarpsM;    // blocks of 16 rows of a warp
// Blocks of 8 columns of a warp, at most.
constexpr int kDqNTiles = kDqUnit / 8 * ceil_div(ceil_div(kHeadDim, kDqUnit), kDqWarpsD);
static_assert(kDqWarpsM * kDqWarpsD == kDqWarps && kDqWarpsM * kDqMTiles * 16 == kBlockM, "dQ is shared out evenly");

constexpr int kDqTileFloats = kDqWarps * kDqMTiles * kDqNTiles * 128;

// Rows and columns of a warp's part. Where blocks of kDqUnit columns cannot be shared out evenly, the last warps have fewer.
FA2_DEVICE int dq_row(int warp) { return warp / kDqWarpsD * kDqMTiles * 16; }
FA2_DEVICE int dq_col(int warp) { return warp % kDqWarpsD * kDqNTiles * 8; }

// Offset of element `e` of block (i, j) of a thread. With kVectorRed the four elements of a thread are neighbours,
// otherwise the same element of the 32 threads of a warp.
FA2_DEVICE int dq_offset(int warp, int lane, int i, int j, int e) {
  const int block = (warp * kDqMTiles + i) * kDqNTiles + j;
  return block * 128 + (kVectorRed ? lane * 4 + e : e * 32 + lane);
}
