// Rows of pieces of attention that are merged (smxx/merge.cu, smxx/merge_bwd.cu): which threads take which, and their weights.
#pragma once

#include "common/chunk.cuh"
#include "common/params.cuh"

constexpr int kLanes = kNumThreads / kBlockM;  // that take a row together
constexpr int kChunk = 16 / static_cast<int>(sizeof(PieceElement));  // elements that a lane takes at a time
constexpr int kAtOnce = kPieces < 8 ? kPieces : 8;  // pieces whose loads are issued together
constexpr int kMaxPieces = sizeof(MergeParams::outs) / sizeof(void*);
static_assert(kPieces <= kMaxPieces && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0);

using Chunk = ChunkOf<PieceElement>;

struct PieceRow {
  int batch, row, head;
  bool is_there;
};

// The row of this thread. Eight neighbours along the queries come first, whose lse share a sector of memory, then heads, then the
// other queries.
template <typename Params>
FA2_DEVICE PieceRow row_of_thread(const Params& params) {
  const uint32_t index = static_cast<uint32_t>(blockIdx.x) * kBlockM + threadIdx.x / kLanes;
  const uint32_t heads = params.num_heads, blocks = ceil_div(params.num_rows, 8);
  const uint32_t block_of_batch = index / 8 / heads, head = index / 8 % heads;
  const int batch = block_of_batch / blocks, row = block_of_batch % blocks * 8 + index % 8;
  return {batch, row, static_cast<int>(head), batch < params.batch && row < params.num_rows};
}

FA2_DEVICE int64_t place_of(const PieceRow& row, const Strides& strides) {
  return row.batch * strides.batch + row.row * strides.row + row.head * strides.head;
}

// Columns [col, col + kChunk) of pieces [first, first + kAtOnce), zeros where there is none.
template <typename Params>
FA2_DEVICE void load_pieces(Chunk (&chunks)[kAtOnce], const Params& params, int64_t place, int first, int col) {
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (first + i >= kPieces) break;
    chunks[i] = load_chunk(static_cast<const PieceElement*>(params.outs[first + i]) + place, col, params.cols);
  }
}
