// Which elements of a tile count. The blocks that need to ask are named by visit.cuh.
#pragma once

#include "common/visit.cuh"
#include "common/position.cuh"

// With kPicked: which elements of a block that it meets in part a thread has, a word for each of its rows of the accumulator. The read
// is issued beside a product.
template <bool kIsPicked, bool kTransposed, int kMTiles>
struct SeenOf {
  template <typename Params>
  FA2_DEVICE void read(const Params&, int, int, int) {}
  FA2_DEVICE bool hides(int, int, int) const { return false; }
};
template <bool kTransposed, int kMTiles>
struct SeenOf<true, kTransposed, kMTiles> {
  uint32_t words[kMTiles][2];
  // number: of the block's bits, see MetBlock. row: of the thread's first element within the block of 128; col: of its warp's first
  // column there, a multiple of 16.
  template <typename Params>
  FA2_DEVICE void read(const Params& params, int number, int row, int col) {
    if (number < 0) return;
    const uint32_t* bits = params.mask_bits + (static_cast<int64_t>(number) * 2 + kTransposed) * kPickedBlock * 4;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) words[i][h] = bits[(row + 16 * i + 8 * h) * 4 + lane_id() % 4] >> col / 4;
  }
  FA2_DEVICE bool hides(int i, int j, int e) const { return !(words[i][e / 2] >> (2 * j + e % 2) & 1); }
};
template <bool kTransposed, int kMTiles>
using Seen = SeenOf<kPicked, kTransposed, kMTiles>;

// S = -inf where bits hide an element.
template <int kMTiles, int kNTiles>
FA2_DEVICE void mask_scores(Accumulator<kMTiles, kNTiles>& acc_s, const Seen<false, kMTiles>& seen) {
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (seen.hides(i, j, e)) acc_s.x[i][j][e] = -kInfinity;
}

// S = -inf where a query does not see a key.
template <int kMTiles, int kNTiles>
FA2_DEVICE void mask_scores(Accumulator<kMTiles, kNTiles>& acc_s, const Sequence& sequence, const Position<false>& position) {
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = position.query(i, 0, 2 * h);
      const int begin = key_begin(sequence, query) - position.first_key, end = key_end(sequence, query) - position.first_key;
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e)
          if (col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_s.x[i][j][e] = -kInfinity;
    }
}

// P = 0 likewise, of the rows that are 8 * h below this thread's first one. After exp2: no -inf may meet a derivative.
template <int kNTiles>
FA2_DEVICE void mask_p(Accumulator<1, kNTiles>& acc_p, int h, const Sequence& sequence, const Position<false>& position) {
  const int query = position.query(0, 0, 2 * h);
  const int begin = key_begin(sequence, query) - position.first_key, end = key_end(sequence, query) - position.first_key;
#pragma unroll
  for (int j = 0; j < kNTiles; ++j)
#pragma unroll
    for (int e = 2 * h; e < 2 * h + 2; ++e)
      if (col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_p.x[0][j][e] = 0.f;
}
