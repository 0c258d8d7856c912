// Functions of scores and statistics that float has an instruction for and double has not: one name for both. Called with Real.
#pragma once

#include "common/ptx.cuh"

FA2_DEVICE float larger(float x, float y) { return fmaxf(x, y); }
// NaN never is the larger one, as with fmaxf: as long as x is none, which a maximum that begins with -inf is not.
FA2_DEVICE double larger(double x, double y) { return x < y ? y : x; }

// A product that no fma swallows.
FA2_DEVICE float mul_rn(float x, float y) { return __fmul_rn(x, y); }
FA2_DEVICE double mul_rn(double x, double y) { return __dmul_rn(x, y); }

FA2_DEVICE float to_real(half_t x) { return to_float(x); }
FA2_DEVICE float to_real(bf16_t x) { return to_float(x); }
FA2_DEVICE float to_real(float x) { return x; }
FA2_DEVICE double to_real(double x) { return x; }

template <typename T>
FA2_DEVICE T rounded(float x) {
  return T{static_cast<uint16_t>(cvt_pack<T>(x, 0.f))};
}
template <>
FA2_DEVICE float rounded<float>(float x) {
  return x;
}
template <typename T>
FA2_DEVICE T rounded(double x) {
  return x;
}

FA2_DEVICE void red_add(float* address, float value) { red_add_f32(address, value); }
FA2_DEVICE void red_add(double* address, double value) { red_add_f64(address, value); }
FA2_DEVICE void red_add_four(float* address, const float (&x)[4]) { red_add_v4_f32(address, x[0], x[1], x[2], x[3]); }
FA2_DEVICE void red_add_four(double* address, const double (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) red_add_f64(address + i, x[i]);
}

FA2_DEVICE double rcp(double x) { return 1.0 / x; }
FA2_DEVICE double lg2(double x) { return log2(x); }

// 2^x within 1.4 units of 2^-53. x = n + f with |f| <= 1/2: f goes into the minimax polynomial of degree 11, whose error is 3e-18,
// and n into the exponent. Below 2^-1022 it is 0, from 2^1022 on infinite, and NaN stays NaN.
FA2_DEVICE double ex2(double x) {
  constexpr double kIntegers = 6755399441055744.0;  // 1.5 * 2^52: a number of this size has no bits behind the point
  const double rounded = x + kIntegers;
  const double f = x - (rounded - kIntegers);
  const int n = __double2loint(rounded);
  double y = 4.4352809512162244e-10;
  y = fma(y, f, 7.074105627067491e-09);
  y = fma(y, f, 1.0178198033263577e-07);
  y = fma(y, f, 1.3215433089589812e-06);
  y = fma(y, f, 1.525273348996106e-05);
  y = fma(y, f, 0.00015403530462514622);
  y = fma(y, f, 0.0013333558146789949);
  y = fma(y, f, 0.009618129107588335);
  y = fma(y, f, 0.055504108664819925);
  y = fma(y, f, 0.24022650695910155);
  y = fma(y, f, 0.6931471805599453);
  y = fma(y, f, 1.0);
  const int high = __double2hiint(x), magnitude = high & 0x7fffffff;
  int y_high = __double2hiint(y) + static_cast<int>(static_cast<uint32_t>(n) << 20), y_low = __double2loint(y);
  if (magnitude >= 0x408ff000) {  // |x| >= 1022: words instead of doubles, whose pipe is the one that is full
    const bool nan = magnitude > 0x7ff00000 || (magnitude == 0x7ff00000 && __double2loint(x) != 0);
    y_high = nan ? 0x7ff80000 : high < 0 ? 0 : 0x7ff00000;
    y_low = 0;
  }
  return __hiloint2double(y_high, y_low);
}
