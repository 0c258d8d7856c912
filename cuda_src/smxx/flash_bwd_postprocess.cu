// After the backward: float32 sums become rows, rounded. dQ = scale * dq_accum, out of the order of dq_accum.cuh; and where thread
// blocks shared key blocks (kPartialDkv), dK and dV = the sums of their parts.
//
// The first thread blocks take a tile of kBlockM query rows each, with the warps that share it, heads from the last to the first:
// those that flash_bwd ended with are still in L2. The others take 8 columns of a row of dK, later of dV, with each thread.
#include "common/bwd_tiles.cuh"
#include "common/chunk.cuh"
#include "common/dq_accum.cuh"
#include "sm80/tile.cuh"

static_assert(sizeof(PostprocessParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

struct SharedMemory {
  Tile<kBlockM, kHeadDim> dq;
};

static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/tiles.py and this struct differ");

// dQ of tile `linear`, of all that there are at most.
FA2_DEVICE void convert_dq(SharedMemory& smem, const PostprocessParams& params, int64_t linear) {
  const Shape& shape = params.shape;
  const int m_blocks = query_tiles_of_head(params);
  const int place = linear % m_blocks, row_of_tiles = linear / m_blocks;
  const int head = row_of_tiles % shape.num_heads, batch = row_of_tiles / shape.num_heads;
  if (kListed && !has_query_tile(params, place)) return;
  const auto entry = query_tile_at(params, place, batch);
  const Sequence& sequence = sequence_of_tile(shape, entry, params);
  const int64_t tile = kListed ? static_cast<int64_t>(head) * m_blocks + entry.tile : linear;
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
  const int first_query = (kListed ? entry.block : place) * kBlockM;
  store_tile(params.dq + query_batch(entry) * dqs.batch + head * dqs.head + query_row(entry, first_query) * dqs.row, dqs.row,
             sequence.seqlen_q - first_query, shape.head_dim, smem.dq);
}

// dK or dV: chunk `index` of 8 columns, counted along rows, keys, key heads and batches. Its parts are added in the order of the
// queries, so that the bits do not depend on anything.
template <bool kIsDk>
FA2_DEVICE void sum_parts(const PostprocessParams& params, int64_t index) {
  constexpr int kPartCols = kIsDk ? kHeadDim : kHeadDimV;
  const Shape& shape = params.shape;
  const int cols = kIsDk ? shape.head_dim : head_dim_v(params);
  const int chunks = ceil_div(cols, 8);
  const int col = index % chunks * 8;
  const int key = index / chunks % shape.seqlen_k;
  const int64_t row_of_keys = index / chunks / shape.seqlen_k;
  const int head = row_of_keys % shape.num_heads_k;
  const int64_t batch = row_of_keys / shape.num_heads_k;
  if (batch >= shape.batch) return;

  const int64_t part_floats = static_cast<int64_t>(ceil_div(shape.seqlen_k, kBlockN)) * kBlockN * kPartCols;
  const float* part = kIsDk ? params.dk_partial : params.dv_partial;
  part += row_of_keys * params.splits * part_floats + static_cast<int64_t>(key) * kPartCols + col;
  float sum[8] = {};
#pragma unroll 4
  for (int split = 0; split < params.splits; ++split, part += part_floats) {
    const float4 low = *reinterpret_cast<const float4*>(part), high = *reinterpret_cast<const float4*>(part + 4);
    sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
    sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
  }
  const Strides& strides = kIsDk ? params.dk_strides : params.dv_strides;
  Element* rows = (kIsDk ? params.dk : params.dv) + batch * strides.batch + head * strides.head;
  store_chunk(rows + key * strides.row, col, cols, sum);
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 4)
    flash_bwd_postprocess(const __grid_constant__ PostprocessParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  griddepcontrol_wait();  // flash_bwd has ended
  const Shape& shape = params.shape;
  const int query_tiles = query_tiles_of_head(params) * shape.num_heads * shape.batch;  // of a list at most
  const int block = static_cast<int>(blockIdx.x) - query_tiles;
  if (block < 0) return convert_dq(smem, params, -1 - block);
  if constexpr (kPartialDkv) {
    const int64_t keys = static_cast<int64_t>(shape.seqlen_k) * shape.num_heads_k * shape.batch;
    const int dk_blocks = (keys * ceil_div(shape.head_dim, 8) + kNumThreads - 1) / kNumThreads;
    const int64_t first = static_cast<int64_t>(block < dk_blocks ? block : block - dk_blocks) * kNumThreads;
    if (block < dk_blocks) return sum_parts<true>(params, first + threadIdx.x);
    sum_parts<false>(params, first + threadIdx.x);
  }
}
