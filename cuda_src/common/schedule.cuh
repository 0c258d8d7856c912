// Which tile comes when: the order in which thread blocks take the tiles of all heads.
#pragma once

#include "common/visit.cuh"

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

// Blocks of a head: of keys, and of queries, whose tiles in workspaces are so many from head to head. Of a list, of all sequences.
template <int kWide, typename Params>
FA2_DEVICE int key_tiles_of_head(const Params& params) {
  if constexpr (kListed) {
    return params.counts[1];
  } else {
    return ceil_div(params.shape.seqlen_k, kWide);
  }
}
template <typename Params>
FA2_DEVICE int query_tiles_of_head(const Params& params) {
  if constexpr (kListed) {
    return params.tiles_of_head_q;
  } else {
    return ceil_div(params.shape.seqlen_q, kBlockM);
  }
}

// How many sections come after that of tile `linear`.
FA2_DEVICE int sections_after(int linear, int blocks, int rows, const Shape& shape) {
  return (rows - 1) / shape.heads_per_section - linear / (shape.heads_per_section * blocks);
}

// The tiles of Tiles::next, less those that meet no block (kUnseenRows): nobody takes them, in no role, and fill_unseen fills what
// would be theirs.
template <typename Tiles>
struct Visited : Tiles {
  template <typename Problem, typename Work, typename... Params>
  FA2_DEVICE bool next(const Problem& problem, Work& work, const Params&... params) {
    if constexpr (!kUnseenRows || kListed) {
      return Tiles::next(problem, work, params...);
    } else {
      while (Tiles::next(problem, work, params...)) {
        if (work.visit.begin < work.visit.end) return true;
      }
      return false;
    }
  }
};
