// What the backward's kernels of sm_90 have in common: which tiles a thread block takes and which steps these have, how lse
// and D arrive, whose turn it is to add to dQ, and how dK and dV leave.
#pragma once

#include "common/bwd_steps.cuh"
#include "sm90/tile.cuh"

// In a band: from which query block on there is a mask again, and how many blocks a head has.
template <bool kHasBand>
struct WorkOfBand {};
template <>
struct WorkOfBand<true> {
  int mask_again, head_blocks;
};
template <typename Visit>
FA2_DEVICE WorkOfBand<kBand> work_of_band(const Visit& visit, int head_blocks) {
  if constexpr (kBand) {
    return {visit.mask_again, head_blocks};
  } else {
    return {};
  }
}
template <typename Work>
FA2_DEVICE int head_blocks(const Work& work) {
  if constexpr (kListed) {
    return work.tiles_of_head;
  } else if constexpr (kBand) {
    return work.head_blocks;
  } else {
    return work.end;
  }
}

// Of a list: the sequence's place and lengths, its first tile of queries among those of a head, and how many of these there are.
template <bool kHasList, bool kHasPosition>
struct WorkOfList {};
template <>
struct WorkOfList<true, false> {
  int first_q, seqlen_q, first_k, seqlen_k, batch_q, batch_k, first_tile, tiles_of_head;
};
template <>
struct WorkOfList<true, true> {
  int first_q, seqlen_q, first_k, seqlen_k, batch_q, batch_k, first_tile, tiles_of_head, in_front_q, in_front_k;
};
template <typename Entry, typename Params>
FA2_DEVICE WorkOfList<kListed, kPositioned> work_of_list(const Entry& entry, const Params& params) {
  if constexpr (kPositioned) {
    return {entry.first_q, entry.seqlen_q, entry.first_k,          entry.seqlen_k,   entry.batch_q,
            entry.batch_k, entry.tile,     params.tiles_of_head_q, entry.in_front_q, entry.in_front_k};
  } else if constexpr (kListed) {
    return {entry.first_q, entry.seqlen_q, entry.first_k, entry.seqlen_k,
            entry.batch_q, entry.batch_k,  entry.tile,    params.tiles_of_head_q};
  } else {
    return {};
  }
}

// A tile: key block n_block, and the steps that it takes: all query blocks that meet it, of one query head after the other, or a
// part of these.
struct Work : WorkOfBand<kBand>, WorkOfList<kListed, kPositioned> {
  int n_block, head_k, batch;
  int begin, end, mask_to;     // a head's query blocks, for all of the cluster, up to the last one; before mask_to with a mask
  int steps, head, m_block;    // how many, and the first of them
  int head_begin;              // the query block that a head begins with; the last one is followed by the first
  int part;                    // which part of dK and dV this is (kPartialDkv)
};

// Of a list, what a work's keys leave by, and whether there is more work after it. A step has no registers to keep it in: it waits in
// shared memory.
template <typename Work>
FA2_DEVICE int4 keys_of_work(const Work& work, bool more) {
  if constexpr (kListed) {
    return {work.first_k, work.batch_k, work.seqlen_k, more};
  } else {
    return {};
  }
}
template <typename Work>
FA2_DEVICE void recall_keys(Work& work, const int4& keys) {
  if constexpr (kListed) work.first_k = keys.x, work.batch_k = keys.y, work.seqlen_k = keys.z;
}

// The number of a head's first tile of queries that is the work's.
template <typename Work>
FA2_DEVICE int64_t first_tile_of(const Shape& shape, const Work& work, int head) {
  if constexpr (kListed) {
    return static_cast<int64_t>(head) * work.tiles_of_head + work.first_tile;
  } else {
    return static_cast<int64_t>(work.batch * shape.num_heads + head) * query_tiles(shape);
  }
}

// The last of the query heads that share a tile's keys.
FA2_DEVICE int last_head_of(const Shape& shape, const Work& work) {
  return (work.head_k + 1) * (shape.num_heads / shape.num_heads_k) - 1;
}
// By lists: how many steps a tile of keys has, of all of these heads.
template <typename Params>
FA2_DEVICE int picked_steps(const Params& params, int batch, int head_k, int n_block) {
  int steps = 0;
  const int heads = params.shape.num_heads / params.shape.num_heads_k;
  for (int head = head_k * heads; head < (head_k + 1) * heads; ++head) {
    const int4 row = picked_row_k(params, batch, head, n_block / kKeyParts);
    steps += (row.y + row.z) * kQueryParts;
  }
  return steps;
}

