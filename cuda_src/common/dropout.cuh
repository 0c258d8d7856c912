// Which elements of P take part in a product: the hook between the softmax, whose l is summed from all of them, and P's rounding.
//
// An element is kept or dropped by where it stands in its sequence, and by nothing that a kernel chooses. 16 queries make eight units,
// each of a query and of the one that is 8 behind it, and so do 16 keys. A unit of queries and one of keys have four elements, which
// are one thread's in both layouts of an accumulator (position.cuh), and one call of Philox (Salmon et al. 2011), which gives 15 bits
// for each. fa2cupy/philox.py says the same in NumPy.
//
// What is drawn does not depend on S: kernels draw while a product runs.
#pragma once

#include "common/position.cuh"
#include "common/ptx.cuh"
#include "common/visit.cuh"

// Philox2x32 with 7 rounds. Its keys are constants: what distinguishes seeds is in the counter (Drawing).
FA2_DEVICE uint2 philox2x32(uint32_t c0, uint32_t c1) {
#pragma unroll
  for (uint32_t round = 1; round <= 7; ++round) {
    const uint2 product = mul_wide_u32(c0, 0xd256d193u);
    c0 = product.y ^ (0x9e3779b9u * round) ^ c1;
    c1 = product.x;
  }
  return {c0, c1};
}

// The first two words of Philox4x32 with 10 rounds. Not unrolled: it is called once for a tile.
FA2_DEVICE uint2 philox4x32(uint2 key, uint4 c) {
#pragma unroll 1
  for (int round = 0; round < 10; ++round) {
    const uint2 first = mul_wide_u32(c.x, 0xd2511f53u), second = mul_wide_u32(c.z, 0xcd9e8d57u);
    c = {second.y ^ c.y ^ key.x, second.x, first.y ^ c.w ^ key.y, first.x};
    key = {key.x + 0x9e3779b9u, key.y + 0xbb67ae85u};
  }
  return {c.x, c.y};
}

// The unit of a query or a key.
FA2_DEVICE uint32_t unit_of(int position) {
  const uint32_t x = position;
  return x / 16 * 8 + x % 8;
}

// What is drawn for a query head of a sequence.
template <bool kGiven>
struct DrawingOf {};
template <>
struct DrawingOf<true> {
  uint32_t queries, keys;  // what their units are combined with
  uint32_t threshold;      // DropoutParams
  int in_front_q, in_front_k;  // rows of the sequence in front of those that the kernel counts
};
using Drawing = DrawingOf<kDrawn>;

// `tile`: of a list, or whoever has its fields; of a shape, what says which row of the batch it is.
template <typename Params, typename Tile>
FA2_DEVICE Drawing drawing_of(const Params& params, const Tile& tile, int head) {
  if constexpr (kDrawn) {
    const uint32_t* seed = params.dropout_seed;
    uint4 counter{0, 0, static_cast<uint32_t>(query_batch(tile)), static_cast<uint32_t>(head)};
    if (params.words >= 4) counter.x = seed[2], counter.y = seed[3];
    if (params.words >= 8) counter.z += seed[4], counter.w += seed[6];
    const uint2 tweak = philox4x32({seed[0], seed[1]}, counter);
    return {tweak.x, tweak.y, params.threshold, params.first_query + queries_in_front(tile),
            params.first_key + keys_in_front(tile)};
  } else {
    return {};
  }
}

// What is left of P is as much too small: O, and with it all that has been multiplied by P, has to be multiplied by this.
template <typename Params>
FA2_DEVICE Real inverse_of_kept(const Params& params) {
  if constexpr (kDrawn) {
    return params.inverse;
  } else {
    return 1.f;
  }
}

