// What a score is, and what becomes of it in the backward: P, computed again, and dS.
//
// A score in an accumulator is q . k, times what `exponent_scale` says an exponent of 2. With kSoftcap it becomes tanh(softmax_scale
// * q . k / softcap), in units of softcap. With kAlibi slope * |distance| is taken off it. In a block of scores whose keys all lie on
// one side of their queries the distance is a part of the row and a part of the column: the row's goes into the exponents of the
// whole row, at once (RowShift), and what an element gets is small, however far away the keys are.
#pragma once

#include "common/dropout.cuh"
#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "common/softmax.cuh"

enum { kCurved = kSoftcap };  // scores become others whose derivative is not 1
// P is rounded for its product with dO as soon as it is there: dS needs something else in its place.
enum { kPackEarly = kCurved };

// tanh. The approximation is within 1.1e-5 on sm_90, less than bfloat16 shows; the other one within 3e-7, absolutely. The forward and
// the backward of a problem take the same.
FA2_DEVICE float tanh_of(float x) {
#if FA2_BF16 && (defined(FA2_HOST) || __CUDA_ARCH__ == 900)
  return tanh_approx(x);
#else
  return fmaf(-2.f, rcp(1.f + ex2(x * (2.f * kLog2E))), 1.f);
#endif
}

// What a head's scores lose with each key of distance, in exponents of 2. Read for a tile, long before it is needed.
template <bool kGiven>
struct HeadScoresOf {};
template <>
struct HeadScoresOf<true> {
  float slope;
};
using HeadScores = HeadScoresOf<kAlibi>;
template <typename Params>
FA2_DEVICE HeadScores head_scores(const Params& params, int batch, int head) {
  if constexpr (kAlibi) {
    return {params.alibi_slopes[batch * params.alibi_batch_stride + head * params.alibi_head_stride] * kLog2E};
  } else {
    return {};
  }
}

// Where the keys of a warp's scores are, seen from the queries.
enum class Keys { kInFront, kBehind, kAround };
enum { kAnySide = kAlibi && !kCausal };  // it matters, and need not be in front
template <bool kTransposed, int kMTiles, int kNTiles>
FA2_DEVICE Keys keys_of(const Sequence& sequence, const Position<kTransposed>& position) {
  if (kCausal) return Keys::kInFront;  // or hidden
  constexpr int kRows = 16 * kMTiles, kCols = 8 * kNTiles;
  const int row = accumulator_row(), col = accumulator_col();  // counted from the warp's first element: all lanes agree
  const int query = position.first_query - (kTransposed ? col : row) + offset_of(sequence);
  const int key = position.first_key - (kTransposed ? row : col);
  if (key + (kTransposed ? kRows : kCols) - 1 <= query) return Keys::kInFront;
  return key >= query + (kTransposed ? kCols : kRows) - 1 ? Keys::kBehind : Keys::kAround;
}

// How far this thread's first query stands behind its first key.
template <bool kTransposed>
FA2_DEVICE float distance_of(const Sequence& sequence, const Position<kTransposed>& position) {
  return static_cast<float>(position.first_query + offset_of(sequence) - position.first_key);
}

// What scores are multiplied by in exponents of 2: by the forward, which may have scaled them, and where they are computed again.
template <bool kScaled, typename Params>
FA2_DEVICE float exponent_scale(const Params& params) {
  if constexpr (kSoftcap) {
    return params.softcap_log2;
  } else {
    return kScaled ? kLog2E : params.scale_softmax_log2;
  }
}

#ifdef FA2_SCALE_FIRST
// Scores that are scaled before the softmax, or capped: what it takes is S times `factor`.
template <int kMTiles, int kNTiles, typename Params>
FA2_DEVICE void scale_scores(Accumulator<kMTiles, kNTiles>& acc_s, const Params& params, float factor) {
  if constexpr (kScaleFirst || kSoftcap) {
    if constexpr (kSoftcap) {
      factor *= params.softcap_factor;
    } else {
      factor *= params.scale_softmax_log2 * kLn2;
    }
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          acc_s.x[i][j][e] *= factor;
          if constexpr (kSoftcap) acc_s.x[i][j][e] = tanh_of(acc_s.x[i][j][e]);
        }
  }
}

