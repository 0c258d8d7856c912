// Before the backward: D = rowsum(dO * O) (Dao 2023, algorithm 2, line 4), lse in base 2, and zeros for dQ or its turns.
//
// One thread block per kBlockM query rows of a head; a row is shared by the lanes that hold its 16-byte chunks. Heads are taken
// from the last to the first: what flash_bwd begins with is the last that has been touched, and still in L2.
#include "common/block_range.cuh"
#include "common/dq_accum.cuh"
#include "common/ptx.cuh"

static_assert(sizeof(BwdParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kLanesPerRow = ceil_pow2(kHeadDimV / 8);
constexpr int kRowsPerPass = kNumThreads / kLanesPerRow;

// Eight neighbouring elements of a row as float32, zeros past column `cols`.
FA2_DEVICE void load_chunk(float (&x)[8], const Element* row, int col, int cols) {
  alignas(16) Element elements[8] = {};
  if constexpr (kAligned) {
    if (col < cols) *reinterpret_cast<uint4*>(elements) = *reinterpret_cast<const uint4*>(row + col);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < cols) elements[i] = row[col + i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(elements[i]);
}

extern "C" __global__ void __launch_bounds__(kNumThreads) flash_bwd_preprocess(const __grid_constant__ BwdParams params) {
  const Shape& shape = params.shape;
  const int m_blocks = ceil_div(shape.seqlen_q, kBlockM);
  const int64_t tile = gridDim.x - 1 - blockIdx.x;
  const int m_block = tile % m_blocks, row_of_tiles = tile / m_blocks;
  const int head = row_of_tiles % shape.num_heads, batch = row_of_tiles / shape.num_heads;

  const Strides &os = params.out_strides, &dos = params.dout_strides, &ls = params.lse_strides;
  const Element* gmem_out = params.out + batch * os.batch + head * os.head;
  const Element* gmem_dout = params.dout + batch * dos.batch + head * dos.head;
  const float* gmem_lse = params.lse + batch * ls.batch + head * ls.head;

  const int col = threadIdx.x % kLanesPerRow * 8;
#pragma unroll
  for (int i = threadIdx.x / kLanesPerRow; i < ceil_div(kBlockM, kRowsPerPass) * kRowsPerPass; i += kRowsPerPass) {
    const int row = m_block * kBlockM + i;
    const bool inside = i < kBlockM && row < shape.seqlen_q;
    float d = 0.f;
    if (inside) {
      float out[8], dout[8];
      load_chunk(out, gmem_out + row * os.row, col, head_dim_v(params));
      load_chunk(dout, gmem_dout + row * dos.row, col, head_dim_v(params));
#pragma unroll
      for (int j = 0; j < 8; ++j) d = fmaf(out[j], dout[j], d);
    }
#pragma unroll
    for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2) d += __shfl_xor_sync(0xffffffffu, d, lanes);
    if (i < kBlockM && col == 0) {
      // P = exp2(... - inf) = 0: a row past the end, or one whose every score is -inf, adds nothing to any gradient.
      float lse_log2 = kInfinity;
      if (inside && gmem_lse[row * ls.row] != -kInfinity) lse_log2 = gmem_lse[row * ls.row] * kLog2E;
      params.lse_log2[tile * kBlockM + i] = lse_log2;
      params.softmax_d[tile * kBlockM + i] = d;
    }
  }

  if constexpr (kClearDq) {
    float4* dq = reinterpret_cast<float4*>(params.dq_accum + tile * kDqTileFloats);
    for (int i = threadIdx.x; i < kDqTileFloats / 4; i += kNumThreads) dq[i] = float4{0.f, 0.f, 0.f, 0.f};
  }
  if (threadIdx.x < kDqParts) params.dq_turn[tile * kDqParts + threadIdx.x] = 0;
}