// A step: one block of queries of one query head.
template <bool kIsPicked>
struct StepOf {
  int left;      // steps from this one on
  int head, m_block;
  int64_t tile;  // this block among all blocks of queries
  template <typename Params>
  FA2_DEVICE StepOf(const Shape& shape, const Work& work, const Params&)
      : left(work.steps),
        head(work.head),
        m_block(work.m_block),
        tile(first_tile_of(shape, work, head) + m_block) {}
  template <typename Params>
  FA2_DEVICE void advance(const Work& work, const Params&) {
    --left, ++m_block, ++tile;
    if (m_block == work.end) m_block = work.begin, tile -= work.end - work.begin;
    if (m_block == work.head_begin) ++head, tile += head_blocks(work);  // without a band the end is the head's, too
  }
};
// By lists, of one query head after the other (bwd_steps.cuh); there work.head is the first of them that has any.
template <>
struct StepOf<true> {
  int left, head, m_block;
  int first, place, end, bits, turn;
  int64_t tile;
  template <typename Params>
  FA2_DEVICE StepOf(const Shape& shape, const Work& work, const Params& params) : left(work.steps), head(work.head) {
    find_first_step(*this, params, work.batch, work.n_block, last_head_of(shape, work));
    tile = first_tile_of(shape, work, head) + m_block;
  }
  template <typename Params>
  FA2_DEVICE void advance(const Work& work, const Params& params) {
    --left, ++place;
    find_step(*this, params, work.batch, work.n_block, last_head_of(params.shape, work));
    tile = first_tile_of(params.shape, work, head) + m_block;
  }
};
using Step = StepOf<kPicked>;

// Whether a step is the first of its tile that is of its head.
template <typename AnyStep>
FA2_DEVICE bool starts_head(const Work& work, const AnyStep& step) {
  if constexpr (kPicked) {
    return step.place == 0;
  } else {
    return step.left == work.steps || step.m_block == work.head_begin;
  }
}

FA2_DEVICE int cluster_rank() { return kCluster > 1 ? blockIdx.x % kCluster : 0; }

// lse_log2 or softmax_d of a step. One thread; the barrier expects kStatisticsBytes. A tensor copy, though the floats lie in a
// row: compute-sanitizer's racecheck misreads plain bulk copies.
constexpr uint32_t kStatisticsBytes = kBlockM * sizeof(float);
FA2_DEVICE void load_statistics(float (&statistics)[kBlockM], const TensorMap& map, uint64_t& barrier, const Step& step) {
  cp_async_bulk_tensor_4d_load(statistics, map, barrier, 0, static_cast<int>(step.tile), 0, 0);
}

// What says that copies have brought keys and blocks of queries (or of their gradients), and a float for each query.
template <int kBuffers>
struct Loads {
  alignas(128) float statistics[kBuffers][kBlockM];
  // full: the bytes have landed. empty: every reader is done with them.
  uint64_t keys_full, keys_empty, full[kBuffers], empty[kBuffers];
};
template <int kBuffers>
FA2_DEVICE void init_loads(Loads<kBuffers>& loads, int readers_of_keys) {
  mbarrier_init(loads.keys_full, 1);
  mbarrier_init(loads.keys_empty, readers_of_keys);
#pragma unroll
  for (int i = 0; i < kBuffers; ++i) {
    mbarrier_init(loads.full[i], 1);
    mbarrier_init(loads.empty[i], 5);  // each warp of compute_scores, one of sum_gradient
  }
}

// Without a mask all key blocks of a head begin with the same query block, and add to the same dQ at a time. Staggered, each
// pair of them begins with another one (causal ones do so by themselves). The two thread blocks of a pair read the same queries
// at the same time, and are faster by 3 to 5% than each on its own.
constexpr bool kStagger = kBlockM < kBlockN && !kCausal && !kBand && !kDeterministic && !kPartialDkv;

