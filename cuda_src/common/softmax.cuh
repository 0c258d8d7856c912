// Online softmax of FlashAttention-2 (Dao 2023, algorithm 1), in base 2: exp(scale * s) = exp2(scale_log2 * s).
#pragma once

#include "common/accumulator.cuh"
#include "common/config.cuh"
#include "common/ptx.cuh"

// Reduction over the four lanes that hold one row of an accumulator.
FA2_DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FA2_DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What is taken off the exponents of a thread's part of a row in a block, and is not in the accumulator (score.cuh).
template <int kMTiles, bool kGiven>
struct RowShiftOf {
  FA2_DEVICE float of(int, int) const { return 0.f; }
};
template <int kMTiles>
struct RowShiftOf<kMTiles, true> {
  float x[kMTiles][2];
  FA2_DEVICE float of(int i, int h) const { return x[i][h]; }
};
template <int kMTiles>
using RowShift = RowShiftOf<kMTiles, kAlibi>;

// Running statistics of the rows that a thread has a part of: two for each 16 rows of its warp.
template <int kMTiles>
struct Softmax {
  float max[kMTiles][2];  // m: the score that the exponents are taken relative to, not yet scaled; with a shift, scaled
  float sum[kMTiles][2];  // l: sum of exp2(scale_log2 * (s - m)); this thread's columns only, until finish()

