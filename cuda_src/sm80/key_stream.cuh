// The keys and values of a share, as a stream of slices through the ring of a warp, by cp.async: each lane copies a few chunks of
// 16 bytes of a row, wherever that lies. A slice's rows that are none of the tile's keys become 0 and are not read.
#pragma once

#include "common/append.cuh"
#include "common/work_list.cuh"
#include "sm80/key_bytes.cuh"

template <bool kIsByte>
struct SlotOf {
  Tile<kBlockN, kHeadDim> k;
  Tile<kBlockN, kHeadDimV> v;
};
template <>
struct SlotOf<true> {
  ByteTile<kBlockN, kHeadDim> k;
  ByteTile<kBlockN, kHeadDimV> v;
};
// And what each key's elements are multiplied by, where that is not the same for all.
template <bool kIsGiven>
struct SlotScales {};
template <>
struct SlotScales<true> {
  float k_scale[kBlockN], v_scale[kBlockN];
};
struct Slot : SlotOf<(kQuantised > 0)>, SlotScales<kScaleOfPage> {};

// S or P, whose columns are keys, times the scales of keys or of values, where each key has its own.
template <bool kOfValues, int kMTiles, int kNTiles, typename AnySlot>
FA2_DEVICE void multiply_columns(Accumulator<kMTiles, kNTiles>& acc, const AnySlot& slot) {
  if constexpr (kScaleOfPage) {
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = accumulator_col() + col_of(j, e);
        float scale;
        if constexpr (kOfValues) {
          scale = slot.v_scale[key];
        } else {
          scale = slot.k_scale[key];
        }
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) acc.x[i][j][e] *= scale, acc.x[i][j][e + 2] *= scale;
      }
  }
}

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
    if (first_key_ <= key && key < (kScaleOfPage ? end_key_ : cached)) {
      own = place_of(params, walk_.sequence, key);
      own.row = max(own.row, 0);
      if (kScattered != 1) own.inside -= key - first;
    }
    const int head = walk_.head();
    note_scales(params, slot, first, own.row, head);
    copy_rows(slot.k, params.k + head * params.k_strides.head, params.k_strides, params.head_dim, first, cached, own);
    copy_rows(slot.v, params.v + head * params.v_strides.head, params.v_strides, params.head_dim_v, first, cached, own);
    if constexpr (kNewKeys) {
      if (first + kBlockN > cached && cached < end_key_) {
        const int index = first - walk_.sequence.before;
        const int from = max(max(cached, first_key_) - first, 0), to = min(end_key_ - first, kBlockN);
        take_new<false>(slot.k, new_row(params.k_new, params.k_new_strides, walk_.sequence, walk_.b, index, head),
                        params.k_new_strides.row, params.head_dim, first, from, to, walk_.sequence, walk_.b, head, params);
        take_new<true>(slot.v, new_row(params.v_new, params.v_new_strides, walk_.sequence, walk_.b, index, head),
                       params.v_new_strides.row, params.head_dim_v, first, from, to, walk_.sequence, walk_.b, head, params);
      }
    }
  }

  // What each key is multiplied by, by its page: that of lane i's key, or of all.
  template <typename Params, typename AnySlot>
  FA2_DEVICE void note_scales(const Params& params, AnySlot& slot, int first, int page, int head) const {
    if constexpr (kScaleOfPage) {
      for (int i = lane_id(); i < kBlockN; i += 32) {
        const bool there = first_key_ <= first + i && first + i < end_key_;
        slot.k_scale[i] = there ? scale_of<false>(params, page, walk_.b, head) : 0.f;
        slot.v_scale[i] = there ? scale_of<true>(params, page, walk_.b, head) : 0.f;
      }
    }
  }

  // Rows [first, first + kBlockN) of the keys, as far as the tile has them and they lie in the cache, below `cached`; the others 0. New
  // ones are left out.
  template <typename AnyTile>
  FA2_DEVICE void copy_rows(AnyTile& tile, const Stored* gmem, const Strides& strides, int cols, int first, int cached,
                            const KeyPlace& own) const {
    constexpr int kChunk = 16 / sizeof(Stored), kCols = AnyTile::kCols;  // columns
    constexpr int kLanesPerRow = kCols % (8 * kChunk) == 0 ? 8 : kCols % (4 * kChunk) == 0 ? 4 : 2;
    constexpr int kRowsPerPass = 32 / kLanesPerRow;
    const int lane_row = lane_id() / kLanesPerRow, lane_col = lane_id() % kLanesPerRow * kChunk;
    const uint32_t target = smem_address(tile.data) + lane_row * tile.kRowBytes + lane_id() % kLanesPerRow * 16;
#pragma unroll
    for (int pass = 0; pass < kBlockN; pass += kRowsPerPass) {
      const int row = pass + lane_row, key = first + row;
      const int place = kScattered == 1 ? __shfl_sync(0xffffffffu, own.row, row) : own.row;
      const int inside = kScattered == 1 ? __shfl_sync(0xffffffffu, own.inside, row) : own.inside + row;
      const bool there = first_key_ <= key && key < cached;
      if (kNewKeys && first_key_ <= key && cached <= key && key < end_key_) continue;
      const Stored* source = gmem + (there ? place * strides.batch + inside * strides.row : 0) + lane_col;
#pragma unroll
      for (int col = 0; col < kCols; col += kChunk * kLanesPerRow) {
        if constexpr (kAligned) {
          const bool exists = there && lane_col + col < cols;
          // The last chunk of bytes may have 8 columns only.
          const int bytes = kQuantised > 0 && cols - lane_col - col < 16 ? 8 : 16;
          cp_async_16(target + pass * tile.kRowBytes + col * sizeof(Stored), source + col, exists ? bytes : 0);
        } else {
          Stored* smem = reinterpret_cast<Stored*>(reinterpret_cast<unsigned char*>(tile.data) + row * tile.kRowBytes) + lane_col + col;
#pragma unroll
          for (int i = 0; i < kChunk; ++i) smem[i] = there && lane_col + col + i < cols ? source[col + i] : Stored{0};
        }
      }
    }
  }

  // The new ones, from where they came: `gmem` is where the one would be that is the slice's first key.
  template <bool kOfValues, typename AnyTile, typename Params>
  static FA2_OUTLINED void take_new(AnyTile& tile, const Element* gmem, int64_t row_stride, int cols, int first, int from, int to,
                                    CachedSequence sequence, int b, int head, const Params& params) {
    constexpr int kChunks = AnyTile::kCols / 8;
    for (int i = from * kChunks + lane_id(); i < to * kChunks; i += 32) {
      const int row = i / kChunks, col = i % kChunks * 8, key = first + row;
      const Chunk chunk = read_chunk<(kTurned && !kOfValues)>(params, gmem + row * row_stride, key, col, cols);
      unsigned char* smem = reinterpret_cast<unsigned char*>(tile.data) + row * tile.kRowBytes + col * sizeof(Stored);
      if constexpr (kQuantised > 0) {
        const int page = kScaleOfPage ? max(place_of(params, sequence, key).row, 0) : 0;
        *reinterpret_cast<uint2*>(smem) = quantise_chunk(chunk, scale_of<kOfValues>(params, page, b, head));
      } else {
        *reinterpret_cast<uint4*>(smem) = uint4{chunk.pairs[0], chunk.pairs[1], chunk.pairs[2], chunk.pairs[3]};
      }
    }
  }

  Walk walk_;
  int slice_, end_;           // of this warp's in the tile
  int first_key_, end_key_;   // of the tile
};
