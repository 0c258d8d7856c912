// Attention over all keys from attention over pieces of them:
//
//   lse = log(sum of exp(lse_i)),   out = sum of w_i out_i,   w_i = exp(lse_i - lse)
//
// kLanes threads take a row together, 16 bytes of each piece at a time; nothing is read twice, and what a thread reads first, of all
// pieces, is on its way before it waits for any lse. A piece in which a row sees no key (lse_i = -inf) may hold anything there.
#include "common/pieces.cuh"

static_assert(sizeof(MergeParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

extern "C" __global__ void __launch_bounds__(kNumThreads) merge(const __grid_constant__ MergeParams params) {
  const PieceRow row = row_of_thread(params);
  if (!row.is_there) return;
  const int64_t place = place_of(row, params.outs_strides), lse_place = place_of(row, params.lses_strides);
  int col = threadIdx.x % kLanes * kChunk;
  Chunk chunks[kAtOnce];
  load_pieces(chunks, params, place, 0, col);

  float weight[kPieces], max = -kInfinity, sum = 0.f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    weight[i] = params.lses[i][lse_place];
    max = fmaxf(max, weight[i]);
  }
  const float shift = max == -kInfinity ? 0.f : max;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    weight[i] = ex2((weight[i] - shift) * kLog2E);
    sum += weight[i];
  }
  const float inverse = sum == 0.f ? 0.f : rcp(sum);
  if (col == 0) params.lse[place_of(row, params.lse_strides)] = lg2(sum) * kLn2 + shift;

  PieceElement* out = static_cast<PieceElement*>(params.out) + place_of(row, params.out_strides);
  for (; col < params.cols; col += kLanes * kChunk) {
    float x[kChunk] = {};
#pragma unroll
    for (int first = 0; first < kPieces; first += kAtOnce) {
      if (first > 0 || col >= kLanes * kChunk) load_pieces(chunks, params, place, first, col);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= kPieces || weight[first + i] == 0.f) continue;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) x[e] = fmaf(weight[first + i], to_float(chunks[i].x[e]), x[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) x[e] *= inverse;
    store_chunk(out, col, params.cols, x);
  }
}