// The tiles of a thread block, or of a cluster of them, whose blocks have neighbouring key blocks: every so many-th of the
// launch order, in alternating direction. Sections of a causal problem alternate too, from long to short and from short to
// long, the last one from long to short: so all finish at about the same time. Deterministic: always in the order of the
// turns, see wait_for_turn.
struct Tiles {
  int round = 0;
  FA2_DEVICE int place() const {
    const int clusters = read_nctaid() / kCluster, cluster = read_ctaid() / kCluster;  // anew: no registers to keep them in
    return round * clusters + (kDeterministic || round % 2 == 0 ? cluster : clusters - 1 - cluster);
  }
  FA2_DEVICE bool more(const BwdTmaBandParams& params) {
    const Shape& shape = params.shape;
    const int parts = shape.num_heads_k * (kPartialDkv ? params.splits : 1);
    if constexpr (kPicked) skip_unmet(params);
    return place() < key_tiles_of_head<kCluster * kBlockN>(params) * parts * shape.batch;
  }
  // By lists: the tile of this place, and how many steps it has; those that have none nobody takes, and fill_unseen fills what would be
  // theirs.
  template <typename Params>
  FA2_DEVICE Work picked_tile(const Params& params) const {
    const Shape& shape = params.shape;
    const int blocks = key_tiles_of_head<kBlockN>(params), rows = shape.num_heads_k * shape.batch, linear = place();
    const Tile2 tile = tile_of(linear, blocks, shape.num_heads_k, shape);
    const bool backwards = !kDeterministic && sections_after(linear, blocks, rows, shape) % 2 == 1;
    Work work;
    const int block = backwards ? blocks - 1 - tile.block : tile.block;
    work.n_block = key_block_of(params, tile, block, tile.batch, tile.head);
    work.head_k = tile.head, work.batch = tile.batch, work.part = 0;
    work.head = tile.head * (shape.num_heads / shape.num_heads_k);
    work.steps = picked_steps(params, tile.batch, tile.head, work.n_block);
    return work;
  }
  template <typename Params>
  FA2_DEVICE void skip_unmet(const Params& params) {
    const int tiles = key_tiles_of_head<kBlockN>(params) * params.shape.num_heads_k * params.shape.batch;
    while (place() < tiles && picked_tile(params).steps == 0) ++round;
  }
  FA2_DEVICE bool next(const BwdTmaBandParams& params, Work& work) {
    if (!more(params)) return false;
    if constexpr (kPicked) {
      work = picked_tile(params);
      ++round;
      return true;
    }
    const Shape& shape = params.shape;
    const int splits = kPartialDkv ? params.splits : 1, parts = shape.num_heads_k * splits;
    const int n_blocks = key_tiles_of_head<kCluster * kBlockN>(params), rows = parts * shape.batch;
    const int linear = place();
    round = kDeterministic ? 1 : round + 1;  // deterministic: a tile is all
    const Tile2 tile = key_tile_of<kDeterministic>(linear, n_blocks, parts, shape);
    const int sections_left = sections_after(linear, n_blocks, rows, shape);
    const bool backwards = kDeterministic ? kBand : kCausal && !kListed && sections_left % 2 == 1;
    const int place = backwards ? n_blocks - 1 - tile.block : tile.block;
    const auto entry = key_tile_at(params, place, tile.batch);
    const int first_block = kCluster * (kListed ? entry.block : place);
    const int n_block = first_block + cluster_rank();
    const Sequence& sequence = sequence_of_tile(shape, entry, params);
    // Of all of the cluster: without a band its first key block has most.
    const QueryVisit visit = query_blocks<kBand ? kCluster : 1>(sequence, first_block);
    const int heads = shape.num_heads / shape.num_heads_k, head_k = tile.head / splits;
    const int head_steps = visit.end - visit.begin, steps = heads * head_steps;
    const int split = tile.head % splits;
    const int first = steps * split / splits, end = steps * (split + 1) / splits;
    const int key_blocks = kListed ? ceil_div(sequence.seqlen_k, kCluster * kBlockN) : n_blocks;
    const int stagger = kStagger ? n_block / 2 * 2 * ceil_div(visit.end, key_blocks) % visit.end : 0;
    work = {work_of_band(query_blocks(sequence, n_block), ceil_div(shape.seqlen_q, kBlockM)),
            work_of_list(entry, params),
            n_block,
            head_k,
            tile.batch,
            visit.begin,
            visit.end,
            kCluster > 1 ? query_blocks(sequence, n_block).mask_to : visit.mask_to,
            end - first,
            head_k * heads + first / head_steps,
            visit.begin + first % head_steps + stagger,
            visit.begin + stagger,
            (tile.batch * parts + tile.head) * kCluster * n_blocks + n_block};
    return true;
  }
};
using Schedule = Tiles;
enum { kMayBeIdle = kListed || kPicked };  // a thread block may find no tile
static_assert(!kUnseenRows || kMayBeIdle, "more() does not look ahead, and a thread block takes its first tile for granted");

