// What scores of packed rows become, and what their softmax takes in beside them: as score.cuh and statistics.cuh have it, but each row
// has a head of its own.
#pragma once

#include "common/cache.cuh"
#include "common/score.cuh"
#include "common/statistics.cuh"

// What a thread's rows lose with each key of distance, in exponents of 2.
template <int kMTiles, bool kGiven>
struct RowSlopesOf {};
template <int kMTiles>
struct RowSlopesOf<kMTiles, true> {
  float slope[kMTiles][2];
};
template <int kMTiles>
using RowSlopes = RowSlopesOf<kMTiles, kAlibi>;
template <int kMTiles, typename Params>
FA2_DEVICE RowSlopes<kMTiles> scores_of_rows(const Params& params, int b, int head_k, int first_row) {
  RowSlopes<kMTiles> slopes;
  if constexpr (kAlibi) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) slopes.slope[i][h] = head_scores(params, b, packed_row(params, head_k, first_row + row_of(i, 2 * h)).head).slope;
  }
  return slopes;
}

// What scores are multiplied by in exponents of 2, and before that (modify_packed_scores). `factor`: what Q K^T is still to be
// multiplied by.
template <typename Params>
FA2_DEVICE float packed_exponent_scale(const Params& params, float factor) {
  return kScaleFirst || kSoftcap ? exponent_scale<kScaleFirst>(params) : params.scale_softmax_log2 * factor;
}

// Between the product and the mask: S in place, and what is taken off the exponents of whole rows. first_row, first_key: of this
// thread's first element.
template <int kMTiles, int kNTiles, typename Params, typename Slopes>
FA2_DEVICE RowShift<kMTiles> modify_packed_scores(Accumulator<kMTiles, kNTiles>& acc_s, const Params& params, float factor,
                                                  const Slopes& slopes, const CachedSequence& sequence, int first_row,
                                                  int first_key) {
  scale_scores(acc_s, params, factor);
  RowShift<kMTiles> shift;
  if constexpr (kAlibi) {
    const float unit = rcp(packed_exponent_scale(params, factor));
    // In front of all queries: then a distance is a part of the row and a part of the key.
    const int off = sequence.end - sequence.seqlen_q, first_query = params.group.quotient(first_row - accumulator_row());
    const bool in_front = first_key - accumulator_col() + 8 * kNTiles - 1 <= first_query + off;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = params.group.quotient(first_row + row_of(i, 2 * h));
        const float distance = static_cast<float>(query + off - first_key);
        const float slope = slopes.slope[i][h], of_key = slope * unit;
        shift.x[i][h] = in_front ? slope * distance : 0.f;
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e)
            acc_s.x[i][j][e] = in_front ? fmaf(of_key, static_cast<float>(col_of(j, e)), acc_s.x[i][j][e])
                                        : fmaf(-of_key, fabsf(distance - col_of(j, e)), acc_s.x[i][j][e]);
      }
  }
  return shift;
}

// lse_log2 with the logit of a head's own, and what O has to be multiplied by for it.
template <typename Params>
FA2_DEVICE float with_own_logit(const Params& params, int head, float& lse_log2) {
  if constexpr (kOwnLogit) {
    const float own = own_logit(params, head) * kLog2E, largest = fmaxf(lse_log2, own);
    if (largest == -kInfinity) return 1.f;
    const float with = largest + lg2(ex2(lse_log2 - largest) + ex2(own - largest));
    const float factor = ex2(lse_log2 - with);
    lse_log2 = with;
    return factor;
  } else {
    return 1.f;
  }
}
