// Which blocks of the other sequence a tile meets, and which of them need a mask (mask.cuh). Causal masks are aligned
// bottom-right: query i sees key j if j <= i + seqlen_k - seqlen_q. The host drops leading queries that see no key, so a causal
// problem that arrives here has seqlen_q <= seqlen_k.
#pragma once

#include "common/params.cuh"

// The queries and the keys of one row of the batch: seqlen_q, seqlen_k. Whoever asks for lengths asks a Sequence. As all rows of
// the batch have the same, it is the Shape itself, by reference: a struct of two numbers takes other registers.
using Sequence = Shape;
FA2_DEVICE const Sequence& sequence_of(const Shape& shape, int /* batch */) { return shape; }

FA2_DEVICE int causal_offset(const Sequence& sequence) { return sequence.seqlen_k - sequence.seqlen_q; }

// Query `query` sees the keys [0, key_end).
FA2_DEVICE int key_end(const Sequence& sequence, int query) {
  return kCausal ? min(sequence.seqlen_k, query + causal_offset(sequence) + 1) : sequence.seqlen_k;
}

// Key `key` is seen by the queries [query_begin, seqlen_q); a key past the end by none.
FA2_DEVICE int query_begin(const Sequence& sequence, int key) {
  if (key >= sequence.seqlen_k) return 0x7fffffff;
  return kCausal ? key - causal_offset(sequence) : 0;
}

// Key blocks for a block of queries: [begin, end), of which those from mask_from on need a mask. All queries begin with block 0.
struct KeyVisit {
  int begin, end, mask_from;
};
FA2_DEVICE KeyVisit key_blocks(const Sequence& sequence, int m_block) {
  const int first_query = m_block * kBlockM;
  const int last_query = min(first_query + kBlockM, sequence.seqlen_q) - 1;
  const int end = ceil_div(key_end(sequence, last_query), kBlockN);
  const int unmasked = key_end(sequence, first_query) / kBlockN;
  return {0, end, min(end, kUnseenRows ? max(0, unmasked) : unmasked)};
}

// Query blocks for a block of keys: [begin, end), of which [mask_from, mask_to) need a mask: the first, or all of them if the
// block has keys past the end.
struct QueryVisit {
  int begin, end, mask_from, mask_to;
};
FA2_DEVICE QueryVisit query_blocks(const Sequence& sequence, int n_block) {
  const int first_key = n_block * kBlockN;
  const int last_key = first_key + kBlockN - 1;
  const int begin = max(0, query_begin(sequence, first_key)) / kBlockM;
  const int end = ceil_div(sequence.seqlen_q, kBlockM);
  if (last_key >= sequence.seqlen_k) return {begin, end, begin, end};
  return {begin, end, begin, min(end, ceil_div(max(0, query_begin(sequence, last_key)), kBlockM))};
}
