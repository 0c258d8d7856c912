// The keys and values of a share, as a stream of slices through the ring of a warp, by cp.async: each lane copies a few chunks of
// 16 bytes of a row, wherever that lies. A slice's rows that are none of the tile's keys become 0 and are not read.
#pragma once

#include "common/work_list.cuh"
#include "sm80/tile.cuh"

struct Slot {
  Tile<kBlockN, kHeadDim> k;
  Tile<kBlockN, kHeadDimV> v;
};

// Where a row of the cache is that has a key: (its row, or page; the row in there).
struct KeyPlace {
  int row, inside;
};

// Its state is the same in all lanes and lies in shared memory between two slices: registers are for the products.
class alignas(16) KeyStream {
 public:
  KeyStream() = default;
  // Every warp takes every kNumWarps-th slice of a tile.
  FA2_DEVICE KeyStream(const CacheParams& params, const Share& share, const Walk& walk) : walk_(walk) { enter(params, share); }

  // The next slice into a slot that the warp is done with, or nothing if there is none.
  FA2_DEVICE void load(const CacheParams& params, const Share& share, Slot& slot) {
    if (slice_ >= end_) {
      if (walk_.start >= share.size) return;
      walk_.next(params, share);
      enter(params, share);
      if (slice_ >= end_) return;
    }
    copy(params, slot);
    slice_ += kNumWarps;
  }

 private:
  // To the first slice that the warp has of this tile, or of one that follows.
  FA2_DEVICE void enter(const CacheParams& params, const Share& share) {
    slice_ = end_ = 0;
    while (walk_.start < share.size) {
      const SeenKeys seen = seen_keys(params, walk_.sequence, walk_.block());
      const Slices part = walk_.part_of(slices_of(seen), share);
      if (part.begin + warp_id() < part.end) {
        slice_ = part.begin + warp_id(), end_ = part.end;
        first_key_ = seen.begin, end_key_ = seen.end;
        return;
      }
      walk_.next(params, share);
    }
  }

  // The place of a key that there is.
  FA2_DEVICE KeyPlace place_of(const CacheParams& params, int key) const {
    if constexpr (!kScattered) {
      return {walk_.sequence.row, key};
    } else {
      const int page = params.page.quotient(key);
      const int row = table_row(params, walk_.sequence.row)[page];
      return {static_cast<uint32_t>(row) < static_cast<uint32_t>(params.rows) ? row : 0, key - page * params.page.value};
    }
  }

  FA2_DEVICE void copy(const CacheParams& params, Slot& slot) {
    const int first = slice_ * kBlockN;
    // Lane i looks up key i of the slice; of a page of whole slices one is all.
    KeyPlace own{0, 0};
    if (kScattered == 1) {
      const int key = first + lane_id() % kBlockN;
      if (first_key_ <= key && key < end_key_) own = place_of(params, key);
    } else {
      own = place_of(params, max(first, first_key_));
      own.inside -= max(first, first_key_) - first;
    }
    const int head = walk_.head();
    copy_rows(slot.k, params.k + head * params.k_strides.head, params.k_strides, params.head_dim, first, own);
    copy_rows(slot.v, params.v + head * params.v_strides.head, params.v_strides, params.head_dim_v, first, own);
  }

  template <int kCols>
  FA2_DEVICE void copy_rows(Tile<kBlockN, kCols>& tile, const Element* gmem, const Strides& strides, int cols, int first,
                            const KeyPlace& own) const {
    constexpr int kLanesPerRow = kCols % 64 == 0 ? 8 : kCols % 32 == 0 ? 4 : 2;
    constexpr int kRowsPerPass = 32 / kLanesPerRow;
    const int lane_row = lane_id() / kLanesPerRow, lane_col = lane_id() % kLanesPerRow * 8;
    const uint32_t target = smem_address(tile.data) + lane_row * tile.kRowBytes + lane_col * 2;
#pragma unroll
    for (int pass = 0; pass < kBlockN; pass += kRowsPerPass) {
      const int row = pass + lane_row;
      const int page = kScattered == 1 ? __shfl_sync(0xffffffffu, own.row, row) : own.row;
      const int inside = kScattered == 1 ? __shfl_sync(0xffffffffu, own.inside, row) : own.inside + row;
      const bool there = first_key_ <= first + row && first + row < end_key_;
      const Element* source = gmem + (there ? page * strides.batch + inside * strides.row : 0) + lane_col;
#pragma unroll
      for (int col = 0; col < kCols; col += 8 * kLanesPerRow) {
        const bool exists = there && lane_col + col < cols;
        if constexpr (kAligned) {
          cp_async_16(target + pass * tile.kRowBytes + col * 2, source + col, exists ? 16 : 0);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i)
            tile.data[row * tile.kRowElements + lane_col + col + i] =
                there && lane_col + col + i < cols ? source[col + i] : Element{0};
        }
      }
    }
  }

  Walk walk_;
  int slice_, end_;           // of this warp's in the tile
  int first_key_, end_key_;   // of the tile
};
