// Attention of a few queries over the keys of a cache, at the speed of the memory: every GPU from sm_80 on.
//
//   O = softmax(scale * Q K^T) V,   lse = log(sum(exp(scale * Q K^T)))
//
// All query heads of a key head are rows of one tile, kBlockM at most, and nobody reads a key twice for them. The keys of all tiles are
// cut into equal shares, one for each thread block (work_list.cuh). In a thread block each warp takes every kNumWarps-th slice of
// kBlockN keys, through a ring of its own, and no warp waits for another:
//
//   wait for the slice    S = Q K^T   P = exp(scale * S - m)   O = diag(alpha) O + P V    load another into its place
//
// The ring does not run dry at the end of a tile: the slices of the next one are on their way by then. Q is in registers. Where a tile
// ends, in a thread block, its warps add up what they have, and where several thread blocks share it the last of them adds up theirs
// (combine.cuh).
#include "common/combine.cuh"
#include "common/packed_scores.cuh"
#include "sm80/key_stream.cuh"

static_assert(sizeof(DecodeParams) == kParamsBytes, "kernels/cache_params.py and common/cache_params.cuh differ");

constexpr int kMTiles = kBlockM / 16;
constexpr int kSTiles = kBlockN / 8, kOTiles = kHeadDimV / 8;
constexpr int kHeadSteps = kHeadDim / 16, kKeySteps = kBlockN / 16;

// What the thread block works on. Registers are for the products: whatever is not needed with them is read from here.
struct Work {
  Walk walk;
  Slices part;  // of the tile's slices
  int rows;
  bool is_whole;  // that is all of them; else what follows says where what becomes of it goes
  Parts parts;
  int number;  // of the part, among these
};

struct SharedMemory {
  Slot ring[kNumWarps][kSlots];
  Tile<kBlockM, kHeadDim> q;
  CombineBuffer combine;
  KeyStream streams[kNumWarps];
  Work work;
  float q_factor[kQuantised > 0 ? kBlockM : 1];  // what the rows of Q were divided by
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/sm80/flash_decode.py and this struct differ");

// Q of a tile, zeros where there is no row or column. All threads. For bytes (sm80/key_bytes.cuh) it becomes float16, each row of
// bfloat16 divided by a power of two that its largest element is not above.
template <typename Params>
FA2_DEVICE void load_q(SharedMemory& smem, const Params& params, const Work& work) {
  const Walk& walk = work.walk;
  constexpr int kChunks = kHeadDim / 8;
  for (int i = threadIdx.x; i < kBlockM * kChunks; i += kNumThreads) {
    const int row = i / kChunks, col = i % kChunks * 8;
    const PackedRow packed = packed_row(params, walk.head(), walk.block() * kBlockM + row);
    const Element* gmem = params.q + row_offset(params.q_strides, walk.sequence, walk.b, packed);
    Chunk chunk{{0, 0, 0, 0}};
    if (row < work.rows) {
      int position = 0;
      if constexpr (kTurned) position = walk.sequence.before + (params.each ? packed.query : 0);
      chunk = read_chunk<kTurned>(params, gmem, position, col, params.head_dim);
    }
    Element* target = smem.q.data + row * smem.q.kRowElements;
    if constexpr (kQuantised == 0) {
      *reinterpret_cast<uint4*>(target + col) = uint4{chunk.pairs[0], chunk.pairs[1], chunk.pairs[2], chunk.pairs[3]};
    } else {
      const float factor = row < work.rows ? power_of_row(gmem, params.head_dim) : 1.f;
      if (col == 0) smem.q_factor[row] = factor;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t pair = chunk.pairs[j];
        const float x = to_float(Element{static_cast<uint16_t>(pair)}), y = to_float(Element{static_cast<uint16_t>(pair >> 16)});
        *reinterpret_cast<uint32_t*>(target + place_of_column(col + 2 * j)) = cvt_pack<half_t>(x / factor, y / factor);
      }
    }
  }
}

