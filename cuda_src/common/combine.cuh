// A tile's results from the parts of its keys: those of the warps of a thread block, then those of the thread blocks that share it.
//
// Each part has O (not divided by l), m and l of its own keys: O = sum exp2(m_p - m) O_p, l = sum exp2(m_p - m) l_p, m the largest.
// Thread blocks leave theirs in a workspace and count themselves; the last one to come adds them up, in the order of the thread blocks
// whoever that is, and nobody waits. The counter goes round, back to 0.
#pragma once

#include "common/softmax.cuh"
#include "common/work_list.cuh"

constexpr int kCombinedRows = 4;              // of the rows that the warps add up at a time
constexpr int kCombineCols = kHeadDimV + 8;   // rows lie in different banks
struct CombineBuffer {
  alignas(16) float out[kNumWarps][kCombinedRows][kCombineCols];
  float max[kNumWarps][kBlockM];  // in base 2, scaled
  float sum[kNumWarps][kBlockM];
  int is_last;
};


// Of the two tiles of 8 columns from column 16 m on, a thread has 4 columns of a row: two pairs, 8 apart. Where values are widened bytes
// (sm80/key_bytes.cuh) they are neighbours, the even ones in the first tile and the odd ones in the second.
template <int kOTiles>
FA2_DEVICE void write_columns(float* row, const float (&o)[kOTiles][4], int m, int h, float factor) {
  const float(&a)[4] = o[2 * m], (&b)[4] = o[2 * m + 1];
  if constexpr (kQuantised > 0) {
    *reinterpret_cast<float4*>(row + 16 * m + 2 * accumulator_col()) =
        float4{a[2 * h] * factor, b[2 * h] * factor, a[2 * h + 1] * factor, b[2 * h + 1] * factor};
  } else {
    *reinterpret_cast<float2*>(row + 16 * m + accumulator_col()) = float2{a[2 * h] * factor, a[2 * h + 1] * factor};
    *reinterpret_cast<float2*>(row + 16 * m + 8 + accumulator_col()) = float2{b[2 * h] * factor, b[2 * h + 1] * factor};
  }
}
template <int kOTiles>
FA2_DEVICE void add_columns(float (&o)[kOTiles][4], const float* row, int m, int h, float factor) {
  float(&a)[4] = o[2 * m], (&b)[4] = o[2 * m + 1];
  const int col = 16 * m + (kQuantised > 0 ? 2 : 1) * accumulator_col();
  const float2 first = ld_cg_v2_f32(row + col), second = ld_cg_v2_f32(row + col + (kQuantised > 0 ? 2 : 8));
  a[2 * h] += factor * first.x;
  (kQuantised > 0 ? b[2 * h] : a[2 * h + 1]) += factor * first.y;
  (kQuantised > 0 ? a[2 * h + 1] : b[2 * h]) += factor * second.x;
  b[2 * h + 1] += factor * second.y;
}

// A row's m and l over all warps.
struct RowTotal {
  float max, sum;
  FA2_DEVICE float lse_log2() const { return sum == 0.f ? -kInfinity : max + lg2(sum); }
};
FA2_DEVICE RowTotal row_total(const CombineBuffer& buffer, int row) {
  RowTotal total{-kInfinity, 0.f};
#pragma unroll
  for (int w = 0; w < kNumWarps; ++w) total.max = fmaxf(total.max, buffer.max[w][row]);
  const float base = total.max == -kInfinity ? 0.f : total.max;
#pragma unroll
  for (int w = 0; w < kNumWarps; ++w) total.sum += buffer.sum[w][row] * ex2(buffer.max[w][row] - base);
  return total;
}

// Adds up what the warps have of the first `rows` rows, and calls store(row, col, x, lse_log2) for each 4 columns x of O, divided by l.
// max, sum: of this thread's rows, in the order of Softmax.
template <int kMTiles, int kOTiles, typename Store>
FA2_DEVICE void add_up_warps(CombineBuffer& buffer, const Accumulator<kMTiles, kOTiles>& acc_o, const float (&max)[kMTiles][2],
                             const float (&sum)[kMTiles][2], int rows, const Store& store) {
  const int warp = warp_id();
  if (accumulator_col() == 0) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        buffer.max[warp][accumulator_row() + row_of(i, 2 * h)] = max[i][h];
        buffer.sum[warp][accumulator_row() + row_of(i, 2 * h)] = sum[i][h];
      }
  }
  __syncthreads();  // m and l of all warps are there
  for (int first = 0; first < rows; first += kCombinedRows) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = accumulator_row() + row_of(i, 2 * h), place = row - first;
        if (place < 0 || place >= kCombinedRows || row >= rows) continue;
        float largest = -kInfinity;
#pragma unroll
        for (int w = 0; w < kNumWarps; ++w) largest = fmaxf(largest, buffer.max[w][row]);
        const float weight = max[i][h] == -kInfinity ? 0.f : ex2(max[i][h] - largest);
