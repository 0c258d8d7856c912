// FlashAttention-2 backward (Dao 2023, algorithm 2) with mma.sync and cp.async: every GPU from sm_80 on.
//
//   P = exp(scale * Q K^T - lse)    dV = P^T dO    dP = dO V^T    dS = P * (dP - D)    dQ = scale * dS K    dK = scale * dS^T Q
//
// A thread block owns kBlockN keys of one key head and runs over the query blocks of all query heads that share it, so dK
// and dV are summed in registers, GQA included. With too few of these blocks to fill the GPU (kPartialDkv), splits of
// them share the query heads of a key head, and flash_bwd_postprocess sums what each has of dK and dV.
//
// The scores are computed transposed (S^T = K Q^T): a warp owns key rows, and P^T and dS^T leave the accumulators as the A
// operands of dV += P^T dO and dK += dS^T Q. dQ alone needs dS of all warps: it goes through shared memory, and dS K is
// added to dq_accum in global memory.
//
// kSplit > 1 (head_dim > 64, where dK and dV of 32 keys do not fit a warp's registers): 2 or 4 warps share key rows. Each
// computes its part of the query columns of S^T and owns its part of the columns of dK (head_dim) and dV (head_dim_v); P^T
// goes through shared memory too.
#include "common/bwd_steps.cuh"
#include "common/dq_accum.cuh"
#include "common/dropout.cuh"
#include "common/score.cuh"
#include "sm80/tile.cuh"

static_assert(sizeof(BwdBandParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kKeyWarps = kNumWarps / kSplit;
constexpr int kKeyTiles = kBlockN / kKeyWarps / 16;   // blocks of 16 keys of a warp
constexpr int kSCols = kBlockM / kSplit;              // query columns of S^T of a warp
constexpr int kDCols = kHeadDim / kSplit;             // columns of dK of a warp
constexpr int kDColsV = kHeadDimV / kSplit;           // columns of dV of a warp
constexpr int kTurnBlocks = !kBand && !kPicked && kBlockN > kBlockM ? kBlockN / kBlockM : 1;  // query blocks of a turn, see my_turn
constexpr int kHeadSteps = kHeadDim / 16, kHeadStepsV = kHeadDimV / 16, kQuerySteps = kBlockM / 16, kKeySteps = kBlockN / 16;
static_assert(kKeyTiles * kKeyWarps * 16 == kBlockN, "each warp owns whole blocks of 16 keys");
static_assert(kSCols % 16 == 0 && kDCols % 16 == 0 && kDColsV % 16 == 0, "a split leaves whole blocks of 16");

struct SharedMemory {
  Tile<kBlockN, kHeadDim> k;   // later dK on its way to global memory
  Tile<kBlockN, kHeadDimV> v;  // later dV
  Tile<kBlockM, kHeadDim> q[kStages];
  Tile<kBlockM, kHeadDimV> dout[kStages];
  Tile<kBlockN, kBlockM> ds;                          // dS^T
  Tile<kSplit == 1 ? 16 : kBlockN, kBlockM> p;        // P^T, if several warps share its keys
  alignas(16) float lse_log2[kStages][kBlockM];
  alignas(16) float softmax_d[kStages][kBlockM];
};

static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/tiles.py and this struct differ");

using AccS = Accumulator<kKeyTiles, kSCols / 8>;
using AccK = Accumulator<kKeyTiles, kDCols / 8>;
using AccV = Accumulator<kKeyTiles, kDColsV / 8>;
using FragmentsP = Fragments<kKeyTiles, kSCols / 16>;
using SeenKeys = Seen<true, kKeyTiles>;

// Statistics of the kBlockM query rows that start at `gmem`: whole blocks, the workspace is padded.
FA2_DEVICE void copy_statistics(float (&smem)[kBlockM], const float* gmem) {
  for (int i = threadIdx.x * 4; i < kBlockM; i += kNumThreads * 4) cp_async_16(smem_address(smem + i), gmem + i, 16);
}

// Of short sequences, which lie there one behind the other: of `rows` rows, and `missing` for those that do not exist.
FA2_DEVICE void copy_rows(float (&smem)[kBlockM], const float* gmem, int rows, float missing) {
  for (int i = threadIdx.x; i < kBlockM; i += kNumThreads) smem[i] = i < rows ? gmem[i] : missing;
}

// P^T = exp2(scale_log2 * S^T - lse_log2), 0 where a query does not see a key. kPackEarly: P goes into `packed`, rounded, and its
// derivative stays.
template <bool kMasked, bool kBothSides>
FA2_DEVICE void recompute_p(AccS& acc, FragmentsP& packed, const float (&lse_log2)[kBlockM], const Scores<true>& scores,
                            const Sequence& sequence, const SeenKeys& seen, int first_key, int first_query, int first_col) {
#pragma unroll
  for (int j = 0; j < kSCols / 8; ++j) {
    const int col = first_col + 8 * j + accumulator_col();
    const float2 lse = *reinterpret_cast<const float2*>(lse_log2 + col);
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i) {
      float rounded[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float derivative = 1.f;
        float p = scores.p<kBothSides>(acc.x[i][j][e], e % 2 == 0 ? -lse.x : -lse.y, i, j, e, derivative);
        if constexpr (kMasked && kPicked) {
          if (seen.hides(i, j, e)) p = 0.f;
        } else if constexpr (kMasked) {
          const int key = first_key + 16 * i + accumulator_row() + e / 2 * 8;
          if (first_query + col + e % 2 < query_begin(sequence, key)) p = 0.f;
          if (kBand && first_query + col + e % 2 >= query_end(sequence, key)) p = 0.f;
        }
        acc.x[i][j][e] = kCurved ? p * derivative : p;
        rounded[e] = p;
      }
      if constexpr (kPackEarly) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          packed.r[i][j / 2][j % 2 * 2 + h] = cvt_pack<Element>(rounded[2 * h], rounded[2 * h + 1]);
      }
    }
  }
}

