// After the backward: dQ = scale * dq_accum, out of the order of dq_accum.cuh into rows, rounded.
//
// One thread block per tile of kBlockM query rows, with the warps that share it. Heads are taken from the last to the first:
// those that flash_bwd ended with are still in L2.
#include "common/dq_accum.cuh"
#include "common/params.cuh"
#include "sm80/tile.cuh"

static_assert(sizeof(BwdParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

struct SharedMemory {
  Tile<kBlockM, kHeadDim> dq;
};

static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/tiles.py and this struct differ");

extern "C" __global__ void __launch_bounds__(kNumThreads) flash_bwd_postprocess(const __grid_constant__ BwdParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  const Shape& shape = params.shape;
  const int m_blocks = ceil_div(shape.seqlen_q, kBlockM);
  const int64_t tile = gridDim.x - 1 - blockIdx.x;
  const int m_block = tile % m_blocks, row_of_tiles = tile / m_blocks;
  const int head = row_of_tiles % shape.num_heads, batch = row_of_tiles / shape.num_heads;
  const float* dq_tile = params.dq_accum + tile * kDqTileFloats;

  const int warp = warp_id(), lane = lane_id();
#pragma unroll
  for (int j = 0; j < kDqNTiles; ++j) {
    if (dq_col(warp) + 8 * j >= kHeadDim) break;
    Accumulator<kDqMTiles, 1> acc;
#pragma unroll
    for (int i = 0; i < kDqMTiles; ++i) {
      float(&x)[4] = acc.x[i][0];
      if constexpr (kVectorRed) {
        const float4 all = *reinterpret_cast<const float4*>(dq_tile + dq_offset(warp, lane, i, j, 0));
        x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = dq_tile[dq_offset(warp, lane, i, j, e)];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] *= params.softmax_scale;
    }
    store_accumulator(smem.dq, dq_row(warp), dq_col(warp) + 8 * j, acc);
  }
  __syncthreads();  // dQ is in shared memory
  const Strides& dqs = params.dq_strides;
  const int first_query = m_block * kBlockM;
  store_tile(params.dq + batch * dqs.batch + head * dqs.head + first_query * dqs.row, dqs.row,
             shape.seqlen_q - first_query, shape.head_dim, smem.dq);
}
