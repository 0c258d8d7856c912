// FlashAttention backward with wgmma and TMA (Dao 2023, algorithm 2; Shah et al. 2024): sm_90a, head_dim up to 128.
//
//   P = exp(scale * Q K^T - lse)    dV = P^T dO    dP = dO V^T    dS = P * (dP - D)    dQ = scale * dS K    dK = scale * dS^T Q
//
// One thread block per multiprocessor takes tiles, kBlockN keys of one key head, from a fixed list, and runs over the query
// blocks of all query heads that share them. Who does what:
//
//   copying     one thread: K and V of every tile; Q with lse, and dO with D, of every step
//   adding      a thread for each key warpgroup: its part of dQ leaves for dq_accum by bulk copies, which add (the first:
//               write). Deterministic: one more waits for this block's turns
//   keys (two)  warpgroups of 64 keys: S^T = K Q^T, P^T, dP^T = V dO^T and dS^T stay in registers, as A operands of dV and dK
//
// What a key warpgroup does in step m. The other one is half a step behind; exponentials and dS belong to one at a time:
//
//   tensor cores   dP(m)                     dV += P^T dO, dK += dS^T Q   dQ(m-1) = dS(m-1) K   S(m+1)   dP(m+1)
//   other units    P(m) = exp2(S(m)), dS(m)  dS(m) to shared memory    (the other one's turn)   dQ(m-1) to shared memory
//
// The step after a tile's last one is the first of the next tile: nothing stops in between. (Deterministic: there is a
// thread block for every tile, because whoever waits for a turn must know that the others have started.)
// docs/backward.md draws the pipeline and says who waits for whom.
#include "common/dq_accum.cuh"
#include "common/dropout.cuh"
#include "common/score.cuh"
#include "sm90/backward.cuh"
#include "sm90/pipeline.cuh"

