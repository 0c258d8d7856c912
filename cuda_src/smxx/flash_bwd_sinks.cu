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
  Real sums[kNumWarps];
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/smxx/flash_bwd_sinks.py and this struct differ");

// A thread's part of what the preprocess has summed up.
template <typename Params>
FA2_DEVICE Real sum_of_tiles(const Params& params, int head) {
  const int64_t room = static_cast<int64_t>(params.tiles_of_head) * params.sums_of_tile;  // of a head, in a row of the batch
  int64_t count = room;
  if constexpr (kListed) {
    if (room > 0) count = static_cast<int64_t>(params.counts[0]) * params.sums_of_tile;  // tiles are numbered without a gap
  }
  Real sum = 0.f;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < params.batch * count; i += kNumThreads) {
    sum += params.sink_sums[(i / count * params.num_heads + head) * room + i % count];
  }
  return sum;
}

// Likewise of short segments, which are in no tile.
template <typename Params>
FA2_DEVICE Real sum_of_shorts(const Params& params, int head) {
  Real sum = 0.f;
  if constexpr (kSegments) {
    if (params.short_sums == nullptr) return sum;
    const int64_t room = static_cast<int64_t>(params.batch_rows) * min(params.rows_q, params.rows_k) * params.sums_of_tile;
    const int64_t count = static_cast<int64_t>(params.counts[2]) * params.sums_of_tile;
    for (int64_t i = threadIdx.x; i < count; i += kNumThreads) sum += params.short_sums[head * room + i];
  }
  return sum;
}

// A thread's part of dlse of the first `unseen` rows of the runs that the lanes of its warp have: of one after the other, by all lanes.
template <typename Params>
FA2_DEVICE Real sum_of_leading(const Params& params, int head, int batch, int first_row, int unseen) {
  Real sum = 0.f;
  if (!__any_sync(0xffffffffu, unseen > 0)) return sum;
  const int lane = threadIdx.x % 32;
  for (int other = 0; other < 32; ++other) {
    const int rows = __shfl_sync(0xffffffffu, unseen, other), first = __shfl_sync(0xffffffffu, first_row, other);
    const int row_of_batch = __shfl_sync(0xffffffffu, batch, other);
    for (int row = lane; row < rows; row += 32) sum += dlse_of(params, row_of_batch, head, first + row);
  }
  return sum;
}

// A thread's part of dlse of the rows that see no key; all of these lead their sequence.
template <typename Params>
FA2_DEVICE Real sum_of_unseen(const Params& params, int head) {
  Real sum = 0.f;
  if constexpr (kDlse && kSegments) {
    const int lane = threadIdx.x % 32, reach = reach_of(params).behind;
    for (int group = 0; group < params.groups; ++group) {
      const int first_row = group * params.rows_of_group, end_row = min(first_row + params.rows_of_group, params.batch_rows);
      const IdRun* runs = params.runs_q + first_row * params.rows_q;
      const int count = params.found[3 * group + 1];
      for (int first = threadIdx.x - lane; first < count; first += kNumThreads) {
        const int own = first + lane, start = own < count ? runs[own].start : 0;
        int unseen = 0;
        if (own < count && runs[own].met >= 0) {
          const int end = own + 1 < count ? runs[own + 1].start : end_row * params.rows_q;
          unseen = unseen_rows({0, end - start}, {0, runs[own].met}, reach);
        }
        sum += sum_of_leading(params, head, start / params.rows_q, start % params.rows_q, unseen);
      }
    }
  } else if constexpr (kDlse && kListed) {
    const Side queries = queries_of(params), keys = keys_of(params);
    const int reach = reach_of(params).behind, lane = threadIdx.x % 32;
    for (int first = threadIdx.x - lane; first < params.sequences; first += kNumThreads) {
      Run run{0, 0};
      int unseen = 0;
      if (first + lane < params.sequences) {
        run = queries.run(first + lane);
        unseen = unseen_rows(run, keys.run(first + lane), reach);
      }
      sum += sum_of_leading(params, head, first + lane, run.first, unseen);
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
  Real sum = sum_of_tiles(params, head) + sum_of_unseen(params, head);
  if (kSegments) sum += sum_of_shorts(params, head);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) smem.sums[threadIdx.x / 32] = sum;
  __syncthreads();  // the sums of the warps are there
  if (threadIdx.x != 0) return;
  sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kNumWarps; ++warp) sum += smem.sums[warp];
  if (own_logit(params, head) == -kInfinity) sum = 0.f;  // as if there were none, rows of an lse of -inf included
  if (params.sinks_are_16_bit) {
    static_cast<Element*>(params.dsinks)[head] = rounded<Element>(sum);
  } else {
    static_cast<float*>(params.dsinks)[head] = static_cast<float>(sum);
  }
}
