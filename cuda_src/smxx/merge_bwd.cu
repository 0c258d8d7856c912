// The gradients of smxx/merge.cu:
//
//   dout_i = w_i dout,   dlse_i = w_i (dlse + rowsum(dout * (out_i - out))),   w_i = exp(lse_i - lse)
//
// Threads take rows as there. A piece of weight 0 has gradients of 0, whatever it holds.
#include "common/pieces.cuh"

static_assert(sizeof(MergeBwdParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

extern "C" __global__ void __launch_bounds__(kNumThreads) merge_bwd(const __grid_constant__ MergeBwdParams params) {
  const PieceRow row = row_of_thread(params);
  const int64_t place = place_of(row, params.outs_strides), lse_place = place_of(row, params.lses_strides);
  const int64_t dout_place = place_of(row, params.douts_strides);
  const int lane = threadIdx.x % kLanes;
  const auto* out = static_cast<const PieceElement*>(params.out) + place_of(row, params.out_strides);
  const auto* dout = static_cast<const PieceElement*>(params.dout) + place_of(row, params.dout_strides);
  const float lse = row.is_there ? params.lse[place_of(row, params.lse_strides)] : -kInfinity;
  const float dlse = row.is_there ? params.dlse[place_of(row, params.dlse_strides)] : 0.f;
  float weight[kPieces], sum[kPieces];  // sum: of dout * (out_i - out), this lane's columns
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const float own = row.is_there ? params.lses[i][lse_place] : -kInfinity;
    weight[i] = own == -kInfinity ? 0.f : ex2((own - lse) * kLog2E);
    sum[i] = 0.f;
  }
  for (int col = lane * kChunk; row.is_there && col < params.cols; col += kLanes * kChunk) {
    const Chunk chunk_out = load_chunk(out, col, params.cols), chunk_dout = load_chunk(dout, col, params.cols);
#pragma unroll
    for (int first = 0; first < kPieces; first += kAtOnce) {
      Chunk chunks[kAtOnce];
      load_pieces(chunks, params, place, first, col);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= kPieces) break;
        float x[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          const float d = to_float(chunk_dout.x[e]);
          sum[first + i] = fmaf(d, to_float(chunks[i].x[e]) - to_float(chunk_out.x[e]), sum[first + i]);
          x[e] = weight[first + i] * d;
        }
        store_chunk(static_cast<PieceElement*>(params.douts[first + i]) + dout_place, col, params.cols, x);
      }
    }
  }
  // All lanes of the warp are here, also those whose row is not there.
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], lanes);
    if (lane == 0 && row.is_there) {
      const float gradient = weight[i] == 0.f ? 0.f : weight[i] * (dlse + sum[i]);  // of a piece that may hold anything
      params.dlses[i][place_of(row, params.dlses_strides)] = gradient;
    }
  }
}
