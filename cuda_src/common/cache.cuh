// A cache: which keys a sequence has in it and where they lie, and which of them a block of rows sees. Whatever lengths and tables
// hold, no row outside the arrays is meant by them, and nothing of a table behind a sequence's last key is followed.
//
// Rows are packed: the num_heads / num_heads_k query heads that share a key head are rows of one matrix, so that its keys are read
// once for all of them. Row r of a sequence is query r / group, head r % group of those.
#pragma once

#include "common/accumulator.cuh"
#include "common/cache_params.cuh"

// What a sequence has: keys [first, end) of row `row` of the cache or of the table, those from `before` on new, and queries [first_q,
// first_q + seqlen_q). New key i is key before + i.
struct CachedSequence {
  int row, first, before, end;
  int first_q, seqlen_q;
};

FA2_DEVICE int clamp(int x, int low, int high) { return min(max(x, low), high); }

FA2_DEVICE int new_keys(const CacheParams& params, const CachedSequence& sequence) {
  return params.seqlen_new < 0 ? sequence.seqlen_q : params.seqlen_new;
}

FA2_DEVICE CachedSequence cached_sequence(const CacheParams& params, int b) {
  CachedSequence sequence{b, 0, 0, 0, 0, params.seqlen_q};
  if (params.starts_q) {
    sequence.first_q = clamp(params.starts_q[b], 0, params.seqlen_q);
    sequence.seqlen_q = clamp(params.starts_q[b + 1], sequence.first_q, params.seqlen_q) - sequence.first_q;
  }
  if (params.batch_idx) sequence.row = params.batch_idx[b];
  if (sequence.row < 0 || sequence.row >= params.table_rows || params.rows == 0) return sequence;
  int room = params.table_width * params.page.value;
  if (params.table_starts) {
    const int start = clamp(params.table_starts[sequence.row], 0, params.table_entries);
    const int pages = clamp(params.table_starts[sequence.row + 1], start, params.table_entries) - start;
    room = min(pages, params.table_width) * params.page.value;
  }
  if (params.seqused) {
    sequence.end = clamp(params.seqused[b], 0, room);
    sequence.before = sequence.end - new_keys(params, sequence);
  } else {
    sequence.before = params.seqlens_number < 0 ? room : min(static_cast<int>(params.seqlens_number), room);
    if (params.seqlens) sequence.before = clamp(params.seqlens[b], 0, room);
    sequence.end = min(sequence.before + new_keys(params, sequence), room);
  }
  if (params.leftpad) sequence.first = clamp(params.leftpad[b], 0, sequence.end);
  return sequence;
}

// Where a key of a sequence is: a row of the cache (its own, or a page; -1 for a number that is no page's), and the row in there.
struct KeyPlace {
  int row, inside;
};
FA2_DEVICE KeyPlace place_of(const CacheParams& params, const CachedSequence& sequence, int key) {
  if constexpr (!kScattered) {
    return {sequence.row, key};
  } else {
    const int* table = params.table + static_cast<int64_t>(sequence.row) * params.table_width;
    if (params.table_starts) table = params.table + clamp(params.table_starts[sequence.row], 0, params.table_entries);
    const int page = params.page.quotient(key);
    const int row = table[page];
    return {0 <= row && row < params.rows ? row : -1, key - page * params.page.value};
  }
}

// Query `query` of a sequence sees its keys [key_begin, key_end).
FA2_DEVICE int cached_key_begin(const CacheParams& params, const CachedSequence& sequence, int query) {
  return max(sequence.first, query + sequence.end - sequence.seqlen_q - params.left);
}
FA2_DEVICE int cached_key_end(const CacheParams& params, const CachedSequence& sequence, int query) {
  return min(sequence.end, query + sequence.end - sequence.seqlen_q + params.right + 1);
}

// The keys that some row of a block sees, [begin, end), and those that all of them see, [all_from, all_to).
struct SeenKeys {
  int begin, end, all_from, all_to;
};
FA2_DEVICE int row_blocks(const CacheParams& params, const CachedSequence& sequence) {
  return ceil_div(sequence.seqlen_q * params.group.value, kBlockM);
}
FA2_DEVICE SeenKeys seen_keys(const CacheParams& params, const CachedSequence& sequence, int block) {
  const int first = params.group.quotient(block * kBlockM);
  const int last = params.group.quotient(min((block + 1) * kBlockM, sequence.seqlen_q * params.group.value) - 1);
  return {cached_key_begin(params, sequence, first), cached_key_end(params, sequence, last),
          cached_key_begin(params, sequence, last), cached_key_end(params, sequence, first)};
}

// Of a row of a block: its query, and its head among all.
struct PackedRow {
  int query, head;
};
FA2_DEVICE PackedRow packed_row(const CacheParams& params, int head_k, int row) {
  const int query = params.group.quotient(row);
  return {query, head_k * params.group.value + row - query * params.group.value};
}
FA2_DEVICE int64_t row_offset(const Strides& strides, const CachedSequence& sequence, int b, const PackedRow& row) {
  return b * strides.batch + (sequence.first_q + row.query) * strides.row + row.head * strides.head;
}

// S = -inf where a row does not see a key. `first_row`, `first_key`: of this thread's first element.
template <int kMTiles, int kNTiles>
FA2_DEVICE void mask_packed_scores(Accumulator<kMTiles, kNTiles>& acc_s, const CacheParams& params, const CachedSequence& sequence,
                                   int first_row, int first_key) {
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = params.group.quotient(first_row + row_of(i, 2 * h));
      const int begin = cached_key_begin(params, sequence, query) - first_key;
      const int end = cached_key_end(params, sequence, query) - first_key;
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e)
          if (col_of(j, e) < begin || col_of(j, e) >= end) acc_s.x[i][j][e] = -kInfinity;
    }
}

// Packed queries of no sequence, in front of the first and behind the last: out 0, lse -inf. All warps of all thread blocks.
FA2_DEVICE void fill_rows_of_no_sequence(const CacheParams& params) {
  if (params.starts_q == nullptr) return;
  const int from = clamp(params.starts_q[0], 0, params.seqlen_q);
  const int to = clamp(params.starts_q[params.batch], from, params.seqlen_q);
  const int warps = gridDim.x * kNumWarps;
  for (int row = blockIdx.x * kNumWarps + warp_id(); row < params.seqlen_q; row += warps) {
    if (from <= row && row < to) continue;
    for (int head = 0; head < params.num_heads; ++head) {
      Element* out = params.out + row * params.out_strides.row + head * params.out_strides.head;
      for (int col = lane_id(); col < params.head_dim_v; col += 32) out[col] = Element{0};
      if (lane_id() == 0) params.lse[row * params.lse_strides.row + head * params.lse_strides.head] = -kInfinity;
    }
  }
}
