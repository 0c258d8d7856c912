// What a row's statistics take in beside its scores: a logit of its head's own (attention sinks), a gradient of lse, and what
// dropout keeps. All are templates, since parameters that are not there must not be looked up.
#pragma once

#include "common/params.cuh"
#include "common/ptx.cuh"

// The sink of a head, in the units of lse; where there are none -inf, which is as good as none.
template <typename Params>
FA2_DEVICE float own_logit(const Params& params, int head) {
  if constexpr (kOwnLogit) {
    if (params.sinks_are_16_bit) return to_float(static_cast<const Element*>(params.sinks)[head]);
    return static_cast<const float*>(params.sinks)[head];
  } else {
    return -kInfinity;
  }
}

// The gradient of lse of query `row` of those that are here (of one that was left out in front of them: below 0); 0 where nobody gave
// one.
template <typename Params>
FA2_DEVICE float dlse_of(const Params& params, int batch, int head, int row) {
  if constexpr (kDlse) {
    const Strides& strides = params.dlse_strides;
    return params.dlse[batch * strides.batch + head * strides.head +
                       (params.dlse_first_row + row) * strides.row];
  } else {
    return 0.f;
  }
}

// A part of the gradient of an own logit, of the rows of a warp: the sum of exp(sink - lse) * (dlse - D), to be summed over lanes.
template <int kWarps, typename Params>
FA2_DEVICE void store_own_logit_sum(const Params& params, int64_t tile, float sum) {
  if constexpr (kOwnLogit) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % 32 == 0) params.sink_sums[tile * kWarps + threadIdx.x / 32] = sum;
  }
}

// What part of P dropout keeps. As much of D goes with dS: the inverse of this is a factor of what is multiplied by dS.
template <typename Params>
FA2_DEVICE float part_kept(const Params& params) {
  if constexpr (kDrawn) {
    return params.kept;
  } else {
    return 1.f;
  }
}
