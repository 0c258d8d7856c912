// Online softmax of FlashAttention-2 (Dao 2023, algorithm 1), in base 2: exp(scale * s) = exp2(scale_log2 * s).
#pragma once

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

// Running statistics of the rows that a thread has a part of: two for each 16 rows of its warp.
template <int kMTiles>
struct Softmax {
  float max[kMTiles][2];  // m: largest score so far, not yet scaled
  float sum[kMTiles][2];  // l: sum of exp2(scale_log2 * (s - m)); this thread's columns only, until finish()

  FA2_DEVICE Softmax() {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
      max[i][0] = max[i][1] = -kInfinity;
      sum[i][0] = sum[i][1] = 0.f;
    }
  }

  // S becomes P = exp2(scale_log2 * S - m); O and l move to the new maximum m.
  // kMayBeEmpty: a row of S can be all -inf, and so can everything the row has seen.
  template <bool kMayBeEmpty, typename AccS, typename AccO>
  FA2_DEVICE void update(AccS& acc_s, AccO& acc_o, float scale_log2) {
    constexpr int kSTiles = sizeof(acc_s.x[0]) / sizeof(acc_s.x[0][0]), kOTiles = sizeof(acc_o.x[0]) / sizeof(acc_o.x[0][0]);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m = max[i][h];
#pragma unroll
        for (int j = 0; j < kSTiles; ++j) m = fmaxf(m, fmaxf(acc_s.x[i][j][2 * h], acc_s.x[i][j][2 * h + 1]));
        m = row_max(m);
        // The rounded product is used in P and in alpha alike: rounding it twice in two ways would show.
        const float m_old_scaled = max[i][h] * scale_log2;
        float m_scaled = m * scale_log2;
        if (kMayBeEmpty && m == -kInfinity) m_scaled = 0.f;
        const float alpha = ex2(m_old_scaled - m_scaled);
        max[i][h] = m;
        float l = sum[i][h] * alpha;
#pragma unroll
        for (int j = 0; j < kSTiles; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            acc_s.x[i][j][e] = ex2(fmaf(acc_s.x[i][j][e], scale_log2, -m_scaled));
            l += acc_s.x[i][j][e];
          }
        sum[i][h] = l;
#pragma unroll
        for (int j = 0; j < kOTiles; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) acc_o.x[i][j][e] *= alpha;
      }
  }

  // O becomes diag(l)^-1 O. Afterwards lse(i, h) is the log-sum-exp of a row.
  template <typename AccO>
  FA2_DEVICE void finish(AccO& acc_o) {
    constexpr int kOTiles = sizeof(acc_o.x[0]) / sizeof(acc_o.x[0][0]);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[i][h] = row_sum(sum[i][h]);
        const float inverse = rcp(sum[i][h]);
#pragma unroll
        for (int j = 0; j < kOTiles; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) acc_o.x[i][j][e] *= inverse;
      }
  }
  FA2_DEVICE float lse(int i, int h, float scale_log2) const {
    return (max[i][h] * scale_log2 + lg2(sum[i][h])) * kLn2;
  }
};
