// Sequences with places and lengths of their own, which the host does not know: packed, padded, or partly used. smxx/list_tiles.cu
// makes of them lists of tiles, and kernels with kListed take their tiles from there. All sequences are one: rows [first, first +
// seqlen) of a row of the batch, on the side of the queries and on that of the keys.
#pragma once

#include "common/config.cuh"

// A tile of a list. Two reads of 16 bytes (with kPositioned three), and nothing else has to be looked up.
struct alignas(16) ListedPlace {
  int first_q, seqlen_q, first_k, seqlen_k;  // of its sequence
  int batch_q, batch_k;  // row of the batch: the sequence's number, or that of its segments; packed arrays have a stride of 0 there
  int block;             // along the sequence
  int tile;              // of queries: its number among all query tiles of a head; of keys: that of the sequence's first query tile
};
// And how many rows of the sequence were left out in front of it, because they are not in use or see nothing: where it matters
// which row of its sequence one is, and not only how far from the others.
struct alignas(16) ListedPosition {
  int first_q, seqlen_q, first_k, seqlen_k, batch_q, batch_k, block, tile;
  int in_front_q, in_front_k;
};
template <bool kHasPosition>
struct ListedTileOf {
  using Type = ListedPlace;
};
template <>
struct ListedTileOf<true> {
  using Type = ListedPosition;
};
using ListedTile = ListedTileOf<kPositioned>::Type;

// What kernels with kListed are given: the block behind their own struct, and behind those of other features.
struct ListParams {
  const ListedTile* tiles_q;  // of the queries, and of the keys
  const ListedTile* tiles_k;
  const int* counts;  // how many there are of each
  int rows_q, rows_k;  // of an array, or of each row of its batch
  int tiles_of_head_q, tiles_of_head_k;  // how many there can be: a head's part of what is kept for each tile
};

// A run of equal ids: its first token, counted along all rows of the batch, and how many the run of that id has on the other side: 0
// if there is none, -1 if this one is no segment's.
struct IdRun {
  int start, met;
};

// What smxx/find_segments.cu has found of segments: of groups of rows of the batch, each by a thread block of its own.
struct SegmentParams {
  IdRun* runs_q;  // (batch * rows_q,), a group's from its first token on
  IdRun* runs_k;  // (batch * rows_k,)
  // (batch * min(rows_q, rows_k),), likewise: of runs that have met, in the order of the queries. `tile`: the first token.
  ListedPlace* segments;
  int* found;  // (groups, 3): segments, runs of queries, runs of keys
  // (batch * min(rows_q, rows_k),), or null: where list_tiles.cu puts those of at most short_keys keys, if tiles of all of them are more
  // than there is room for; counts[2] and counts[3] say how many.
  ListedTile* shorts;
  const Real* short_sums;  // (num_heads, batch * min(rows_q, rows_k), warps), for flash_bwd_sinks.cu; or null
  int batch_rows, groups, rows_of_group, short_keys;
};

// The arrays that a call was given, or null; int32 on the device. Whatever they hold, no row outside the arrays is meant by it.
struct LengthsParams {
  const int* cu_seqlens_q;  // (sequences + 1,): packed, and where sequences start
  const int* cu_seqlens_k;
  const int* seqused_q;  // (sequences,): rows in use, from the first
  const int* seqused_k;
  const int* leftpad_k;  // (sequences,): of these so many in front are not
  const int* segment_ids_q;  // (batch, rows): rows of the same id are a sequence, which find_segments.cu finds
  const int* segment_ids_k;
  int sequences;
};