// Q as the A operand.
using QOperand = KeptOperand<Tile<kBlockM, kHeadDim>::kRowBytes, kMTiles, kQStepsInRegs>;

// What a tile's scores, or its results, are still to be multiplied by.
template <bool kOfValues, typename Params>
FA2_DEVICE float factor_of_tile(const Params& params, const Walk& walk) {
  if constexpr (kQuantised == 0) {
    return 1.f;
  } else if constexpr (kScaleOfPage) {
    return kWidenedUnit;
  } else {
    return kWidenedUnit * scale_of<kOfValues>(params, 0, walk.b, walk.head());
  }
}

// S = Q K^T
template <typename AnySlot>
FA2_DEVICE void multiply_keys(Accumulator<kMTiles, kSTiles>& acc_s, const QOperand& q, const SharedMemory& smem, const AnySlot& slot) {
  acc_s.clear();
  if constexpr (kQuantised == 0) {
    gemm<kHeadSteps>(acc_s, q, operand_b_transposed(slot.k, 0, 0));
  } else {
    gemm_keys(acc_s, q, slot.k);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float factor = smem.q_factor[accumulator_row() + row_of(i, e)];
#pragma unroll
        for (int j = 0; j < kSTiles; ++j) acc_s.x[i][j][e] *= factor;
      }
    multiply_columns<false>(acc_s, slot);
  }
}

// O += P V
template <typename AnySlot>
FA2_DEVICE void multiply_values(Accumulator<kMTiles, kOTiles>& acc_o, Accumulator<kMTiles, kSTiles>& acc_p, const AnySlot& slot) {
  if constexpr (kQuantised == 0) {
    gemm<kKeySteps>(acc_o, to_fragments(acc_p), operand_b(slot.v, 0, 0));
  } else {
    multiply_columns<true>(acc_p, slot);
    gemm_values(acc_o, to_fragments<half_t>(acc_p), slot.v);
  }
}

