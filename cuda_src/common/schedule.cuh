// Which tile comes when: the order in which thread blocks take the tiles of all heads.
#pragma once

#include "common/ptx.cuh"
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

// How many sections come after that of tile `linear`.
FA2_DEVICE int sections_after(int linear, int blocks, int rows, const Shape& shape) {
  return (rows - 1) / shape.heads_per_section - linear / (shape.heads_per_section * blocks);
}

// Launch order of a list of `count` tiles, each of which is there for all heads. So many neighbours, mostly of one sequence, go
// together: head by head, so that a head's keys are read once for all of them. The list runs slowest, longest tiles first. Of long
// sequences heads are taken in sections here, too, every other one from the list's end on, the last one from its start.
struct ListPlace {
  int entry, head;
};
FA2_DEVICE ListPlace place_in_list(int linear, int count, int heads, const Shape& shape) {
  const int section = linear / (shape.heads_per_section * count), first_head = section * shape.heads_per_section;
  const int section_heads = min(shape.heads_per_section, heads - first_head), place = linear - first_head * count;
  const int first = place / (kListedRun * section_heads) * kListedRun;
  const int neighbours = min(kListedRun, count - first), index = place - first * section_heads;
  const int entry = first + index % neighbours;
  const bool backwards = ((heads - 1) / shape.heads_per_section - section) % 2 == 1;
  return {backwards ? count - 1 - entry : entry, first_head + index / neighbours};
}

// An entry of a list of its words, those of its position included.
template <typename Tile>
FA2_DEVICE Tile positioned(const int4& low, const int4& high, const int4& position) {
  return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w, position.x, position.y};
}

// An entry of a list, in two reads, or three.
template <typename Tile>
FA2_DEVICE Tile read_listed(const Tile* tile) {
  const int4* words = reinterpret_cast<const int4*>(tile);
  const int4 low = words[0], high = words[1];
  if constexpr (kPositioned) {
    return positioned<Tile>(low, high, words[2]);
  } else {
    return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  }
}

// A query block of a head.
template <bool kIsListed, bool kHasPosition>
struct QueryTileOf {
  int m_block, head, batch;
};
template <>
struct QueryTileOf<true, false> {
  int m_block, head;
  int first_q, seqlen_q, first_k, seqlen_k, batch_q, batch_k;
};
template <>
struct QueryTileOf<true, true> {
  int m_block, head;
  int first_q, seqlen_q, first_k, seqlen_k, batch_q, batch_k, in_front_q, in_front_k;
};
using QueryTile = QueryTileOf<kListed, kPositioned>;

// Tile `linear` of the list of queries; of head -1 if there is none. If all heads are one section, the entry is read beside the count,
// not after it: as if there were a whole run of neighbours, which only the last one may not be. (There is room for that one, whatever
// it holds.)
template <typename Params, typename Tile = QueryTile>
FA2_DEVICE Tile listed_query_tile(const Params& params, int linear, int heads) {
  const int first = linear / (kListedRun * heads) * kListedRun, index = linear - first * heads;
  if (first >= params.tiles_of_head_q) return {0, -1};
  const int count = params.counts[0];
  auto tile = read_listed(params.tiles_q + first + index % kListedRun);
  int head = index / kListedRun;
  if (first + kListedRun > count || params.shape.heads_per_section < heads) {
    if (linear >= count * heads) return {0, -1};
    const ListPlace place = place_in_list(linear, count, heads, params.shape);
    tile = read_listed(params.tiles_q + place.entry);
    head = place.head;
  }
  if constexpr (kPositioned) {
    return {tile.block,    head,         tile.first_q, tile.seqlen_q,   tile.first_k,
            tile.seqlen_k, tile.batch_q, tile.batch_k, tile.in_front_q, tile.in_front_k};
  } else {
    return {tile.block, head, tile.first_q, tile.seqlen_q, tile.first_k, tile.seqlen_k, tile.batch_q, tile.batch_k};
  }
}

// How many tiles a list has, of all heads.
template <typename Params>
FA2_DEVICE int listed_query_tiles(const Params& params) {
  if constexpr (kListed) {
    griddepcontrol_wait();  // the list is there
    return params.counts[0] * params.shape.num_heads;
  } else {
    return 0;
  }
}

// The tile of a thread block that takes one, tile `linear` of the launch order; of head -1 if there is none. The longest come first.
template <typename Params>
FA2_DEVICE QueryTile query_tile(const Shape& shape, int linear, const Params& params) {
  if constexpr (kListed) {
    griddepcontrol_wait();  // the list is there
    return listed_query_tile(params, linear, shape.num_heads);
  } else {
    const int m_blocks = query_tiles(shape);
    const Tile2 tile = tile_of(linear, m_blocks, shape.num_heads, shape);
    if constexpr (kPicked) {
      return {longest_tile(params, tile.batch, tile.head, tile.block), tile.head, tile.batch};
    } else {
      return {kCausal ? m_blocks - 1 - tile.block : tile.block, tile.head, tile.batch};
    }
  }
}

// The tiles of Tiles::next, less those that meet no block (kUnseenRows): nobody takes them, in no role, and fill_unseen fills what
// would be theirs.
template <typename Tiles>
struct Visited : Tiles {
  template <typename Problem, typename Work, typename... Params>
  FA2_DEVICE bool next(const Problem& problem, Work& work, const Params&... params) {
    if constexpr (!kUnseenRows || kListed) {  // in a list there are no others
      return Tiles::next(problem, work, params...);
    } else {
      while (Tiles::next(problem, work, params...)) {
        if (work.visit.begin < work.visit.end) return true;
      }
      return false;
    }
  }
};
