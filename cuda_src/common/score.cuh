// What a score is, and what becomes of it in the backward: P, computed again, and dS.
#pragma once

#include "common/mask.cuh"
#include "common/ptx.cuh"

#ifdef FA2_SCALE_FIRST
// The forward's hook for scores, between the product and the mask: S = Q K^T in place. In a plain kernel they stay as they are, and
// the exponent's fma scales them. With kScaleFirst they are scaled here, to s = softmax_scale * q . k: a scale <= 0 needs no
// more, since then the largest score is not the largest scaled one; whatever else changes scores changes them here, after that.
template <int kMTiles, int kNTiles>
FA2_DEVICE void modify_scores(Accumulator<kMTiles, kNTiles>& acc_s, float scale_log2) {
  if constexpr (kScaleFirst) {
    const float scale = scale_log2 * kLn2;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_s.x[i][j][e] *= scale;
  }
}

// What scores are then multiplied by in exponents of 2.
FA2_DEVICE float exponent_scale(float scale_log2) { return kScaleFirst ? kLog2E : scale_log2; }
#endif

// P = exp2(scale_log2 * S - lse_log2) of the rows that are 8 * h below this thread's first one: mask_p comes after it.
template <int kNTiles>
FA2_DEVICE void recompute_p(Accumulator<1, kNTiles>& acc, int h, float lse_log2, float scale_log2) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j)
#pragma unroll
    for (int e = 2 * h; e < 2 * h + 2; ++e) acc.x[0][j][e] = ex2(fmaf(acc.x[0][j][e], scale_log2, -lse_log2));
}

// dS^T = P^T * (dP^T - D), in place of dP^T. `softmax_d`: of this thread's first query.
template <int kMTiles, int kNTiles>
FA2_DEVICE void differentiate_softmax(Accumulator<kMTiles, kNTiles>& acc_dp, const Accumulator<kMTiles, kNTiles>& acc_p,
                                      const float* softmax_d) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j) {
    const float2 d = *reinterpret_cast<const float2*>(softmax_d + 8 * j);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_dp.x[i][j][e] = acc_p.x[i][j][e] * (acc_dp.x[i][j][e] - (e % 2 == 0 ? d.x : d.y));
  }
}

// The same of a plain tile. `softmax_d`: of this thread's two rows.
template <int kNTiles>
FA2_DEVICE void differentiate_softmax_of_rows(Accumulator<1, kNTiles>& acc_dp, const Accumulator<1, kNTiles>& acc_p,
                                              const float (&softmax_d)[2]) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc_dp.x[0][j][e] = acc_p.x[0][j][e] * (acc_dp.x[0][j][e] - softmax_d[e / 2]);
}
