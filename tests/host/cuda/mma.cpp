// The product of a warp, of all libraries that have one: compiled once, and optimised as kernels are not.
#include "sm80/ptx.cuh"

namespace fa2_host {

using Row = float __attribute__((vector_size(32)));  // the 8 columns of D

template <class T>
void mma_complete(void* const* lanes) {
  uint32_t a_bits[16][8];  // rows of A; two k each
  uint16_t b_bits[16][8];  // rows of B, k
  float a[16][16];
  Row b[16], d[16];
  for (int l = 0; l < 32; l++) {
    const Mma& lane = *static_cast<const Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) a_bits[g + 8 * (i % 2)][t + 4 * (i / 2)] = lane.a[i];
    for (int i = 0; i < 2; i++) {
      b_bits[2 * t + 8 * i][g] = static_cast<uint16_t>(lane.b[i]);
      b_bits[2 * t + 8 * i + 1][g] = static_cast<uint16_t>(lane.b[i] >> 16);
    }
    for (int i = 0; i < 4; i++) d[g + 8 * (i / 2)][2 * t + i % 2] = lane.d[i];
  }
  for (int k = 0; k < 16; k++) {
    float row[8];
    for (int n = 0; n < 8; n++) row[n] = to_float(T{b_bits[k][n]});
    memcpy(&b[k], row, sizeof row);
  }
  for (int m = 0; m < 16; m++) {
    uint16_t row[16];
    memcpy(row, a_bits[m], sizeof row);
    for (int k = 0; k < 16; k++) a[m][k] = to_float(T{row[k]});
  }
  for (int m = 0; m < 16; m++) {
    Row sum{};
    for (int k = 0; k < 16; k++) sum += a[m][k] * b[k];
    d[m] += sum;
  }
  for (int l = 0; l < 32; l++) {
    const Mma& lane = *static_cast<const Mma*>(lanes[l]);
    for (int i = 0; i < 4; i++) lane.d[i] = d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  }
}

template void mma_complete<bf16_t>(void* const*);
template void mma_complete<half_t>(void* const*);

namespace {

constexpr int kExtraBits = 2;  // that a sum keeps behind the last of a float32 of the size of its largest term

// x with as many bits as float32 has, the others cut off.
float truncated(double x) {
  const float nearest = static_cast<float>(x);
  if (std::isinf(nearest) || std::fabs(nearest) <= std::fabs(x)) return nearest;
  return __uint_as_float(__float_as_uint(nearest) - 1);
}

// What mma looks at of an operand: 10 bits behind the point; subnormal numbers are 0.
float tf32(uint32_t bits) {
  if ((bits & 0x7f800000) == 0) return 0.f;
  return __uint_as_float(bits & ~0x1fffu);
}

}  // namespace

// The least that hardware was seen to do: all terms, the accumulator among them, are cut off at one place behind the last bit
// of the largest, and so is their sum. A chain of these loses a little of itself with each, always towards zero, and who lets it
// become long is found out.
void mma_tf32_complete(void* const* lanes) {
  float a[16][8], b[8][8];
  for (int l = 0; l < 32; l++) {
    const MmaTf32& lane = *static_cast<const MmaTf32*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32(lane.a[i]);
    for (int i = 0; i < 2; i++) b[t + 4 * i][g] = tf32(lane.b[i]);
  }
  using Sums = double __attribute__((vector_size(64)));  // of the 8 columns
  using Words = int64_t __attribute__((vector_size(64)));
  Sums rows[8];
  for (int k = 0; k < 8; k++)
    for (int n = 0; n < 8; n++) rows[k][n] = b[k][n];
  for (int m = 0; m < 16; m++) {
    Sums accumulator;
    for (int n = 0; n < 8; n++) {
      const MmaTf32& lane = *static_cast<const MmaTf32*>(lanes[m % 8 * 4 + n / 2]);
      accumulator[n] = lane.d[m / 8 * 2 + n % 2];
    }
    constexpr Words kMagnitude = Words{} + 0x7fffffffffffffff;
    Sums terms[8];
    Words largest = reinterpret_cast<Words>(accumulator) & kMagnitude;
    for (int k = 0; k < 8; k++) {
      terms[k] = a[m][k] * rows[k];
      const Words magnitude = reinterpret_cast<Words>(terms[k]) & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    // A number of the size of the largest term, 2^52 times the unit: added and taken off again, it leaves multiples of the unit.
    // Rounded to nearest first, these are then brought back towards zero.
    constexpr Words kInfinite = Words{} + (int64_t{0x7c0} << 52);  // no product of two floats is as large
    Words exponent = largest & (int64_t{0x7ff} << 52);
    exponent = exponent > kInfinite ? kInfinite : exponent;
    const Sums big = reinterpret_cast<Sums>(exponent + (int64_t{52 - 23 - kExtraBits} << 52));
    const Sums unit = reinterpret_cast<Sums>(exponent - (int64_t{23 + kExtraBits} << 52));
    auto cut = [&](Sums x) {
      const Words bits = reinterpret_cast<Words>(x), sign = bits & ~kMagnitude;
      const Sums magnitude = reinterpret_cast<Sums>(bits & kMagnitude);
      Sums whole = (magnitude + big) - big;
      whole = whole > magnitude ? whole - unit : whole;
      return reinterpret_cast<Sums>(reinterpret_cast<Words>(whole) | sign);
    };
    Sums sum = cut(accumulator);
    for (int k = 0; k < 8; k++) sum += cut(terms[k]);
    Sums plain = accumulator;  // of infinities and NaN, which have no unit
    for (int k = 0; k < 8; k++) plain += terms[k];
    for (int n = 0; n < 8; n++) {
      const MmaTf32& lane = *static_cast<const MmaTf32*>(lanes[m % 8 * 4 + n / 2]);
      const bool finite = exponent[n] < kInfinite[n], zero = largest[n] == 0;
      lane.d[m / 8 * 2 + n % 2] = zero ? 0.f : finite ? truncated(sum[n]) : static_cast<float>(plain[n]);
    }
  }
}

template <int kRows, int kSum>
void mma_f64_complete(void* const* lanes) {
  double a[kRows][kSum], b[kSum][8];
  for (int l = 0; l < 32; l++) {
    const auto& lane = *static_cast<const MmaF64<kRows, kSum>*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int k = 0; k < kSum / 4; k++) {
      for (int m = 0; m < kRows / 8; m++) a[g + 8 * m][t + 4 * k] = lane.a[m + kRows / 8 * k];
      b[t + 4 * k][g] = lane.b[k];
    }
  }
  for (int m = 0; m < kRows; m++)
    for (int n = 0; n < 8; n++) {
      double& d = static_cast<const MmaF64<kRows, kSum>*>(lanes[m % 8 * 4 + n / 2])->d[m / 8 * 2 + n % 2];
      for (int k = 0; k < kSum; k++) d = std::fma(a[m][k], b[k][n], d);
    }
}

template void mma_f64_complete<16, 8>(void* const*);
template void mma_f64_complete<8, 4>(void* const*);

}  // namespace fa2_host
