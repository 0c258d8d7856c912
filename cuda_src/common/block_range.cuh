// Which tile a thread block works on, which blocks of the other sequence it meets, and which of them need a mask.
// Causal masks are aligned bottom-right: query i sees key j if j <= i + seqlen_k - seqlen_q. The host drops leading
// queries that see no key, so a causal problem that arrives here has seqlen_q <= seqlen_k.
#pragma once

#include "common/params.cuh"

struct Tile2 {
  int block;  // along the sequence
  int head, batch;
};

// Launch order: heads are taken in sections whose keys and values fit the L2 cache together. Within a section the
// block index runs slowest, so that every head's longest blocks start before anybody's short ones.
FA2_DEVICE Tile2 tile_of(int linear, int blocks, int heads, const Shape& shape) {
  const int rows = heads * shape.batch;
  const int section = linear / (shape.heads_per_section * blocks);
  const int first = section * shape.heads_per_section;
  const int section_heads = min(shape.heads_per_section, rows - first);
  const int index = linear - first * blocks;
  const int row = first + index % section_heads;
  return {index / section_heads, row % heads, row / heads};
}

FA2_DEVICE int causal_offset(const Shape& shape) { return shape.seqlen_k - shape.seqlen_q; }

// Query `query` sees the keys [0, key_end).
FA2_DEVICE int key_end(const Shape& shape, int query) {
  return kCausal ? min(shape.seqlen_k, query + causal_offset(shape) + 1) : shape.seqlen_k;
}

// Key `key` is seen by the queries [query_begin, seqlen_q); a key past the end by none.
FA2_DEVICE int query_begin(const Shape& shape, int key) {
  if (key >= shape.seqlen_k) return 0x7fffffff;
  return kCausal ? key - causal_offset(shape) : 0;
}

struct BlockRange {
  int begin, end;         // blocks to visit
  int mask_from, mask_to;  // those of them that need the mask: [mask_from, mask_to)
};

// Key blocks for a block of queries. The masked ones are the last.
FA2_DEVICE BlockRange key_blocks(const Shape& shape, int m_block) {
  const int first_query = m_block * kBlockM;
  const int last_query = min(first_query + kBlockM, shape.seqlen_q) - 1;
  const int end = ceil_div(key_end(shape, last_query), kBlockN);
  return {0, end, min(end, key_end(shape, first_query) / kBlockN), end};
}

// Query blocks for a block of keys. The masked ones are the first, or all of them if the block has keys past the end.
FA2_DEVICE BlockRange query_blocks(const Shape& shape, int n_block) {
  const int first_key = n_block * kBlockN;
  const int last_key = first_key + kBlockN - 1;
  const int begin = max(0, query_begin(shape, first_key)) / kBlockM;
  const int end = ceil_div(shape.seqlen_q, kBlockM);
  if (last_key >= shape.seqlen_k) return {begin, end, begin, end};
  return {begin, end, begin, min(end, ceil_div(max(0, query_begin(shape, last_key)), kBlockM))};
}
