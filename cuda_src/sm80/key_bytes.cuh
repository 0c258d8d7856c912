// Products with keys and values of 8 bits: widened in the registers, exactly, to float16, which Q and P are, too.
//
// ldmatrix moves pairs of bytes as it would 16-bit elements, so that a lane gets four neighbours where a fragment wants two times two:
//   keys     columns 4t .. 4t + 3 of a key, in place of 2t, 2t + 1, 2t + 8, 2t + 9: Q's columns are stored in that order
//   values   (transposed) columns 2g, 2g + 1 of keys 2t and 2t + 1: the even columns of 16 are one n8 tile of O, the odd ones the next
#pragma once

#include "common/quantised.cuh"
#include "sm80/tile.cuh"

template <int kRows_, int kCols_>
struct ByteTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kRowBytes = kCols + 16;  // the 8 rows of an ldmatrix fall into different banks
  alignas(128) unsigned char data[kRows * kRowBytes];
};

// What widened numbers are still to be multiplied by: without the instruction, codes become floats by their bits, 2^-8 too small.
constexpr float kWidenedUnit = kQuantised == 1 && !kCvtE4m3 ? 256.f : 1.f;

// Four bytes of a register -> two pairs.
FA2_DEVICE void widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
  if constexpr (kQuantised == 2) {
    // 1024 + (x + 128) as a float16 is 0x6400 and the byte.
    bytes ^= 0x80808080u;
    low = sub_f16x2(prmt(bytes, 0x64646464u, 0x4140), 0x64806480u);
    high = sub_f16x2(prmt(bytes, 0x64646464u, 0x4342), 0x64806480u);
  } else if constexpr (kCvtE4m3) {
    low = cvt_f16x2_e4m3x2(bytes & 0xffff);
    high = cvt_f16x2_e4m3x2(bytes >> 16);
  } else {
    const auto place = [](uint32_t pair) { return (pair & 0x00800080u) << 8 | (pair & 0x007f007fu) << 7; };
    low = place(prmt(bytes, 0, 0x4140));
    high = place(prmt(bytes, 0, 0x4342));
  }
}

// Where column `col` of Q stands in a row in shared memory.
FA2_DEVICE int place_of_column(int col) { return col / 16 * 16 + col % 16 / 4 * 2 + (col & 2) * 4 + (col & 1); }

// acc_s += Q K^T
template <int kMTiles, int kNTiles, typename A, int kRows, int kCols>
FA2_DEVICE void gemm_keys(Accumulator<kMTiles, kNTiles>& acc_s, const A& q, const ByteTile<kRows, kCols>& tile) {
  const int lane = lane_id();
  const uint32_t address = smem_address(tile.data) + lane % 16 * tile.kRowBytes + lane / 16 * 16;
#pragma unroll
  for (int step = 0; step < kCols / 32; ++step) {
    uint32_t frag_q[2][kMTiles][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) q.load(frag_q[half][i], i, 2 * step + half);
#pragma unroll
    for (int n = 0; n < kRows / 16; ++n) {
      uint32_t bytes[4];  // keys 0-7 and 8-15 of columns 0-15, then of columns 16-31
      ldmatrix_x4(bytes, address + n * 16 * tile.kRowBytes + step * 32);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t b0, b1;
        widen(bytes[m], b0, b1);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) mma_m16n8k16<half_t>(acc_s.x[i][2 * n + m % 2], frag_q[m / 2][i], b0, b1);
      }
    }
  }
}

// acc_o += P V, with the columns of O in the order of OutColumns.
template <int kMTiles, int kNTiles, int kKeySteps, int kRows, int kCols>
FA2_DEVICE void gemm_values(Accumulator<kMTiles, kNTiles>& acc_o, const Fragments<kMTiles, kKeySteps>& p,
                            const ByteTile<kRows, kCols>& tile) {
  const int lane = lane_id();
  const uint32_t address = smem_address(tile.data) + lane % 16 * tile.kRowBytes + lane / 16 * 16;
#pragma unroll
  for (int k = 0; k < kKeySteps; ++k)
#pragma unroll
    for (int step = 0; step < kCols / 32; ++step) {
      uint32_t bytes[4];
      ldmatrix_x4_trans(bytes, address + k * 16 * tile.kRowBytes + step * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t even0, odd0, even1, odd1;
        widen(prmt(bytes[2 * half], 0, 0x3120), even0, odd0);
        widen(prmt(bytes[2 * half + 1], 0, 0x3120), even1, odd1);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
          mma_m16n8k16<half_t>(acc_o.x[i][4 * step + 2 * half], p.r[i][k], even0, even1);
          mma_m16n8k16<half_t>(acc_o.x[i][4 * step + 2 * half + 1], p.r[i][k], odd0, odd1);
        }
      }
    }
}
