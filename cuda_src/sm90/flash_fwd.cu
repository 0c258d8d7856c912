// FlashAttention forward with wgmma and TMA (Dao 2023, algorithm 1; Shah et al. 2024): sm_90a.
//
//   O = softmax(scale * Q K^T) V,   lse = log(sum(exp(scale * Q K^T)))
//
// One thread block per multiprocessor takes tiles, kBlockM query rows of one head, from a fixed list. Warpgroup 0 copies: one
// of its warps K and V into rings of kKvStages buffers, one for each other warpgroup that one's Q in and its O out. Each other
// warpgroup computes 64 query rows of the tile; no two warps share a row. Key blocks n run from the last to the first.
//
//   tensor cores   S(n) = Q K(n)^T   O += P(n+1) V(n+1)            S(n-1) = Q K(n-1)^T   O += P(n) V(n)   ...
//   other units                      P(n) = softmax of S(n), O *= alpha                  P(n-1) = ...
//
// The step from one tile to the next is such a step too: the first scores of the next tile are computed beside the last
// product of this one, if there is room for two tiles of Q (kQStages > 1). O leaves through the buffer of its own Q. Where
// there is room for one tile of Q only, but for half a one of O (kOwnO), the warpgroups' O leave through that one by one, and
// Q's buffer is filled again after the tile's last scores.
//
// docs/forward_sm90.md draws the pipeline and says who waits for whom.
#include "common/dropout.cuh"
#include "common/schedule.cuh"
#include "common/score.cuh"
#include "common/softmax.cuh"
#include "common/statistics.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/tile.cuh"

