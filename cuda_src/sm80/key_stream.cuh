// The keys and values of a share, as a stream of slices through the ring of a warp, by cp.async: each lane copies a few chunks of
// 16 bytes of a row, wherever that lies. A slice's rows that are none of the tile's keys become 0 and are not read.
#pragma once

#include "common/append.cuh"
#include "common/work_list.cuh"
#include "sm80/tile.cuh"

struct Slot {
  Tile<kBlockN, kHeadDim> k;
  Tile<kBlockN, kHeadDimV> v;
};


// Its state is the same in all lanes and lies in shared memory between two slices: registers are for the products.
class alignas(16) KeyStream {
 public:
  KeyStream() = default;
  // Every warp takes every kNumWarps-th slice of a tile.
  FA2_DEVICE KeyStream(const CacheParams& params, const Share& share, const Walk& walk) : walk_(walk) { enter(params, share); }

  // The next slice into a slot that the warp is done with, or nothing if there is none.
  template <typename Params>
  FA2_DEVICE void load(const Params& params, const Share& share, Slot& slot) {
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
      const Slices part = walk_.part_of(params, slices_of(seen), share);
      if (part.begin + warp_id() < part.end) {
        slice_ = part.begin + warp_id(), end_ = part.end;
        first_key_ = seen.begin, end_key_ = seen.end;
        return;
      }
      walk_.next(params, share);
    }
  }

  template <typename Params>
  FA2_DEVICE void copy(const Params& params, Slot& slot) {
    const int first = slice_ * kBlockN;
    // Where the keys of the cache end that the slice may have; behind are new ones.
    const int cached = kNewKeys ? min(end_key_, walk_.sequence.before) : end_key_;
    // Lane i looks up key i of the slice; where whole slices are together, one is all.
    KeyPlace own{0, 0};
    const int key = kScattered == 1 ? first + lane_id() % kBlockN : max(first, first_key_);
    if (first_key_ <= key && key < cached) {
      own = place_of(params, walk_.sequence, key);
      own.row = max(own.row, 0);
      if (kScattered != 1) own.inside -= key - first;
    }
    const int head = walk_.head();
    copy_rows(slot.k, params.k + head * params.k_strides.head, params.k_strides, params.head_dim, first, cached, own);
    copy_rows(slot.v, params.v + head * params.v_strides.head, params.v_strides, params.head_dim_v, first, cached, own);
    if constexpr (kNewKeys) {
      if (first + kBlockN > cached && cached < end_key_) {
        const int index = first - walk_.sequence.before;
        const int from = max(max(cached, first_key_) - first, 0), to = min(end_key_ - first, kBlockN);
        take_new<kTurned>(slot.k, new_row(params.k_new, params.k_new_strides, walk_.sequence, walk_.b, index, head),
                          params.k_new_strides.row, params.head_dim, first, from, to, params);
        take_new<false>(slot.v, new_row(params.v_new, params.v_new_strides, walk_.sequence, walk_.b, index, head),
                        params.v_new_strides.row, params.head_dim_v, first, from, to, params);
      }
    }
  }

  // Rows [first, first + kBlockN) of the keys, as far as the tile has them and they lie in the cache, below `cached`; the others 0. New
  // ones are left out.
  template <int kCols>
  FA2_DEVICE void copy_rows(Tile<kBlockN, kCols>& tile, const Element* gmem, const Strides& strides, int cols, int first, int cached,
                            const KeyPlace& own) const {
    constexpr int kLanesPerRow = kCols % 64 == 0 ? 8 : kCols % 32 == 0 ? 4 : 2;
    constexpr int kRowsPerPass = 32 / kLanesPerRow;
    const int lane_row = lane_id() / kLanesPerRow, lane_col = lane_id() % kLanesPerRow * 8;
    const uint32_t target = smem_address(tile.data) + lane_row * tile.kRowBytes + lane_col * 2;
#pragma unroll
    for (int pass = 0; pass < kBlockN; pass += kRowsPerPass) {
      const int row = pass + lane_row, key = first + row;
      const int place = kScattered == 1 ? __shfl_sync(0xffffffffu, own.row, row) : own.row;
      const int inside = kScattered == 1 ? __shfl_sync(0xffffffffu, own.inside, row) : own.inside + row;
      const bool there = first_key_ <= key && key < cached;
      if (kNewKeys && first_key_ <= key && cached <= key && key < end_key_) continue;
      const Element* source = gmem + (there ? place * strides.batch + inside * strides.row : 0) + lane_col;
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

  // The new ones, from where they came: `gmem` is where the one would be that is the slice's first key.
  template <bool kIsTurned, int kCols, typename Params>
  static FA2_OUTLINED void take_new(Tile<kBlockN, kCols>& tile, const Element* gmem, int64_t row_stride, int cols, int first, int from,
                                    int to, const Params& params) {
    constexpr int kChunks = kCols / 8;
    for (int i = from * kChunks + lane_id(); i < to * kChunks; i += 32) {
      const int row = i / kChunks, col = i % kChunks * 8;
      const Chunk chunk = read_chunk<kIsTurned>(params, gmem + row * row_stride, first + row, col, cols);
      *reinterpret_cast<uint4*>(tile.data + row * tile.kRowElements + col) =
          uint4{chunk.pairs[0], chunk.pairs[1], chunk.pairs[2], chunk.pairs[3]};
    }
  }

  Walk walk_;
  int slice_, end_;           // of this warp's in the tile
  int first_key_, end_key_;   // of the tile
};