// Bits that say which elements of an accumulator are kept. Units of its columns are counted from 0 on, and each has a bit, in one half of
// a word for the upper (or only) rows of each 16 and in the other for the lower; so that a thread's element is a constant bit.
//
//   plain       a word for the upper rows of each 16 (queries), and one for the lower; halves are for keys, those of a unit
//   transposed  halves are for the rows (keys); a word for the first query of a unit, and one for the second
//
// Where they are few, both words are one.
template <bool kGiven, bool kTransposed, int kMTiles, int kNTiles>
struct KeptOf {
  FA2_DEVICE void draw(const Drawing&, const Position<kTransposed>&) {}
  FA2_DEVICE int before(const Drawing&, int x) const { return x; }
  FA2_DEVICE bool has(int, int, int) const { return true; }
  FA2_DEVICE void drop(Accumulator<kMTiles, kNTiles>&) const {}
  FA2_DEVICE const Accumulator<kMTiles, kNTiles>& of(const Accumulator<kMTiles, kNTiles>& acc_p) const { return acc_p; }
  FA2_DEVICE void drop(int, uint32_t (&)[ceil_div(kNTiles, 2)][4]) const {}
};

template <bool kTransposed, int kMTiles, int kNTiles>
struct KeptOf<true, kTransposed, kMTiles, kNTiles> {
  static constexpr bool kShared = kNTiles <= 8;
  static constexpr int kWords = kShared ? 1 : ceil_div(kNTiles, 16);
  uint32_t words[kMTiles][kShared ? 1 : 2][kWords];

  // `second`: of the two queries of a unit.
  static FA2_DEVICE constexpr int bit_of(bool second, int unit) { return kShared ? 8 * second + unit : unit % 16; }
  FA2_DEVICE uint32_t& word(int i, bool second, int unit) { return words[i][kShared ? 0 : second][kShared ? 0 : unit / 16]; }

  // Whether an element is kept; all three are constants.
  FA2_DEVICE bool has(int i, int j, int e) const {
    const bool second = kTransposed ? j % 2 : e / 2, upper = kTransposed ? e / 2 : j % 2;
    const int unit = j / 2 * 2 + e % 2;
    return words[i][kShared ? 0 : second][kShared ? 0 : unit / 16] >> (bit_of(second, unit) + 16 * upper) & 1;
  }

