// What the tensor cores make of sums of tf32 products, and how fast: tf32_sums.py launches this on a GPU, tests/host on a CPU.
#include "sm80/ptx.cuh"

struct SumsParams {
  const float* a;  // (16, 8 * steps)
  const float* b;  // (8 * steps, 8)
  float* out;      // (16, 8); of rates one float for each thread
  int steps, which, threads;
};

namespace {

// A float in two parts of 10 bits behind the point, the first rounded.
struct Parts {
  uint32_t big, small;
};
FA2_DEVICE Parts split(float x) {
  const uint32_t big = __float_as_uint(x) + 0x1000;
  return {big, __float_as_uint(x - __uint_as_float(big & 0xffffe000))};
}

struct Operands {
  uint32_t a_big[4], a_small[4], b_big[2], b_small[2];
};
FA2_DEVICE void load(const SumsParams& p, int step, Operands& x) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, columns = 8 * p.steps;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Parts parts = split(p.a[(g + i % 2 * 8) * columns + 8 * step + t + i / 2 * 4]);
    x.a_big[i] = parts.big, x.a_small[i] = parts.small;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Parts parts = split(p.b[(8 * step + t + i * 4) * 8 + g]);
    x.b_big[i] = parts.big, x.b_small[i] = parts.small;
  }
}

FA2_DEVICE void multiply(float (&d)[4], const Operands& x, bool exact) {
  if (exact) {
    mma_m16n8k8_tf32(d, x.a_small, x.b_big[0], x.b_big[1]);
    mma_m16n8k8_tf32(d, x.a_big, x.b_small[0], x.b_small[1]);
  }
  mma_m16n8k8_tf32(d, x.a_big, x.b_big[0], x.b_big[1]);
}

// D = A B, by one product or by three; the accumulator begins anew with every `fresh` steps of 8, or never (0).
FA2_DEVICE void chain(const SumsParams& p, bool exact, int fresh) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float d[4] = {}, sum[4] = {};
  for (int step = 0; step < p.steps; ++step) {
    Operands x;
    load(p, step, x);
    multiply(sum, x, exact);
    if (fresh > 0 && (step + 1) % fresh == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] += sum[i], sum[i] = 0.f;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i] + sum[i];
}

// The same by fma, one after the other.
FA2_DEVICE void chain_of_fma(const SumsParams& p) {
  for (int i = threadIdx.x; i < 128; i += 32) {
    float sum = 0.f;
    for (int k = 0; k < 8 * p.steps; ++k) sum = fmaf(p.a[i / 8 * 8 * p.steps + k], p.b[k * 8 + i % 8], sum);
    p.out[i] = sum;
  }
}

// Eight sums at a time, as a row of 16 queries and 64 keys has them, of operands in registers: split anew each time, as what comes
// from shared memory is.
template <int kProducts, bool kFresh>
FA2_DEVICE void rate(const SumsParams& p) {
  float d[8][4] = {}, a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = 1.f + 0.001f * (threadIdx.x + i);
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = 1.f - 0.001f * (threadIdx.x + i);
  for (int step = 0; step < p.steps; ++step) {
    Operands x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Parts parts = split(a[i]);
      x.a_big[i] = parts.big, x.a_small[i] = parts.small, a[i] += 0.0001f;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float sum[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = kFresh ? 0.f : d[n][i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Parts parts = split(b[i]);
          x.b_big[i] = parts.big, x.b_small[i] = parts.small, b[i] += 0.0001f;
        }
        multiply(sum, x, kProducts == 3);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] = kFresh ? d[n][i] + sum[i] : sum[i];
    }
  }
  float total = 0.f;
#pragma unroll
  for (int n = 0; n < 8; ++n) total += d[n][0] + d[n][1] + d[n][2] + d[n][3];
  p.out[blockIdx.x * p.threads + threadIdx.x] = total;
}

// Doubles likewise, without a split: one instruction of 16 x 8 x 8, or four of 8 x 8 x 4.
template <bool kWide>
FA2_DEVICE void rate_of_doubles(const SumsParams& p) {
  double d[8][4] = {}, a[4], b[2] = {1.0 - 0.001 * threadIdx.x, 1.0};
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = 1.0 + 0.001 * (threadIdx.x + i);
  for (int step = 0; step < p.steps; ++step) {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      if constexpr (kWide) {
        mma_m16n8k8_f64(d[n % 8], a, b[0], b[1]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_m8n8k4_f64(d[n % 8][i % 2 * 2], d[n % 8][i % 2 * 2 + 1], a[i], b[i / 2]);
      }
    }
    a[0] += 0.0001;
  }
  double total = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) total += d[n][0] + d[n][1] + d[n][2] + d[n][3];
  p.out[blockIdx.x * p.threads + threadIdx.x] = static_cast<float>(total);
}

}  // namespace

extern "C" __global__ void tf32_sums(const __grid_constant__ SumsParams p) {
  switch (p.which) {
    case 0: return chain(p, false, 0);
    case 1: return chain(p, false, 2);
    case 2: return chain(p, true, 0);
    case 3: return chain(p, true, 2);
    case 4: return chain(p, true, 4);
    case 5: return chain(p, true, 8);
    case 6: return chain_of_fma(p);
    case 10: return rate<1, false>(p);
    case 11: return rate<3, false>(p);
    case 12: return rate<3, true>(p);
    case 20: return rate_of_doubles<true>(p);
    case 21: return rate_of_doubles<false>(p);
  }
}
