// Rows in pieces of 16 bytes: where these are aligned (kAligned) one read or write, else element by element.
#pragma once

#include "common/config.cuh"
#include "common/ptx.cuh"

FA2_DEVICE float to_float(float x) { return x; }

template <typename T>
struct alignas(16) ChunkOf {
  T x[16 / sizeof(T)];
};

// The elements of a row from column `col` on, zeros past column `cols`.
template <typename T>
FA2_DEVICE ChunkOf<T> load_chunk(const T* row, int col, int cols) {
  ChunkOf<T> chunk = {};
  if constexpr (kAligned) {
    if (col < cols) *reinterpret_cast<uint4*>(&chunk) = *reinterpret_cast<const uint4*>(row + col);
  } else {
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i)
      if (col + i < cols) chunk.x[i] = row[col + i];
  }
  return chunk;
}

// They become x, rounded; nothing past the end of the row.
template <typename T>
FA2_DEVICE void store_chunk(T* row, int col, int cols, const float (&x)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = cvt_pack<T>(x[2 * i], x[2 * i + 1]);
  if constexpr (kAligned) {
    *reinterpret_cast<uint4*>(row + col) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < cols) row[col + i] = T{static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16)};
  }
}
FA2_DEVICE void store_chunk(float* row, int col, int cols, const float (&x)[4]) {
  if constexpr (kAligned) {
    *reinterpret_cast<float4*>(row + col) = float4{x[0], x[1], x[2], x[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (col + i < cols) row[col + i] = x[i];
  }
}
