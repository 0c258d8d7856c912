// FlashAttention backward with wgmma and TMA: sm_90a, head_dim above 128. The algorithm is that of flash_bwd.cu.
//
// dK and dV of 64 keys x 256 columns take 128 registers each, of every thread of a warpgroup. So a tile has 64 keys, and
// the warpgroups share its products, not its keys:
//
//   copying  two threads: K of every tile and Q with lse of every step; V, and dO with D. A third one adds dQ, or ends turns;
//            deterministic: a fourth waits for them
//   scores   S = Q K^T, P; dP = dO V^T, dS = P * (dP - D). P and dS go to the others through shared memory
//   values   dV += P^T dO, and a piece of dQ = dS K
//   keys     dK += dS^T Q, and another piece. dQ leaves for dq_accum through shared memory if there is room (kDqShared), else
//            from registers
//
// Rings of buffers couple them, and nothing else: while the scores' warpgroup computes exponentials, the others' products run.
//
// What a tile of 64 keys adds to dQ in L2 would be the limit. So two thread blocks, a cluster, take neighbouring tiles, and
// the same queries at the same time: each sends its dS to the other, and sums other columns of dQ over the keys of both.
#include "common/dq_accum.cuh"
#include "common/dropout.cuh"
#include "common/score.cuh"
#include "sm90/backward.cuh"
#include "sm90/pipeline.cuh"