// dQ of a block of queries is a sum over the key blocks that meet it. Whoever comes first writes, all others add. A counter
// for each warpgroup's part of the sum counts those who have come, up to kWritten, which the first one adds when it is done.
// Deterministic: key blocks add in ascending order, those of a band in descending order, in which they come to it; in that order
// their tiles are taken, so that whoever is waited for is running; the counter counts those who are done. Of each warpgroup that adds one thread waits here.
constexpr int kWritten = 1 << 30;

// Deterministic: how many key blocks (pairs of a cluster) add to the dQ of a step before this one.
FA2_DEVICE int turn_of(const BwdTmaBandParams& params, const Work& work, const Step& step) {
  const int block = work.n_block / kCluster;
  if constexpr (kPicked) {
    return turn_at(step);
  } else if constexpr (kBand) {
    const Sequence& sequence = sequence_of_tile(params.shape, work, params);
    const int last_query = min((step.m_block + 1) * kBlockM, sequence.seqlen_q) - 1;
    return (key_end(sequence, last_query) - 1) / (kCluster * kBlockN) - block;
  } else {
    return block;
  }
}
// Deterministic: waits for this key block's turn.
FA2_DEVICE void wait_for_turn(const int* counter, int turn) {
  while (ld_acquire(counter) < turn) continue;  // every key block before this one has added
}
// Deterministic: whether it is the first turn, and nobody has cleared the sum.
FA2_DEVICE bool writes_dq(int turn) { return kDeterministic && !kClearDq && turn == 0; }
// Not deterministic: whether this key block comes first. If not, the first one has written.
FA2_DEVICE bool comes_first(int* counter) {
  if (kClearDq) return false;
  int seen = atom_acquire_add(counter, 1);
  if (seen == 0) return true;
  while (seen < kWritten) seen = ld_acquire(counter);  // the first one has written
  return false;
}
// What was written or added is in global memory. Not deterministic: of the first one only.
FA2_DEVICE void end_turn(int* counter) { red_release_add(counter, kDeterministic ? 1 : kWritten); }

// 16 rows of `stride` floats, of this warp, = acc: four lanes write 32 bytes of a row, a whole sector.
template <int kNTiles>
FA2_DEVICE void store_partial(float* gmem, int stride, const Accumulator<1, kNTiles>& acc) {
  float* target = gmem + accumulator_row() * stride + accumulator_col();
#pragma unroll
  for (int j = 0; j < kNTiles; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<float2*>(target + 8 * h * stride + 8 * j) = float2{acc.x[0][j][2 * h], acc.x[0][j][2 * h + 1]};
}

// 16 rows of dK or dV, of this warp, = factor * acc, rounded. `gmem`: the first of them, of which `rows` exist. Four lanes
// exchange what they have of 4 x 8 columns, so that each writes 16 bytes.
template <int kNTiles>
FA2_DEVICE void store_gradient(Element* gmem, int64_t stride, int rows, int cols, const Accumulator<1, kNTiles>& acc,
                               float factor) {
  const int lane = lane_id(), col = lane % 4 * 8;
  gmem += accumulator_row() * stride + col;
#pragma unroll
  for (int j = 0; j < kNTiles; j += 4)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t x[4];  // of block j + i, later lane i's
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = cvt_pack<Element>(acc.x[0][j + i][2 * h] * factor, acc.x[0][j + i][2 * h + 1] * factor);
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & bit) continue;
          const uint32_t other = __shfl_xor_sync(0xffffffffu, lane & bit ? x[i] : x[i + bit], bit);
          (lane & bit ? x[i] : x[i + bit]) = other;
        }
      if (accumulator_row() + 8 * h < rows && 8 * j + col < cols)
        *reinterpret_cast<uint4*>(gmem + 8 * h * stride + 8 * j) = uint4{x[0], x[1], x[2], x[3]};
    }
}
