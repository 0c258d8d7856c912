// Which keys queries see, by blocks of 128 x 128: lists of blocks for each query block and for each key block, and bits of blocks of
// which a part is seen. smxx/classify_blocks.cu looks at the elements, smxx/list_blocks.cu makes lists of what it finds;
// fa2cupy/block_mask/lists.py says what is in them. G masks, M query blocks, N key blocks.
#pragma once

#include "common/config.cuh"

enum { kBlock = 128 };  // queries and keys of a block
enum { kEmpty = 0, kPartial = 1, kFull = 2 };  // kinds of blocks

// Of all kernels that make lists.
struct BlockGrid {
  int masks, query_blocks, key_blocks;
};

struct ClassifyBlocksParams {
  unsigned char* kinds;  // (G, M, N)
  const int2* numbers;   // (G, M, N): x is that of a partial block's bits
  uint4* bits;           // (partial blocks, 2, 128): four words for each row
  BlockGrid grid;
  int num_heads;  // of the mask: of G masks each batch has so many
  int seqlen_q, seqlen_k;
  int step;  // 0: kinds, 1: bits
};

struct ListBlocksParams {
  const unsigned char* kinds;  // (G, M, N)
  int4* rows_q;                // (G, M): first entry, partial ones, full ones, the row at this place of the order
  int2* entries_q;             // (entries,): key block, number of its bits or -1
  int4* rows_k;                // (G, N): likewise of key blocks
  int2* entries_k;
  int* ranks;                  // (entries,): of entries_k, how many key blocks the query block meets before this one
  int2* numbers;               // (G, M, N), a workspace: number of the bits, -1 if full, -2 if empty; rank
  int* first_partial;          // (G, M), a workspace: partial blocks before this row
  int* counts;                 // (2,): entries, partial blocks
  BlockGrid grid;
  int max_entries, max_partial;  // what there is room for; at least one partial block
  int step;  // 0: count the entries of rows, 1: where rows begin, and their order, 2: entries of query blocks, 3: of key blocks
};
