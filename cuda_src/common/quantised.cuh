// Caches of 8 bits: what an element is multiplied by, and new keys in 8 bits.
#pragma once

#include "common/rotary.cuh"

// Of keys (or values) of a head of a sequence, in a page.
template <bool kOfValues>
FA2_DEVICE float scale_of(const ScaleParams& params, int page, int b, int head) {
  if constexpr (kOfValues) {
    if (params.v_scale == nullptr) return params.v_number;
    return params.v_scale[static_cast<int64_t>(page) * params.v_page + b * params.v_batch + head * params.v_head];
  } else {
    if (params.k_scale == nullptr) return params.k_number;
    return params.k_scale[static_cast<int64_t>(page) * params.k_page + b * params.k_batch + head * params.k_head];
  }
}

// x in 8 bits: to nearest, ties to even; what is too large becomes the largest there is. NaN stays NaN, in int8 it is 0.
FA2_DEVICE uint32_t quantise(float x) {
  if constexpr (kQuantised == 2) {
    return x != x ? 0 : static_cast<uint32_t>(cvt_rni(fminf(fmaxf(x, -128.f), 127.f))) & 0xff;
  } else {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7f;
    if (magnitude < 0x3c800000) return sign | static_cast<uint32_t>(cvt_rni(__uint_as_float(magnitude) * 512.f));  // below 2^-6
    const uint32_t code = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    return sign | min(code, 0x7eu);
  }
}

// Eight elements, divided by their scale.
FA2_DEVICE uint2 quantise_chunk(const Chunk& chunk, float scale) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Element x{static_cast<uint16_t>(chunk.pairs[i / 2] >> 16 * (i % 2))};
    words[i / 4] |= quantise(div_rn(to_float(x), scale)) << 8 * (i % 4);
  }
  return {words[0], words[1]};
}

// And to memory, as far as there are columns.
FA2_DEVICE void write_bytes(unsigned char* row, const uint2& bytes, int col, int cols) {
  if constexpr (kAligned) {
    if (col < cols) *reinterpret_cast<uint2*>(row + col) = bytes;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < cols) row[col + i] = static_cast<unsigned char>((i < 4 ? bytes.x : bytes.y) >> 8 * (i % 4));
  }
}

// A power of two that no element of a row of q is above, and no less than half of it, for rows that are turned twice that. 1 where
// float16 reaches as far.
FA2_DEVICE float power_of_row(const Element* row, int cols) {
  if constexpr (!kIsBf16) {
    return 1.f;
  } else {
    uint32_t largest = 0;  // of the bits without sign, which order as the numbers do
    for (int col = 0; col < cols; col += 8) {
      const Chunk chunk = read_chunk<false>(False{}, row, 0, col, cols);
#pragma unroll
      for (int j = 0; j < 4; ++j) largest = max(largest, max(chunk.pairs[j] & 0x7fffu, chunk.pairs[j] >> 16 & 0x7fffu));
    }
    // 2^(e + 1) of a number with exponent e, and of those that are turned 2^(e + 2); within what floats are.
    const uint32_t exponent = min(max((largest >> 7) + 1 + kTurned, 2u), 253u);
    return __uint_as_float(exponent << 23);
  }
}
