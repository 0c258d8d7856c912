// Blocks that meet each other by lists (kPicked), not by where they stand: for each block of 128 queries the blocks of keys that it
// meets, and for each block of 128 keys the blocks of queries. Those of which all elements are seen are full; of the others bits say
// which are. A kernel's block is an equal part of such a block.
#pragma once

#include "common/params.cuh"

enum { kPickedBlock = 128 };
#ifdef FA2_BLOCK_M
enum { kQueryParts = kWholeQueries ? kPickedBlock / kBlockM : 1, kKeyParts = kPicked ? kPickedBlock / kBlockN : 1 };
static_assert(!kWholeQueries || kQueryParts * kBlockM == kPickedBlock, "a kernel's block is an equal part of one of 128");
static_assert(!kPicked || kKeyParts * kBlockN == kPickedBlock, "a kernel's block is an equal part of one of 128");

// Tiles of the queries of a head. Of those of whole blocks of 128 the last ones may lie behind the last query.
FA2_DEVICE int query_tiles(const Shape& shape) {
  if constexpr (kWholeQueries) {
    return ceil_div(shape.seqlen_q, kPickedBlock) * kQueryParts;
  } else {
    return ceil_div(shape.seqlen_q, kBlockM);
  }
}
#endif

// Which mask a query head goes by.
template <typename Params>
FA2_DEVICE int64_t mask_of(const Params& params, int batch, int head) {
  return static_cast<int64_t>(batch) * params.batch_masks + static_cast<int64_t>(head) * params.head_masks;
}
template <typename Params>
FA2_DEVICE int4 picked_row_q(const Params& params, int batch, int head, int block) {
  return params.mask_rows_q[mask_of(params, batch, head) * params.query_blocks + block];
}
template <typename Params>
FA2_DEVICE int4 picked_row_k(const Params& params, int batch, int head, int block) {
  return params.mask_rows_k[mask_of(params, batch, head) * params.key_blocks + block];
}

// Whether row `row` of the queries of a head, or of the keys of a key head (kOfKeys), meets a block at all.
template <typename Params>
FA2_DEVICE bool meets_any(const Params& params, int batch, int head, int row) {
  if constexpr (kOfKeys) {
    for (int i = 0; i < params.heads_of_key && params.query_blocks > 0; ++i) {
      const int4 entries = picked_row_k(params, batch, head * params.heads_of_key + i, row / kPickedBlock);
      if (entries.y + entries.z > 0) return true;
    }
    return false;
  } else {
    if (params.key_blocks == 0) return false;
    const int4 entries = picked_row_q(params, batch, head, row / kPickedBlock);
    return entries.y + entries.z > 0;
  }
}
template <typename Params>
FA2_DEVICE bool is_unmet(const Params& params, int batch, int head, int row) {
  if constexpr (kPicked) {
    return !meets_any(params, batch, head, row);
  } else {
    return true;
  }
}

// What a tile meets in a step: the block, and of it the number of its bits, below 0 if all is seen.
struct MetBlock {
  int block, bits;
};
