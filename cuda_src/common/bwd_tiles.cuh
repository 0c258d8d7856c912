// Tiles of the backward's kernels: of a shape, or of lists (kListed), whose length only the device knows.
#pragma once

#include "common/schedule.cuh"

// What a tile that no list says would have been told.
struct Unlisted {
  enum { block = 0, tile = 0 };
};

// Blocks of a head: of `kWide` keys, and of kBlockM queries. The latter is a head's part of what is kept for each tile of queries:
// of lists as many as there can be.
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

// Whether there is a tile `place` of a head's queries, of query_tiles_of_head.
template <typename Params>
FA2_DEVICE bool has_query_tile(const Params& params, int place) {
  if constexpr (kListed) {
    return place < params.counts[0];
  } else {
    return true;
  }
}

// What the lists say of tile `place` of a head.
template <typename Params>
FA2_DEVICE auto query_tile_at(const Params& params, int place) {
  if constexpr (kListed) {
    return read_listed(params.tiles_q + place);
  } else {
    return Unlisted{};
  }
}
template <typename Params>
FA2_DEVICE auto key_tile_at(const Params& params, int place) {
  if constexpr (kListed) {
    return read_listed(params.tiles_k + place);
  } else {
    return Unlisted{};
  }
}

// Which tile of the keys comes when, `block` of them being its place in a list. Those that add in turn are listed in the order of the
// sequences, and come in sections of heads, as the shape's do: neighbours would wait for each other.
template <bool kInTurn>
FA2_DEVICE Tile2 key_tile_of(int linear, int blocks, int heads, const Shape& shape) {
  if constexpr (kListed && !kInTurn) {
    const ListPlace place = place_in_list(linear, blocks, heads);
    return {place.entry, place.head, 0};
  } else {
    return tile_of(linear, blocks, heads, shape);
  }
}

// The sequence of a tile. `tile`: what a list says of it, or whoever has its first six fields.
template <typename Params, typename Tile>
FA2_DEVICE decltype(auto) sequence_of(const Shape& shape, int batch, const Params& params, const Tile& tile) {
  if constexpr (kListed) {
    return sequence_of_tile(tile, params);
  } else {
    return sequence_of(shape, batch, params);
  }
}

// Where its rows begin in head 0 of an array, in elements. `batch`: of a shape's tile.
template <typename AnySequence>
FA2_DEVICE int64_t first_query_offset(const AnySequence& sequence, int batch, const Strides& strides) {
  if constexpr (kListed) {
    return sequence.batch_q * strides.batch + sequence.first_q * strides.row;
  } else {
    return batch * strides.batch;
  }
}
template <typename AnySequence>
FA2_DEVICE int64_t first_key_offset(const AnySequence& sequence, int batch, const Strides& strides) {
  if constexpr (kListed) {
    return sequence.batch_k * strides.batch + sequence.first_k * strides.row;
  } else {
    return batch * strides.batch;
  }
}
