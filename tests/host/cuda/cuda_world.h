// CUDA's built-ins for g++, included before the first line of every kernel (-include): types, variables, barriers and
// shuffles. PTX is in the twins, the ptx.cuh and wgmma.cuh of common, sm80 and sm90. Only what the kernels use is here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "world.h"

#define FA2_HOST 1

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define FA2_DEVICE inline
#define FA2_OUTLINED inline

#define threadIdx (*fa2_host::thread_index)
#define blockIdx (fa2_host::block_index)
#define gridDim (fa2_host::grid_dim)

// Dynamic shared memory as one struct, see cuda_src/common/config.cuh.
#define FA2_SHARED_MEMORY(Type, name) Type& name = *reinterpret_cast<Type*>(fa2_host::shared_memory(sizeof(Type)))

#define FA2_HOST_VECTORS(T, name)         \
  struct alignas(2 * sizeof(T)) name##2 { \
    T x, y;                               \
  };                                      \
  struct alignas(4 * sizeof(T)) name##4 { \
    T x, y, z, w;                         \
  };
FA2_HOST_VECTORS(int, int)
FA2_HOST_VECTORS(unsigned, uint)
FA2_HOST_VECTORS(float, float)
FA2_HOST_VECTORS(double, double)
#undef FA2_HOST_VECTORS

template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
using std::fma;  // of float and of double

template <class To, class From>
inline To fa2_host_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return fa2_host_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return fa2_host_bits<float>(x); }
inline int __double2hiint(double x) { return static_cast<int>(fa2_host_bits<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(fa2_host_bits<uint64_t>(x)); }
inline double __hiloint2double(int hi, int lo) {
  return fa2_host_bits<double>(static_cast<uint64_t>(static_cast<unsigned>(hi)) << 32 | static_cast<unsigned>(lo));
}

inline void __syncthreads(FA2_HOST_SITE) { fa2_host::barrier("__syncthreads", 0, 0, {file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, FA2_HOST_SITE) {
  if (mask != 0xffffffffu) fa2_host::fail("__syncwarp of part of a warp");
  if (fa2_host::synchronises("__syncwarp", {file, line})) {
    fa2_host::collective("__syncwarp", nullptr, [](void* const*) { fa2_host::warp_met(); }, {file, line});
  }
}

namespace fa2_host {
struct Shuffle {
  uint64_t value, result;
  uint32_t source;
};
template <class T>
inline T shuffle(const char* name, unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 bits, or twice as many in two");
  if (mask != 0xffffffffu) fail("%s of part of a warp", name);
  Shuffle args{0, 0, source % 32};
  memcpy(&args.value, &value, sizeof(T));
  collective(name, &args, [](void* const* lanes) {
    for (int i = 0; i < 32; i++) {
      Shuffle& lane = *static_cast<Shuffle*>(lanes[i]);
      lane.result = static_cast<const Shuffle*>(lanes[lane.source])->value;
    }
  }, site);
  T result;
  memcpy(&result, &args.result, sizeof(T));
  return result;
}
inline unsigned lane() {
  return (thread_index->x + block_dim.x * (thread_index->y + block_dim.y * thread_index->z)) % 32;
}
}  // namespace fa2_host

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, FA2_HOST_SITE) {
  return fa2_host::shuffle("__shfl_sync", mask, value, source, {file, line});
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, FA2_HOST_SITE) {
  return fa2_host::shuffle("__shfl_xor_sync", mask, value, fa2_host::lane() ^ lanes, {file, line});
}

inline int __any_sync(unsigned mask, int predicate, FA2_HOST_SITE) {
  if (mask != 0xffffffffu) fa2_host::fail("__any_sync of part of a warp");
  fa2_host::Shuffle args{predicate != 0, 0, 0};
  fa2_host::collective("__any_sync", &args, [](void* const* lanes) {
    uint64_t any = 0;
    for (int i = 0; i < 32; i++) any |= static_cast<const fa2_host::Shuffle*>(lanes[i])->value;
    for (int i = 0; i < 32; i++) static_cast<fa2_host::Shuffle*>(lanes[i])->result = any;
  }, {file, line});
  return static_cast<int>(args.result);
}

// A bit for each lane: its predicate.
inline unsigned __ballot_sync(unsigned mask, int predicate, FA2_HOST_SITE) {
  if (mask != 0xffffffffu) fa2_host::fail("__ballot_sync of part of a warp");
  fa2_host::Shuffle args{predicate != 0, 0, 0};
  fa2_host::collective("__ballot_sync", &args, [](void* const* lanes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; i++) all |= static_cast<const fa2_host::Shuffle*>(lanes[i])->value << i;
    for (int i = 0; i < 32; i++) static_cast<fa2_host::Shuffle*>(lanes[i])->result = all;
  }, {file, line});
  return args.result;
}

// The lanes that have the same value.
inline unsigned __match_any_sync(unsigned mask, int value, FA2_HOST_SITE) {
  if (mask != 0xffffffffu) fa2_host::fail("__match_any_sync of part of a warp");
  fa2_host::Shuffle args{fa2_host_bits<uint32_t>(value), 0, 0};
  fa2_host::collective("__match_any_sync", &args, [](void* const* lanes) {
    for (int i = 0; i < 32; i++) {
      fa2_host::Shuffle& lane = *static_cast<fa2_host::Shuffle*>(lanes[i]);
      for (int j = 0; j < 32; j++) {
        lane.result |= static_cast<uint32_t>(static_cast<const fa2_host::Shuffle*>(lanes[j])->value == lane.value) << j;
      }
    }
  }, {file, line});
  return static_cast<unsigned>(args.result);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
inline int atomicMin(int* address, int value) {
  const int before = *address;
  if (value < before) *address = value;
  return before;
}
inline int atomicCAS(int* address, int expected, int value) {
  const int before = *address;
  if (before == expected) *address = value;
  return before;
}

// A product that no FMA swallows.
inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}
inline double __dmul_rn(double a, double b) {
    volatile double product = a * b;
    return product;
}
