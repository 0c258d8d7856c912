// Rows in pieces of 16 bytes: where these are aligned (kAligned) one read or write, else element by element.
#pragma once

#include "common/config.cuh"
#include "common/ptx.cuh"
#include "common/real.cuh"

FA2_DEVICE float to_float(float x) { return x; }

// So many pieces.
template <typename T, int kCount = 1>
struct alignas(16) ChunkOf {
  T x[kCount * 16 / sizeof(T)];
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
template <int kCount, typename T>
FA2_DEVICE ChunkOf<T, kCount> load_chunks(const T* row, int col, int cols) {
  constexpr int kAtOnce = 16 / static_cast<int>(sizeof(T));
  if constexpr (kCount == 1) {
    return load_chunk(row, col, cols);
  } else {
    ChunkOf<T, kCount> chunks = {};
#pragma unroll
    for (int piece = 0; piece < kCount; ++piece) {
      const ChunkOf<T> chunk = load_chunk(row, col + piece * kAtOnce, cols);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) chunks.x[piece * kAtOnce + i] = chunk.x[i];
    }
    return chunks;
  }
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
// Of elements that nothing is rounded to, two pieces or four.
FA2_DEVICE void store_chunk(Real* row, int col, int cols, const Real (&x)[8]) {
  constexpr int kAtOnce = kAligned ? 16 / sizeof(Real) : 1;
#pragma unroll
  for (int i = 0; i < 8; i += kAtOnce) {
    if (col + i >= cols) break;
    if constexpr (kAligned) {
      *reinterpret_cast<uint4*>(row + col + i) = *reinterpret_cast<const uint4*>(x + i);
    } else {
      row[col + i] = x[i];
    }
  }
}
