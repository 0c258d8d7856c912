// Tiles of the backward's kernels: of a shape, or of lists (kListed), whose length only the device knows.
#pragma once

#include "common/schedule.cuh"

// A tile that is in no list: what it would say of it.
struct Unlisted {
  int batch;
  enum { block = 0, tile = 0 };
};

// Blocks of a head: of `kWide` keys, and of kBlockM queries. The latter is a head's part of what is kept for each tile of queries:
// of lists as many as there can be.
template <int kWide, typename Params>
FA2_DEVICE int key_tiles_of_head(const Params& params) {
  if constexpr (kListed) {
    return params.counts[1];
  } else if constexpr (kPicked) {
    return params.key_blocks * (kPickedBlock / kWide);
  } else {
    return ceil_div(params.shape.seqlen_k, kWide);
  }
}
template <typename Params>
FA2_DEVICE int query_tiles_of_head(const Params& params) {
  if constexpr (kListed) {
    return params.tiles_of_head_q;
  } else {
    return query_tiles(params.shape);
  }
}

// Whether there is a tile `place` of a head's queries, of query_tiles_of_head.
template <typename Params>
FA2_DEVICE bool has_query_tile(const Params& params, int place) {
  if constexpr (kListed) {
    return place < params.counts[0];
  } else {
    return true;
  }
}

// Of a list of whole sequences (kShort): how many there are; where one's first row is among the statistics of all rows; and which of the
// sums of a sequence each are its own.
template <typename Params>
FA2_DEVICE int listed_sequences(const Params& params) {
  if constexpr (kListed) {
    return params.counts[0];
  } else {
    return 0;
  }
}
template <typename Params, typename Entry>
FA2_DEVICE int64_t statistics_of(const Params& params, int head, const Entry& entry) {
  return static_cast<int64_t>(head) * query_tiles_of_head(params) + entry.tile;
}
template <typename Params>
FA2_DEVICE int64_t sums_of(const Params& params, int head, int place) {
  if constexpr (kListed) {
    return static_cast<int64_t>(head) * params.tiles_of_head_k + place;
  } else {
    return 0;
  }
}

// What the lists say of tile `place` of a head; `batch`: of a shape's.
template <typename Params>
FA2_DEVICE auto query_tile_at(const Params& params, int place, int batch) {
  if constexpr (kListed) {
    return read_listed(params.tiles_q + place);
  } else {
    return Unlisted{batch};
  }
}
template <typename Params>
FA2_DEVICE auto key_tile_at(const Params& params, int place, int batch) {
  if constexpr (kListed) {
    return read_listed(params.tiles_k + place);
  } else {
    return Unlisted{batch};
  }
}

// Which tile of the keys comes when; `block` is its place in a list. Where they add in turn, the list has the order of the sequences,
// and comes in sections of heads as a shape's tiles do: neighbours would wait for each other.
template <bool kInTurn>
FA2_DEVICE Tile2 key_tile_of(int linear, int blocks, int heads, const Shape& shape) {
  if constexpr (kListed && !kInTurn) {
    const ListPlace place = place_in_list(linear, blocks, heads, shape);
    return {place.entry, place.head, 0};
  } else {
    return tile_of(linear, blocks, heads, shape);
  }
}
