// The functions of cuda_src/sm90/wgmma.cuh on a CPU, for every width. Found first by the order of -I.
#pragma once

#include "async.h"
#include "common/accumulator.cuh"
#include "common/config.cuh"

namespace fa2_host {
inline const bool kUsesWgmma = uses_async_proxy = true;
}

inline void wgmma_fence(FA2_HOST_SITE) {
  if (fa2_host::synchronises("wgmma_fence", {file, line})) fa2_host::wgmma_fence({file, line});
}
inline void wgmma_commit_group(FA2_HOST_SITE) { fa2_host::wgmma_commit_group({file, line}); }
template <int kPending>
inline void wgmma_wait_group(FA2_HOST_SITE) {
  if (fa2_host::synchronises("wgmma_wait_group", {file, line})) fa2_host::wgmma_wait_group(kPending, {file, line});
}

template <int kNTiles>
inline void pin(Accumulator<1, kNTiles>&) {}

inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  const uint64_t base = (address & 0x3ffff) >> 4, lbo = leading >> 4, sbo = 1024 >> 4, swizzle_128b = 1;
  return base | lbo << 16 | sbo << 32 | swizzle_128b << 62;
}

template <typename T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16_t> = true;

template <typename T, bool kADown, bool kBDown, int kNTiles>
inline void wgmma_ss(Accumulator<1, kNTiles>& d, uint64_t a, uint64_t b, bool accumulate, FA2_HOST_SITE) {
  static_assert(kNTiles >= 1 && kNTiles <= 32, "the width is 8, 16, ..., 256");
  const fa2_host::Wgmma args{d.x[0][0], nullptr, a, b, 8 * kNTiles, kADown, kBDown, accumulate, kIsBf16<T>};
  fa2_host::wgmma("wgmma_ss", args, {file, line});
}
template <typename T, bool kBDown, int kNTiles>
inline void wgmma_rs(Accumulator<1, kNTiles>& d, const uint32_t (&a)[4], uint64_t b, bool accumulate, FA2_HOST_SITE) {
  static_assert(kNTiles >= 1 && kNTiles <= 32, "the width is 8, 16, ..., 256");
  const fa2_host::Wgmma args{d.x[0][0], a, 0, b, 8 * kNTiles, false, kBDown, accumulate, kIsBf16<T>};
  fa2_host::wgmma("wgmma_rs", args, {file, line});
}