// Four columns of a row of out, and its lse.
template <typename Params>
FA2_DEVICE void store_row(const Params& params, const Walk& walk, int row, int col, float4 x, float lse_log2) {
  if constexpr (kQuantised > 0) {
    const float factor = factor_of_tile<true>(params, walk);
    x = float4{x.x * factor, x.y * factor, x.z * factor, x.w * factor};
  }
  const PackedRow packed = packed_row(params, walk.head(), walk.block() * kBlockM + row);
  const float of_own = with_own_logit(params, packed.head, lse_log2);
  if constexpr (kOwnLogit) x = float4{x.x * of_own, x.y * of_own, x.z * of_own, x.w * of_own};
  Element* out = params.out + row_offset(params.out_strides, walk.sequence, walk.b, packed) + col;
  const uint2 elements{cvt_pack<Element>(x.x, x.y), cvt_pack<Element>(x.z, x.w)};
  if constexpr (kAligned) {
    if (col < params.head_dim_v) *reinterpret_cast<uint2*>(out) = elements;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (col + i < params.head_dim_v)
        out[i] = Element{static_cast<uint16_t>((i < 2 ? elements.x : elements.y) >> 16 * (i % 2))};
  }
  if (col == 0) params.lse[row_offset(params.lse_strides, walk.sequence, walk.b, packed)] = lse_log2 * kLn2;
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) flash_decode(const __grid_constant__ DecodeParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  fill_rows_of_no_sequence(params);
  const Share share = share_of(params, blockIdx.x, gridDim.x);
  if (share.size == 0) return append_new_keys(params);
  Walk walk(params, share);
  Slot* ring = smem.ring[warp_id()];
  auto load_slice = [&](KeyStream& stream, int slot) {
    stream.load(params, share, ring[slot]);
    cp_async_commit_group();
  };
  {
    KeyStream stream(params, share, walk);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) load_slice(stream, i);
    if (lane_id() == 0) smem.streams[warp_id()] = stream;
  }
  append_new_keys(params);  // while the first slices are on their way
  int slot = 0;
  for (; walk.start < share.size; walk.next(params, share)) {
    const SeenKeys seen = seen_keys(params, walk.sequence, walk.block());
    const Slices slices = slices_of(seen);
    Work work;
    work.walk = walk, work.part = walk.part_of(params, slices, share);
    // Others have its slices; or there are none, and it is theirs.
    if (work.part.count() == 0 && (slices.count() > 0 || !walk.is_first())) continue;
    work.rows = min(kBlockM, walk.sequence.seqlen_q * params.group.value - walk.block() * kBlockM);
    work.is_whole = work.part.count() == slices.count();
    work.parts = work.is_whole ? Parts{} : parts_of_tile(params, share, walk, slices);
    work.number = kFixedParts ? walk.part : static_cast<int>(blockIdx.x) - work.parts.first;
    if (threadIdx.x == 0) smem.work = work;
    load_q(smem, params, work);
    __syncthreads();  // Q is there, and what the work is
    QOperand operand_q{operand_a(smem.q, 0, 0)};
    operand_q.keep();
    const float factor = factor_of_tile<false>(params, walk), scale_log2 = packed_exponent_scale(params, factor);
    const int row = walk.block() * kBlockM + accumulator_row();  // this thread's first, among those of the sequence
    const auto of_rows = scores_of_rows<kMTiles>(params, walk.b, walk.head(), row);

    Softmax<kMTiles> softmax;
    Accumulator<kMTiles, kOTiles> acc_o;
    acc_o.clear();
    const int end = work.part.end, all_from = seen.all_from, all_to = seen.all_to;
    for (int n = work.part.begin + warp_id(); n < end; n += kNumWarps) {
      cp_async_wait_group<kSlots - 1>();
      __syncwarp();  // the slice is there, every lane's part of it, and where the stream goes on
      Accumulator<kMTiles, kSTiles> acc_s;
      multiply_keys(acc_s, operand_q, smem, ring[slot]);
      const int first_key = n * kBlockN;
      const CachedSequence& sequence = smem.work.walk.sequence;
      const auto shift = modify_packed_scores(acc_s, params, factor, of_rows, sequence, row, first_key + accumulator_col());
      if (first_key < all_from || first_key + kBlockN > all_to) {
        mask_packed_scores(acc_s, params, sequence, row, first_key + accumulator_col());
      }
      softmax.update(acc_s, acc_o, scale_log2, shift);
      multiply_values(acc_o, acc_s, ring[slot]);
      KeyStream stream = smem.streams[warp_id()];
      __syncwarp();  // every lane is done with the slice, and has read where the stream goes on
      load_slice(stream, slot);
      if (lane_id() == 0) smem.streams[warp_id()] = stream;
      slot = slot + 1 == kSlots ? 0 : slot + 1;
    }

    const Work& done = smem.work;
    float max[kMTiles][2], sum[kMTiles][2];
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        max[i][h] = softmax.max[i][h] == -kInfinity ? -kInfinity : softmax.scaled(softmax.max[i][h], scale_log2);
        sum[i][h] = row_sum(softmax.sum[i][h]);
      }
    for (bool is_final = done.is_whole;; is_final = true) {
      add_up_warps(smem.combine, acc_o, max, sum, done.rows, [&](int row, int col, const float4& x, float lse_log2) {
        if (is_final) {
          store_row(params, done.walk, row, col, x, lse_log2);
        } else {
          store_part(params, done.parts.place(params, done.number) + row, col, x, lse_log2);
        }
      });
      if (is_final || (kFixedParts && done.parts.has_next(done.number, done.walk, share))) break;
      if (!is_last_to_come(smem.combine, params, done.parts)) break;
      read_parts(params, done.parts, done.rows, acc_o, max, sum);
    }
    walk = done.walk;
    __syncthreads();  // everybody knows where to go on
  }
}
