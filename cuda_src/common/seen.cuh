// Whether a query sees a key, by what the caller gave (FA2_SEEN_BY): a bool array, one of blocks with a band, or a function of the
// user's own.
#pragma once

#include "common/blocks.cuh"

// A bool array (batch, num_heads, seqlen_q, seqlen_k), or of blocks. Strides in elements, 0 where it is the same for all.
struct SeenArrayParams {
  const unsigned char* seen;
  int64_t batch_stride, head_stride, row_stride, key_stride;
};
// Blocks of so many queries and keys; and query i sees the keys from i + first to i + last alone.
struct SeenBlocksParams {
  const unsigned char* seen;
  int64_t batch_stride, head_stride, row_stride, key_stride;
  int block_q, block_k, first, last;
};

// Whether a query sees a key; offset: seqlen_k - seqlen_q.
FA2_DEVICE bool is_seen(const SeenArrayParams& by, int batch, int head, int query, int key, int /* offset */) {
  return by.seen[batch * by.batch_stride + head * by.head_stride + query * by.row_stride + key * by.key_stride] != 0;
}
FA2_DEVICE bool is_seen(const SeenBlocksParams& by, int batch, int head, int query, int key, int /* offset */) {
  if (key < query + by.first || key > query + by.last) return false;
  const int row = query / by.block_q, column = key / by.block_k;
  return by.seen[batch * by.batch_stride + head * by.head_stride + row * by.row_stride + column * by.key_stride] != 0;
}

#if FA2_SEEN_BY == 2
#include "user/mask_mod.cuh"
using SeenBy = fa2_user::Captures_mask_mod;
FA2_DEVICE bool is_seen(const SeenBy& by, int batch, int head, int query, int key, int offset) {
  return fa2_user::mask_mod(batch, head, query, key, query + offset, by);
}
#elif FA2_SEEN_BY == 1
using SeenBy = SeenBlocksParams;
#else
using SeenBy = SeenArrayParams;
#endif
struct SeenParams : ClassifyBlocksParams, SeenBy {};  // without captures as long as the first
