// Operands of double, by mma of doubles: of 16 x 8 x 8 where there is one (kWideMma), else by four of 8 x 8 x 4.
//
// Lanes have the elements that they have of float's (operand_f32.cuh). There is no ldmatrix for them: each is a load of its own. In
// place t and t+4 of the sum are columns 2t and 2t+1 of the scores, or for t = 1 and 2 the other way round: so the rows of B that
// four lanes read at once are 0, 3, 5 and 6, then 1, 2, 4 and 7, which lie in different banks.
#pragma once

#include "sm80/operand.cuh"

// Whether this lane's places are the other way round.
FA2_DEVICE bool is_swapped() { return lane_id() % 4 == 1 || lane_id() % 4 == 2; }

template <>
struct Fragment<double> {
  using Words = double[2][4];  // of 8 terms of the sum each, as mma has them
  using A = Words;
  static constexpr int kTilesB = 1;
  static constexpr int kPad = 4, kScorePad = 4;
  static constexpr bool kInterleaved = false;

  static FA2_DEVICE Words& words(A& fragment) { return fragment; }
  static FA2_DEVICE void copy(Words& to, const Words& from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i / 4][i % 4] = from[i / 4][i % 4];
  }
  static FA2_DEVICE void prepare(A&) {}

  template <int kMTiles, int kNTiles, typename OperandB>
  static FA2_DEVICE void multiply(double (&d)[kMTiles][kNTiles][4], int j, const A (&a)[kMTiles], const OperandB& b, int k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      double places[2];
      b.load(places, j, k, half);
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) multiply(d[i][j], a[i][half], places);
    }
  }
  static FA2_DEVICE void multiply(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
    if constexpr (kWideMma) {
      mma_m16n8k8_f64(d, a, b[0], b[1]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_m8n8k4_f64(d[i % 2 * 2], d[i % 2 * 2 + 1], a[i], b[i / 2]);
    }
  }

  static FA2_DEVICE void of_scores(Words& words, const double (&low)[4], const double (&high)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      set_pair(words, 0, h, low[2 * h], low[2 * h + 1]);
      set_pair(words, 1, h, high[2 * h], high[2 * h + 1]);
    }
  }
  static FA2_DEVICE void set_pair(Words& words, int high, int h, double x, double y) {
    words[high][h] = is_swapped() ? y : x;
    words[high][2 + h] = is_swapped() ? x : y;
  }
  static FA2_DEVICE void drop_of_pair(Words& words, int high, int h, bool x, bool y) {
    if (is_swapped() ? y : x) words[high][h] = 0.0;
    if (is_swapped() ? x : y) words[high][2 + h] = 0.0;
  }
  static FA2_DEVICE void store_pair_of(uint32_t address, const Words& words, int high, int h) {
    const double x = words[high][h], y = words[high][2 + h];
    store_pair(address, is_swapped() ? y : x, is_swapped() ? x : y);
  }
  static FA2_DEVICE void store_pair(uint32_t address, double x, double y) { st_shared_v2_f64(address, x, y); }
};

template <int kRowBytes, bool kIsA, bool kSumIsContiguous>
struct Operand<double, kRowBytes, kIsA, kSumIsContiguous> {
  static_assert(!kIsA || kSumIsContiguous, "of A down the sum there are scores only");
  uint32_t address;  // of place t; down the sum place t+4 is a row behind it, or in front of it
  int other = 0;

  FA2_DEVICE explicit Operand(uint32_t first) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    if constexpr (kSumIsContiguous) {
      address = first + g * kRowBytes + t * 8;
    } else {
      address = first + (2 * t + is_swapped()) * kRowBytes + g * 8;
      other = is_swapped() ? -kRowBytes : kRowBytes;
    }
  }
  FA2_DEVICE void load(Fragment<double>::Words& r, int i, int k) const {  // A
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        r[half][e] = ld_shared_f64(address + (i * 16 + e % 2 * 8) * kRowBytes + k * 128 + half * 64 + e / 2 * 32);
  }
  FA2_DEVICE void load(double (&r)[2], int i, int k, int half) const {  // B
#pragma unroll
    for (int place = 0; place < 2; ++place) {
      if constexpr (kSumIsContiguous) {
        r[place] = ld_shared_f64(address + i * 8 * kRowBytes + k * 128 + half * 64 + place * 32);
      } else {
        r[place] = ld_shared_f64(address + place * other + (k * 16 + half * 8) * kRowBytes + i * 64);
      }
    }
  }
};

template <int kRowBytes, bool kSumIsContiguous>
struct ScoreOperand<double, kRowBytes, kSumIsContiguous> {
  uint32_t address;
  int other;

  FA2_DEVICE explicit ScoreOperand(uint32_t first) {
    const int g = lane_id() / 4, place = lane_id() % 4 * 2 + is_swapped();
    address = first + (kSumIsContiguous ? g : place) * kRowBytes + (kSumIsContiguous ? place : g) * 8;
    other = kSumIsContiguous ? 8 : kRowBytes;
    if (is_swapped()) other = -other;
  }
  FA2_DEVICE void load(Fragment<double>::Words& r, int i, int k) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = i * 16 + e % 2 * 8, term = k * 16 + half * 8;
        const int offset = kSumIsContiguous ? row * kRowBytes + term * 8 : term * kRowBytes + row * 8;
        r[half][e] = ld_shared_f64(address + e / 2 * other + offset);
      }
  }
};
