// Who works on what, where keys lie in a cache: the slices of all tiles, one behind the other, in equal shares for the thread blocks.
//
// A tile is a block of packed rows of a key head of a sequence; a slice is kBlockN keys of it, from a multiple of kBlockN on. The tiles
// of a sequence have numbers, head by head. Each counts as its slices and kTileCost more, which are nobody's work but take the place of
// what a tile costs beside them; so one without a key is somebody's, too. A share may begin and end within a tile: it is then shared by
// neighbouring thread blocks, and every thread block has at most two of those, its first and its last.
//
// Nobody hands out anything: every warp reads the lengths and finds the same shares.
//
// With kFixedParts a tile counts as its parts, of part_slices slices each and cut at multiples of that many, and shares are whole parts:
// what is computed together does not depend on the other sequences, nor on how many thread blocks there are.
#pragma once

#include "common/cache.cuh"

constexpr int kTileCost = ceil_div(64, kBlockN);

// Slices [begin, end) of a tile.
struct Slices {
  int begin, end;
  FA2_DEVICE int count() const { return end - begin; }
};
FA2_DEVICE Slices slices_of(const SeenKeys& seen) {
  const int begin = seen.begin / kBlockN;
  return {begin, seen.begin < seen.end ? ceil_div(seen.end, kBlockN) : begin};
}

// Parts of so many slices, with kFixedParts; one if there are none.
FA2_DEVICE int parts_of(const CacheParams& params, const Slices& slices) {
  if (slices.count() == 0) return 1;
  return ceil_div(slices.end, params.part_slices) - slices.begin / params.part_slices;
}

// What a tile of a sequence with `blocks` blocks of rows counts as: its slices, of several blocks the most that one can have.
FA2_DEVICE int tile_cost(const CacheParams& params, const CachedSequence& sequence, int blocks) {
  Slices slices;
  if (blocks == 1) {
    slices = slices_of(seen_keys(params, sequence, 0));
  } else {
    const int begin = cached_key_begin(params, sequence, 0), end = cached_key_end(params, sequence, sequence.seqlen_q - 1);
    slices = slices_of({begin, end, begin, end});
    if constexpr (!kFixedParts) {
      const int64_t queries = params.group.quotient(kBlockM - 1) + 2;
      const int64_t most = (queries + params.left + params.right) / kBlockN + 2;
      slices.end = slices.begin + static_cast<int>(min(most, static_cast<int64_t>(slices.count())));
    }
  }
  if constexpr (kFixedParts) {
    return parts_of(params, slices);
  } else {
    return kTileCost + slices.count();
  }
}

FA2_DEVICE int64_t sequence_cost(const CacheParams& params, int b) {
  if (b >= params.batch) return 0;
  const CachedSequence sequence = cached_sequence(params, b);
  const int blocks = row_blocks(params, sequence);
  if (blocks == 0) return 0;
  return static_cast<int64_t>(params.num_heads_k) * blocks * tile_cost(params, sequence, blocks);
}

FA2_DEVICE int64_t shuffle64(int64_t x, int lane) {
  const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(x), lane);
  const uint32_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(x >> 32), lane);
  return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
}

// Thread block i of `blocks` has [i total / blocks, (i + 1) total / blocks) of all; those that there are more than `total` have nothing.
struct Share {
  int64_t total, from;
  int size, blocks;
};
FA2_DEVICE Share share_of(const CacheParams& params, int block, int blocks) {
  int64_t total = 0;
  for (int b = lane_id(); b < params.batch; b += 32) total += sequence_cost(params, b);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) total += shuffle64(total, lane_id() ^ d);
  blocks = static_cast<int>(min(total, static_cast<int64_t>(blocks)));
  if (block >= blocks) return {total, total, 0, blocks};
  const int64_t from = total * block / blocks;
  return {total, from, static_cast<int>(total * (block + 1) / blocks - from), blocks};
}
// The thread block that has this place.
FA2_DEVICE int owner_of(const Share& share, int64_t place) {
  return static_cast<int>(((place + 1) * share.blocks - 1) / share.total);
}

// The tiles of a share, in order; with kFixedParts part by part. `start` is where the tile begins, from the start of the share on: below
// 0 if others have something of it that comes before.
struct Walk {
  CachedSequence sequence;
  int b, tile, blocks, cost, start, part;

  Walk() = default;

  FA2_DEVICE void read(const CacheParams& params) {
    sequence = cached_sequence(params, b);
    blocks = row_blocks(params, sequence);
    cost = blocks == 0 ? 0 : tile_cost(params, sequence, blocks);
  }

  FA2_DEVICE Walk(const CacheParams& params, const Share& share) {
    int64_t before = 0;
    b = 0;
    for (int first = 0; first < params.batch; first += 32) {
      const int64_t own = sequence_cost(params, first + lane_id());
      int64_t up_to = own;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int64_t below = shuffle64(up_to, lane_id() - d);
        if (lane_id() >= d) up_to += below;
      }
      const int64_t here = shuffle64(up_to, 31);
      if (share.from < before + here) {
        const int passed = __popc(__ballot_sync(0xffffffffu, before + up_to <= share.from));
        b = first + passed;
        before += shuffle64(up_to - own, passed);
        break;
      }
      before += here;
    }
    read(params);
    const int64_t inside = share.from - before;
    tile = static_cast<int>(inside / cost);
    start = static_cast<int>(static_cast<int64_t>(tile) * cost - inside);
    part = kFixedParts ? -start : 0;
  }

  // The next tile, or part, if the share has more.
  FA2_DEVICE void next(const CacheParams& params, const Share& share) {
    if constexpr (kFixedParts) {
      if (++part < cost && start + part < share.size) return;
      part = 0;
    }
    start += cost;
    if (start >= share.size || ++tile < params.num_heads_k * blocks) return;
    tile = 0;
    do {
      ++b;
      read(params);
    } while (blocks == 0);
  }

  FA2_DEVICE int head() const { return blocks == 1 ? tile : tile / blocks; }
  FA2_DEVICE int block() const { return blocks == 1 ? 0 : tile % blocks; }

  // Those of the tile's slices that are in the share; or the part's.
  FA2_DEVICE Slices part_of(const CacheParams& params, const Slices& slices, const Share& share) const {
    if constexpr (kFixedParts) {
      const int first = (slices.begin / params.part_slices + part) * params.part_slices;
      const int begin = max(slices.begin, first);
      return {begin, max(begin, min(slices.end, first + params.part_slices))};
    } else {
      const int begin = max(0, -start), end = min(share.size - start, slices.count());
      return {slices.begin + begin, slices.begin + max(begin, end)};
    }
  }
  // Whether a tile without a key is this thread block's.
  FA2_DEVICE bool is_first() const { return kFixedParts ? part == 0 : start >= 0; }
};