// The forward's hook for scores, between the product and the mask: S = Q K^T in place. In a plain kernel they stay as they are, and
// the exponent's fma scales them. With kScaleFirst they are scaled here, to s = softmax_scale * q . k: a scale <= 0 needs no
// more, since then the largest score is not the largest scaled one.
template <int kMTiles, int kNTiles, typename Params, typename Head>
FA2_DEVICE RowShift<kMTiles> modify_scores(Accumulator<kMTiles, kNTiles>& acc_s, const Params& params, const Head& head,
                                           const Sequence& sequence, const Position<false>& position) {
  scale_scores(acc_s, params, 1.f);
  RowShift<kMTiles> shift;
  if constexpr (kAlibi) {
    const Keys keys = keys_of<false, kMTiles, kNTiles>(sequence, position);
    const float distance = distance_of(sequence, position), unit = rcp(exponent_scale<kScaleFirst>(params));
    const float slope = keys == Keys::kBehind ? -head.slope : head.slope, of_column = slope * unit;
    auto for_each = [&](auto change) {
#pragma unroll
      for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc_s.x[i][j][e] = change(acc_s.x[i][j][e], row_of(i, e), col_of(j, e));
    };
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) shift.x[i][h] = keys == Keys::kAround ? 0.f : slope * (distance + row_of(i, 2 * h));
    if (keys == Keys::kAround) {
      for_each([&](float s, int row, int col) { return fmaf(-of_column, fabsf(distance + (row - col)), s); });
    } else {
      for_each([&](float s, int, int col) { return fmaf(of_column, static_cast<float>(col), s); });
    }
  }
  return shift;
}
#endif

// The backward's: the scores of a block on their way to P.
template <bool kTransposed>
struct Scores {
  float scale_log2;
  float slope, distance;  // kAlibi; the slope is negative where the distance shrinks from query to query
  float softcap_factor;   // kSoftcap
  Keys keys;

  template <int kMTiles, int kNTiles, typename Params, typename Head>
  static FA2_DEVICE Scores of(const Params& params, const Head& head, const Sequence& sequence,
                              const Position<kTransposed>& position) {
    Scores scores;
    scores.scale_log2 = exponent_scale<false>(params);
    if constexpr (kAlibi) {
      scores.keys = keys_of<kTransposed, kMTiles, kNTiles>(sequence, position);
      scores.slope = scores.keys == Keys::kBehind ? -head.slope : head.slope;
      scores.distance = distance_of(sequence, position);
    }
    if constexpr (kSoftcap) scores.softcap_factor = params.softcap_factor;
    return scores;
  }

  // P = exp2(scale_log2 * s - lse_log2) of element (i, j, e); and what becomes of dP - D besides, on its way to softmax_scale * q . k.
  template <bool kBothSides>
  FA2_DEVICE float p(float s, float minus_lse_log2, int i, int j, int e, float& derivative) const {
    if constexpr (kSoftcap) {
      s = tanh_of(s * softcap_factor);
      derivative = fmaf(-s, s, 1.f);
    }
    if constexpr (kAlibi) {
      const int row = row_of(i, e), col = col_of(j, e);
      if constexpr (kBothSides) {
        minus_lse_log2 = fmaf(-slope, fabsf(distance + (kTransposed ? col - row : row - col)), minus_lse_log2);
      } else if constexpr (kTransposed) {  // what elements of other rows have too comes first, to be computed once
        minus_lse_log2 = fmaf(-slope, static_cast<float>(col), minus_lse_log2) - slope * (distance - row);
      } else {
        minus_lse_log2 = fmaf(slope, static_cast<float>(col), minus_lse_log2 - slope * (distance + row));
      }
    }
    return ex2(fmaf(s, scale_log2, minus_lse_log2));
  }
};

