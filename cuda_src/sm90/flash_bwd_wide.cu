// FlashAttention backward with wgmma and TMA: sm_90a, head_dim above 128. The algorithm is that of flash_bwd.cu.
//
// dK and dV of 64 keys x 256 columns take 128 registers each, of every thread of a warpgroup. So a tile has 64 keys, and
// what one warpgroup did for its own keys there, three do for the same keys here, one product after the other:
//
//   copying  two threads: K of every tile and Q with lse of every step; V, and dO with D. A third one adds dQ, or ends turns;
//            deterministic: a fourth waits for them
//   scores   S^T = K Q^T, P^T, dV += P^T dO. P^T goes to the next one through shared memory, register by register
//   softmax  dP^T = V dO^T, dS^T = P^T * (dP^T - D), dK += dS^T Q. dS goes to the next one through shared memory, for wgmma
//   dQ       dQ = dS K. It leaves for dq_accum through shared memory if there is room (kDqShared), else from registers
//
// Rings of buffers couple them, and nothing else: where one waits or computes exponentials, the others' products run. The
// first two issue S or dP of the next step with dV or dK of this one.
#include "common/dq_accum.cuh"
#include "sm90/backward.cuh"
#include "sm90/pipeline.cuh"

static_assert(sizeof(BwdTmaParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");
static_assert(kBlockN == 64 && kNumThreads == 512, "a warpgroup for each of the four");
static_assert(kDqWarps == 4 && kDqWarpsD == 1 && kDqMTiles == 1, "one warpgroup adds to dQ, a warp 16 rows");

constexpr int kQuerySteps = kBlockM / 16, kKeySteps = kBlockN / 16;
constexpr int kCopyRegisters = 24, kComputeRegisters = 208, kDqRegisters = 72;
static_assert(kCopyRegisters + 2 * kComputeRegisters + kDqRegisters <= 512, "the registers of 128 threads");

// dQ is computed so many columns at a time: what its registers hold.
constexpr int kDqCols = 64, kDqPieces = kHeadDim / kDqCols;
static_assert(kHeadDim % kDqCols == 0, "whole pieces of dQ");
constexpr bool kDqShared = kHeadDim <= 192;  // there is room for dQ in shared memory, from where bulk copies add it

// Rows that copies bring, and what goes with them: keys, queries (or their gradient), and a float for each of these.
struct Loads {
  alignas(128) float statistics[kStages][kBlockM];
  // full: the bytes have landed. empty: every reader is done with them.
  uint64_t keys_full, keys_empty, full[kStages], empty[kStages];
};
struct SharedMemory {
  Panels<kBlockN, kHeadDim> k;
  Panels<kBlockN, kHeadDimV> v;
  Panels<kBlockM, kHeadDim> q[kStages];
  Panels<kBlockM, kHeadDimV> dout[kStages];
  Panels<kBlockM, kBlockN> ds[kStages];
  uint4 p[kBlockM / 8][128];  // P^T in float32: rounded twice, dS would be too far off
  Loads q_loads, dout_loads;  // with lse_log2, with softmax_d
  uint64_t ds_full[kStages], ds_empty[kStages];
  alignas(128) float dq[kDqShared ? kDqTileFloats : 1];  // in the order of dq_accum.cuh
  uint64_t dq_full[kDqPieces], dq_empty[kDqPieces];
  uint64_t dq_turn, dq_added, dq_seen;  // deterministic, the last two not kDqShared
};
constexpr int kPFull = 1, kPEmpty = 2;  // named barriers: of the two warpgroups that hand P over
static_assert(sizeof(SharedMemory) <= kSharedBytes && sizeof(SharedMemory) + 1024 > kSharedBytes,
              "kernels/tiles.py and this struct differ");

// K and Q with lse, or V and dO with D: one thread.
template <int kCols>
FA2_DEVICE void copy_tiles(const BwdTmaParams& params, Loads& loads, Panels<kBlockN, kCols>& keys, const TensorMap& keys_map,
                           Panels<kBlockM, kCols> (&queries)[kStages], const TensorMap& queries_map,
                           const TensorMap& statistics_map) {
  Schedule schedule;
  Work work;
  Ring<kStages> ring;
  uint32_t keys_parity = 0;
  while (schedule.next(params, work)) {
    mbarrier_wait(loads.keys_empty, keys_parity ^ 1);  // released by compute, and K by compute_dq too
    keys_parity ^= 1;
    mbarrier_arrive_expect_tx(loads.keys_full, keys.kBytes);
    load_tile(keys, keys_map, loads.keys_full, work.n_block * kBlockN, work.head_k, work.batch);
    for (Step step(params.shape, work); step.left > 0; step.advance(work), ring.advance()) {
      mbarrier_wait(loads.empty[ring.stage], ring.parity ^ 1);  // released by both who compute
      mbarrier_arrive_expect_tx(loads.full[ring.stage], queries[0].kBytes + kStatisticsBytes);
      load_tile(queries[ring.stage], queries_map, loads.full[ring.stage], step.m_block * kBlockM, step.head, work.batch);
      load_statistics(loads.statistics[ring.stage], statistics_map, loads.full[ring.stage], step);
    }
  }
}

// dS^T = P^T * (dP^T - D), in place of dP^T; P^T from shared memory. Reads run four blocks ahead of the arithmetic, no more:
// there are no registers for all of P.
FA2_DEVICE void differentiate_softmax(AccS& acc, const uint4 (&p)[kBlockM / 8][128], const float (&softmax_d)[kBlockM]) {
#pragma unroll
  for (int j = 0; j < kBlockM / 8; ++j) {
    uint32_t ready = 0;  // always: the bits of -inf, and what makes 0 of them
    if (j >= 4) ready = __float_as_uint(minus_infinity_after(acc.x[0][j - 4][3])) + 0x00800000;
    const uint4 bits = ld_shared_v4(smem_address(&p[j][threadIdx.x % 128]) + ready);
    const float2 d = *reinterpret_cast<const float2*>(softmax_d + 8 * j + accumulator_col() + ready);
    float(&x)[4] = acc.x[0][j];
    x[0] = __uint_as_float(bits.x) * (x[0] - d.x);
    x[1] = __uint_as_float(bits.y) * (x[1] - d.y);
    x[2] = __uint_as_float(bits.z) * (x[2] - d.x);
    x[3] = __uint_as_float(bits.w) * (x[3] - d.y);
  }
}

// One warpgroup: S, P and dV of all tiles, or (kSecond) dP, dS and dK. `acc` is S or dP, then P or dS; `loads`: of its
// operands keys and queries. The sum runs over other_queries, dO for P and Q for dS, which other_loads bring.
template <bool kSecond, int kCols, int kOtherCols>
FA2_DEVICE void compute(SharedMemory& smem, const BwdTmaParams& params, Loads& loads, const Panels<kBlockN, kCols>& keys,
                        const Panels<kBlockM, kCols> (&queries)[kStages], Loads& other_loads,
                        const Panels<kBlockM, kOtherCols> (&other_queries)[kStages]) {
  const Shape& shape = params.shape;
  const int warp_row = warp_id() % 4 * 16;
  const bool leader = threadIdx.x % 128 == 0;
  Ring<kStages> ring;  // of the step
  uint32_t keys_parity = 0;
  AccS acc;
  constexpr int kParts = kOtherCols > 192 ? 2 : 1, kPartCols = kOtherCols / kParts;
  Accumulator<1, kPartCols / 8> acc_gradient[kParts];
  Fragments<kQuerySteps> frag;
  Schedule schedule;
  Work work = {};

  auto issue = [&] {  // S^T = K Q^T, dP^T = V dO^T
    mbarrier_wait(loads.full[ring.stage], ring.parity);  // landed: copy_tiles
    wgmma_fence();
    gemm_ss<kCols / 16>(acc, AlongRows(keys), AlongRows(queries[ring.stage]));
    wgmma_commit_group();
  };
  // P or dS, from S or dP. P goes to the second warpgroup at once.
  auto transform = [&](const Step& step) {
    const float(&statistics)[kBlockM] = loads.statistics[ring.stage];
    if constexpr (kSecond) {
      bar_sync(kPFull, 256);  // P is there: the first warpgroup
      differentiate_softmax(acc, smem.p, statistics);
      bar_arrive(kPEmpty, 256);
    } else {
      const int key = work.n_block * kBlockN + warp_row + accumulator_row(), first_query = step.m_block * kBlockM;
      if (step.m_block < work.mask_to) {
        recompute_p<true>(acc, statistics, params.scale_softmax_log2, shape, key, first_query);
      } else {
        recompute_p<false>(acc, statistics, params.scale_softmax_log2, shape, key, first_query);
      }
      bar_sync(kPEmpty, 256);  // P of the step before has been read: the second warpgroup
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) {
        const float(&x)[4] = acc.x[0][j];
        st_shared_v4(smem_address(&smem.p[j][threadIdx.x % 128]),
                     uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
      }
      bar_arrive(kPFull, 256);
    }
  };
  auto pin_gradient = [&] {
#pragma unroll
    for (int i = 0; i < kParts; ++i) pin(acc_gradient[i]);
  };
  auto compute_step = [&](const Step& step, bool first, auto more) {
    constexpr bool kMore = decltype(more)::value;  // a step of this tile after this one
    pin(acc);
    if (!kMore && leader) mbarrier_arrive(loads.keys_empty);  // the last S or dP of the tile is there
    transform(step);
    to_fragments(frag, acc);
    if constexpr (kSecond) {
      mbarrier_wait(smem.ds_empty[ring.stage], ring.parity ^ 1);  // released by compute_dq
      store_transposed(smem.ds[ring.stage], warp_row, frag);
      fence_proxy_async();  // this thread's part of dS, before wgmma reads it
      __syncwarp();         // the warp's part is in shared memory
      if (lane_id() == 0) mbarrier_arrive(smem.ds_full[ring.stage]);
    }
    const int stage = ring.stage;
    const uint32_t parity = ring.parity;
    ring.advance();
    mbarrier_wait(other_loads.full[stage], parity);  // landed: copy_tiles
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kParts; ++i)  // dV += P^T dO, dK += dS^T Q
      gemm_rs<kQuerySteps>(acc_gradient[i], frag, DownRows(other_queries[stage], i * kPartCols), !first);
    wgmma_commit_group();
    if constexpr (kMore) issue();
    wgmma_wait_group<0>();  // dV or dK; S or dP of the next step
    pin_gradient();
    if (leader) {
      mbarrier_arrive(loads.empty[stage]);
      mbarrier_arrive(other_loads.empty[stage]);
    }
  };

  // Columns [col, col + kPartCols) of dV or dK. A loop over the parts would put them into local memory.
  auto store = [&](Accumulator<1, kPartCols / 8>& part, int col) {
    const float factor = kSecond ? params.softmax_scale : 1.f;
    if constexpr (kPartialDkv) {  // whole blocks, the workspace is padded
#pragma unroll
      for (int j = 0; j < kPartCols / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) part.x[0][j][e] *= factor;
      float* partial = kSecond ? params.dk_partial : params.dv_partial;
      const int64_t row = static_cast<int64_t>(work.part) * kBlockN + warp_row;
      store_partial(partial + row * kOtherCols + col, kOtherCols, part);
    } else {
      const Strides& strides = kSecond ? params.dk_strides : params.dv_strides;
      const int row = work.n_block * kBlockN + warp_row;
      Element* target = (kSecond ? params.dk : params.dv) + work.batch * strides.batch + work.head_k * strides.head;
      store_gradient(target + row * strides.row + col, strides.row, shape.seqlen_k - row,
                     (kSecond ? shape.head_dim : params.head_dim_v) - col, part, factor);
    }
  };

  if (kSecond) bar_arrive(kPEmpty, 256);  // there is no step before the first
  while (schedule.next(params, work)) {
    mbarrier_wait(loads.keys_full, keys_parity);  // landed: copy_tiles
    if (!kDeterministic) keys_parity ^= 1;        // else this was the only tile, and a register is worth having
    Step step(shape, work);
    issue();
    wgmma_wait_group<0>();  // S or dP of the first step
    bool first = true;
    for (; step.left > 1; step.advance(work)) {
      compute_step(step, first, True{});
      first = false;
    }
    compute_step(step, first, False{});
    store(acc_gradient[0], 0);
    if constexpr (kParts > 1) store(acc_gradient[1], kPartCols);
  }
}

// One warpgroup: dQ of every step.
FA2_DEVICE void compute_dq(SharedMemory& smem, const BwdTmaParams& params) {
  const int warp = warp_id() % 4, lane = lane_id();
  const bool leader = threadIdx.x % 128 == 0;
  Schedule schedule;
  Work work;
  Ring<kStages> ring;
  uint32_t parity = 0;
  Accumulator<1, kDqCols / 8> acc_dq;
  while (schedule.next(params, work)) {
    for (Step step(params.shape, work); step.left > 0; step.advance(work), ring.advance()) {
      mbarrier_wait(smem.ds_full[ring.stage], ring.parity);  // dS is there: the second warpgroup; so K is
#pragma unroll
      for (int col = 0; col < kHeadDim; col += kDqCols) {
        wgmma_fence();
        gemm_ss<kKeySteps>(acc_dq, AlongRows(smem.ds[ring.stage]), DownRows(smem.k, col));
        wgmma_commit_group();
        wgmma_wait_group<0>();
        pin(acc_dq);
        if (col + kDqCols == kHeadDim && leader) {
          mbarrier_arrive(smem.ds_empty[ring.stage]);
          if (step.left == 1) mbarrier_arrive(smem.q_loads.keys_empty);
        }
        if constexpr (kDqShared) {
          const int piece = col / kDqCols;
          mbarrier_wait(smem.dq_empty[piece], parity ^ 1);  // the step before has been read: add_dq
#pragma unroll
          for (int j = 0; j < kDqCols / 8; ++j) {
            const float(&x)[4] = acc_dq.x[0][j];
            st_shared_v4(smem_address(smem.dq + dq_offset(warp, lane, 0, col / 8 + j, 0)),
                         uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
          }
          fence_proxy_async();  // this thread's part of dQ, before the copy engine reads it
          __syncwarp();         // the warp's part is in shared memory
          if (lane == 0) mbarrier_arrive(smem.dq_full[piece]);
        } else {
          float* dq_tile = params.dq_accum + step.tile * kDqTileFloats;
          if (kDeterministic && col == 0) mbarrier_wait(smem.dq_turn, parity);  // it is this block's turn: announce_turns
#pragma unroll
          for (int j = 0; j < kDqCols / 8; ++j) {
            const float(&x)[4] = acc_dq.x[0][j];
            float* target = dq_tile + dq_offset(warp, lane, 0, col / 8 + j, 0);
            if (writes_dq(work)) {
              *reinterpret_cast<float4*>(target) = float4{x[0], x[1], x[2], x[3]};
            } else {
              red_add_v4_f32(target, x[0], x[1], x[2], x[3]);
            }
          }
        }
      }
      if constexpr (!kDqShared && kDeterministic) mbarrier_arrive(smem.dq_added);  // this thread has added its part
      if constexpr (kDqShared || kDeterministic) parity ^= 1;
    }
  }
}

// Adds dQ of every step to dq_accum, piece by piece, or waits for compute_dq to have done so, and ends the turn. One thread.
FA2_DEVICE void add_dq(SharedMemory& smem, const BwdTmaParams& params) {
  Schedule schedule;
  Work work;
  uint32_t parity = 0;
  while (schedule.next(params, work)) {
    for (Step step(params.shape, work); step.left > 0; step.advance(work), parity ^= 1) {
      if constexpr (kDqShared) {
        float* dq_tile = params.dq_accum + step.tile * kDqTileFloats;
#pragma unroll
        for (int piece = 0; piece < kDqPieces; ++piece) {
          mbarrier_wait(smem.dq_full[piece], parity);  // dQ is in shared memory: compute_dq
          if (kDeterministic && piece == 0) mbarrier_wait(smem.dq_turn, parity);  // it is this block's turn: announce_turns
#pragma unroll
          for (int warp = 0; warp < 4; ++warp) {
            const int offset = dq_offset(warp, 0, 0, piece * kDqCols / 8, 0);
            if (writes_dq(work)) {
              cp_async_bulk_store(dq_tile + offset, smem.dq + offset, kDqCols * 64);
            } else {
              cp_reduce_async_bulk_add_f32(dq_tile + offset, smem.dq + offset, kDqCols * 64);
            }
          }
          cp_async_bulk_commit_group();
          cp_async_bulk_wait_group_read<0>();
          mbarrier_arrive(smem.dq_empty[piece]);  // shared memory has been read
        }
        if constexpr (kDeterministic) cp_async_bulk_wait_group<0>();  // dQ is in global memory
      } else {
        mbarrier_wait(smem.dq_added, parity);  // every thread has added its part: compute_dq
        mbarrier_arrive(smem.dq_seen);
      }
      if constexpr (kDeterministic) end_turn(params.dq_turn + step.tile);
    }
  }
}

// Deterministic: tells those who add when this block's turns have come. One thread, so that a turn is awaited while the
// addition before it is still on its way.
FA2_DEVICE void announce_turns(SharedMemory& smem, const BwdTmaParams& params) {
  Schedule schedule;
  Work work;
  uint32_t parity = 0;
  while (schedule.next(params, work)) {
    for (Step step(params.shape, work); step.left > 0; step.advance(work), parity ^= 1) {
      wait_for_turn(params.dq_turn + step.tile, work.n_block);
      mbarrier_wait(kDqShared ? smem.dq_empty[0] : smem.dq_seen, parity ^ 1);  // the turn before has been taken: add_dq
      mbarrier_arrive(smem.dq_turn);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) flash_bwd(const __grid_constant__ BwdTmaParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  if (threadIdx.x == 0) {
    mbarrier_init(smem.q_loads.keys_full, 1);
    mbarrier_init(smem.q_loads.keys_empty, 2);
    mbarrier_init(smem.dout_loads.keys_full, 1);
    mbarrier_init(smem.dout_loads.keys_empty, 1);
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem.q_loads.full[i], 1);
      mbarrier_init(smem.q_loads.empty[i], 2);
      mbarrier_init(smem.dout_loads.full[i], 1);
      mbarrier_init(smem.dout_loads.empty[i], 2);
      mbarrier_init(smem.ds_full[i], 4);
      mbarrier_init(smem.ds_empty[i], 1);
    }
#pragma unroll
    for (int i = 0; i < kDqPieces; ++i) {
      mbarrier_init(smem.dq_full[i], 4);
      mbarrier_init(smem.dq_empty[i], 1);
    }
    mbarrier_init(smem.dq_turn, 1);
    mbarrier_init(smem.dq_added, 128);
    mbarrier_init(smem.dq_seen, 1);
    fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are initialised

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<kCopyRegisters>();
    const int warp = __shfl_sync(0xffffffffu, warp_id(), 0);
    if (lane_id() == 0 && warp == 0) {
      copy_tiles(params, smem.q_loads, smem.k, params.k, smem.q, params.q, params.lse_log2);
    } else if (lane_id() == 0 && warp == 1) {
      copy_tiles(params, smem.dout_loads, smem.v, params.v, smem.dout, params.dout, params.softmax_d);
    } else if ((kDqShared || kDeterministic) && lane_id() == 0 && warp == 2) {
      add_dq(smem, params);
    } else if (kDeterministic && lane_id() == 0 && warp == 3) {
      announce_turns(smem, params);
    }
  } else if (warpgroup == 3) {
    setmaxnreg_dec<kDqRegisters>();
    compute_dq(smem, params);
  } else {
    setmaxnreg_inc<kComputeRegisters>();
    if (warpgroup == 1) {
      compute<false>(smem, params, smem.q_loads, smem.k, smem.q, smem.dout_loads, smem.dout);
    } else {
      compute<true>(smem, params, smem.dout_loads, smem.v, smem.dout, smem.q_loads, smem.q);
    }
  }
}
