// Rows of q and of new keys, turned by their positions: pairs of the first 2 half columns by an angle each, whose cosine and sine are
// in tables. In float32, then rounded: what is turned is what the cache holds.
#pragma once

#include "common/cache.cuh"
#include "common/ptx.cuh"

// Eight elements of a row.
struct Chunk {
  uint32_t pairs[4];
};

FA2_DEVICE float turn_table(const TurnParams& params, const void* table, int position, int pair) {
  const int64_t place = static_cast<int64_t>(clamp(position, 0, params.positions - 1)) * params.half + pair;
  return params.is_float ? static_cast<const float*>(table)[place] : to_float(static_cast<const Element*>(table)[place]);
}

// Column `col` of a row that is turned to a position.
FA2_DEVICE float turned_element(const TurnParams& params, const Element* row, int position, int col) {
  const float x = to_float(row[col]);
  if (col >= 2 * params.half) return x;
  const bool second = params.neighbours ? col % 2 : col >= params.half;
  const int pair = params.neighbours ? col / 2 : second ? col - params.half : col;
  const int other = params.neighbours ? col ^ 1 : second ? col - params.half : col + params.half;
  const float y = to_float(row[other]) * turn_table(params, params.sin, position, pair);
  return fmaf(x, turn_table(params, params.cos, position, pair), second ? y : -y);
}

// Columns [col, col + 8) of a row of `cols`, zeros behind it; turned, if rows are.
template <bool kIsTurned, typename Params>
FA2_DEVICE Chunk read_chunk(const Params& params, const Element* row, int position, int col, int cols) {
  Chunk chunk{{0, 0, 0, 0}};
  if constexpr (kIsTurned) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = col + 2 * i < cols ? turned_element(params, row, position, col + 2 * i) : 0.f;
      const float y = col + 2 * i + 1 < cols ? turned_element(params, row, position, col + 2 * i + 1) : 0.f;
      chunk.pairs[i] = cvt_pack<Element>(x, y);
    }
  } else if constexpr (kAligned) {
    if (col < cols) {
      const uint4 words = *reinterpret_cast<const uint4*>(row + col);
      chunk = {{words.x, words.y, words.z, words.w}};
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < cols) chunk.pairs[i / 2] |= static_cast<uint32_t>(row[col + i].bits) << 16 * (i % 2);
  }
  return chunk;
}

// A chunk to memory, as far as there are columns.
FA2_DEVICE void write_chunk(Element* row, const Chunk& chunk, int col, int cols) {
  if constexpr (kAligned) {
    if (col < cols) *reinterpret_cast<uint4*>(row + col) = uint4{chunk.pairs[0], chunk.pairs[1], chunk.pairs[2], chunk.pairs[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (col + i < cols) row[col + i] = Element{static_cast<uint16_t>(chunk.pairs[i / 2] >> 16 * (i % 2))};
  }
}