template <bool kMasked>
FA2_DEVICE void recompute_p(AccS& acc, FragmentsP& packed, const float (&lse_log2)[kBlockM], const Scores<true>& scores,
                            const Sequence& sequence, const SeenKeys& seen, int first_key, int first_query, int first_col) {
  if constexpr (kAnySide) {
    if (scores.keys == Keys::kAround) {
      return recompute_p<kMasked, true>(acc, packed, lse_log2, scores, sequence, seen, first_key, first_query, first_col);
    }
  }
  recompute_p<kMasked, false>(acc, packed, lse_log2, scores, sequence, seen, first_key, first_query, first_col);
}

// Rows of kCols floats = acc: four lanes write 32 bytes of a row, a whole sector.
template <int kCols, int kNTiles>
FA2_DEVICE void store_partial(float* gmem, int row, int col, const Accumulator<kKeyTiles, kNTiles>& acc) {
  float* target = gmem + (row + accumulator_row()) * kCols + col + accumulator_col();
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(target + (16 * i + 8 * h) * kCols + 8 * j) =
            float2{acc.x[i][j][2 * h], acc.x[i][j][2 * h + 1]};
}

// dq_accum += dS K for this warp's part of the tile.
FA2_DEVICE void add_dq(float* dq_tile, const SharedMemory& smem) {
  const int warp = warp_id();
  if (dq_col(warp) >= kHeadDim) return;
  Accumulator<kDqMTiles, kDqNTiles> acc_dq;
  acc_dq.clear();
  // Columns past head_dim read the padding or the next row of K: finite or not, they are not added.
  gemm<kKeySteps>(acc_dq, operand_a_transposed(smem.ds, 0, dq_row(warp)), operand_b(smem.k, 0, dq_col(warp)));
#pragma unroll
  for (int i = 0; i < kDqMTiles; ++i)
#pragma unroll
    for (int j = 0; j < kDqNTiles; ++j) {
      if (dq_col(warp) + 8 * j >= kHeadDim) continue;
      const float(&x)[4] = acc_dq.x[i][j];
      if constexpr (kVectorRed) {
        red_add_v4_f32(dq_tile + dq_offset(warp, lane_id(), i, j, 0), x[0], x[1], x[2], x[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) red_add_f32(dq_tile + dq_offset(warp, lane_id(), i, j, e), x[e]);
      }
    }
}

// dQ = scale * dS K, rounded, for this warp's part of the tile: of a sequence whose keys are one block nobody else adds to it. `gmem`:
// its first row, of which `rows` exist.
FA2_DEVICE void store_dq(Element* gmem, int64_t stride, int rows, int cols, float scale, const SharedMemory& smem) {
  const int warp = warp_id();
  if (dq_col(warp) >= kHeadDim) return;
  Accumulator<kDqMTiles, kDqNTiles> acc_dq;
  acc_dq.clear();
  gemm<kKeySteps>(acc_dq, operand_a_transposed(smem.ds, 0, dq_row(warp)), operand_b(smem.k, 0, dq_col(warp)));
#pragma unroll
  for (int i = 0; i < kDqMTiles; ++i)
#pragma unroll
    for (int j = 0; j < kDqNTiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = dq_row(warp) + 16 * i + 8 * h + accumulator_row(), col = dq_col(warp) + 8 * j + accumulator_col();
        if (row >= rows || col >= cols) continue;
        const float(&x)[4] = acc_dq.x[i][j];
        const uint32_t pair = cvt_pack<Element>(x[2 * h] * scale, x[2 * h + 1] * scale);
        Element* target = gmem + row * stride + col;
        if constexpr (kAligned) {
          *reinterpret_cast<uint32_t*>(target) = pair;
        } else {
          target[0] = Element{static_cast<uint16_t>(pair)};
          if (col + 1 < cols) target[1] = Element{static_cast<uint16_t>(pair >> 16)};
        }
      }
}

// Tile `linear` of the launch order.
FA2_DEVICE void differentiate(SharedMemory& smem, const BwdBandParams& params, int linear) {
  const Shape& shape = params.shape;
  const int n_blocks = key_tiles_of_head<kBlockN>(params), m_blocks = query_tiles_of_head(params);
  // tile.head counts the shares of all key heads: splits for each, one after the other.
  const int splits = kPartialDkv ? params.splits : 1, shares = shape.num_heads_k * splits;
  const Tile2 tile = key_tile_of<kDeterministic>(linear, n_blocks, shares, shape);
  // The longest first, but see my_turn.
  const int place = kDeterministic && (kCausal || kBand) ? n_blocks - 1 - tile.block : tile.block;
  const auto entry = key_tile_at(params, place, tile.batch);
  const int n_block = key_block_of(params, entry, place, tile.batch, tile.head / splits);
  const Sequence& sequence = sequence_of_tile(shape, entry, params);
  const int first_key = n_block * kBlockN, keys = sequence.seqlen_k - first_key;
  const int head_k = tile.head / splits;
  const int heads = shape.num_heads / shares;  // query heads of this share
  // Which part of dK and dV this is (kPartialDkv). Computed at the end, it takes the loop two registers more.
  const int part = (tile.batch * shares + tile.head) * n_blocks + n_block;

  const int warp_row = warp_id() / kSplit * kKeyTiles * 16;
  const int s_col = warp_id() % kSplit * kSCols, d_col = warp_id() % kSplit * kDCols;
  const int d_col_v = kOwnHeadDimV ? warp_id() % kSplit * kDColsV : d_col;
  const auto smem_k = operand_a(smem.k, warp_row, 0);
  const auto smem_v = operand_a(smem.v, warp_row, 0);
  const auto smem_p = operand_a(smem.p, kSplit == 1 ? 0 : warp_row, 0);
  const auto smem_ds = operand_a(smem.ds, warp_row, 0);

  const Strides &qs = params.q_strides, &dos = params.dout_strides, &ks = params.k_strides, &vs = params.v_strides;
  load_tile(smem.k, params.k + key_batch(entry) * ks.batch + head_k * ks.head + key_row(entry, first_key) * ks.row, ks.row,
            keys, shape.head_dim);
  load_tile(smem.v, params.v + key_batch(entry) * vs.batch + head_k * vs.head + key_row(entry, first_key) * vs.row, vs.row,
            keys, head_dim_v(params));

  // A step is a block of queries of one of the query heads of this share.
  using Step = StagedStepOf<kPicked>;
  const QueryVisit visit = query_blocks(sequence, n_block);
  const int last_head = (tile.head + 1) * heads - 1;
  auto next_of = [&](const Step& step) {
    if constexpr (kPicked) return step_after(step, (step.stage + 1) % kStages, params, tile.batch, n_block, last_head);
    const bool last = step.m_block + 1 == visit.end;
    return Step{step.head + last, last ? visit.begin : step.m_block + 1, (step.stage + 1) % kStages};
  };
  constexpr int kPlaces = kShort ? kBlockM : 1;  // of a tile: of short sequences each row has one
  auto tile_index = [&](const Step& step) {      // among all tiles of queries
    return static_cast<int64_t>(tile.batch * shape.num_heads + step.head) * m_blocks + entry.tile + step.m_block * kPlaces;
  };
  // What a step needs: its rows of Q and dO, whole or in parts, and their statistics. After the last step, zeros: nobody
  // reads them, and there is no branch in the loop.
  auto load_q = [&](const Step& step, int part = 0, int parts = 1) {
    const int first_query = step.m_block * kBlockM;
    const Element* rows = params.q + query_batch(entry) * qs.batch + step.head * qs.head;
    load_tile(smem.q[step.stage], rows + query_row(entry, first_query) * qs.row, qs.row,
              step.head <= last_head ? sequence.seqlen_q - first_query : 0, shape.head_dim, part, parts);
  };
  auto load_dout = [&](const Step& step, int part = 0, int parts = 1) {
    const int first_query = step.m_block * kBlockM;
    const Element* rows = params.dout + query_batch(entry) * dos.batch + step.head * dos.head;
    load_tile(smem.dout[step.stage], rows + query_row(entry, first_query) * dos.row, dos.row,
              step.head <= last_head ? sequence.seqlen_q - first_query : 0, head_dim_v(params), part, parts);
  };
  auto load_statistics = [&](const Step& step) {
    if constexpr (kShort) {
      const int rows = sequence.seqlen_q - step.m_block * kBlockM;
      copy_rows(smem.lse_log2[step.stage], params.lse_log2 + tile_index(step), rows, kInfinity);
      copy_rows(smem.softmax_d[step.stage], params.softmax_d + tile_index(step), rows, 0.f);
    } else {
      copy_statistics(smem.lse_log2[step.stage], params.lse_log2 + tile_index(step) * kBlockM);
      copy_statistics(smem.softmax_d[step.stage], params.softmax_d + tile_index(step) * kBlockM);
    }
  };
  auto load_queries = [&](const Step& step) {
    load_statistics(step);
    load_q(step);
    load_dout(step);
    cp_async_commit_group();
  };

  AccK acc_dk;
  AccV acc_dv;
  acc_dk.clear();
  acc_dv.clear();
  SeenKeys seen;
  auto compute_p = [&](AccS& acc, FragmentsP& packed, const Step& step, const Position<true>& position, auto masked) {
    const HeadScores of_head = head_scores(params, query_batch(entry), step.head);
    const auto scores = Scores<true>::of<kKeyTiles, kSCols / 8>(params, of_head, sequence, position);
    recompute_p<decltype(masked)::value>(acc, packed, smem.lse_log2[step.stage], scores, sequence, seen, first_key + warp_row,
                                         step.m_block * kBlockM, s_col);
  };

  // Deterministic: the key blocks that meet a query block add to its dQ in turn, causal ones from the diagonal on and those of a band
  // from its right end on, which is the order in which they come to it. Blocks are launched in that order too, so that whoever is waited for is running:
  // a query head belongs to one share, and tile_of gives the blocks of a share in the order of their turns.
  // A turn is for kTurnBlocks query blocks: it is awaited before the first of them and passed on after the last. Whoever
  // starts within a turn, at its diagonal, is the first in it: the others have started at least kBlockN queries earlier.
  auto my_turn = [&](int m_block) {
    if (!kCausal && !kBand) return n_block;
    return key_blocks(sequence, min(m_blocks, (m_block / kTurnBlocks + 1) * kTurnBlocks) - 1).end - 1 - n_block;
  };
  int* turn_to_pass = nullptr;
  // Orders the dQ of the whole block, which is done with it, before the turn of the next one: red.release and the barrier
  // before it are cumulative. Not the warp that awaits turns: either takes about a microsecond.
  auto pass_turn = [&] {
    if (kDeterministic && turn_to_pass && threadIdx.x == kNumThreads - 32) red_release_add(turn_to_pass, 1);
  };

  bool any = visit.begin < visit.end;
  Step step{tile.head * heads, visit.begin, 0};
  if constexpr (kPicked) any = find_first_step(step, params, tile.batch, n_block, last_head) && keys > 0;
  Drawing drawing;
  Kept<true, kKeyTiles, kSCols / 8> kept;
  if (any) load_queries(step);
  if (kPicked && !any) cp_async_commit_group();  // K and V
  while (any && step.head <= last_head) {
    const Step next = next_of(step);
    const int stage = step.stage, m_block = step.m_block;
    const Position<true> position{m_block * kBlockM + s_col + accumulator_col(), first_key + warp_row + accumulator_row()};
    if (kDrawn && (kPicked ? place_of(step) == 0 : m_block == visit.begin)) drawing = drawing_of(params, entry, step.head);
    kept.draw(drawing, position);
    if constexpr (kPicked) {
      seen.read(params, bits_of(step), n_block % kKeyParts * kBlockN + warp_row + accumulator_row(),
                m_block % kQueryParts * kBlockM + s_col);
    }
    cp_async_wait_group<0>();  // Q, dO, lse and D of this step landed, and before the first step K and V: load_queries
    __syncthreads();           // everybody's part of them is there, and everybody is done with the last step
    pass_turn();
    if (kStages > 1 && next.head <= last_head) load_statistics(next);
    // S^T = K Q^T, P^T = exp(scale * S^T - lse)
    AccS acc_p;
    acc_p.clear();
    gemm<kHeadSteps>(acc_p, smem_k, operand_b_transposed(smem.q[stage], s_col, 0));
    FragmentsP packed;
    if (m_block < mask_to_at(visit, step)) {
      compute_p(acc_p, packed, step, position, True{});
    } else {
      compute_p(acc_p, packed, step, position, False{});
    }
    if constexpr (kPackEarly) {
#pragma unroll
      for (int i = 0; i < kKeyTiles; ++i) kept.drop(i, packed.r[i]);
    }
    if constexpr (kPackEarly && kSplit > 1) store_fragments(smem.p, warp_row, s_col, packed);
    // dP^T = V dO^T, dS^T = P^T * (dP^T - D)
    AccS acc_ds;
    acc_ds.clear();
    gemm<kHeadStepsV>(acc_ds, smem_v, operand_b_transposed(smem.dout[stage], s_col, 0), [&](int k) {
      if (kStages > 1) load_q(next, k, kHeadStepsV);
    });
    differentiate_softmax(acc_ds, acc_p, smem.softmax_d[stage] + s_col + accumulator_col(), kept);
    store_accumulator(smem.ds, warp_row, s_col, acc_ds);
    const int block_in_turn = m_block % kTurnBlocks;
    int* turn = params.dq_turn + tile_index(step) - block_in_turn;
    if (kDeterministic && threadIdx.x == 0 && block_in_turn == 0) {
      while (ld_acquire(turn) != (kPicked ? turn_at(step) : my_turn(m_block))) continue;  // the key block before this one has added its part of dQ
    }
    // dV += P^T dO
    const auto smem_dout = operand_b(smem.dout[stage], 0, d_col_v);
    auto copy_dout = [&](int k) {
      if (kStages > 1) load_dout(next, k, kQuerySteps);
    };
    if constexpr (kSplit == 1) {
      if constexpr (!kPackEarly) packed = to_fragments(acc_p);
      gemm<kQuerySteps>(acc_dv, packed, smem_dout, copy_dout);
      __syncthreads();  // dS^T is complete, and it is this block's turn
    } else {
      if constexpr (!kPackEarly) store_accumulator(smem.p, warp_row, s_col, acc_p);
      __syncthreads();  // P^T and dS^T are complete, and it is this block's turn
      gemm<kQuerySteps>(acc_dv, smem_p, smem_dout, copy_dout);
    }
    cp_async_commit_group();  // all of the next step
    // dQ += dS K
    if constexpr (kShort) {
      const Strides& dqs = params.dq_strides;
      const int first_query = m_block * kBlockM;
      Element* rows = params.dq + query_batch(entry) * dqs.batch + step.head * dqs.head + query_row(entry, first_query) * dqs.row;
      store_dq(rows, dqs.row, sequence.seqlen_q - first_query, shape.head_dim, params.softmax_scale, smem);
    } else {
      add_dq(params.dq_accum + tile_index(step) * kDqTileFloats, smem);
    }
    turn_to_pass = block_in_turn + 1 == kTurnBlocks || m_block + 1 == visit.end ? turn : nullptr;
    // dK += dS^T Q
    const auto smem_q = operand_b(smem.q[stage], 0, d_col);
    if constexpr (kSplit == 1) {
      gemm<kQuerySteps>(acc_dk, to_fragments(acc_ds), smem_q);
    } else {
      gemm<kQuerySteps>(acc_dk, smem_ds, smem_q);
    }
    if (kStages == 1 && next.head <= last_head) {
      __syncthreads();  // everybody is done with Q and dO
      load_queries(next);
    }
    step = next;
  }

#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
    for (int j = 0; j < kDCols / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_dk.x[i][j][e] *= params.softmax_scale;
  if constexpr (kDrawn) {
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
      for (int j = 0; j < kDColsV / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_dv.x[i][j][e] *= inverse_of_kept(params);
  }
  cp_async_wait_group<0>();  // the zeros, or K and V, should there have been no step
  __syncthreads();           // everybody is done with K and V
  pass_turn();
  if constexpr (kPartialDkv) {  // whole blocks, the workspace is padded
    const int64_t row = static_cast<int64_t>(part) * kBlockN;
    store_partial<kHeadDim>(params.dk_partial + row * kHeadDim, warp_row, d_col, acc_dk);
    store_partial<kHeadDimV>(params.dv_partial + row * kHeadDimV, warp_row, d_col_v, acc_dv);
  } else {  // through the tiles of K and V
    store_accumulator(smem.k, warp_row, d_col, acc_dk);
    store_accumulator(smem.v, warp_row, d_col_v, acc_dv);
    __syncthreads();  // dK and dV are in shared memory
    const Strides &dks = params.dk_strides, &dvs = params.dv_strides;
    store_tile(params.dk + key_batch(entry) * dks.batch + head_k * dks.head + key_row(entry, first_key) * dks.row, dks.row,
               keys, shape.head_dim, smem.k);
    store_tile(params.dv + key_batch(entry) * dvs.batch + head_k * dvs.head + key_row(entry, first_key) * dvs.row, dvs.row,
               keys, head_dim_v(params), smem.v);
  }
}

extern "C" __global__ void __launch_bounds__(kNumThreads) flash_bwd(const __grid_constant__ BwdBandParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  if constexpr (kShort) {
    const int tiles = key_tiles_of_head<kBlockN>(params) * params.shape.num_heads_k;
    // No barrier between two: all that is read after the last one, dK and dV, a thread overwrites with K and V itself.
    for (int linear = blockIdx.x; linear < tiles; linear += gridDim.x) differentiate(smem, params, linear);
  } else {
    const int shares = params.shape.num_heads_k * (kPartialDkv ? params.splits : 1);
    if (kListed && blockIdx.x >= key_tiles_of_head<kBlockN>(params) * shares) return;  // the host knows only the most there can be
    differentiate(smem, params, blockIdx.x);
  }
}
