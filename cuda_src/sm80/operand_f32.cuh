// Operands of float, by products of tf32, which has 10 bits behind the point.
//
// With three of them float32's own accuracy: x = big + small, x y = small big + big small + big big, and what is left out is of the
// size of a rounding. The tensor cores cut off a sum behind its last bit: it loses a little with every mma, always towards zero. So
// those of a block begin with zero, and what they make is added to the accumulator as float32 adds (kPromote).
//
// With g = lane / 4 and t = lane % 4 a lane has of A (g, t) (g+8, t) (g, t+4) (g+8, t+4), of B (t, g) (t+4, g), of D (g, 2t) (g, 2t+1)
// (g+8, 2t) (g+8, 2t+1). The accumulators of scores are A without moving, if the sum takes its terms in another order: place t is
// column 2t, place t+4 column 2t+1, and the rows of B likewise. These are read two columns at a time, one for each of two blocks of
// 8 columns, whose sums are thus interleaved.
#pragma once

#include "sm80/operand.cuh"

// What a product takes of 8 terms of the sum: of A, or of two blocks of 8 columns of B.
struct SplitTf32 {
  uint32_t big[4], small[4];

  // From floats in `big`. With three products these are rounded to big parts, whose low 13 bits mma does not look at, and the rest is
  // small. NaN may become a zero, but then its rest is NaN.
  FA2_DEVICE void split() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = __uint_as_float(big[i]);
      if constexpr (kTf32Products == 3) {
        big[i] += 0x1000;
        small[i] = __float_as_uint(x - __uint_as_float(big[i] & 0xffffe000));
      } else {
        big[i] = cvt_rna_tf32(x);
      }
    }
  }
};

template <>
struct Fragment<float> {
  using Words = uint32_t[2][4];  // of 8 terms of the sum each, as mma has them
  struct A {
    Words words;
    SplitTf32 half[2];
  };
  static constexpr int kTilesB = 2;
  static constexpr int kPad = 4, kScorePad = 8;
  static constexpr bool kInterleaved = true;

  static FA2_DEVICE Words& words(A& fragment) { return fragment.words; }
  static FA2_DEVICE void copy(Words& to, const Words& from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i / 4][i % 4] = from[i / 4][i % 4];
  }
  static FA2_DEVICE void prepare(A& fragment) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment.half[half].big[i] = fragment.words[half][i];
      fragment.half[half].split();
    }
  }

  template <int kMTiles, int kNTiles, typename OperandB>
  static FA2_DEVICE void multiply(float (&d)[kMTiles][kNTiles][4], int j, const A (&a)[kMTiles], const OperandB& b, int k) {
    float sum[kMTiles][2][4];
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[i][e / 4][e % 4] = kPromote ? 0.f : d[i][2 * j + e / 4][e % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the second is read when the first is done: registers
      SplitTf32 frag_b;
      b.load(frag_b.big, j, k, half);
      frag_b.split();
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) multiply(sum[i], a[i].half[half], frag_b);
    }
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& total = d[i][2 * j + e / 4][e % 4];
        total = kPromote ? total + sum[i][e / 4][e % 4] : sum[i][e / 4][e % 4];
      }
  }
  static FA2_DEVICE void multiply(float (&d)[2][4], const SplitTf32& a, const SplitTf32& b) {
    if constexpr (kTf32Products == 3) {
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k8_tf32(d[n], a.small, b.big[2 * n], b.big[2 * n + 1]);
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k8_tf32(d[n], a.big, b.small[2 * n], b.small[2 * n + 1]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) mma_m16n8k8_tf32(d[n], a.big, b.big[2 * n], b.big[2 * n + 1]);
  }

  static FA2_DEVICE void of_scores(Words& words, const float (&low)[4], const float (&high)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      set_pair(words, 0, h, low[2 * h], low[2 * h + 1]);
      set_pair(words, 1, h, high[2 * h], high[2 * h + 1]);
    }
  }
  static FA2_DEVICE void set_pair(Words& words, int high, int h, float x, float y) {
    words[high][h] = __float_as_uint(x);
    words[high][2 + h] = __float_as_uint(y);
  }
  static FA2_DEVICE void drop_of_pair(Words& words, int high, int h, bool x, bool y) {
    if (x) words[high][h] = 0;
    if (y) words[high][2 + h] = 0;
  }
  static FA2_DEVICE void store_pair_of(uint32_t address, const Words& words, int high, int h) {
    st_shared_v2(address, uint2{words[high][h], words[high][2 + h]});
  }
  static FA2_DEVICE void store_pair(uint32_t address, float x, float y) {
    st_shared_v2(address, uint2{__float_as_uint(x), __float_as_uint(y)});
  }
};

// Along the sum ldmatrix: its 8x8 matrices of 16 bits are 8x4 of these. B down the sum: rows 2t and 2t+1, columns 2g and 2g+1.
template <int kRowBytes, bool kIsA, bool kSumIsContiguous>
struct Operand<float, kRowBytes, kIsA, kSumIsContiguous> {
  static_assert(!kIsA || kSumIsContiguous, "of A down the sum there are scores only");
  uint32_t address;

  FA2_DEVICE explicit Operand(uint32_t first) {
    const int lane = lane_id();
    if constexpr (kSumIsContiguous) {
      const int row = kIsA ? lane % 16 : lane % 8 + lane / 16 * 8;
      address = first + row * kRowBytes + (kIsA ? lane / 16 : lane / 8 % 2) * 16;
    } else {
      address = first + lane % 4 * 2 * kRowBytes + lane / 4 * 8;
    }
  }
  FA2_DEVICE void load(Fragment<float>::Words& r, int i, int k) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) load(r[half], i, k, half);
  }
  FA2_DEVICE void load(uint32_t (&r)[4], int i, int k, int half) const {
    if constexpr (kSumIsContiguous) {
      ldmatrix_x4(r, address + i * 16 * kRowBytes + k * 64 + half * 32);
    } else {
#pragma unroll
      for (int place = 0; place < 2; ++place) {
        const uint2 columns = ld_shared_v2(address + (k * 16 + half * 8 + place) * kRowBytes + i * 64);
        r[place] = columns.x;
        r[2 + place] = columns.y;
      }
    }
  }
};

// Along the sum columns 2t and 2t+1 of rows g and g+8; down the sum columns 2g and 2g+1 of rows 2t and 2t+1, which makes row g of
// the product query 2g, and row g+8 query 2g+1.
template <int kRowBytes, bool kSumIsContiguous>
struct ScoreOperand<float, kRowBytes, kSumIsContiguous> {
  uint32_t address;

  FA2_DEVICE explicit ScoreOperand(uint32_t first) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    address = first + (kSumIsContiguous ? g : 2 * t) * kRowBytes + (kSumIsContiguous ? 2 * t : 2 * g) * 4;
  }
  FA2_DEVICE void load(Fragment<float>::Words& r, int i, int k) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if constexpr (kSumIsContiguous) {
          const uint2 places = ld_shared_v2(address + (i * 16 + row * 8) * kRowBytes + k * 64 + half * 32);
          r[half][row] = places.x;
          r[half][2 + row] = places.y;
        } else {
          const uint2 rows = ld_shared_v2(address + (k * 16 + half * 8 + row) * kRowBytes + i * 64);
          r[half][2 * row] = rows.x;
          r[half][2 * row + 1] = rows.y;
        }
      }
  }
};
