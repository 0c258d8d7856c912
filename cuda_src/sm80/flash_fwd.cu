// FlashAttention-2 forward (Dao 2023, algorithm 1) with mma.sync and cp.async: every GPU from sm_80 on.
//
//   O = softmax(scale * Q K^T) V,   lse = log(sum(exp(scale * Q K^T)))
//
// A thread block owns kBlockM query rows of one head, a warp a slice of them, so that no two warps ever share a row and the
// softmax needs no shared memory. Key blocks run from the last to the first: the ones that need a mask come first.
//
//   copies   V(n)                     K(n-1)       V(n-1)
//   math     S = Q K(n)^T   softmax   O += P V(n)   S = Q K(n-1)^T   ...
//
// K and V have one buffer each; each is filled while the product that needs the other one runs. The copies are issued in
// parts, between the steps of that product.
#include "common/dropout.cuh"
#include "common/schedule.cuh"
#include "common/score.cuh"
#include "common/softmax.cuh"
#include "common/statistics.cuh"
#include "sm80/tile.cuh"

static_assert(sizeof(FwdBandParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kMTiles = kBlockM / kNumWarps / 16;  // of 16 rows each, per warp
constexpr int kSTiles = kBlockN / 8, kOTiles = kHeadDimV / 8;
constexpr int kHeadSteps = kHeadDim / 16, kKeySteps = kBlockN / 16;
static_assert(kMTiles * kNumWarps * 16 == kBlockM, "each warp owns whole blocks of 16 query rows");

struct SharedMemory {
  union {
    Tile<kBlockM, kHeadDim> q;
    Tile<kBlockM, kHeadDimV> out;  // on its way to global memory, when everybody is done with Q
  };
  Tile<kBlockN, kHeadDim> k;
  Tile<kBlockN, kHeadDimV> v;
};

static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/tiles.py and this struct differ");

using AccS = Accumulator<kMTiles, kSTiles>;
using AccO = Accumulator<kMTiles, kOTiles>;

// Q as the A operand of S = Q K^T.
using QOperand = KeptOperand<Tile<kBlockM, kHeadDim>::kRowBytes, kMTiles, kQStepsInRegs>;

FA2_DEVICE void store_lse(const Softmax<kMTiles>& softmax, float* lse, int64_t stride, int row, int rows, float scale_log2) {
  if (accumulator_col() != 0) return;  // four lanes hold the same row
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (row + 16 * i + 8 * h < rows) lse[(row + 16 * i + 8 * h) * stride] = softmax.lse(i, h, scale_log2);
}

// Tile `linear` of the launch order.
FA2_DEVICE void attend(SharedMemory& smem, const FwdBandParams& params, int linear) {
  const Shape& shape = params.shape;
  const QueryTile tile = query_tile(shape, linear, params);
  if (kListed && tile.head < 0) return;
  const int m_block = tile.m_block;
  const Sequence& sequence = sequence_of_tile(shape, tile, params);
  const int head_k = tile.head / (shape.num_heads / shape.num_heads_k);

  const Strides &qs = params.q_strides, &ks = params.k_strides, &vs = params.v_strides, &os = params.out_strides;
  const int first_query = m_block * kBlockM, queries = sequence.seqlen_q - first_query;
  const Element* gmem_q = params.q + query_batch(tile) * qs.batch + tile.head * qs.head + query_row(tile, first_query) * qs.row;
  const Element* gmem_k = params.k + key_batch(tile) * ks.batch + head_k * ks.head + key_row(tile, 0) * ks.row;
  const Element* gmem_v = params.v + key_batch(tile) * vs.batch + head_k * vs.head + key_row(tile, 0) * vs.row;

  const int warp_row = warp_id() * kMTiles * 16;
  const auto smem_q = operand_a(smem.q, warp_row, 0);
  const auto smem_k = operand_b_transposed(smem.k, 0, 0);
  const auto smem_v = operand_b(smem.v, 0, 0);

  // Keys of block n, or a part of them; of block -1, zeros: nobody reads them, and there is no branch in the loop. Only the
  // last block may have rows past the end.
  auto keys_from = [&](int n) { return n < 0 ? 0 : sequence.seqlen_k - n * kBlockN; };
  auto load_k = [&](int n, auto whole, int part = 0, int parts = 1) {
    load_tile<decltype(whole)::value>(smem.k, gmem_k + n * kBlockN * ks.row, ks.row, keys_from(n), shape.head_dim, part,
                                      parts);
  };
  auto load_v = [&](int n, auto whole, int part, int parts) {
    load_tile<decltype(whole)::value>(smem.v, gmem_v + n * kBlockN * vs.row, vs.row, keys_from(n), head_dim_v(params), part,
                                      parts);
  };

  const KeyVisit visit = key_visit(sequence, m_block, params, query_batch(tile), tile.head);
  if (kUnseenRows && !kListed && visit.begin >= visit.end) return;
  load_tile(smem.q, gmem_q, qs.row, queries, shape.head_dim);
  load_k(met_keys(visit, visit.end - 1).block, False{});
  cp_async_commit_group();

  QOperand operand_q{smem_q};
  if constexpr (kQStepsInRegs > 0) {
    cp_async_wait_group<0>();  // Q landed (and the first K)
    __syncthreads();           // everybody's part of Q is there
    operand_q.keep();
  }

  Softmax<kMTiles> softmax;
  AccO acc_o;
  acc_o.clear();
  const float scale_log2 = exponent_scale<kScaleFirst>(params);
  const HeadScores of_head = head_scores(params, query_batch(tile), tile.head);

  auto position_of = [&](int n) {
    return Position<false>{first_query + warp_row + accumulator_row(), n * kBlockN + accumulator_col()};
  };
  const Drawing drawing = drawing_of(params, tile, tile.head);
  Kept<false, kMTiles, kSTiles> kept;
  Seen<false, kMTiles> seen;
  auto step = [&](int n, auto masked, auto whole, int bits = -1, int next = -1) {
    if constexpr (kPicked && decltype(masked)::value) {
      seen.read(params, bits, m_block % kQueryParts * kBlockM + warp_row + accumulator_row(), n % kKeyParts * kBlockN);
    }
    kept.draw(drawing, position_of(n));
    cp_async_wait_group<0>();  // K(n) landed
    __syncthreads();           // everybody's part of K(n) is there, and everybody is done with V(n+1)
    // S = Q K^T
    AccS acc_s;
    acc_s.clear();
    gemm<kHeadSteps>(acc_s, operand_q, smem_k, [&](int k) { load_v(n, whole, k, kHeadSteps); });
    cp_async_commit_group();
    // P = exp(scale * S - m)
    const RowShift<kMTiles> shift = modify_scores(acc_s, params, of_head, sequence, position_of(n));
    if constexpr (decltype(masked)::value) {
      if constexpr (kPicked) {
        mask_scores(acc_s, seen);
      } else {
        mask_scores(acc_s, sequence, position_of(n));
      }
    }
    softmax.update(acc_s, acc_o, scale_log2, shift);
    kept.drop(acc_s);
    cp_async_wait_group<0>();  // V(n) landed
    __syncthreads();           // everybody's part of V(n) is there, and everybody is done with K(n)
    // O = diag(alpha) O + P V
    gemm<kKeySteps>(acc_o, to_fragments(acc_s), smem_v, [&](int k) {
      if constexpr (kPicked) {
        load_k(next, False{}, k, kKeySteps);
      } else {
        load_k(kBand && n == visit.begin ? -1 : n - 1, True{}, k, kKeySteps);
      }
    });
    cp_async_commit_group();
  };
  int n = visit.end - 1;
  if constexpr (kPicked) {  // the last block may be anywhere
    MetBlock met = met_keys(visit, n);
    auto step_at = [&](int place, auto masked) {
      const MetBlock next = place > 0 ? met_keys(visit, place - 1) : MetBlock{-1, -1};
      step(met.block, masked, False{}, met.bits, next.block);
      met = next;
    };
    for (; n >= visit.mask_from; --n) step_at(n, True{});
    for (; n >= visit.begin; --n) step_at(n, False{});
  } else {
    for (; n >= visit.mask_from; --n) step(n, True{}, False{});
    for (; n >= visit.unmasked_from(); --n) step(n, False{}, True{});
    if constexpr (kBand) {
      for (; n >= visit.begin; --n) step(n, True{}, True{});
    }
  }

  // O = diag(l)^-1 O, through shared memory: since the last S everybody has been at a barrier, nobody reads Q any more.
  softmax.finish(acc_o, scale_log2, own_logit(params, tile.head), inverse_of_kept(params));
  float* gmem_lse = params.lse + query_batch(tile) * params.lse_strides.batch + tile.head * params.lse_strides.head;
  store_lse(softmax, gmem_lse + query_row(tile, first_query) * params.lse_strides.row, params.lse_strides.row,
            warp_row + accumulator_row(), queries, scale_log2);
  store_accumulator(smem.out, warp_row, 0, acc_o);
  cp_async_wait_group<0>();  // the zeros
  __syncthreads();  // the whole output tile is in shared memory
  Element* gmem_out = params.out + query_batch(tile) * os.batch + tile.head * os.head + query_row(tile, first_query) * os.row;
  store_tile(gmem_out, os.row, queries, head_dim_v(params), smem.out);
}

extern "C" __global__ void __launch_bounds__(kNumThreads) flash_fwd(const __grid_constant__ FwdBandParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  if constexpr (kRepeat) {
    const int tiles = listed_query_tiles(params);
    for (int linear = blockIdx.x; linear < tiles; linear += gridDim.x) {
      attend(smem, params, linear);
      __syncthreads();  // O has left shared memory
    }
  } else {
    attend(smem, params, blockIdx.x);
  }
}
