// New keys and values into a cache, where there are so many that who computes with them had better read them there: every GPU.
#include "common/append.cuh"

static_assert(sizeof(DecodeParams) == kParamsBytes, "kernels/cache_params.py and common/cache_params.cuh differ");

extern "C" __global__ void __launch_bounds__(kNumThreads) append_keys(const __grid_constant__ DecodeParams params) {
  append_new_keys(params);
}
