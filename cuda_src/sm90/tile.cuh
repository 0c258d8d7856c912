// Tiles in shared memory as bulk tensor copies write them and wgmma reads them, and products of such tiles.
//
// A tile is cut into panels of 64 columns: rows of 128 bytes whose 16-byte chunks are swizzled (chunk ^= row % 8). Copies,
// descriptors and stores all speak of panels; nobody but store_accumulator has to know the swizzle.
#pragma once

#include "common/config.cuh"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

template <int kRows_, int kCols_>
struct Panels {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPanels = ceil_div(kCols, 64), kPanelBytes = kRows * 128, kBytes = kPanels * kPanelBytes;
  alignas(1024) Element data[kPanels][kRows][64];
};

// Where a box begins: at a row of a head. kListed: of a sequence, whose rows are those in front of `start` in memory. There the
// dimension of rows is so shifted that it ends where the sequence does: what lies behind reads as zeros, and is not written. Its
// maps have the dimensions (columns, rows, heads, rows + 1, batch), the fourth with the stride of the second, and begin as many rows
// in front of the array as it has.
template <bool kIsListed>
struct MapPlaceOf {
  int row, head, batch;
};
template <>
struct MapPlaceOf<true> {
  int row, head, start, batch;
};
using MapPlace = MapPlaceOf<kListed>;

// Of query `query`, or key `key`, of a tile (or of whoever has its fields). One behind the sequence's end becomes its last: the copy
// engine clips a box that reaches beyond the end, but of one that lies beyond it wholly it was seen to touch memory in front of the
// array (an illegal access where there is none). Nobody looks at the rows that come instead, and `is_there` says what may be stored.
template <typename Tile, typename Params>
FA2_DEVICE MapPlace query_place(const Tile& tile, int query, int head, const Params& params) {
  if constexpr (kListed) {
    return {params.rows_q - tile.seqlen_q + min(query, tile.seqlen_q - 1), head, tile.first_q + tile.seqlen_q, tile.batch_q};
  } else {
    return {query, head, tile.batch};
  }
}
template <typename Tile, typename Params>
FA2_DEVICE MapPlace key_place(const Tile& tile, int key, int head, const Params& params) {
  if constexpr (kListed) {
    return {params.rows_k - tile.seqlen_k + min(key, tile.seqlen_k - 1), head, tile.first_k + tile.seqlen_k, tile.batch_k};
  } else {
    return {key, head, tile.batch};
  }
}

template <typename Tile>
FA2_DEVICE bool is_there(const Tile& tile, int query) {
  if constexpr (kListed) {
    return query < tile.seqlen_q;
  } else {
    return true;  // clipped
  }
}

template <typename Place>
FA2_DEVICE void load_box(void* smem, const TensorMap& map, uint64_t& barrier, int col, const Place& at) {
  if constexpr (kListed) {
    cp_async_bulk_tensor_5d_load(smem, map, barrier, col, at.row, at.head, at.start, at.batch);
  } else {
    cp_async_bulk_tensor_4d_load(smem, map, barrier, col, at.row, at.head, at.batch);
  }
}
template <typename Place>
FA2_DEVICE void store_box(const TensorMap& map, const void* smem, int col, const Place& at) {
  if constexpr (kListed) {
    cp_async_bulk_tensor_5d_store(map, smem, col, at.row, at.head, at.start, at.batch);
  } else {
    cp_async_bulk_tensor_4d_store(map, smem, col, at.row, at.head, at.batch);
  }
}

// Rows [tile_row, tile_row + kCount) of the tile = rows and columns from that place on, and from `col`; the map's box has kCount
// rows. One thread; the barrier expects the bytes.
template <int kCount, int kRows, int kCols>
FA2_DEVICE void load_rows(Panels<kRows, kCols>& tile, int tile_row, const TensorMap& map, uint64_t& barrier, const MapPlace& at,
                          int col = 0) {
#pragma unroll
  for (int p = 0; p < tile.kPanels; ++p) load_box(tile.data[p][tile_row], map, barrier, col + 64 * p, at);
}
template <int kRows, int kCols>
FA2_DEVICE void load_tile(Panels<kRows, kCols>& tile, const TensorMap& map, uint64_t& barrier, const MapPlace& at, int col = 0) {
  load_rows<kRows>(tile, 0, map, barrier, at, col);
}
template <int kRows, int kCols>
FA2_DEVICE void load_tile(Panels<kRows, kCols>& tile, const TensorMap& map, uint64_t& barrier, int row, int head, int batch,
                          int col = 0) {
  static_assert(!kListed || kRows == 0, "a tile of a list has a place of its own");
#pragma unroll
  for (int p = 0; p < tile.kPanels; ++p) {  // not load_rows: it makes a plain kernel of the wide backward another
    cp_async_bulk_tensor_4d_load(tile.data[p][0], map, barrier, col + 64 * p, row, head, batch);
  }
}