#pragma unroll
        for (int m = 0; m < kOTiles / 2; ++m) write_columns(buffer.out[warp][place], acc_o.x[i], m, h, weight);
      }
    __syncthreads();  // these rows of all warps are there
    for (int e = threadIdx.x; e < min(kCombinedRows, rows - first) * (kHeadDimV / 4); e += kNumThreads) {
      const int place = e / (kHeadDimV / 4), col = e % (kHeadDimV / 4) * 4;
      float4 x{0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < kNumWarps; ++w) {
        const float4 part = *reinterpret_cast<const float4*>(&buffer.out[w][place][col]);
        x.x += part.x, x.y += part.y, x.z += part.z, x.w += part.w;
      }
      const RowTotal total = row_total(buffer, first + place);
      const float inverse = total.sum == 0.f ? 0.f : 1.f / total.sum;
      store(first + place, col, float4{x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse}, total.lse_log2());
    }
    __syncthreads();  // everybody is done with these rows, and in the end with m and l
  }
}

// The parts of a tile, `count` of them, and where in the workspace they are; and how many thread blocks share it, the first of which is
// `first`.
struct Parts {
  int count, first, sharers;
  int64_t unit;  // with kFixedParts: of part 0, among all
  FA2_DEVICE int64_t place(const CacheParams& params, int part) const {
    // Of the two parts that a thread block may leave otherwise: that of the tile that it begins, or of the one that it goes on with.
    const int64_t slot = kFixedParts ? unit + part : 2 * (first + part) + (part == 0);
    return slot * params.part_rows;
  }
  // Whether the thread block has the part after this one, too (kFixedParts).
  FA2_DEVICE bool has_next(int part, const Walk& walk, const Share& share) const {
    return part + 1 < count && walk.start + part + 1 < share.size;
  }
};
FA2_DEVICE Parts parts_of_tile(const CacheParams& params, const Share& share, const Walk& walk, const Slices& slices) {
  const int64_t unit = share.from + walk.start;
  const int units = kFixedParts ? parts_of(params, slices) : slices.count();
  const int first = owner_of(share, unit);
  const int sharers = owner_of(share, unit + units - 1) - first + 1;
  return {kFixedParts ? units : sharers, first, sharers, unit};
}

// Whether this thread block is the last to leave its parts of a tile. All its threads have written theirs, and are at a barrier since.
FA2_DEVICE bool is_last_to_come(CombineBuffer& buffer, const CacheParams& params, const Parts& parts) {
  if (kFixedParts && parts.sharers == 1) return true;  // the counter is another tile's
  if (threadIdx.x == 0) {
    const uint32_t before = atom_acq_rel_inc(params.counters + parts.first, parts.sharers - 1);
    buffer.is_last = before == static_cast<uint32_t>(parts.sharers - 1);
  }
  __syncthreads();  // it is known, and the parts of all are seen by all
  return buffer.is_last;
}

// What all have left of a tile, a warp every kNumWarps-th: O, m and l of this thread's rows as if the warp had computed them.
template <int kMTiles, int kOTiles>
FA2_DEVICE void read_parts(const CacheParams& params, const Parts& parts, int rows, Accumulator<kMTiles, kOTiles>& acc_o,
                           float (&max)[kMTiles][2], float (&sum)[kMTiles][2]) {
  acc_o.clear();
#pragma unroll
  for (int i = 0; i < kMTiles; ++i) max[i][0] = max[i][1] = -kInfinity, sum[i][0] = sum[i][1] = 0.f;
  for (int p = warp_id(); p < parts.count; p += kNumWarps) {
    const float* lse = params.partial_lse + parts.place(params, p) + accumulator_row();
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (accumulator_row() + row_of(i, 2 * h) < rows) max[i][h] = fmaxf(max[i][h], ld_cg_f32(lse + row_of(i, 2 * h)));
  }
  for (int p = warp_id(); p < parts.count; p += kNumWarps) {
    const int64_t place = parts.place(params, p) + accumulator_row();
    const float* out = params.partial_out + place * kHeadDimV;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (max[i][h] > -kInfinity) {  // there is such a row, and it sees a key
          const float weight = ex2(ld_cg_f32(params.partial_lse + place + row_of(i, 2 * h)) - max[i][h]);
          sum[i][h] += weight;
#pragma unroll
          for (int m = 0; m < kOTiles / 2; ++m) add_columns(acc_o.x[i], out + row_of(i, 2 * h) * kHeadDimV, m, h, weight);
        }
  }
}

// Leaves 4 columns of a row of a part.
FA2_DEVICE void store_part(const CacheParams& params, int64_t place, int col, const float4& x, float lse_log2) {
  *reinterpret_cast<float4*>(params.partial_out + place * kHeadDimV + col) = x;
  if (col == 0) params.partial_lse[place] = lse_log2;
}