static_assert(sizeof(BwdTmaBandParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");
static_assert(kBlockN == 64 && kNumThreads == 512, "a warpgroup for each of the four");
static_assert(kDqWarps == 4 && kDqWarpsD == 1 && kDqMTiles == 1, "a warpgroup adds all rows of a piece of dQ, a warp 16");

constexpr int kQuerySteps = kBlockM / 16, kKeySteps = kBlockN / 16;
constexpr int kCopyRegisters = kHeadDim > 192 ? 24 : 32, kScoreRegisters = kHeadDim > 192 ? 104 : 112;
constexpr int kSumRegisters = kHeadDim > 192 ? 192 : 184;
static_assert(kCopyRegisters + kScoreRegisters + 2 * kSumRegisters <= 512, "the registers of 128 threads");

// A piece of dQ is as many columns as registers hold, at most. Each block of the cluster sums its pieces over the keys of both:
// block `rank` panel `rank`, with the warpgroup that sums dV, and panel 2 + `rank`, or of three panels half `rank` of the last one,
// with the other.
constexpr int kDqCols = 64;
static_assert(kCluster == 2 && (kHeadDim == 3 * kDqCols || kHeadDim == 4 * kDqCols), "a piece for each of two warpgroups");
constexpr int cols_of_dq(bool second) { return second && kHeadDim == 3 * kDqCols ? kDqCols / 2 : kDqCols; }
constexpr bool kDqShared = kHeadDim == 192;  // there is room for dQ in shared memory, from where bulk copies add it
constexpr int kTurns = kDqShared ? 2 : 1;    // of a block in a step: for each of its pieces, or for both at a time
static_assert(kDqParts == kCluster * kTurns, "a counter for each turn");
// Else the additions of a warp are so many clocks apart: a burst of them holds up all that goes through the load-store unit.
constexpr uint32_t kRedClocks = 48;

// Buffers of blocks of Q and of dO, in parts of up to 192 columns, and of P. The first part of dO is free again early.
constexpr int kParts = kHeadDim > 192 ? 2 : 1, kPartsV = kHeadDimV > 192 ? 2 : 1;
constexpr int kQBuffers = kStages * kParts, kDoutBuffers = kStages * kPartsV - (kPartsV > 1);
constexpr int kPBuffers = kParts > 1 ? 1 : 2;

struct SharedMemory {
  Panels<kBlockN, kHeadDim> k;
  Panels<kBlockN, kHeadDimV> v;
  Panels<kBlockM, kHeadDim / kParts> q[kQBuffers];
  Panels<kBlockM, kHeadDimV / kPartsV> dout[kDoutBuffers];
  Panels<kBlockM, kBlockN> p[kPBuffers], ds[2];
  Panels<kBlockM, kBlockN> ds_peer;     // the other block's dS
  Panels<kBlockN, 2 * kDqCols> k_peer;  // and its K, the panels of this block's pieces of dQ
  Loads<kQBuffers> q_loads;             // with lse_log2
  Loads<kDoutBuffers> dout_loads;       // with softmax_d
  uint64_t p_full[kPBuffers], p_empty[kPBuffers], ds_full[2];
  uint64_t ds_peer_full, ds_peer_empty;  // the other block's dS has landed here; it is done with this one's
  alignas(128) float dq[kDqShared ? kBlockM * (kDqCols + cols_of_dq(true)) : 4];  // a piece of each warpgroup
  uint64_t dq_full[2], dq_empty[2];
  uint64_t dq_turn[kTurns], dq_added, dq_seen;  // deterministic, the last two not kDqShared
};
static_assert(sizeof(SharedMemory) <= kSharedBytes && sizeof(SharedMemory) + 1024 > kSharedBytes,
              "kernels/tiles.py and this struct differ");

// The piece of dQ of the warpgroup that sums dV, or of that which sums dK (second): its first column.
FA2_DEVICE int first_col_of_dq(bool second) { return second * 2 * kDqCols + cluster_rank() * cols_of_dq(second); }

// Deterministic: pairs of key blocks take turns at a block's pieces.
FA2_DEVICE int* turn_counter(const BwdTmaBandParams& params, const Step& step, int turn) {
  return params.dq_turn + step.tile * kDqParts + turn * kCluster + cluster_rank();
}

// Of the barriers of K and V, while the tile that the schedule has just given is worked on.
FA2_DEVICE uint32_t keys_parity(const Schedule& schedule) { return (schedule.round + 1) % 2; }

// K and Q with lse, or V and dO with D: one thread. k_peer: the other block's columns of K, or null.
template <int kCols, int kPartCols, int kBuffers>
FA2_DEVICE void copy_tiles(const BwdTmaBandParams& params, Loads<kBuffers>& loads, Panels<kBlockN, kCols>& keys,
                           const TensorMap& keys_map, Panels<kBlockM, kPartCols> (&queries)[kBuffers],
                           const TensorMap& queries_map, const TensorMap& statistics_map,
                           Panels<kBlockN, 2 * kDqCols>* k_peer) {
  Schedule schedule;
  Work work;
  Ring<kBuffers> ring;
  while (schedule.next(params, work)) {
    mbarrier_wait(loads.keys_empty, keys_parity(schedule) ^ 1);  // released by compute_scores, and K by both sum_gradient
    mbarrier_arrive_expect_tx(loads.keys_full, keys.kBytes + (k_peer ? k_peer->kBytes : 0));
    if constexpr (kListed) {
      load_tile(keys, keys_map, loads.keys_full, key_place(work, work.n_block * kBlockN, work.head_k, params));
    } else {
      load_tile(keys, keys_map, loads.keys_full, work.n_block * kBlockN, work.head_k, work.batch);
    }
    if (k_peer) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int col = first_col_of_dq(i > 0) / kDqCols * kDqCols, key = (work.n_block ^ 1) * kBlockN;
        if constexpr (kListed) {
          load_box(k_peer->data[i], keys_map, loads.keys_full, col, key_place(work, key, work.head_k, params));
        } else {
          cp_async_bulk_tensor_4d_load(k_peer->data[i], keys_map, loads.keys_full, col, key, work.head_k, work.batch);
        }
      }
    }
    griddepcontrol_wait();  // what the kernel before wrote is there: lse and D, and what dQ is added to
    for (Step step(params.shape, work, params); step.left > 0; step.advance(work, params)) {
#pragma unroll 1  // for want of registers
      for (int col = 0; col < kCols; col += kPartCols, ring.advance()) {
        mbarrier_wait(loads.empty[ring.stage], ring.parity ^ 1);  // released by compute_scores and sum_gradient
        mbarrier_arrive_expect_tx(loads.full[ring.stage], queries[0].kBytes + (col == 0 ? kStatisticsBytes : 0));
        if constexpr (kListed) {
          load_tile(queries[ring.stage], queries_map, loads.full[ring.stage],
                    query_place(work, step.m_block * kBlockM, step.head, params), col);
        } else {
          load_tile(queries[ring.stage], queries_map, loads.full[ring.stage], step.m_block * kBlockM, step.head, work.batch,
                    col);
        }
        if (col == 0) load_statistics(loads.statistics[ring.stage], statistics_map, loads.full[ring.stage], step);
      }
    }
  }
}

