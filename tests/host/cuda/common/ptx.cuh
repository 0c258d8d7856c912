// The functions of cuda_src/common/ptx.cuh on a CPU. Found first by the order of -I.
#pragma once

#include "common/types.cuh"

inline float ex2(float x) { return exp2f(x); }
inline float lg2(float x) { return log2f(x); }
inline float rcp(float x) { return 1.0f / x; }
// To 17 bits, as it was seen on an H200.
inline float tanh_approx(float x) { return __uint_as_float(__float_as_uint(tanhf(x)) & ~0x7fu); }
inline float minus_infinity_after(float) { return -__builtin_inff(); }

inline float to_float(bf16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(half_t x) {
  const uint32_t magnitude = x.bits & 0x7fff;
  // The exponent's bias is 15 instead of 127; the product is exact, for subnormal numbers too.
  const float value = __uint_as_float(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0;  // infinity and NaN keep their largest exponent
  return __uint_as_float(__float_as_uint(value) | special | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// To nearest, ties to even; NaN becomes the one NaN of cvt.rn.
template <class T>
inline T from_float(float x);
template <>
inline bf16_t from_float<bf16_t>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline half_t from_float<half_t>(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (x != x) return {0x7fff};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more: infinity
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end, rounded
    return {static_cast<uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

template <class T>
inline uint32_t cvt_pack(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}

inline uint2 mul_wide_u32(uint32_t a, uint32_t b) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product), static_cast<uint32_t>(product >> 32)};
}

inline uint32_t abs_f16x2(uint32_t x) { return x & 0x7fff7fff; }
inline uint32_t set_geu_u32_f16x2(uint32_t a, uint32_t b) {
  uint32_t halves = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const half_t x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    if (!(to_float(x) < to_float(y))) halves |= 0xffffu << shift;
  }
  return halves;
}
inline uint32_t cvt_f16x2_e4m3x2(uint32_t pair) {
  uint32_t x = 0;
  for (int i = 0; i < 2; i++) {
    const uint32_t code = pair >> 8 * i & 0xff, exponent = code >> 3 & 15, mantissa = code & 7;
    float magnitude = exponent ? ldexpf(8.0f + mantissa, static_cast<int>(exponent) - 10) : ldexpf(mantissa, -9);
    if ((code & 0x7f) == 0x7f) magnitude = __builtin_nanf("");
    x |= static_cast<uint32_t>(from_float<half_t>(code & 0x80 ? -magnitude : magnitude).bits) << 16 * i;
  }
  return x;
}
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x, int i) { return to_float(half_t{static_cast<uint16_t>(x >> 16 * i)}); };
  return cvt_pack<half_t>(half(a, 0) - half(b, 0), half(a, 1) - half(b, 1));
}
inline uint32_t prmt(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline float div_rn(float x, float y) {
  volatile float quotient = x / y;
  return quotient;
}
inline int cvt_rni(float x) { return static_cast<int>(nearbyintf(x)); }

// A long time passes between any two looks at the clock.
inline uint32_t read_clock() {
  static uint32_t cycles = 0;
  return cycles += 1000;
}

inline uint32_t smem_address(const void* pointer) { return fa2_host::shared_address(pointer); }

namespace fa2_host {
template <class T>
inline T load_shared(uint32_t address, Site site) {
  T value;
  memcpy(&value, shared_pointer(address, sizeof(T), site), sizeof(T));
  return value;
}
template <class T>
inline void store_shared(uint32_t address, T value, Site site) {
  char* shared = shared_pointer(address, sizeof(T), site);
  memcpy(shared, &value, sizeof(T));
  if (uses_async_proxy) mark_stored(shared, sizeof(T));
}
inline void check_aligned(const void* address, uintptr_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("%s:%d: %p is not aligned", site.file, site.line, address);
}
}  // namespace fa2_host

inline void st_shared_b32(uint32_t address, uint32_t value, FA2_HOST_SITE) {
  fa2_host::store_shared(address, value, {file, line});
}
inline uint4 ld_shared_v4(uint32_t address, FA2_HOST_SITE) { return fa2_host::load_shared<uint4>(address, {file, line}); }
inline void st_shared_v4(uint32_t address, uint4 value, FA2_HOST_SITE) {
  fa2_host::store_shared(address, value, {file, line});
}

inline int read_ctaid() { return static_cast<int>(blockIdx.x); }
inline int read_nctaid() { return static_cast<int>(gridDim.x); }

inline void red_add_f32(float* address, float value) { *address += value; }
inline void red_add_v4_f32(float* address, float x, float y, float z, float w, FA2_HOST_SITE) {
  fa2_host::check_aligned(address, 16, {file, line});
  address[0] += x;
  address[1] += y;
  address[2] += z;
  address[3] += w;
}

inline void griddepcontrol_wait(FA2_HOST_SITE) {
  if (fa2_host::synchronises("griddepcontrol_wait", {file, line})) fa2_host::await_previous();
}
inline void griddepcontrol_launch_dependents() {}

inline int ld_acquire(const int* address, FA2_HOST_SITE) { return fa2_host::poll(address, {file, line}); }
inline void red_release_add(int* address, int value) {
  *address += value;
  fa2_host::release();
}
inline uint32_t atom_acq_rel_inc(int* address, uint32_t last) {
  const uint32_t before = static_cast<uint32_t>(*address);
  *address = before >= last ? 0 : static_cast<int>(before + 1);
  fa2_host::release();
  return before;
}
inline float ld_cg_f32(const float* address) { return *address; }
inline float2 ld_cg_v2_f32(const float* address, FA2_HOST_SITE) {
  fa2_host::check_aligned(address, 8, {file, line});
  return {address[0], address[1]};
}
inline int atom_acquire_add(int* address, int value) {
  const int before = *address;
  *address += value;
  fa2_host::word_changed();
  return before;
}
