// New keys and values: where they are before they are in the cache, and on their way there. Nobody reads from the cache what is being
// written to it: who needs a new key takes it from where it came from.
#pragma once

#include "common/quantised.cuh"

// Row of new key `index` of a sequence, of one of the two arrays. Packed, new keys stand where their queries do; else first_q is 0.
FA2_DEVICE const Element* new_row(const Element* array, const Strides& strides, const CachedSequence& sequence, int b, int index, int head) {
  return array + b * strides.batch + (sequence.first_q + index) * strides.row + head * strides.head;
}
// New key `index` of a sequence into the cache, if there is room: a warp, each lane some chunks.
template <typename Params>
FA2_DEVICE void append_key(const Params& params, const CachedSequence& sequence, int b, int index, int head) {
  const int key = sequence.before + index;
  if (key < 0 || key >= sequence.end) return;
  const KeyPlace place = place_of(params, sequence, key);
  if (place.row < 0) return;
  const Element* k = new_row(params.k_new, params.k_new_strides, sequence, b, index, head);
  const Element* v = new_row(params.v_new, params.v_new_strides, sequence, b, index, head);
  const Strides &ks = params.k_strides, &vs = params.v_strides;
  Stored* k_to = params.k_to + place.row * ks.batch + place.inside * ks.row + head * ks.head;
  Stored* v_to = params.v_to + place.row * vs.batch + place.inside * vs.row + head * vs.head;
  const int col = lane_id() * 8;  // 32 lanes are 256 columns
  const Chunk k_chunk = read_chunk<kTurned>(params, k, key, col, params.head_dim);
  const Chunk v_chunk = read_chunk<false>(params, v, key, col, params.head_dim_v);
  if constexpr (kQuantised > 0) {
    write_bytes(k_to, quantise_chunk(k_chunk, scale_of<false>(params, place.row, b, head)), col, params.head_dim);
    write_bytes(v_to, quantise_chunk(v_chunk, scale_of<true>(params, place.row, b, head)), col, params.head_dim_v);
  } else {
    write_chunk(k_to, k_chunk, col, params.head_dim);
    write_chunk(v_to, v_chunk, col, params.head_dim_v);
  }
}

// Whose row of packed new keys it is: the last sequence that starts there or before.
FA2_DEVICE int sequence_of_row(const CacheParams& params, int row) {
  int first = 0;
  for (int left = params.batch - 1; left > 0;) {
    const int half = (left + 1) / 2;
    if (params.starts_q[first + half] <= row) {
      first += half, left -= half;
    } else {
      left = half - 1;
    }
  }
  return first;
}

// All new keys, if there are any, shared out among the warps of all thread blocks.
template <typename Params>
FA2_DEVICE void append_new_keys(const Params& params) {
  if constexpr (kNewKeys) {
    if (params.batch == 0) return;
    const int warps = gridDim.x * kNumWarps, warp = blockIdx.x * kNumWarps + warp_id();
    const int64_t rows = params.starts_q ? params.seqlen_q : static_cast<int64_t>(params.batch) * params.seqlen_new;
    for (int64_t item = warp; item < rows * params.num_heads_k; item += warps) {
      const int head = static_cast<int>(item % params.num_heads_k);
      const int64_t row = item / params.num_heads_k;
      const int b = params.starts_q ? sequence_of_row(params, static_cast<int>(row)) : static_cast<int>(row / params.seqlen_new);
      const CachedSequence sequence = cached_sequence(params, b);
      const int index = static_cast<int>(params.starts_q ? row - sequence.first_q : row % params.seqlen_new);
      if (0 <= index && index < new_keys(params, sequence)) append_key(params, sequence, b, index, head);
    }
  }
}