// The other way round, for the first kCols columns. One thread; the caller commits.
template <int kCount, int kCols, int kRows, int kTileCols>
FA2_DEVICE void store_rows(const TensorMap& map, const Panels<kRows, kTileCols>& tile, int tile_row, const MapPlace& at) {
#pragma unroll
  for (int p = 0; p < ceil_div(kCols, 64); ++p) store_box(map, tile.data[p][tile_row], 64 * p, at);
}

// An operand of a product whose sum runs along the rows of a tile (Q and K): `step` is the block of 16 columns.
template <int kRows, int kCols>
struct AlongRows {
  static constexpr bool kDown = false;
  uint64_t descriptor;
  FA2_DEVICE explicit AlongRows(const Panels<kRows, kCols>& tile, int row = 0, int col = 0)  // col: where a panel starts
      : descriptor(matrix_descriptor(smem_address(tile.data) + col / 64 * tile.kPanelBytes + row * 128, 0)) {}
  FA2_DEVICE uint64_t at(int step) const {
    return descriptor + (step / 4 * Panels<kRows, kCols>::kPanelBytes + step % 4 * 32) / 16;
  }
};

// An operand of a product whose sum runs down the rows of a tile (V): `step` is the block of 16 rows. `col`: of its first
// column, where a panel or half of one starts.
template <int kRows, int kCols>
struct DownRows {
  static constexpr bool kDown = true;
  uint64_t descriptor;
  FA2_DEVICE explicit DownRows(const Panels<kRows, kCols>& tile, int col = 0)
      : descriptor(
            matrix_descriptor(smem_address(tile.data) + col / 64 * tile.kPanelBytes + col % 64 * 2, tile.kPanelBytes)) {}
  FA2_DEVICE uint64_t at(int step) const { return descriptor + step * 16 * 128 / 16; }
};

// acc (+)= A B over kSteps blocks of 16, both in shared memory.
template <int kSteps, int kNTiles, typename A, typename B>
FA2_DEVICE void gemm_ss(Accumulator<1, kNTiles>& acc, const A& a, const B& b, bool accumulate = false) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) wgmma_ss<Element, A::kDown, B::kDown>(acc, a.at(k), b.at(k), k > 0 || accumulate);
}

// The A operand of a product in registers: the accumulators of another, rounded.
template <int kSteps>
struct Fragments {
  uint32_t r[kSteps][4];
};
template <int kNTiles>
FA2_DEVICE void to_fragments(Fragments<kNTiles / 2>& frag, const Accumulator<1, kNTiles>& acc) {
#pragma unroll
  for (int k = 0; k < kNTiles / 2; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&pair)[4] = acc.x[0][2 * k + i / 2];
      frag.r[k][i] = cvt_pack<Element>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
}

// acc (+)= A B, A in registers, the sum running down the rows of B.
template <int kSteps, int kNTiles, typename B>
FA2_DEVICE void gemm_rs(Accumulator<1, kNTiles>& acc, const Fragments<kSteps>& a, const B& b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) wgmma_rs<Element, true>(acc, a.r[k], b.at(k), k > 0 || accumulate);
}

// Columns [col, col + 16) of the tile, of this warp, = its 16 rows of an accumulator, rounded and transposed.
template <int kSteps, int kRows, int kCols>
FA2_DEVICE void store_transposed(Panels<kRows, kCols>& tile, int col, const Fragments<kSteps>& frag) {
  const int lane = lane_id(), row = lane % 8 + lane / 16 * 8, chunk = col % 64 / 8 + lane / 8 % 2;
  const uint32_t address = smem_address(tile.data) + col / 64 * tile.kPanelBytes + row * 128 + ((chunk ^ lane % 8) << 4);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) stmatrix_x4_trans(address + k * 16 * 128, frag.r[k]);
}

// Rows [row, row + 16) of the tile, of this warp, = its 16 rows of an accumulator, rounded.
template <int kSteps, int kRows, int kCols>
FA2_DEVICE void store_fragments(Panels<kRows, kCols>& tile, int row, const Fragments<kSteps>& frag) {
  const int lane = lane_id();
  const uint32_t address = smem_address(tile.data) + (row + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) stmatrix_x4((address ^ k % 4 << 5) + k / 4 * tile.kPanelBytes, frag.r[k]);
}
template <int kNTiles, int kRows, int kCols>
FA2_DEVICE void store_accumulator(Panels<kRows, kCols>& tile, int row, const Accumulator<1, kNTiles>& acc) {
  Fragments<kNTiles / 2> frag;
  to_fragments(frag, acc);
  store_fragments(tile, row, frag);
}
