// Where sequences lie, read from the arrays of a call: packed, padded, or partly used. Read by smxx/list_tiles.cu and
// smxx/find_segments.cu, and where sequences are asked for rows that see nothing.
#pragma once

#include "common/visit.cuh"

// One side of a sequence.
struct Run {
  int first, seqlen;
};

// One side of all of them. Whatever the arrays hold, a run lies within the rows that there are.
struct Side {
  const int *starts, *used, *padding;  // each null where there is none
  int rows;
  // Its first row, in use or not.
  FA2_DEVICE int start(int sequence) const { return starts ? min(max(starts[sequence], 0), rows) : 0; }
  FA2_DEVICE Run run(int sequence) const {
    Run run{start(sequence), rows};
    if (starts) {
      run.seqlen = min(max(starts[sequence + 1], run.first), rows) - run.first;
    }
    if (used) run.seqlen = min(max(used[sequence], 0), run.seqlen);
    if (padding) {
      const int in_front = min(max(padding[sequence], 0), run.seqlen);
      run.first += in_front, run.seqlen -= in_front;
    }
    return run;
  }
};
template <typename Params>
FA2_DEVICE Side queries_of(const Params& params) {
  return {params.cu_seqlens_q, params.seqused_q, nullptr, params.rows_q};
}
template <typename Params>
FA2_DEVICE Side keys_of(const Params& params) {
  return {params.cu_seqlens_k, params.seqused_k, params.leftpad_k, params.rows_k};
}

// How far a query sees, in both directions.
struct Reach {
  int before, behind;
};
template <typename Params>
FA2_DEVICE Reach reach_of(const Params& params) {
  constexpr int kAll = 1 << 30;
  if constexpr (kBand) {
    return {params.left, params.right};
  } else {
    return {kAll, kCausal ? 0 : kAll};
  }
}

// How many rows in front of a run of queries see no key; or of a run of keys are seen by no query. reach: how far the band goes.
FA2_DEVICE int unseen_rows(const Run& own, const Run& other, int reach) {
  return other.seqlen == 0 ? own.seqlen : min(max(own.seqlen - other.seqlen - reach, 0), own.seqlen);
}

// x and y summed over the threads up to this one, each on its own. The caller has a barrier between two of these; its shared memory
// has room for the sums of the warps, warp_q and warp_k.
template <typename SharedMemory>
FA2_DEVICE void sum_up(SharedMemory& smem, int& x, int& y) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int before_x = __shfl_sync(0xffffffffu, x, lane - d), before_y = __shfl_sync(0xffffffffu, y, lane - d);
    if (lane >= d) x += before_x, y += before_y;
  }
  if (lane == 31) smem.warp_q[warp] = x, smem.warp_k[warp] = y;
  __syncthreads();  // the sums of the warps are there
  int sum_x = lane < warp && lane < kNumWarps ? smem.warp_q[lane] : 0;
  int sum_y = lane < warp && lane < kNumWarps ? smem.warp_k[lane] : 0;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    sum_x += __shfl_xor_sync(0xffffffffu, sum_x, d);
    sum_y += __shfl_xor_sync(0xffffffffu, sum_y, d);
  }
  x += sum_x, y += sum_y;
}