static_assert(sizeof(BwdTmaBandParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kKeyGroups = kBlockN / 64;  // warpgroups that compute
constexpr int kHeadSteps = kHeadDim / 16, kQuerySteps = kBlockM / 16, kKeySteps = kBlockN / 16;
constexpr int kKStages = 2;  // the next tile's first S is computed before this one's last dQ
constexpr int kCopyRegisters = kPicked ? 32 : 24, kComputeRegisters = 240;
static_assert(kKeyGroups == 2 && kNumThreads == 128 * (kKeyGroups + 1), "the registers are shared out for two warpgroups");

// A warpgroup's part of dQ: 64 rows and 64 columns, or half of them. Of the last columns fewer may leave.
constexpr int kDqCols = kDqUnit, kDqColParts = ceil_div(kHeadDim, kDqCols);
static_assert(kDqWarps == 4 * kKeyGroups && kDqWarpsD == kDqColParts && kDqMTiles == 1, "one part for each warpgroup");

struct SharedMemory {
  Panels<kBlockN, kHeadDim> k[kKStages], v;
  Panels<kBlockM, kHeadDim> q[kStages], dout[kStages];
  Panels<kBlockM, kBlockN> ds[kStages];      // a panel is one key warpgroup's
  alignas(1024) float dq[kDqTileFloats];     // in the order of dq_accum.cuh
  alignas(128) float lse_log2[kStages][kBlockM], softmax_d[kStages][kBlockM];
  // full: the bytes have landed, or every warp has stored its part. empty: every reader is done with them.
  uint64_t k_full[kKStages], k_empty[kKStages], v_full, v_empty;
  uint64_t q_full[kStages], dout_full[kStages], q_dout_empty[kStages];
  uint64_t ds_full[kStages], ds_empty[kStages], dq_full[kKeyGroups], dq_empty[kKeyGroups];
  uint64_t dq_turn[kKeyGroups];  // deterministic
  int4 keys_at[kKStages];  // of a list: keys_of_work, which comes with K
};
constexpr int kTurn = 1;  // named barriers, one for each key warpgroup's turn
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/tiles.py and this struct differ");

using AccS = Accumulator<1, kBlockM / 8>;    // 64 keys x kBlockM queries
using AccKV = Accumulator<1, kHeadDim / 8>;  // 64 keys x head_dim
using AccDq = Accumulator<1, kDqCols / 8>;   // 64 queries x kDqCols
// dV is issued before dS is stored, dK before dS is announced. With 128 queries there are no registers for the first; with
// partial dK and dV, too, for neither.
constexpr bool kDvFirst = kBlockM == 64, kDsFirst = !kDvFirst && kPartialDkv;

// All that the tensor cores read from global memory, one thread.
FA2_DEVICE void copy_tiles(SharedMemory& smem, const BwdTmaBandParams& params) {
  const Shape& shape = params.shape;
  Schedule schedule;
  Work work;
  Ring<kStages> ring;
  Ring<kKStages> k;
  uint32_t v_parity = 0;
  while (schedule.next(params, work)) {
    const int first_key = work.n_block * kBlockN;
    bool first = true;
    for (Step step(shape, work, params); step.left > 0; step.advance(work, params)) {
      const int first_query = step.m_block * kBlockM;
      const int i = ring.stage;
      mbarrier_wait(smem.q_dout_empty[i], ring.parity ^ 1);  // released by the key warpgroups after dV and dK
      mbarrier_arrive_expect_tx(smem.q_full[i], smem.q[0].kBytes + kStatisticsBytes);
      load_tile(smem.q[i], params.q, smem.q_full[i], query_place(work, first_query, step.head, params));
      if (first) {
        mbarrier_wait(smem.k_empty[k.stage], k.parity ^ 1);  // released by the key warpgroups after a tile's last dQ
        if constexpr (kListed) smem.keys_at[k.stage] = keys_of_work(work, schedule.more(params));
        mbarrier_arrive_expect_tx(smem.k_full[k.stage], smem.k[0].kBytes);
        load_tile(smem.k[k.stage], params.k, smem.k_full[k.stage], key_place(work, first_key, work.head_k, params));
        griddepcontrol_wait();  // what the kernel before wrote is there: lse and D, and what dQ is added to
      }
      load_statistics(smem.lse_log2[i], params.lse_log2, smem.q_full[i], step);
      mbarrier_arrive_expect_tx(smem.dout_full[i], smem.dout[0].kBytes + kStatisticsBytes);
      load_tile(smem.dout[i], params.dout, smem.dout_full[i], query_place(work, first_query, step.head, params));
      if (first) {
        mbarrier_wait(smem.v_empty, v_parity ^ 1);  // released by the key warpgroups after a tile's last dP
        mbarrier_arrive_expect_tx(smem.v_full, smem.v.kBytes);
        load_tile(smem.v, params.v, smem.v_full, key_place(work, first_key, work.head_k, params));
      }
      load_statistics(smem.softmax_d[i], params.softmax_d, smem.dout_full[i], step);
      ring.advance();
      first = false;
    }
    k.advance();
    v_parity ^= 1;
  }
}

// Which of dQ's warps (dq_accum.cuh) a warp of a warpgroup is.
FA2_DEVICE int dq_warp(int group, int warp) { return kDqColParts == 1 ? group * 4 + warp : warp * kDqColParts + group; }

// Columns of a warpgroup's part of dQ that leave; the others, past kHeadDim, are zero.
FA2_DEVICE int dq_cols(int group) { return kDqColParts > 1 && group == 1 ? kHeadDim - kDqCols : kDqCols; }

// Adds a warpgroup's part of every step's dQ to dq_accum, the parts of its four warps one by one: one thread.
FA2_DEVICE void add_dq(SharedMemory& smem, const BwdTmaBandParams& params, int group) {
  const uint32_t bytes = dq_cols(group) * 64;  // of a warp
  Schedule schedule;
  Work work;
  uint32_t parity = 0;
  while (schedule.next(params, work)) {
    for (Step step(params.shape, work, params); step.left > 0; step.advance(work, params), parity ^= 1) {
      int* turns = params.dq_turn + step.tile * kDqParts + group;
      float* dq_tile = params.dq_accum + step.tile * kDqTileFloats;
      mbarrier_wait(smem.dq_full[group], parity);  // dQ is in shared memory: compute
      bool first;
      if constexpr (kDeterministic) {
        mbarrier_wait(smem.dq_turn[group], parity);  // it is this block's turn: announce_turns
        first = writes_dq(turn_of(params, work, step));
      } else {
        first = comes_first(turns);
      }
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) {
        const int offset = dq_offset(dq_warp(group, warp), 0, 0, 0, 0);
        if (first) {
          cp_async_bulk_store(dq_tile + offset, smem.dq + offset, bytes);
        } else {
          cp_reduce_async_bulk_add_f32(dq_tile + offset, smem.dq + offset, bytes);
        }
      }
      cp_async_bulk_commit_group();
      cp_async_bulk_wait_group_read<0>();
      mbarrier_arrive(smem.dq_empty[group]);  // shared memory has been read
      if (kDeterministic || first) {
        cp_async_bulk_wait_group<0>();  // this part is in global memory
        end_turn(turns);
      }
    }
  }
}

// Deterministic: tells add_dq when the turns of this block have come. One thread, so that a turn is awaited while the addition
// before it is still on its way.
FA2_DEVICE void announce_turns(SharedMemory& smem, const BwdTmaBandParams& params) {
  Schedule schedule;
  Work work;
  uint32_t parity = 0;
  while (schedule.next(params, work)) {
    for (Step step(params.shape, work, params); step.left > 0; step.advance(work, params), parity ^= 1) {
#pragma unroll
      for (int group = 0; group < kKeyGroups; ++group) {
        wait_for_turn(params.dq_turn + step.tile * kDqParts + group, turn_of(params, work, step));
        mbarrier_wait(smem.dq_empty[group], parity ^ 1);  // the turn before has been taken: add_dq
        mbarrier_arrive(smem.dq_turn[group]);
      }
    }
  }
}

// P^T = exp2(scale_log2 * S^T - lse_log2), 0 where a query does not see a key. `key`: of this thread's first row. kPackEarly: P goes
// into `packed`, rounded, and its derivative stays.
template <bool kMasked, bool kBothSides>
FA2_DEVICE void recompute_p(AccS& acc, Fragments<kQuerySteps>& packed, const float (&lse_log2)[kBlockM],
                            const Scores<true>& scores, const Sequence& sequence, const Seen<true, 1>& seen, int key,
                            int first_query) {
  const Position<true> position{first_query + accumulator_col(), key};
  const int keys[2] = {position.key(0, 0, 0), position.key(0, 0, 2)};
  const int begin[2] = {query_begin(sequence, keys[0]) - position.first_query,
                        query_begin(sequence, keys[1]) - position.first_query};
  const int end[2] = {query_end(sequence, keys[0]) - position.first_query, query_end(sequence, keys[1]) - position.first_query};
#pragma unroll
  for (int j = 0; j < kBlockM / 8; ++j) {
    const float2 lse = *reinterpret_cast<const float2*>(lse_log2 + 8 * j + accumulator_col());
    float rounded[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float derivative = 1.f;
      float p = scores.p<kBothSides>(acc.x[0][j][e], e % 2 == 0 ? -lse.x : -lse.y, 0, j, e, derivative);
      const bool hidden = col_of(j, e) < begin[e / 2] || (kBand && col_of(j, e) >= end[e / 2]);
      p = kMasked && (kPicked ? seen.hides(0, j, e) : hidden) ? 0.f : p;
      acc.x[0][j][e] = kCurved ? p * derivative : p;
      rounded[e] = p;
    }
    if constexpr (kPackEarly) {
#pragma unroll
      for (int h = 0; h < 2; ++h) packed.r[j / 2][j % 2 * 2 + h] = cvt_pack<Element>(rounded[2 * h], rounded[2 * h + 1]);
    }
  }
}

template <bool kMasked>
FA2_DEVICE void recompute_p(AccS& acc, Fragments<kQuerySteps>& packed, const float (&lse_log2)[kBlockM],
                            const Scores<true>& scores, const Sequence& sequence, const Seen<true, 1>& seen, int key,
                            int first_query) {
  if constexpr (kAnySide) {
    if (scores.keys == Keys::kAround) return recompute_p<kMasked, true>(acc, packed, lse_log2, scores, sequence, seen, key, first_query);
  }
  recompute_p<kMasked, false>(acc, packed, lse_log2, scores, sequence, seen, key, first_query);
}

// Whether there is a tile after this one. Of a list what copy_tiles says: no step asks global memory.
template <typename Params>
FA2_DEVICE bool has_more(Schedule& schedule, const Params& params, const int4& keys_at) {
  if constexpr (kListed) {
    return keys_at.w != 0;
  } else {
    return schedule.more(params);
  }
}

// One warpgroup: 64 keys of all tiles, and its part of dQ. Steps follow each other across tiles without a pause.
FA2_DEVICE void compute(SharedMemory& smem, const BwdTmaBandParams& params, int group) {
  const Shape& shape = params.shape;
  const int group_row = group * 64, warp_row = group_row + warp_id() % 4 * 16;
  const int dq_row = kDqColParts == 1 ? group_row : 0, dq_col = kDqColParts == 1 ? 0 : group * kDqCols;
  const bool leader = threadIdx.x % 128 == 0;
  Ring<kStages> ring;  // of the S that comes next
  Ring<kStages> ds;    // of the dQ that comes next, a step behind
  Ring<kKStages> k;
  uint32_t v_parity = 0, dq_parity = 0;
  AccS acc_s, acc_dp;
  AccKV acc_dk, acc_dv;
  Fragments<kQuerySteps> frag_p, frag_ds;
  Drawing drawing;
  Kept<true, 1, kBlockM / 8> kept;
  Seen<true, 1> seen;

  auto issue_s = [&](bool first) {  // S^T = K Q^T
    if (first) mbarrier_wait(smem.k_full[k.stage], k.parity);  // K landed: copy_tiles
    mbarrier_wait(smem.q_full[ring.stage], ring.parity);       // Q and lse landed: copy_tiles
    wgmma_fence();
    gemm_ss<kHeadSteps>(acc_s, AlongRows(smem.k[k.stage], group_row), AlongRows(smem.q[ring.stage]));
    wgmma_commit_group();
  };
  auto issue_dp = [&](bool first) {  // dP^T = V dO^T
    if (first) mbarrier_wait(smem.v_full, v_parity);         // V landed: copy_tiles
    mbarrier_wait(smem.dout_full[ring.stage], ring.parity);  // dO and D landed: copy_tiles
    wgmma_fence();
    gemm_ss<kHeadSteps>(acc_dp, AlongRows(smem.v, group_row), AlongRows(smem.dout[ring.stage]));
    wgmma_commit_group();
  };
  auto issue_dq = [&](AccDq& acc_dq, int k_stage) {  // dQ = dS K
    mbarrier_wait(smem.ds_full[ds.stage], ds.parity);  // dS of both warpgroups is there: compute_step
    wgmma_fence();
    gemm_ss<kKeySteps>(acc_dq, AlongRows(smem.ds[ds.stage], dq_row), DownRows(smem.k[k_stage], dq_col));
    wgmma_commit_group();
  };
  auto finish_dq = [&](AccDq& acc_dq) {
    pin(acc_dq);
    if (leader) mbarrier_arrive(smem.ds_empty[ds.stage]);
    ds.advance();
    mbarrier_wait(smem.dq_empty[group], dq_parity ^ 1);  // the step before it has been read: add_dq
    dq_parity ^= 1;
    const uint32_t target = smem_address(smem.dq + dq_offset(dq_warp(group, warp_id() % 4), lane_id(), 0, 0, 0));
#pragma unroll
    for (int j = 0; j < kDqCols / 8; ++j) {
      if (8 * j == kHeadDim % kDqCols && 8 * j >= dq_cols(group)) break;
      const float(&x)[4] = acc_dq.x[0][j];
      st_shared_v4(target + j * 512,
                   uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
    }
    fence_proxy_async();  // this thread's part of dQ, before the copy engine reads it
    __syncwarp();         // the warp's part is in shared memory
    if (lane_id() == 0) mbarrier_arrive(smem.dq_full[group]);
  };

  Schedule schedule;
  Work work;
  const bool any = schedule.next(params, work);
  if (kMayBeIdle && !any) return;  // the host knows only how many tiles there are at most
  Step step(shape, work, params);
  bool first = true;  // step of its tile
  HeadScores of_head = head_scores(params, query_batch(work), step.head);
  auto next_step = [&] {
    first = step.left == 1;
    if (first) {
      schedule.next(params, work);
      step = Step(shape, work, params);
    } else {
      step.advance(work, params);
    }
    of_head = head_scores(params, query_batch(work), step.head);
  };
  auto issue_dv = [&] {  // dV += P^T dO
    wgmma_fence();
    gemm_rs<kQuerySteps>(acc_dv, frag_p, DownRows(smem.dout[ring.stage]), !first);
    wgmma_commit_group();
  };
  auto is_final = [&] { return step.left == 1 && !has_more(schedule, params, smem.keys_at[k.stage]); };

  auto store_dkv = [&] {
    if constexpr (kPartialDkv) {  // whole blocks, the workspace is padded
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc_dk.x[0][j][e] *= params.softmax_scale;
          if constexpr (kDrawn) acc_dv.x[0][j][e] *= inverse_of_kept(params);
        }
      const int64_t offset = (static_cast<int64_t>(work.part) * kBlockN + warp_row) * kHeadDim;
      store_partial(params.dk_partial + offset, kHeadDim, acc_dk);
      store_partial(params.dv_partial + offset, kHeadDim, acc_dv);
    } else {
      const Strides &dks = params.dk_strides, &dvs = params.dv_strides;
      int row = work.n_block * kBlockN + warp_row;
      const int rows = sequence_of_tile(shape, work, params).seqlen_k - row;
      if constexpr (kListed) row = key_row(work, row);  // called without a list, too, it makes some plain kernels others
      store_gradient(params.dk + key_batch(work) * dks.batch + work.head_k * dks.head + row * dks.row, dks.row, rows,
                     shape.head_dim, acc_dk, params.softmax_scale);
      store_gradient(params.dv + key_batch(work) * dvs.batch + work.head_k * dvs.head + row * dvs.row, dvs.row, rows,
                     params.head_dim_v, acc_dv, inverse_of_kept(params));
    }
  };

  // `due`: a dQ is, that of the step before; `more`: there is a step after it, whose first products it starts.
  auto compute_step = [&](auto due, auto more) {
    constexpr bool kDue = decltype(due)::value, kMore = decltype(more)::value;
    const bool last = step.left == 1;  // of its tile
    const Sequence& sequence = sequence_of_tile(shape, work, params);
    const int key = work.n_block * kBlockN + warp_row + accumulator_row(), first_query = step.m_block * kBlockM;
    const Position<true> position{first_query + accumulator_col(), key};
    if (kDrawn && starts_head(work, step)) drawing = drawing_of(params, work, step.head);
    kept.draw(drawing, position);
    if constexpr (kPicked) {
      seen.read(params, bits_of(step), warp_row + accumulator_row(), step.m_block % kQueryParts * kBlockM);
    }
    bar_sync(kept.before(drawing, kTurn + group), 128 * kKeyGroups);  // the other warpgroup has its dS
    const auto scores = Scores<true>::of<1, kBlockM / 8>(params, of_head, sequence, position);
    if (step.m_block < mask_to_at(work, step)) {
      recompute_p<true>(acc_s, frag_p, smem.lse_log2[ring.stage], scores, sequence, seen, key, first_query);
    } else {
      recompute_p<false>(acc_s, frag_p, smem.lse_log2[ring.stage], scores, sequence, seen, key, first_query);
    }
    if constexpr (kPackEarly) kept.drop(0, frag_p.r);
    pin(acc_s);
    wgmma_wait_group<0>();  // dP(m)
    pin(acc_dp);
    if (last && leader) mbarrier_arrive(smem.v_empty);
    differentiate_softmax(acc_dp, acc_s, smem.softmax_d[ring.stage] + accumulator_col(), kept);
    if constexpr (!kPackEarly) to_fragments(frag_p, acc_s);
    to_fragments(frag_ds, acc_dp);
    bar_arrive(kTurn + 1 - group, 128 * kKeyGroups);  // the other warpgroup's turn
    auto announce_ds = [&] {
      fence_proxy_async();  // this thread's part of dS, before wgmma reads it
      __syncwarp();         // the warp's part is in shared memory
      if (lane_id() == 0) mbarrier_arrive(smem.ds_full[ring.stage]);
    };
    // dV runs while dS is stored, dK while it becomes visible.
    if constexpr (kDvFirst) issue_dv();
    mbarrier_wait(smem.ds_empty[ring.stage], ring.parity ^ 1);  // released by both warpgroups after dQ = dS K
    store_transposed(smem.ds[ring.stage], warp_row, frag_ds);
    if constexpr (kDsFirst) announce_ds();
    if constexpr (!kDvFirst) issue_dv();
    wgmma_fence();
    gemm_rs<kQuerySteps>(acc_dk, frag_ds, DownRows(smem.q[ring.stage]), !first);  // dK += dS^T Q
    wgmma_commit_group();
    if constexpr (!kDsFirst) announce_ds();
    AccDq acc_dq;
    const int stage = ring.stage;
    if constexpr (kDue) issue_dq(acc_dq, first ? k.before() : k.stage);
    ring.advance();
    if (last) k.advance(), v_parity ^= 1;
    wgmma_wait_group<kDue ? 1 : 0>();  // dV, dK
    if (leader) mbarrier_arrive(smem.q_dout_empty[stage]);
    if (kDue && first) {      // the next S may wait for this buffer of K, if this tile has no other step
      wgmma_wait_group<0>();  // the last dQ of the tile before
      if (leader) mbarrier_arrive(smem.k_empty[last ? k.stage : k.before()]);  // k has been advanced if `last`
    }
    if constexpr (kMore) issue_s(last);
    if constexpr (kDue) {
      wgmma_wait_group<kMore ? 1 : 0>();  // dQ of the step before
      finish_dq(acc_dq);
    }
    if (last) {
      pin(acc_dk);
      pin(acc_dv);
      if constexpr (kListed) recall_keys(work, smem.keys_at[k.before()]);
      store_dkv();
    }
    if constexpr (kMore) {
      issue_dp(last);
      wgmma_wait_group<1>();  // S(m+1)
      pin(acc_s);
      next_step();
    }
  };
  if (group == 1) bar_arrive(kTurn, 128 * kKeyGroups);  // the first turn is group 0's
  issue_s(true);
  issue_dp(true);
  wgmma_wait_group<1>();  // S(0)
  pin(acc_s);
  if (is_final()) {
    compute_step(False{}, False{});
  } else {
    compute_step(False{}, True{});
    while (!is_final()) compute_step(True{}, True{});
    compute_step(True{}, False{});
  }
  AccDq acc_dq;
  issue_dq(acc_dq, k.before());
  wgmma_wait_group<0>();
  finish_dq(acc_dq);
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) flash_bwd(const __grid_constant__ BwdTmaBandParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  if (threadIdx.x == 0) {
    mbarrier_init(smem.v_full, 1);
    mbarrier_init(smem.v_empty, kKeyGroups);
#pragma unroll
    for (int i = 0; i < kKStages; ++i) {
      mbarrier_init(smem.k_full[i], 1);
      mbarrier_init(smem.k_empty[i], kKeyGroups);
    }
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(smem.q_full[i], 1);
      mbarrier_init(smem.dout_full[i], 1);
      mbarrier_init(smem.q_dout_empty[i], kKeyGroups);
      mbarrier_init(smem.ds_full[i], 4 * kKeyGroups);
      mbarrier_init(smem.ds_empty[i], kKeyGroups);
    }
#pragma unroll
    for (int i = 0; i < kKeyGroups; ++i) {
      mbarrier_init(smem.dq_full[i], 4);
      mbarrier_init(smem.dq_empty[i], 1);
      mbarrier_init(smem.dq_turn[i], 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are initialised
  if constexpr (kMayBeIdle) griddepcontrol_wait();  // everybody, who finds no tile too: the lists and all else that was written is there

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<kCopyRegisters>();
    const int warp = __shfl_sync(0xffffffffu, warp_id(), 0);
    if (warp == 0) {
      if (lane_id() == 0) copy_tiles(smem, params);
    } else if (warp <= kKeyGroups) {
      if (lane_id() == 0) add_dq(smem, params, warp - 1);
    } else if (kDeterministic) {
      if (lane_id() == 0) announce_turns(smem, params);
    }
  } else {
    setmaxnreg_inc<kComputeRegisters>();
    compute(smem, params, warpgroup - 1);
  }
}
