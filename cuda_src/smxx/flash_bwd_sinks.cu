// The gradient of sinks. A row's O and lse depend on the sink of its head by exp(sink - lse), which is as a P that meets no v:
//
//   dsink = sum of exp(sink - lse) * (dlse - D)   over all rows of the head
//
// flash_bwd_preprocess, which has D at hand, has summed up the rows of each of its warps. Rows that see no key are in none of its
// tiles: of these lse is the sink, and D is 0. One thread block for each head adds all, always in the same order.
#include "common/sequences.cuh"
#include "common/statistics.cuh"

static_assert(sizeof(SinksBwdBandParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

struct SharedMemory {
  float sums[kNumWarps];
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/smxx/flash_bwd_sinks.py and this struct differ");

// A thread's part of what the preprocess has summed up.
template <typename Params>
FA2_DEVICE float sum_of_tiles(const Params& params, int head) {
  const int64_t room = static_cast<int64_t>(params.tiles_of_head) * params.sums_of_tile;  // of a head, in a row of the batch
  int64_t count = room;
  if constexpr (kListed) {
    if (room > 0) count = static_cast<int64_t>(params.counts[0]) * params.sums_of_tile;  // tiles are numbered without a gap
  }
  float sum = 0.f;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < params.batch * count; i += kNumThreads) {
    sum += params.sink_sums[(i / count * params.num_heads + head) * room + i % count];
  }
  return sum;
}

// A thread's part of dlse of the rows that see no key; all of these lead their sequence.
template <typename Params>
FA2_DEVICE float sum_of_unseen(const Params& params, int head) {
  float sum = 0.f;
  if constexpr (kDlse && kListed) {
    const Side queries = queries_of(params), keys = keys_of(params);
    const int reach = reach_of(params).behind, lane = threadIdx.x % 32;
    for (int first = threadIdx.x - lane; first < params.sequences; first += kNumThreads) {
      Run run{0, 0};
      int unseen = 0;
      if (first + lane < params.sequences) {
        run = queries.run(first + lane);
        unseen = unseen_rows(run, keys.run(first + lane), reach);
      }
      if (!__any_sync(0xffffffffu, unseen > 0)) continue;
      for (int other = 0; other < 32; ++other) {  // the rows of one sequence after the other, by all lanes
        const int first_row = __shfl_sync(0xffffffffu, run.first, other), rows = __shfl_sync(0xffffffffu, unseen, other);
        for (int row = lane; row < rows; row += 32) sum += dlse_of(params, first + other, head, first_row + row);
      }
    }
  } else if constexpr (kDlse) {
    const int64_t rows = params.dlse_first_row;
    for (int64_t i = threadIdx.x; i < params.batch * rows; i += kNumThreads) {
      sum += dlse_of(params, i / rows, head, static_cast<int>(i % rows - rows));
    }
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(kNumThreads) flash_bwd_sinks(const __grid_constant__ SinksBwdBandParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  const int head = blockIdx.x;
  float sum = sum_of_tiles(params, head) + sum_of_unseen(params, head);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) smem.sums[threadIdx.x / 32] = sum;
  __syncthreads();  // the sums of the warps are there
  if (threadIdx.x != 0) return;
  sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kNumWarps; ++warp) sum += smem.sums[warp];
  if (sink_of(params, head) == -kInfinity) sum = 0.f;  // as if there were none, rows of an lse of -inf included
  if (params.sinks_are_16_bit) {
    static_cast<Element*>(params.dsinks)[head] = Element{static_cast<uint16_t>(cvt_pack<Element>(sum, 0.f))};
  } else {
    static_cast<float*>(params.dsinks)[head] = sum;
  }
}
