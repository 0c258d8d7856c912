// What functions of the user's own are written in (fa2cupy/tracing): captured arrays, and functions whose results are Python's and
// NumPy's where those of C++ are others or undefined. A function is a header user/mask_mod.cuh or user/score_mod.cuh, which is no
// file: it is handed over with the sources.
#pragma once

#include "common/ptx.cuh"

namespace fa2_user {

// ---- captured arrays ------------------------------------------------------------------------------------------------------

FA2_DEVICE bool as_read(bool x) { return x; }
FA2_DEVICE int as_read(signed char x) { return x; }
FA2_DEVICE int as_read(unsigned char x) { return x; }
FA2_DEVICE int as_read(short x) { return x; }
FA2_DEVICE int as_read(int x) { return x; }
FA2_DEVICE int as_read(int64_t x) {  // those beyond become its ends
  const int64_t least = -2147483647 - 1, most = 2147483647;
  return static_cast<int>(x < least ? least : x > most ? most : x);
}
FA2_DEVICE float as_read(half_t x) { return to_float(x); }
FA2_DEVICE float as_read(bf16_t x) { return to_float(x); }
FA2_DEVICE float as_read(float x) { return x; }
FA2_DEVICE float as_read(double x) { return static_cast<float>(x); }

// An array of the caller's: name(i, j, ...) is its element, as a bool, an int or a float. An index outside, negative ones too, is that
// of the last element: no memory but the array's is ever read. The last dimension is contiguous.
template <typename Stored, int kRank>
struct Captured {
  const Stored* data;
  int64_t strides[kRank];  // in elements; the last is not looked at
  int sizes[kRank];        // at least 1

  template <typename... Index>
  FA2_DEVICE auto operator()(Index... index) const {
    static_assert(sizeof...(Index) == kRank, "an index for each dimension");
    const int at[] = {index...};
    int64_t place = 0;
#pragma unroll
    for (int d = 0; d < kRank; ++d) {
      const uint32_t last = sizes[d] - 1, i = static_cast<uint32_t>(at[d]);
      const uint32_t inside = i < last ? i : last;
      place += d + 1 < kRank ? inside * strides[d] : static_cast<int64_t>(inside);
    }
    return as_read(data[place]);
  }
  FA2_DEVICE auto operator[](int index) const { return (*this)(index); }
  FA2_DEVICE int size(int d) const { return sizes[d]; }
};

// One without dimensions, which only the device can read.
template <typename Stored>
struct Captured<Stored, 0> {
  const Stored* data;
  FA2_DEVICE auto operator()() const { return as_read(*data); }
};

// ---- functions ------------------------------------------------------------------------------------------------------------

template <typename A, typename B>
struct CommonOf {
  using Type = decltype(A() + B());
};
template <>
struct CommonOf<bool, bool> {
  using Type = bool;
};

FA2_DEVICE int add(int a, int b) { return static_cast<int>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
FA2_DEVICE int sub(int a, int b) { return static_cast<int>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
FA2_DEVICE int mul(int a, int b) { return static_cast<int>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }
FA2_DEVICE int neg(int a) { return sub(0, a); }

// Towards minus infinity, and the rest of the divisor's sign; by 0 both are 0, as in NumPy.
FA2_DEVICE int floor_div(int a, int b) {
  if (b == 0) return 0;
  if (b == -1) return neg(a);  // C++ has no result for the least of all
  const int quotient = a / b;
  return quotient - (a % b != 0 && (a < 0) != (b < 0));
}
FA2_DEVICE int floor_mod(int a, int b) {
  if (b == 0 || b == -1) return 0;
  const int rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
FA2_DEVICE float floor_mod(float a, float b) {
  const float rest = fmodf(a, b);
  if (rest == 0) return copysignf(rest, b);
  return (rest < 0) != (b < 0) ? rest + b : rest;
}
FA2_DEVICE float floor_div(float a, float b) {
  if (b == 0) return a / b;
  const float rest = fmodf(a, b), towards_zero = (a - rest) / b;  // a whole number but for its rounding
  const float quotient = rest != 0 && (rest < 0) != (b < 0) ? towards_zero - 1 : towards_zero;
  if (quotient == 0) return copysignf(0.f, a / b);
  const float below = floorf(quotient);
  return quotient - below > 0.5f ? below + 1 : below;
}

// No bit is left of shifts by 32 and more (or fewer than 0).
FA2_DEVICE int shift_left(int a, int b) {
  return static_cast<uint32_t>(b) < 32 ? static_cast<int>(static_cast<uint32_t>(a) << b) : 0;
}
FA2_DEVICE int shift_right(int a, int b) { return static_cast<uint32_t>(b) < 32 ? a >> b : a < 0 ? -1 : 0; }

FA2_DEVICE int abs(int x) { return x < 0 ? neg(x) : x; }
FA2_DEVICE float abs(float x) { return fabsf(x); }
FA2_DEVICE float exp(float x) { return expf(x); }
FA2_DEVICE float log(float x) { return logf(x); }
FA2_DEVICE float tanh(float x) { return tanhf(x); }
FA2_DEVICE float sqrt(float x) { return sqrtf(x); }
FA2_DEVICE float sigmoid(float x) { return 1 / (1 + expf(-x)); }
FA2_DEVICE float floor(float x) { return floorf(x); }
FA2_DEVICE float not_a_number() { return kInfinity - kInfinity; }

// Not a number if one of them is not.
template <typename A, typename B>
FA2_DEVICE auto min(A a, B b) {
  const typename CommonOf<A, B>::Type x = a, y = b;
  return y < x || y != y ? y : x;
}
template <typename A, typename B>
FA2_DEVICE auto max(A a, B b) {
  const typename CommonOf<A, B>::Type x = a, y = b;
  return y > x || y != y ? y : x;
}
template <typename A, typename B>
FA2_DEVICE auto where(bool condition, A a, B b) {
  const typename CommonOf<A, B>::Type x = a, y = b;
  return condition ? x : y;
}

}  // namespace fa2_user