using AccS = Accumulator<1, kBlockN / 8>;  // 64 queries x 64 keys

// One warpgroup: P and dS of every step, a warp 16 queries.
FA2_DEVICE void compute_scores(SharedMemory& smem, const BwdTmaBandParams& params) {
  const Shape& shape = params.shape;
  const int warp_row = warp_id() % 4 * 16, row = warp_row + accumulator_row(), peer = cluster_rank() ^ 1;
  const bool leader = lane_id() == 0;
  uint32_t count = 0;  // of steps: where in rings of two, in one register
  Ring<kQBuffers> q;     // of the next S
  Ring<kDoutBuffers> dout;
  AccS acc_s, acc_dp;
  Schedule schedule;
  Work work = {};
  int key = 0;  // this thread's first one
  Drawing drawing;
  Kept<false, 1, kBlockN / 8> kept;

  // S = Q K^T, dP = dO V^T, each in two halves: a warpgroup gets about eight products ahead of the tensor cores, and could do
  // nothing else while it issues more.
  auto issue_s = [&](auto second) {
    constexpr int kHalf = (kHeadDim + 64) / 128 * 64, kCol = decltype(second)::value ? kHalf : 0;
    constexpr int kCols = kCol ? kHeadDim - kCol : kHalf;
    if (kCol == 0 || kParts > 1) mbarrier_wait(smem.q_loads.full[q.stage], q.parity);  // Q and lse landed: copy_tiles
    wgmma_fence();
    gemm_ss<kCols / 16>(acc_s, AlongRows(smem.q[q.stage], 0, kParts > 1 ? 0 : kCol), AlongRows(smem.k, 0, kCol), kCol > 0);
    if (kCol > 0 || kParts > 1) q.advance();
    if (kCol > 0) wgmma_commit_group();
  };
  auto issue_dp = [&](auto second) {
    constexpr int kHalf = (kHeadDimV + 64) / 128 * 64, kCol = decltype(second)::value ? kHalf : 0;
    constexpr int kCols = kCol ? kHeadDimV - kCol : kHalf;
    const uint32_t parity = kept.before(drawing, dout.parity);
    if (kCol == 0 || kPartsV > 1) mbarrier_wait(smem.dout_loads.full[dout.stage], parity);  // dO and D landed: copy_tiles
    wgmma_fence();
    gemm_ss<kCols / 16>(acc_dp, AlongRows(smem.dout[dout.stage], 0, kPartsV > 1 ? 0 : kCol), AlongRows(smem.v, 0, kCol),
                        kCol > 0);
    if (kCol > 0 || kPartsV > 1) dout.advance();
    if (kCol > 0) wgmma_commit_group();
  };
  auto announce = [&](uint64_t& full) {
    fence_proxy_async();  // this thread's part of P or dS, before wgmma and the copy engine read it
    __syncwarp();         // the warp's part is in shared memory
    if (leader) mbarrier_arrive(full);
  };
  auto compute_step = [&](const Step& step, auto more) {
    constexpr bool kMore = decltype(more)::value;  // a step of this tile after this one
    const int stage = count % 2, q_stage = stage * kParts, p_stage = kPBuffers > 1 ? stage : 0;
    const uint32_t p_parity = kPBuffers > 1 ? count / 2 % 2 : stage;
    const int query = step.m_block * kBlockM + row;
    const HeadScores of_head = head_scores(params, query_batch(work), step.head);
    Fragments<kKeySteps> packed;
    auto half_of_p = [&](int h) {
      const float lse_log2 = smem.q_loads.statistics[q_stage][row + 8 * h];
      if constexpr (kScores) {
        recompute_p(acc_s, packed, h, lse_log2, params, of_head, sequence_of_tile(shape, work, params), {query, key},
                    step.m_block < mask_to_of(work, step.m_block));
      } else {
        recompute_p(acc_s, h, lse_log2, params.scale_softmax_log2);
        if (step.m_block < mask_to_of(work, step.m_block)) mask_p(acc_s, h, sequence_of_tile(shape, work, params), {query, key});
      }
      pin(acc_s);
    };
    if (kDrawn && starts_head(work, step)) drawing = drawing_of(params, work, step.head);
    kept.draw(drawing, {query, key});
    issue_dp(False{});
    half_of_p(0);
    issue_dp(True{});
    half_of_p(1);
    mbarrier_wait(smem.p_empty[p_stage], p_parity ^ 1);  // released by sum_gradient
    if constexpr (kPackEarly) {
      kept.drop(0, packed.r);
      store_fragments(smem.p[p_stage], warp_row, packed);
    } else {
      store_accumulator(smem.p[p_stage], warp_row, kept.of(acc_s));
    }
    const int dout_stage = (dout.stage + kDoutBuffers - kPartsV) % kDoutBuffers;  // of this step's dO
    const float* statistics = smem.dout_loads.statistics[dout_stage];
    const float softmax_d[2] = {statistics[row], statistics[row + 8]};
    wgmma_wait_group<0>();  // dP
    pin(acc_dp);
    differentiate_softmax_of_rows(acc_dp, acc_s, softmax_d, kept);
    announce(smem.p_full[p_stage]);
    if constexpr (kMore) issue_s(False{});
    // Released by both sum_gradient of the other block: its ds_peer is free. And so is ds here: the other block has sent what they
    // have read only after those of this block had done two steps ago.
    mbarrier_wait(smem.ds_peer_empty, stage ^ 1);
    store_accumulator(smem.ds[stage], warp_row, acc_dp);
    if constexpr (kMore) issue_s(True{});
    announce(smem.ds_full[stage]);
    if (leader) {
      cp_async_bulk_cluster(smem.ds_peer.data[0][warp_row], smem.ds_peer_full, peer, smem.ds[stage].data[0][warp_row],
                            smem.ds_peer.kBytes / 4);
#pragma unroll
      for (int i = 0; i < kParts; ++i) mbarrier_arrive(smem.q_loads.empty[(q_stage + i) % kQBuffers]);
#pragma unroll
      for (int i = 0; i < kPartsV; ++i) mbarrier_arrive(smem.dout_loads.empty[(dout_stage + i) % kDoutBuffers]);
      if (!kMore) {
        mbarrier_arrive(smem.q_loads.keys_empty);
        mbarrier_arrive(smem.dout_loads.keys_empty);
      }
    }
    ++count;
    if constexpr (kMore) wgmma_wait_group<0>();  // S of the next step
  };

  while (schedule.next(params, work)) {
    Step step(shape, work, params);
    key = work.n_block * kBlockN + accumulator_col();
    mbarrier_wait(smem.q_loads.keys_full, keys_parity(schedule));  // K landed: copy_tiles
    issue_s(False{});
    issue_s(True{});
    wgmma_wait_group<0>();  // S of the first step
    mbarrier_wait(smem.dout_loads.keys_full, keys_parity(schedule));  // V landed: copy_tiles
    for (; step.left > 1; step.advance(work, params)) compute_step(step, True{});
    compute_step(step, False{});
  }
}

