// After a backward in which head_splits thread blocks shared a key block: dK and dV = the sums of their parts, rounded.
//
// One thread per (batch, key head, key, 8 columns); blockIdx.y is 0 for dK, 1 for dV. Parts are added in the
// order of the query heads, so that the bits do not depend on anything.
#include "common/params.cuh"
#include "common/ptx.cuh"

static_assert(sizeof(BwdParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

// Elements [col, col + 8) of a row of `cols` = x, rounded; nothing past its end.
FA2_DEVICE void store_chunk(Element* row, int col, int cols, const float (&x)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = cvt_pack<Element>(x[2 * i], x[2 * i + 1]);
  if constexpr (kAligned) {
    *reinterpret_cast<uint4*>(row + col) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < cols) row[col + i] = Element{static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16)};
  }
}

extern "C" __global__ void __launch_bounds__(kNumThreads) flash_bwd_combine(const __grid_constant__ BwdParams params) {
  const Shape& shape = params.shape;
  const bool is_dk = blockIdx.y == 0;
  const int cols = is_dk ? shape.head_dim : head_dim_v(params), part_cols = is_dk ? kHeadDim : kHeadDimV;
  const int chunks = ceil_div(cols, 8);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
  const int col = index % chunks * 8;
  const int key = index / chunks % shape.seqlen_k;
  const int64_t row_of_keys = index / chunks / shape.seqlen_k;
  const int head = row_of_keys % shape.num_heads_k;
  const int64_t batch = row_of_keys / shape.num_heads_k;
  if (batch >= shape.batch) return;

  const int64_t part_floats = static_cast<int64_t>(ceil_div(shape.seqlen_k, kBlockN)) * kBlockN * part_cols;
  const float* part = is_dk ? params.dk_partial : params.dv_partial;
  part += row_of_keys * params.head_splits * part_floats + static_cast<int64_t>(key) * part_cols + col;
  float sum[8] = {};
#pragma unroll 4
  for (int split = 0; split < params.head_splits; ++split, part += part_floats) {
    const float4 low = *reinterpret_cast<const float4*>(part), high = *reinterpret_cast<const float4*>(part + 4);
    sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
    sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
  }
  const Strides& strides = is_dk ? params.dk_strides : params.dv_strides;
  Element* rows = (is_dk ? params.dk : params.dv) + batch * strides.batch + head * strides.head;
  store_chunk(rows + key * strides.row, col, cols, sum);
}