static_assert(sizeof(FwdTmaBandParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kConsumers = kBlockM / 64;  // warpgroups that compute
constexpr int kHeadSteps = kHeadDim / 16, kKeySteps = kBlockN / 16;
constexpr int kCopyRegisters = kConsumers == 3 ? 32 : 40, kComputeRegisters = kConsumers == 3 ? 160 : 232;
static_assert(kNumThreads == 128 * (kConsumers + 1), "one warpgroup for 64 query rows, and one that copies");
static_assert(kHeadDimV <= kHeadDim, "the buffer of Q holds O");
static_assert(kConsumers == 2 || kConsumers == 3, "the registers are shared out for two or three");

constexpr bool kAhead = kQStages > 1 || kOwnO;  // a tile's first scores are computed beside the last product of the one before

// Q, and what O of a warpgroup leaves through, with its first row there: the buffer and the rows of its own Q,
template <bool kOwn>
struct RowBuffers {
  Panels<kBlockM, kHeadDim> q[kQStages];
  FA2_DEVICE auto& o(int stage) { return q[stage]; }
  static FA2_DEVICE int o_row(int group) { return group * 64; }
};
// or the buffer that the warpgroups use one by one.
template <>
struct RowBuffers<true> {
  Panels<64, kHeadDimV> own_o;
  Panels<kBlockM, kHeadDim> q[kQStages];
  FA2_DEVICE auto& o(int) { return own_o; }
  static FA2_DEVICE int o_row(int) { return 0; }
};

struct SharedMemory : RowBuffers<kOwnO> {
  Panels<kBlockN, kHeadDim> k[kKvStages];
  Panels<kBlockN, kHeadDimV> v[kKvStages];
  // full: the bytes have landed. empty: every consumer is done with them.
  alignas(1024) uint64_t q_full[kConsumers][kQStages];
  uint64_t q_empty[kConsumers][kQStages], o_full[kConsumers][kQStages], o_empty[kConsumers];
  uint64_t k_full[kKvStages], k_empty[kKvStages], v_full[kKvStages], v_empty[kKvStages];
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/tiles.py and this struct differ");

using AccS = Accumulator<1, kBlockN / 8>;
using AccO = Accumulator<1, kHeadDimV / 8>;

// A tile: query block m_block of a head, and the key blocks that it meets, the last of them first.
struct Work : QueryTile, HeadScores {
  KeyVisit visit;
};

// The tiles of a thread block: every gridDim.x-th of the launch order, in alternating direction. Sections alternate too, from
// long to short and from short to long, the last one from long to short: so all thread blocks finish at about the same time. A list
// has sections of its own (place_in_list).
struct Tiles {
  int round = 0;
  template <typename Params>
  FA2_DEVICE bool next(const Shape& shape, Work& work, const Params& params) {
    const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int linear = round++ * gridDim.x + place;
    if constexpr (kListed) {
      const QueryTile tile = listed_query_tile(params, linear, shape.num_heads);
      if (tile.head < 0) return false;
      const HeadScores of_head = head_scores(params, query_batch(tile), tile.head);
      work = {tile, of_head, key_visit(sequence_of_tile(tile, params), tile.m_block, params, 0, tile.head)};
    } else {
      const int m_blocks = ceil_div(shape.seqlen_q, kBlockM), rows = shape.num_heads * shape.batch;
      if (linear >= m_blocks * rows) return false;
      const Tile2 tile = tile_of(linear, m_blocks, shape.num_heads, shape);
      const int sections_left = sections_after(linear, m_blocks, rows, shape);
      int m_block = kCausal && sections_left % 2 == 0 ? m_blocks - 1 - tile.block : tile.block;
      if constexpr (kPicked) {
        m_block = longest_tile(params, tile.batch, tile.head, sections_left % 2 == 0 ? tile.block : m_blocks - 1 - tile.block);
      }
      const HeadScores of_head = head_scores(params, tile.batch, tile.head);
      work = {{m_block, tile.head, tile.batch},
              of_head,
              key_visit(sequence_of(shape, tile.batch, params), m_block, params, tile.batch, tile.head)};
    }
    return true;
  }
};
using Schedule = Visited<Tiles>;

// Keys and values of all tiles, one thread.
FA2_DEVICE void copy_keys(SharedMemory& smem, const FwdTmaBandParams& params) {
  const Shape& shape = params.shape;
  Schedule schedule;
  Work work;
  Ring<kKvStages> ring;
  while (schedule.next(shape, work, params)) {
    const int head_k = work.head / (shape.num_heads / shape.num_heads_k);
    for (int place = work.visit.end - 1; place >= work.visit.begin; --place, ring.advance()) {
      const int n = met_keys(work.visit, place).block;
      mbarrier_wait(smem.k_empty[ring.stage], ring.parity ^ 1);  // released by every consumer after its S
      mbarrier_arrive_expect_tx(smem.k_full[ring.stage], smem.k[0].kBytes);
      load_tile(smem.k[ring.stage], params.k, smem.k_full[ring.stage], key_place(work, n * kBlockN, head_k, params));
      mbarrier_wait(smem.v_empty[ring.stage], ring.parity ^ 1);  // released by every consumer after its O += P V
      mbarrier_arrive_expect_tx(smem.v_full[ring.stage], smem.v[0].kBytes);
      load_tile(smem.v[ring.stage], params.v, smem.v_full[ring.stage], key_place(work, n * kBlockN, head_k, params));
    }
  }
}

// The queries of a computing warpgroup into its buffers, and its outputs out of them, one thread.
FA2_DEVICE void copy_rows(SharedMemory& smem, const FwdTmaBandParams& params, int group) {
  const Shape& shape = params.shape;
  const int group_row = group * 64;
  Schedule loads, stores;
  auto load_next = [&](int stage) {
    Work work;
    if (!loads.next(shape, work, params)) return;
    mbarrier_arrive_expect_tx(smem.q_full[group][stage], smem.q[0].kPanels * 64 * 128);
    load_rows<64>(smem.q[stage], group_row, params.q, smem.q_full[group][stage],
                  query_place(work, work.m_block * kBlockM + group_row, work.head, params));
  };
#pragma unroll
  for (int stage = 0; stage < kQStages; ++stage) load_next(stage);
  Ring<kQStages> ring;
  Work work;
  for (; stores.next(shape, work, params); ring.advance()) {
    if constexpr (kOwnO) {
      mbarrier_wait(smem.q_empty[group][ring.stage], ring.parity);  // released by compute after a tile's last S
      load_next(ring.stage);
    }
    mbarrier_wait(smem.o_full[group][ring.stage], ring.parity);  // O is there: compute
    if (is_there(work, work.m_block * kBlockM + group_row)) {
      store_rows<64, kHeadDimV>(params.out, smem.o(ring.stage), smem.o_row(group),
                                query_place(work, work.m_block * kBlockM + group_row, work.head, params));
    }
    cp_async_bulk_commit_group();
    cp_async_bulk_wait_group_read<0>();  // the buffer is free again; and shared memory outlives its readers
    if constexpr (kOwnO) {
      mbarrier_arrive(smem.o_empty[group]);
    } else {
      load_next(ring.stage);
    }
  }
}

// One warpgroup: all tiles, 64 query rows of each.
FA2_DEVICE void compute(SharedMemory& smem, const FwdTmaBandParams& params, int group) {
  const Shape& shape = params.shape;
  const int group_row = group * 64, warp_row = group_row + warp_id() % 4 * 16, row = warp_row + accumulator_row();
  const bool leader = threadIdx.x % 128 == 0;
  const float scale_log2 = exponent_scale<kScaleFirst>(params);
  Ring<kQStages> q;
  Ring<kKvStages> k, v;
  uint32_t o_parity = 0;
  Softmax<1> softmax;
  AccS acc_s;
  AccO acc_o;
  Fragments<kKeySteps> frag_p;
  Drawing drawing;
  Kept<false, 1, kBlockN / 8> kept;
  Seen<false, 1> seen;

  auto issue_s = [&] {  // S = Q K^T
    mbarrier_wait(smem.k_full[k.stage], k.parity);  // K landed: copy_keys
    wgmma_fence();
    gemm_ss<kHeadSteps>(acc_s, AlongRows(smem.q[q.stage], group_row), AlongRows(smem.k[k.stage]));
    wgmma_commit_group();
  };
  auto issue_o = [&](bool accumulate) {  // O (+)= P V
    mbarrier_wait(smem.v_full[v.stage], v.parity);  // V landed: copy_keys
    wgmma_fence();
    gemm_rs<kKeySteps>(acc_o, frag_p, DownRows(smem.v[v.stage]), accumulate);
    wgmma_commit_group();
  };
  auto finish_s = [&] {
    pin(acc_s);
    if (leader) mbarrier_arrive(smem.k_empty[k.stage]);
    k.advance();
  };
  auto finish_o = [&] {
    pin(acc_o);
    if (leader) mbarrier_arrive(smem.v_empty[v.stage]);
    v.advance();
  };
  auto release_q = [&] {  // after a tile's last S
    if (kOwnO && leader) mbarrier_arrive(smem.q_empty[group][q.stage]);
  };
  auto position_of = [&](const Work& work, int n) {
    return Position<false>{work.m_block * kBlockM + row, met_keys(work.visit, n).block * kBlockN + accumulator_col()};
  };
  auto look = [&](const Work& work, int n) {  // at what is seen of a block that is met in part
    const MetBlock met = met_keys(work.visit, n);
    seen.read(params, met.bits, work.m_block % kQueryParts * kBlockM + row, met.block % kKeyParts * kBlockN);
  };
  auto modify = [&](const Work& work, int n) {
    return modify_scores(acc_s, params, work, sequence_of_tile(shape, work, params), position_of(work, n));
  };
  auto mask = [&](const Work& work, int n) {
    if constexpr (kPicked) {
      mask_scores(acc_s, seen);
    } else {
      mask_scores(acc_s, sequence_of_tile(shape, work, params), position_of(work, n));
    }
  };
  // P = exp(scale * S - m) of a tile's first (that is, last) block of keys
  auto start_softmax = [&](const Work& work) {
    const RowShift<1> shift = modify(work, work.visit.end - 1);
    if (work.visit.end - 1 >= work.visit.mask_from) mask(work, work.visit.end - 1);
    softmax = Softmax<1>();
    float alpha[2];
    softmax.exponentiate(acc_s, alpha, scale_log2, shift);
    kept.drop(acc_s);
  };
  auto draw_first = [&](const Work& work) {  // of a tile
    drawing = drawing_of(params, work, work.head);
    kept.draw(drawing, position_of(work, work.visit.end - 1));
    look(work, work.visit.end - 1);
  };
  auto start_tile = [&](const Work& work) {
    mbarrier_wait(smem.q_full[group][q.stage], q.parity);  // Q landed: copy_rows
    issue_s();
    draw_first(work);
    wgmma_wait_group<0>();
    finish_s();
    if (work.visit.end == work.visit.begin + 1) release_q();
    start_softmax(work);
    to_fragments(frag_p, acc_s);
  };
  // O = diag(l)^-1 O of a tile, whose Q was at `stage`
  auto finish_tile = [&](const Work& work, Softmax<1>& done, float logit, int stage) {
    done.finish(acc_o, scale_log2, logit, inverse_of_kept(params));
    const int first_query = work.m_block * kBlockM;
    if (accumulator_col() == 0) {
      float* lse = params.lse + query_batch(work) * params.lse_strides.batch + work.head * params.lse_strides.head;
      if (kListed) lse += query_row(work, 0) * params.lse_strides.row;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (first_query + row + 8 * h < sequence_of_tile(shape, work, params).seqlen_q)
          lse[(first_query + row + 8 * h) * params.lse_strides.row] = done.lse(0, h, scale_log2);
    }
    if constexpr (kOwnO) {  // the warpgroups take turns
      mbarrier_wait(smem.o_empty[(group + kConsumers - 1) % kConsumers], group == 0 ? o_parity ^ 1 : o_parity);
      o_parity ^= 1;
    }
    store_accumulator(smem.o(stage), smem.o_row(group) + warp_id() % 4 * 16, acc_o);
    fence_proxy_async();  // this thread's part of O, before the copy engine reads it
    mbarrier_arrive(smem.o_full[group][stage]);
  };

  // The warpgroups issue their pairs of products in turn: so one's softmax falls on the others' products.
  auto take_turn = [&] {
    if constexpr (kTurns) bar_sync(1 + group, 256);
  };
  auto pass_turn = [&] {
    if constexpr (kTurns) bar_arrive(1 + (group + 1) % kConsumers, 256);
  };

  Schedule schedule;
  Work work, next, after;
  if (!schedule.next(shape, work, params)) return;
  bool more = kAhead && schedule.next(shape, next, params);
  if (kTurns && group == kConsumers - 1) bar_arrive(1, 256);  // the first turn
  start_tile(work);
  while (true) {
    bool first = true;
    auto step = [&](int n, auto masked) {
      take_turn();
      issue_s();
      kept.draw(drawing, position_of(work, n));
      if constexpr (decltype(masked)::value) look(work, n);
      issue_o(kept.before(drawing, !first));
      pass_turn();
      first = false;
      wgmma_wait_group<1>();  // S(n)
      finish_s();
      if (n == work.visit.begin) release_q();
      const RowShift<1> shift = modify(work, n);
      if constexpr (decltype(masked)::value) mask(work, n);
      float alpha[2];
      softmax.exponentiate(acc_s, alpha, scale_log2, shift);
      kept.drop(acc_s);
      pin(acc_s);             // what can be done of P(n) before the wait is not left for after it
      wgmma_wait_group<0>();  // O += P(n+1) V(n+1)
      finish_o();
      to_fragments(frag_p, acc_s);
      softmax.rescale(acc_o, alpha);
    };
    int n = work.visit.end - 2;
    for (; n >= work.visit.mask_from; --n) step(n, True{});
    // 0 is visit.begin without a band; by that name one kernel (192/128) becomes another
    for (; n >= (kBand ? work.visit.unmasked_from() : 0); --n) step(n, False{});
    if constexpr (kBand) {
      for (; n >= work.visit.begin; --n) step(n, True{});
    }

    // The last product of this tile, and beside it the first scores of the next.
    Softmax<1> done = softmax;
    const int done_stage = q.stage;
    const float logit = own_logit(params, work.head);  // read beside the product
    bool more_after = false;
    q.advance();
    if (kAhead && more) {
      mbarrier_wait(smem.q_full[group][q.stage], q.parity);  // Q landed: copy_rows
      take_turn();
      issue_s();
      draw_first(next);
      issue_o(kept.before(drawing, !first));
      pass_turn();
      more_after = schedule.next(shape, after, params);
      wgmma_wait_group<1>();  // S of the next tile
      finish_s();
      if (next.visit.end == next.visit.begin + 1) release_q();
      start_softmax(next);
      pin(acc_s);
      wgmma_wait_group<0>();  // the last O += P V
      finish_o();
      to_fragments(frag_p, acc_s);
    } else {
      issue_o(!first);
      if (!kAhead) more = schedule.next(shape, next, params);
      wgmma_wait_group<0>();  // the last O += P V
      finish_o();
    }
    finish_tile(work, done, logit, done_stage);
    if (!more) break;
    work = next;
    if (kAhead) {
      next = after;
      more = more_after;
    } else {
      start_tile(work);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) flash_fwd(const __grid_constant__ FwdTmaBandParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kConsumers; ++i)
#pragma unroll
      for (int j = 0; j < kQStages; ++j) {
        mbarrier_init(smem.q_full[i][j], 1);
        mbarrier_init(smem.q_empty[i][j], 1);
        mbarrier_init(smem.o_full[i][j], 128);
      }
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) mbarrier_init(smem.o_empty[i], 1);
#pragma unroll
    for (int i = 0; i < kKvStages; ++i) {
      mbarrier_init(smem.k_full[i], 1);
      mbarrier_init(smem.v_full[i], 1);
      mbarrier_init(smem.k_empty[i], kConsumers);
      mbarrier_init(smem.v_empty[i], kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are initialised
  if constexpr (kListed) griddepcontrol_wait();  // the list is there

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    setmaxnreg_dec<kCopyRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) copy_keys(smem, params);
      else if (warp <= kConsumers) copy_rows(smem, params, warp - 1);
    }
  } else {
    setmaxnreg_inc<kComputeRegisters>();
    compute(smem, params, warpgroup - 1);
  }
}