// One warpgroup: dV += P^T dO, or (kSecond) dK += dS^T Q, of every tile, and a piece of dQ = dS K of every step. `left` is P or
// dS, which left_full announces, and `queries`, which `loads` bring, are dO or Q.
template <bool kSecond, int kPartCols, int kBuffers, int kLeftBuffers>
FA2_DEVICE void sum_gradient(SharedMemory& smem, const BwdTmaBandParams& params, Loads<kBuffers>& loads,
                             const Panels<kBlockM, kPartCols> (&queries)[kBuffers],
                             const Panels<kBlockM, kBlockN> (&left)[kLeftBuffers], uint64_t (&left_full)[kLeftBuffers]) {
  constexpr int kCols = kSecond ? kHeadDim : kHeadDimV, kGradients = kCols / kPartCols;
  const int warp = warp_id() % 4, lane = lane_id(), warp_row = warp * 16, peer = cluster_rank() ^ 1;
  constexpr int kPieceCols = cols_of_dq(kSecond);
  const int piece_col = first_col_of_dq(kSecond);
  const bool leader = threadIdx.x % 128 == 0;
  Ring<kBuffers> rows;  // of queries
  Ring<2> ring;         // of the step; where there is but one buffer, its parity is ring.stage
  Accumulator<1, kPartCols / 8> acc_gradient[kGradients];
  Accumulator<1, kPieceCols / 8> acc_dq;
  Schedule schedule;
  Work work = {};

  // Adds the piece of a step to dq_accum, or puts it into shared memory, from where add_dq adds it.
  auto add_piece = [&](const Step& step) {
    if constexpr (kDqShared) {
      mbarrier_wait(smem.dq_empty[kSecond], ring.stage ^ 1);  // the step before has been read: add_dq
#pragma unroll
      for (int j = 0; j < kPieceCols / 8; ++j) {
        const float(&x)[4] = acc_dq.x[0][j];
        st_shared_v4(smem_address(&smem.dq[kSecond * kDqCols * kBlockM + (warp * kPieceCols / 8 + j) * 128 + lane * 4]),
                     uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
      }
      fence_proxy_async();  // this thread's part of dQ, before the copy engine reads it
      __syncwarp();         // the warp's part is in shared memory
      if (lane == 0) mbarrier_arrive(smem.dq_full[kSecond]);
    } else {
      if (kDeterministic) mbarrier_wait(smem.dq_turn[0], ring.stage);  // it is this block's turn: announce_turns
      float* target = params.dq_accum + step.tile * kDqTileFloats + dq_offset(warp, lane, 0, piece_col / 8, 0);
      const bool writes = writes_dq(turn_of(params, work, step));
      uint32_t last = read_clock() - kRedClocks;
#pragma unroll
      for (int j = 0; j < kPieceCols / 8; ++j, target += 128) {
        const float(&x)[4] = acc_dq.x[0][j];
        while (read_clock() - last < kRedClocks) continue;
        last = read_clock();
        if (writes) {
          *reinterpret_cast<float4*>(target) = float4{x[0], x[1], x[2], x[3]};
        } else {
          red_add_v4_f32(target, x[0], x[1], x[2], x[3]);
        }
      }
      if (kDeterministic) mbarrier_arrive(smem.dq_added);  // this thread has added its part
    }
  };
  auto compute_step = [&](const Step& step, bool first) {
    const int stage = ring.stage, rows_stage = rows.stage, left_stage = kLeftBuffers > 1 ? stage : 0;
    // P or dS is there: compute_scores; so are dO, Q and K
    mbarrier_wait(left_full[left_stage], kLeftBuffers > 1 ? ring.parity : stage);
#pragma unroll
    for (int i = 0; i < kGradients; ++i, rows.advance()) {
      wgmma_fence();
      gemm_ss<kQuerySteps>(acc_gradient[i], DownRows(left[left_stage]), DownRows(queries[rows.stage]), !first);
      wgmma_commit_group();
    }
    if constexpr (kGradients > 1) {
      wgmma_wait_group<1>();  // dV or dK, the first columns: a buffer to be filled soon
      pin(acc_gradient[0]);
      if (leader) mbarrier_arrive(loads.empty[rows_stage]);
    }
    if constexpr (!kSecond) mbarrier_wait(smem.ds_full[stage], ring.parity);  // dS is there: compute_scores
    wgmma_fence();
    gemm_ss<kKeySteps>(acc_dq, AlongRows(smem.ds[stage]), DownRows(smem.k, piece_col));
    mbarrier_wait(smem.ds_peer_full, stage);  // the other block's dS landed: compute_scores there
    wgmma_fence();
    gemm_ss<kKeySteps>(acc_dq, AlongRows(smem.ds_peer), DownRows(smem.k_peer, kSecond * kDqCols + piece_col % kDqCols), true);
    wgmma_commit_group();
    wgmma_wait_group<1>();  // dV or dK, the last columns
    pin(acc_gradient[kGradients - 1]);
    if (leader) {
      mbarrier_arrive(loads.empty[(rows_stage + kGradients - 1) % kBuffers]);
      if (!kSecond) mbarrier_arrive(smem.p_empty[left_stage]);
    }
    wgmma_wait_group<0>();  // dQ
    pin(acc_dq);
    if (leader) {
      if (step.left == 1) mbarrier_arrive(smem.q_loads.keys_empty);
      if (!kSecond) mbarrier_arrive_expect_tx(smem.ds_peer_full, smem.ds_peer.kBytes);
      mbarrier_arrive_cluster(smem.ds_peer_empty, peer);
    }
    add_piece(step);
    ring.advance();
  };

  // Columns [col, col + kPartCols) of dV or dK. A loop over the parts would put them into local memory.
  auto store = [&](Accumulator<1, kPartCols / 8>& part, int col) {
    const float factor = kSecond ? params.softmax_scale : inverse_of_kept(params);
    if constexpr (kPartialDkv) {  // whole blocks, the workspace is padded
#pragma unroll
      for (int j = 0; j < kPartCols / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) part.x[0][j][e] *= factor;
      float* partial = kSecond ? params.dk_partial : params.dv_partial;
      const int64_t row = static_cast<int64_t>(work.part) * kBlockN + warp_row;
      store_partial(partial + row * kCols + col, kCols, part);
    } else {
      const Strides& strides = kSecond ? params.dk_strides : params.dv_strides;
      const int row = work.n_block * kBlockN + warp_row;
      Element* target = (kSecond ? params.dk : params.dv) + key_batch(work) * strides.batch + work.head_k * strides.head;
      if constexpr (kListed) target += key_row(work, 0) * strides.row;
      store_gradient(target + row * strides.row + col, strides.row,
                     sequence_of_tile(params.shape, work, params).seqlen_k - row,
                     (kSecond ? params.shape.head_dim : params.head_dim_v) - col, part, factor);
    }
  };

  while (schedule.next(params, work)) {
    bool first = true;
    for (Step step(params.shape, work, params); step.left > 0; step.advance(work, params)) {
      compute_step(step, first);
      first = false;
    }
    store(acc_gradient[0], 0);
    if constexpr (kGradients > 1) store(acc_gradient[1], kPartCols);
  }
}

// Adds dQ of every step to dq_accum, piece by piece, or waits for sum_gradient to have done so, and ends the turns. One thread.
FA2_DEVICE void add_dq(SharedMemory& smem, const BwdTmaBandParams& params) {
  Schedule schedule;
  Work work;
  uint32_t parity = 0;
  while (schedule.next(params, work)) {
    for (Step step(params.shape, work, params); step.left > 0; step.advance(work, params), parity ^= 1) {
      if constexpr (kDqShared) {
        float* dq_tile = params.dq_accum + step.tile * kDqTileFloats;
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
          const int cols = cols_of_dq(turn > 0), first_col = first_col_of_dq(turn > 0);
          mbarrier_wait(smem.dq_full[turn], parity);                      // dQ is in shared memory: sum_gradient
          if (kDeterministic) mbarrier_wait(smem.dq_turn[turn], parity);  // it is this block's turn: announce_turns
#pragma unroll
          for (int warp = 0; warp < 4; ++warp) {
            float* target = dq_tile + dq_offset(warp, 0, 0, first_col / 8, 0);
            const float* source = smem.dq + (turn * kBlockM * kDqCols + warp * 16 * cols);
            if (writes_dq(turn_of(params, work, step))) {
              cp_async_bulk_store(target, source, cols * 64);
            } else {
              cp_reduce_async_bulk_add_f32(target, source, cols * 64);
            }
          }
          cp_async_bulk_commit_group();
          cp_async_bulk_wait_group_read<0>();
          mbarrier_arrive(smem.dq_empty[turn]);  // shared memory has been read
          if constexpr (kDeterministic) {
            cp_async_bulk_wait_group<0>();  // dQ is in global memory
            end_turn(turn_counter(params, step, turn));
          }
        }
      } else {
        mbarrier_wait(smem.dq_added, parity);  // every thread has added its part: sum_gradient
        mbarrier_arrive(smem.dq_seen);
        end_turn(turn_counter(params, step, 0));
      }
    }
  }
}