// P = exp2(scale_log2 * S - lse_log2) of the rows that are 8 * h below this thread's first one: mask_p comes after it.
template <int kNTiles>
FA2_DEVICE void recompute_p(Accumulator<1, kNTiles>& acc, int h, float lse_log2, float scale_log2) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j)
#pragma unroll
    for (int e = 2 * h; e < 2 * h + 2; ++e) acc.x[0][j][e] = ex2(fmaf(acc.x[0][j][e], scale_log2, -lse_log2));
}

// The same of other scores; columns before `begin` and from `end` on are hidden. kPackEarly: P goes into `packed`, rounded, and its
// derivative stays.
template <bool kBothSides, int kNTiles, typename Packed>
FA2_DEVICE void recompute_p(Accumulator<1, kNTiles>& acc, Packed& packed, int h, float lse_log2, const Scores<false>& scores,
                            int begin, int end) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j) {
    float p[2];
#pragma unroll
    for (int e = 2 * h; e < 2 * h + 2; ++e) {
      float derivative = 1.f;
      p[e % 2] = scores.template p<kBothSides>(acc.x[0][j][e], -lse_log2, 0, j, e, derivative);
      if (col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) p[e % 2] = 0.f;
      acc.x[0][j][e] = kCurved ? p[e % 2] * derivative : p[e % 2];
    }
    if constexpr (kPackEarly) packed.r[j / 2][j % 2 * 2 + h] = cvt_pack<Element>(p[0], p[1]);
  }
}
template <int kNTiles, typename Packed, typename Params>
FA2_DEVICE void recompute_p(Accumulator<1, kNTiles>& acc, Packed& packed, int h, float lse_log2, const Params& params,
                            const HeadScores& of_head, const Sequence& sequence, const Position<false>& position, bool masked) {
  const auto scores = Scores<false>::of<1, kNTiles>(params, of_head, sequence, position);
  const int query = position.query(0, 0, 2 * h);
  const int begin = masked ? key_begin(sequence, query) - position.first_key : 0;
  const int end = masked ? key_end(sequence, query) - position.first_key : 8 * kNTiles;
  if (kAnySide && scores.keys == Keys::kAround) {
    recompute_p<true>(acc, packed, h, lse_log2, scores, begin, end);
  } else {
    recompute_p<false>(acc, packed, h, lse_log2, scores, begin, end);
  }
}

// dS of an element, P * (dP - D). With kDrawn dP counts only where P is kept, and P becomes 0 elsewhere.
FA2_DEVICE float differentiated(float dp, float& p, float d, bool kept) {
  if constexpr (kDrawn) {
    const float without = -p * d;
    p = kept ? p : 0.f;
    return fmaf(p, dp, without);
  } else {
    return p * (dp - d);
  }
}

// dS^T = P^T * (dP^T - D), in place of dP^T. `softmax_d`: of this thread's first query.
template <int kMTiles, int kNTiles>
FA2_DEVICE void differentiate_softmax(Accumulator<kMTiles, kNTiles>& acc_dp, Accumulator<kMTiles, kNTiles>& acc_p,
                                      const float* softmax_d, const Kept<true, kMTiles, kNTiles>& kept) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j) {
    const float2 d = *reinterpret_cast<const float2*>(softmax_d + 8 * j);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        acc_dp.x[i][j][e] = differentiated(acc_dp.x[i][j][e], acc_p.x[i][j][e], e % 2 == 0 ? d.x : d.y, kept.has(i, j, e));
  }
}

// The same of a plain tile, where P stays. `softmax_d`: of this thread's two rows.
template <int kNTiles>
FA2_DEVICE void differentiate_softmax_of_rows(Accumulator<1, kNTiles>& acc_dp, const Accumulator<1, kNTiles>& acc_p,
                                              const float (&softmax_d)[2], const Kept<false, 1, kNTiles>& kept) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float dp = kept.has(0, j, e) ? acc_dp.x[0][j][e] : 0.f;
      acc_dp.x[0][j][e] = acc_p.x[0][j][e] * (dp - softmax_d[e / 2]);
    }
}
