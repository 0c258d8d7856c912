// Fixed-width names and the two 16-bit types. NVRTC gets no toolkit header from us: these few lines replace them.
#pragma once

#ifndef FA2_HOST
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#define FA2_DEVICE __device__ __forceinline__
#define FA2_OUTLINED __device__ __noinline__  // what is rare, and would take registers from the rest
#endif

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The smallest power of two that is not below n.
constexpr int ceil_pow2(int n) { return n <= 1 ? 1 : 2 * ceil_pow2((n + 1) / 2); }

// A compile-time choice, as an argument.
struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};