// Deterministic: tells those who add when this block's turns have come. One thread, so that a turn is awaited while the
// addition before it is still on its way.
FA2_DEVICE void announce_turns(SharedMemory& smem, const BwdTmaBandParams& params) {
  Schedule schedule;
  Work work;
  uint32_t parity = 0;
  while (schedule.next(params, work)) {
    for (Step step(params.shape, work, params); step.left > 0; step.advance(work, params), parity ^= 1) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        wait_for_turn(turn_counter(params, step, turn), turn_of(params, work, step));
        mbarrier_wait(kDqShared ? smem.dq_empty[turn] : smem.dq_seen, parity ^ 1);  // the turn before has been taken: add_dq
        mbarrier_arrive(smem.dq_turn[turn]);
      }
    }
  }
}

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kNumThreads, 1)
    flash_bwd(const __grid_constant__ BwdTmaBandParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  if (threadIdx.x == 0) {
    init_loads(smem.q_loads, 6);  // of K: compute_scores, and both sum_gradient
    init_loads(smem.dout_loads, 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem.ds_full[i], 4);
      mbarrier_init(smem.dq_full[i], 4);
      mbarrier_init(smem.dq_empty[i], 1);
    }
#pragma unroll
    for (int i = 0; i < kPBuffers; ++i) {
      mbarrier_init(smem.p_full[i], 4);
      mbarrier_init(smem.p_empty[i], 1);
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) mbarrier_init(smem.dq_turn[i], 1);
    mbarrier_init(smem.dq_added, 256);
    mbarrier_init(smem.dq_seen, 1);
    mbarrier_init(smem.ds_peer_full, 1);
    mbarrier_init(smem.ds_peer_empty, 2);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(smem.ds_peer_full, smem.ds_peer.kBytes);
  }
  cluster_sync();  // the barriers are initialised
  if constexpr (kListed) griddepcontrol_wait();  // everybody, who finds no tile too: the lists and all else that was written is there

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<kCopyRegisters>();
    const int warp = __shfl_sync(0xffffffffu, warp_id(), 0);
    if (lane_id() == 0 && warp == 0) {
      copy_tiles(params, smem.q_loads, smem.k, params.k, smem.q, params.q, params.lse_log2, &smem.k_peer);
    } else if (lane_id() == 0 && warp == 1) {
      copy_tiles(params, smem.dout_loads, smem.v, params.v, smem.dout, params.dout, params.softmax_d, nullptr);
    } else if ((kDqShared || kDeterministic) && lane_id() == 0 && warp == 2) {
      add_dq(smem, params);
    } else if (kDeterministic && lane_id() == 0 && warp == 3) {
      announce_turns(smem, params);
    }
  } else if (warpgroup == 1) {
    setmaxnreg_dec<kScoreRegisters>();
    compute_scores(smem, params);
  } else {
    setmaxnreg_inc<kSumRegisters>();
    if (warpgroup == 2) {
      sum_gradient<false>(smem, params, smem.dout_loads, smem.dout, smem.p, smem.p_full);
    } else {
      sum_gradient<true>(smem, params, smem.q_loads, smem.q, smem.ds, smem.ds_full);
    }
  }
  cluster_sync();  // the other block is done with this one's shared memory
}