  // x, but not before the bits are there: ptxas computes them where they are used, behind whatever waits in between, unless something
  // in front of that needs them.
  template <typename Drawing>
  FA2_DEVICE int before(const Drawing& drawing, int x) const {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int n = 0; n < (kShared ? 1 : 2) * kWords; ++n) all |= words[i][n / kWords][n % kWords];
    return x + nothing_of(drawing, all);
  }

  // P = 0 where it is not kept.
  FA2_DEVICE void drop(Accumulator<kMTiles, kNTiles>& acc_p) const {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_p.x[i][j][e] = has(i, j, e) ? acc_p.x[i][j][e] : 0.f;
  }

  FA2_DEVICE Accumulator<kMTiles, kNTiles> of(Accumulator<kMTiles, kNTiles> acc_p) const {
    drop(acc_p);
    return acc_p;
  }

  // The same of 16 rows that have been rounded: pairs of columns, as the fragments of a product's A have them.
  FA2_DEVICE void drop(int i, uint32_t (&pairs)[ceil_div(kNTiles, 2)][4]) const {
#pragma unroll
    for (int j = 0; j < kNTiles; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        pairs[j / 2][j % 2 * 2 + h] &= (has(i, j, 2 * h) ? 0xffffu : 0) | (has(i, j, 2 * h + 1) ? 0xffff0000u : 0);
  }

  template <typename Drawing>
  FA2_DEVICE void draw(const Drawing& drawing, const Position<kTransposed>& position) {
    // Random bits are compared as halves without their signs, which have the order of their bits; a threshold among the NaN would not.
    if (kOneByOne && (drawing.in_front_q || drawing.in_front_k || (drawing.threshold & 0x7fff) > 0x7c00)) {
      draw_one_by_one(drawing, position);
    } else {
      draw_units(drawing, position);
    }
  }

 private:
  static constexpr int kAtOnce = 4;  // units that are drawn side by side
  // 0, since a threshold has no such bit; but nobody says so, and so it is not there before x is.
  template <typename Drawing>
  static FA2_DEVICE uint32_t nothing_of(const Drawing& drawing, uint32_t x) {
    return x & static_cast<uint32_t>(static_cast<int>(drawing.threshold) >> 31);
  }

  template <typename Drawing>
  FA2_DEVICE void draw_units(const Drawing& drawing, const Position<kTransposed>& position) {
    const uint32_t rows = unit_of(kTransposed ? position.first_key : position.first_query);
    const uint32_t cols = unit_of(kTransposed ? position.first_query : position.first_key);
    const uint32_t of_rows = kTransposed ? drawing.keys : drawing.queries;
    uint32_t of_cols = kTransposed ? drawing.queries : drawing.keys;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
      const uint32_t row = (rows + 8 * i) ^ of_rows;
#pragma unroll
      for (int unit = 0; unit < kNTiles; ++unit) {
        const int step = unit / 2 * 8 + unit % 2;
        // A power of two of columns starts at a multiple of their number: then the sum has no carries.
        const uint32_t col = ceil_pow2(kNTiles) == kNTiles ? cols ^ of_cols ^ step : (cols + step) ^ of_cols;
        const uint2 random = kTransposed ? philox2x32(col, row) : philox2x32(row, col);
        insert(i, false, unit, set_geu_u32_f16x2(abs_f16x2(random.x), drawing.threshold));
        insert(i, true, unit, set_geu_u32_f16x2(abs_f16x2(random.y), drawing.threshold));
        if (unit % kAtOnce == kAtOnce - 1) of_cols ^= nothing_of(drawing, word(i, true, unit));
      }
    }
  }

  FA2_DEVICE void insert(int i, bool second, int unit, uint32_t halves) {
    const int bit = bit_of(second, unit);
    const uint32_t kept = halves & 0x10001u << bit;
    word(i, second, unit) = bit == 0 ? kept : word(i, second, unit) | kept;
  }

  // Wherever the rows stand: four calls for what draw_units has in one. Bits come in from above.
  template <typename Drawing>
  FA2_DEVICE void draw_one_by_one(const Drawing& drawing, const Position<kTransposed>& position) {
    const int first_query = position.first_query + drawing.in_front_q, first_key = position.first_key + drawing.in_front_k;
#pragma unroll
    for (int from = 0; from < kNTiles; from += 16) {
      const int units = min(16, kNTiles - from);
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) word(i, false, from) = word(i, true, from) = 0;
#pragma unroll 1
      for (int unit = from; unit < from + units; ++unit) {
        const int col = unit / 2 * 16 + unit % 2;
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
          uint32_t kept[2] = {0, 0};
#pragma unroll
          for (int second = 0; second < 2; ++second)
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
              const int query = first_query + 8 * second + (kTransposed ? col : 16 * i);
              const int key = first_key + 8 * upper + (kTransposed ? 16 * i : col);
              if (is_kept(drawing, query, key)) kept[second] |= 1u << 16 * upper;
            }
          if (kShared) kept[0] |= kept[1] << 8;
#pragma unroll
          for (int second = 0; second < (kShared ? 1 : 2); ++second)
            word(i, second, from) = word(i, second, from) >> 1 | kept[second] << (units - 1);
        }
      }
    }
  }

  template <typename Drawing>
  static FA2_DEVICE bool is_kept(const Drawing& drawing, int query, int key) {
    const uint2 random = philox2x32(unit_of(query) ^ drawing.queries, unit_of(key) ^ drawing.keys);
    const uint32_t both = query % 16 < 8 ? random.x : random.y;
    return (both >> (key % 16 < 8 ? 0 : 16) & 0x7fff) >= (drawing.threshold & 0x7fff);
  }
};

// Of eight columns, the first or the second half of 16.
template <int kMTiles>
struct KeptOf<true, true, kMTiles, 1> : KeptOf<true, true, kMTiles, 2> {
  template <typename Drawing>
  FA2_DEVICE void draw(const Drawing& drawing, Position<true> position) {
    const bool second = position.first_query & 8;
    position.first_query &= ~8;
    KeptOf<true, true, kMTiles, 2>::draw(drawing, position);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) this->words[i][0][0] >>= second ? 8 : 0;
  }
};

template <bool kTransposed, int kMTiles, int kNTiles>
using Kept = KeptOf<kDrawn, kTransposed, kMTiles, kNTiles>;
