// What a row's statistics take in beside its scores: a logit of its head's own (attention sinks), and a gradient of lse. All are
// templates, since parameters that are not there must not be looked up.
#pragma once

#include "common/params.cuh"
#include "common/ptx.cuh"

// The sink of a head, in the units of lse; where there are none -inf, which is as good as none.
template <typename Params>
FA2_DEVICE float own_logit(const Params& params, int head) {
  if constexpr (kSinks) {
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

// A part of its gradient: the sum over rows of exp(sink - lse) * (dlse - D). Threads add rows, then all of a warp store their sum.
template <typename Params>
struct OwnLogitGradient {
  const Params& params;
  float sink, sum = 0.f;
  FA2_DEVICE OwnLogitGradient(const Params& params, int head) : params(params), sink(own_logit(params, head)) {}
  // lse of a row that is to be added, or +inf, which adds nothing.
  FA2_DEVICE float lse_of_row(const float* lse, bool is_row) const { return kSinks && is_row ? *lse : kInfinity; }
  // d: D less the gradient of lse.
  FA2_DEVICE void add(float lse, float d) {
    if constexpr (kSinks) sum -= ex2((sink - lse) * kLog2E) * d;
  }
  template <int kWarps>
  FA2_DEVICE void store(int64_t tile) {
    if constexpr (kSinks) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (threadIdx.x % 32 == 0) params.sink_sums[tile * kWarps + threadIdx.x / 32] = sum;
    }
  }
};
