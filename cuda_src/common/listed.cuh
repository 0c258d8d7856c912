// Tiles of a list that smxx/list_tiles.cu made: each is of a sequence with a place and lengths of its own.
#pragma once

#include "common/params.cuh"

// (local copy of the contract, dropped at the merge)
struct alignas(16) ListedTile {
  int first_q, seqlen_q, first_k, seqlen_k, batch_q, batch_k;
  int block;  // along its sequence
  int tile;   // of queries: its number among those of a head; of keys: that of its sequence's first tile of queries
};

// Without a list.
struct Unlisted {
  enum { block = 0, tile = 0 };
};

FA2_DEVICE ListedTile read_tile(const ListedTile* list, int place) {
  const int4* words = reinterpret_cast<const int4*>(list + place);
  const int4 low = words[0], high = words[1];
  return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

// Whether the queries have a tile `place`: the host knows only how many there are at most.
template <typename Params>
FA2_DEVICE bool has_query_tile(const Params& params, int place) {
  if constexpr (kListed) {
    return place < params.counts[0];
  } else {
    return true;
  }
}
template <typename Params>
FA2_DEVICE auto query_tile_at(const Params& params, int place) {
  if constexpr (kListed) {
    return read_tile(params.tiles_q, place);
  } else {
    return Unlisted{};
  }
}
// Tile `place` of the keys.
template <typename Params>
FA2_DEVICE auto key_tile_at(const Params& params, int place) {
  if constexpr (kListed) {
    return read_tile(params.tiles_k, place);
  } else {
    return Unlisted{};
  }
}
