// What kernels over a cache are told (cache.cuh). Twins: kernels/cache_params.py.
#pragma once

#include "common/params.cuh"

// Division of a number in [0, 2^31) by one that the host knows.
struct Divisor {
  uint32_t factor;
  int shift, value;
  FA2_DEVICE int quotient(int x) const;
};
FA2_DEVICE int Divisor::quotient(int x) const { return static_cast<int>(static_cast<uint64_t>(x) * factor >> shift); }

// What the cache holds.
template <bool kByte>
struct StoredOf {
  using Type = Element;
};
template <>
struct StoredOf<true> {
  using Type = unsigned char;
};
using Stored = StoredOf<kOfBytes>::Type;

struct CacheParams {
  const Element* q;      // (batch, seqlen_q, num_heads, head_dim); with starts_q (total, num_heads, head_dim), batch stride 0
  const Stored* k;       // (rows, page, num_heads_k, head_dim): a row is a sequence's, or a page
  const Stored* v;       // (rows, page, num_heads_k, head_dim_v)
  Element* out;          // (batch, seqlen_q, num_heads, head_dim_v)
  float* lse;            // (batch, num_heads, seqlen_q), natural logarithm
  const int* table;      // page numbers, or null
  const int* table_starts;  // (table_rows + 1,): row i of the table is [table_starts[i], table_starts[i + 1]); or null: table_width each
  // (batch,) each, or null
  const int* seqlens;    // keys before new ones
  const int* seqused;    // keys
  const int* batch_idx;  // row of the cache, or of the table
  const int* leftpad;    // first key in use
  const int* starts_q;   // (batch + 1,)
  // Workspaces: parts of tiles that several thread blocks share (combine.cuh).
  float* partial_out;    // (parts, part_rows, kHeadDimV): 2 * blocks parts, or with kFixedParts as many as there can be
  float* partial_lse;    // (parts, part_rows)
  int* counters;         // (blocks,): 0 before and after
  int64_t seqlens_number;  // for all sequences, where seqlens is null; below 0: as many as there is room for
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
  int batch, seqlen_q, num_heads, num_heads_k, head_dim, head_dim_v;
  int rows, table_rows, table_width, table_entries;  // entries: of a table with starts
  Divisor page, group;  // keys of a page (of a row without pages), query heads of a key head
  int left, right;       // the band of keys that a query sees (visit.cuh); at most the lengths
  int seqlen_new;        // new keys of each sequence, behind those of the cache; below 0: as many as it has queries
  int part_rows;         // rows of a part
  int part_slices;       // with kFixedParts: slices of a part
  float scale_softmax_log2;
};

// New keys, where they still have to be written to the cache (append.cuh).
struct NewKeysParams {
  const Element* k_new;  // (batch, seqlen_new, num_heads_k, head_dim); with starts_q (total, num_heads_k, head_dim), batch stride 0
  const Element* v_new;  // likewise, head_dim_v
  Stored* k_to;          // the cache
  Stored* v_to;
  Strides k_new_strides, v_new_strides;
};

// Queries and new keys are turned by their positions (rotary.cuh).
struct TurnParams {
  const void* cos;  // (positions, half), Element or float32
  const void* sin;
  int half, positions;   // pairs of columns
  int neighbours;        // whether a pair is columns 2 i and 2 i + 1, not i and i + half
  int is_float;
  int each;              // whether a query follows the one before, or all stand where the first new key does
};

// What 8 bits are multiplied by (quantised.cuh): numbers, or arrays with strides along pages, sequences and heads.
struct ScaleParams {
  const float* k_scale;  // or null
  const float* v_scale;
  float k_number, v_number;
  int k_page, k_batch, k_head, v_page, v_batch, v_head;
};

using DecodeParams =
    Composed<CacheParams, Part<kNewKeys, NewKeysParams>, Part<kTurned, TurnParams>, Part<kOfBytes, ScaleParams>,
             Part<kScores, ScoreParams>, Part<kOwnLogit, SinksParams>>;