  FA2_DEVICE Softmax() {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
      max[i][0] = max[i][1] = -kInfinity;
      sum[i][0] = sum[i][1] = 0.f;
    }
  }

  // S becomes P = exp2(scale_log2 * S - m), O and l move to the new m: 16 rows at a time, and only if one of them has a new
  // m, which grows rarer from block to block. (To let P outgrow 1 first would be rarer still, but then the largest P is not
  // exactly 1 any more, and its rounding shows: up to 15% more error.)
  template <int kSTiles, int kOTiles>
  FA2_DEVICE void update(Accumulator<kMTiles, kSTiles>& acc_s, Accumulator<kMTiles, kOTiles>& acc_o, float scale_log2,
                         const RowShift<kMTiles>& shift) {
    float new_max[kMTiles][2];
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m = kAlibi ? -kInfinity : max[i][h];
#pragma unroll
        for (int j = 0; j < kSTiles; ++j) m = fmaxf(m, fmaxf(acc_s.x[i][j][2 * h], acc_s.x[i][j][2 * h + 1]));
        if constexpr (kAlibi) m = fmaxf(max[i][h], fmaf(m, scale_log2, -shift.of(i, h)));
        new_max[i][h] = row_max(m);
      }
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
      if (__any_sync(0xffffffffu, new_max[i][0] > max[i][0] || new_max[i][1] > max[i][1])) {
        rescale(i, new_max[i], acc_o.x[i], scale_log2);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m_scaled = scaled_max(max[i][h], scale_log2);
        if constexpr (kAlibi) m_scaled += shift.of(i, h);
        float l = sum[i][h];
#pragma unroll
        for (int j = 0; j < kSTiles; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            acc_s.x[i][j][e] = ex2(fmaf(acc_s.x[i][j][e], scale_log2, -m_scaled));
            l += acc_s.x[i][j][e];
          }
        sum[i][h] = l;
      }
    }
  }

  // m * scale_log2, rounded: __fmul_rn, or the compiler would fuse it into what follows. P, alpha and lse take the same
  // number; rounding it in two ways would show.
  static FA2_DEVICE float scaled(float m, float scale_log2) { return kAlibi ? m : __fmul_rn(m, scale_log2); }

  // The same in an exponent: a row that has seen no key yet has m = -inf, and any finite number makes its P exp2(-inf) = 0.
  static FA2_DEVICE float scaled_max(float m, float scale_log2) { return m == -kInfinity ? 0.f : scaled(m, scale_log2); }

  // O = diag(alpha) O and l = alpha l for 16 rows, with alpha = exp2(m_old - m_new).
  template <int kOTiles>
  FA2_DEVICE void rescale(int i, const float (&new_max)[2], float (&o)[kOTiles][4], float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float alpha = ex2(scaled(max[i][h], scale_log2) - scaled_max(new_max[h], scale_log2));
      max[i][h] = new_max[h];
      sum[i][h] *= alpha;
#pragma unroll
      for (int j = 0; j < kOTiles; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) o[j][e] *= alpha;
    }
  }

  // The same in two parts, for an O that is still being computed when S is there: S becomes P, l moves to the new m, and
  // alpha is what O has to be multiplied by.
  template <int kSTiles>
  FA2_DEVICE void exponentiate(Accumulator<1, kSTiles>& acc_s, float (&alpha)[2], float scale_log2, const RowShift<1>& shift) {
    // One row after the other: the second one's maximum is found between the exponentials of the first. ptxas would find
    // both first, so the second one is made to depend on the first.
    float minus_infinity = -kInfinity;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = kAlibi ? minus_infinity : fmaxf(max[0][h], minus_infinity);
#pragma unroll
      for (int j = 0; j < kSTiles; ++j) m = fmaxf(fmaxf(m, acc_s.x[0][j][2 * h]), acc_s.x[0][j][2 * h + 1]);
      if constexpr (kAlibi) m = fmaxf(max[0][h], fmaf(m, scale_log2, -shift.of(0, h)));
      m = row_max(m);
      minus_infinity = minus_infinity_after(m);
      float m_scaled = scaled_max(m, scale_log2);
      alpha[h] = ex2(scaled(max[0][h], scale_log2) - m_scaled);
      if constexpr (kAlibi) m_scaled += shift.of(0, h);
      max[0][h] = m;
      float l = sum[0][h] * alpha[h];
#pragma unroll
      for (int j = 0; j < kSTiles; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          acc_s.x[0][j][e] = ex2(fmaf(acc_s.x[0][j][e], scale_log2, -m_scaled));
          l += acc_s.x[0][j][e];
        }
      sum[0][h] = l;
    }
  }
  template <int kOTiles>
  FA2_DEVICE void rescale(Accumulator<1, kOTiles>& acc_o, const float (&alpha)[2]) const {
    if (!__any_sync(0xffffffffu, alpha[0] < 1.f || alpha[1] < 1.f)) return;
#pragma unroll
    for (int j = 0; j < kOTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_o.x[0][j][e] *= alpha[e / 2];
  }

  // O becomes diag(l)^-1 O. Afterwards lse(i, h) is the log-sum-exp of a row. Of one that has seen no key (l = 0; kUnseenRows) O
  // stays 0, and lse is -inf. With kOwnLogit l has the sink in it, and such a row no more than that. factor: of
  // O besides, with kDrawn.
  template <int kOTiles>
  FA2_DEVICE void finish(Accumulator<kMTiles, kOTiles>& acc_o, float scale_log2, float sink, float factor) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[i][h] = row_sum(sum[i][h]);
        const float alpha = add_sink(i, h, scale_log2, sink);
        float inverse = alpha * (kUnseenRows && sum[i][h] == 0.f ? 0.f : rcp(sum[i][h]));
        if constexpr (kDrawn) inverse *= factor;
#pragma unroll
        for (int j = 0; j < kOTiles; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) acc_o.x[i][j][e] *= inverse;
      }
  }
  FA2_DEVICE float lse(int i, int h, float scale_log2) const {
    return ((kOwnLogit ? max[i][h] : scaled(max[i][h], scale_log2)) + lg2(sum[i][h])) * kLn2;
  }

  // l of a row gains exp2(sink * log2(e) - m), and m, from here on scaled, becomes the larger of both. Returns what O has to be
  // multiplied by for that.
  FA2_DEVICE float add_sink(int i, int h, float scale_log2, float sink) {
    if constexpr (kOwnLogit) {
      const float m = scaled(max[i][h], scale_log2), sink_log2 = __fmul_rn(sink, kLog2E);
      max[i][h] = fmaxf(m, sink_log2);
      const float m_finite = max[i][h] == -kInfinity ? 0.f : max[i][h];
      const float alpha = ex2(m - m_finite);
      sum[i][h] = sum[i][h] * alpha + ex2(sink_log2 - m_finite);
      return alpha;
    } else {
      return 1.f;
    }
  }
};
