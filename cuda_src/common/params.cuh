// What the host hands to a kernel: one struct by value. fa2cupy/kernels/params.py has the twins; the sizes are checked
// on both sides. Strides count elements; the last dimension is contiguous. Pointers come first.
#pragma once

#include "common/listed.cuh"

struct Strides {
  int64_t batch, row, head;
};

// The whole problem. Which part of it a thread block works on: schedule.cuh and visit.cuh.
struct Shape {
  int batch, num_heads, num_heads_k;
  int seqlen_q, seqlen_k, head_dim;
  int heads_per_section;  // heads whose tiles are interleaved in launch order
};

// The band of keys that a query sees, around the key that it stands beside: so many before it and behind it.
struct WindowParams {
  int left, right;  // each at most 2^30
};

// What becomes of scores (score.cuh).
struct ScoreParams {
  const float* alibi_slopes;  // (num_heads,), or (batch, num_heads); kAlibi
  int64_t alibi_batch_stride, alibi_head_stride;  // its strides
  float softcap_factor;  // softmax_scale / softcap; kSoftcap
  float softcap_log2;    // softcap * log2(e)
};
enum { kScores = kSoftcap || kAlibi };  // scores become others

// A logit of each query head that takes part in the softmax of its rows, and in nothing else.
struct SinksParams {
  const void* sinks;  // (num_heads,): float32, or Element
  int sinks_are_16_bit;
};
// And its gradient. sink_sums: a workspace, (batch, num_heads, m_blocks, warps), of a list (num_heads, tiles_of_head_q, warps): a part
// of the gradient from the rows of each warp of flash_bwd_preprocess.
struct SinksGradientParams {
  const void* sinks;
  void* dsinks;
  float* sink_sums;
  int sinks_are_16_bit;
};

// Which blocks of 128 queries and 128 keys meet each other, by lists, and bits of those of which a part is seen: G masks, M blocks of
// queries, N of keys. What is in the arrays says fa2cupy/block_mask/lists.py.
struct PickedParams {
  const int4* mask_rows_q;     // (G, M)
  const int2* mask_entries_q;  // (entries,)
  const int4* mask_rows_k;     // (G, N)
  const int2* mask_entries_k;  // (entries,)
  const int* mask_ranks;       // (entries,)
  const uint32_t* mask_bits;   // (partial blocks, 2, 128, 4)
  int batch_masks, head_masks;  // how many masks further that of the next row of the batch is, and of the next query head
  int query_blocks, key_blocks;       // M and N
  int heads_of_key;                   // query heads that share a key head
};

// What dropout drops (dropout.cuh).
struct DropoutParams {
  const uint32_t* dropout_seed;  // so many words: seed and offset, of two each, and two each for what is added to batch and head; or the
  int words;                     // first 2 or 4 of them, and the others are 0
  uint32_t threshold;            // of 32768, in both halves of the word: as many of so many elements are dropped
  float kept, inverse;           // what part of P is kept, and its inverse
  int first_query, first_key;    // how many queries and keys the host has left out in front
};

// The struct of a kernel with the blocks behind it that there are, in this order. Without any it is the struct itself: an empty base
// would make some plain kernels of sm80/flash_bwd.cu others.
template <bool kGiven, typename Block>
struct Part {};
template <typename... Parts>
struct Joined : Parts... {};
template <typename Done, typename... Parts>
struct ComposedOf {
  using Type = Done;
};
template <typename Struct>
struct ComposedOf<Joined<Struct>> {
  using Type = Struct;
};
template <typename... Done, typename Block, typename... Parts>
struct ComposedOf<Joined<Done...>, Part<true, Block>, Parts...> : ComposedOf<Joined<Done..., Block>, Parts...> {};
template <typename... Done, typename Block, typename... Parts>
struct ComposedOf<Joined<Done...>, Part<false, Block>, Parts...> : ComposedOf<Joined<Done...>, Parts...> {};
template <typename Struct, typename... Parts>
using Composed = typename ComposedOf<Joined<Struct>, Parts...>::Type;

struct FwdParams {
  const Element* q;  // (batch, seqlen_q, num_heads, head_dim)
  const Element* k;  // (batch, seqlen_k, num_heads_k, head_dim)
  const Element* v;  // (batch, seqlen_k, num_heads_k, head_dim_v)
  Element* out;      // (batch, seqlen_q, num_heads, head_dim_v)
  float* lse;        // (batch, num_heads, seqlen_q), natural logarithm
  Strides q_strides, k_strides, v_strides, out_strides, lse_strides;
  Shape shape;
  float scale_softmax_log2;  // softmax_scale * log2(e)
  int head_dim_v;
};

// Columns of V, O and dO. Where they are those of Q and K, one number for both takes fewer registers.
template <typename Params>
FA2_DEVICE int head_dim_v(const Params& params) {
  return kOwnHeadDimV ? params.head_dim_v : params.shape.head_dim;
}

// A CUtensorMap: how bulk tensor copies address an array. Encoded by fa2cupy/jit/tensor_map.py.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

using FwdBandParams =
    Composed<FwdParams, Part<kBand, WindowParams>, Part<kScores, ScoreParams>, Part<kPicked, PickedParams>,
             Part<kOwnLogit, SinksParams>, Part<kDrawn, DropoutParams>, Part<kListed, ListParams>>;

// The forward of sm_90: arrays as in FwdParams, as maps of dimensions (head_dim or head_dim_v, row, head, batch) whose
// boxes are 64 columns x 64 (q, out) or kBlockN (k, v) rows, with 128-byte swizzle. kListed: maps as sm90/tile.cuh reads them there.
struct FwdTmaParams {
  TensorMap q, k, v, out;
  float* lse;
  Strides lse_strides;
  Shape shape;
  float scale_softmax_log2;
};

using FwdTmaBandParams =
    Composed<FwdTmaParams, Part<kBand, WindowParams>, Part<kScores, ScoreParams>, Part<kPicked, PickedParams>,
             Part<kOwnLogit, SinksParams>, Part<kDrawn, DropoutParams>, Part<kListed, ListParams>>;

struct BwdParams {
  const Element* dout;  // like out
  const Element* q;     // (batch, seqlen_q, num_heads, head_dim)
  const Element* k;     // (batch, seqlen_k, num_heads_k, head_dim)
  const Element* v;     // (batch, seqlen_k, num_heads_k, head_dim_v)
  const Element* out;   // (batch, seqlen_q, num_heads, head_dim_v)
  const float* lse;     // (batch, num_heads, seqlen_q)
  Element* dq;          // like q
  Element* dk;          // like k
  Element* dv;          // like v
  // Workspaces; a row of tiles is m_blocks * kBlockM query rows long.
  float* lse_log2;   // (batch, num_heads, m_blocks * kBlockM): lse * log2(e), +inf past the last row
  float* softmax_d;  // (batch, num_heads, m_blocks * kBlockM): D = rowsum(dO * O) (of what dropout keeps), 0 past the last row
  float* dq_accum;   // (batch, num_heads, m_blocks, kDqTileFloats), in the order of dq_accum.cuh
  int* dq_turn;      // (batch, num_heads, m_blocks, kDqParts), from 0: whose turn it is to add to dQ
  float* dk_partial;  // (batch, num_heads_k, splits, n_blocks * kBlockN, kHeadDim), scaled (splits > 1 only)
  float* dv_partial;  // likewise with kHeadDimV columns, and nothing to scale
  Strides dout_strides, q_strides, k_strides, v_strides, out_strides, lse_strides, dq_strides, dk_strides, dv_strides;
  Shape shape;
  float scale_softmax_log2, softmax_scale;
  // Thread blocks that share a key block: what it meets of the queries of all query heads, one after the other, is cut into as many
  // parts. sm_80: divides num_heads / num_heads_k.
  int splits;
  int head_dim_v;
};

// What a backward adds for a gradient of lse.
struct DlseParams {
  const float* dlse;  // (batch, num_heads, seqlen_q), of all queries: the first of those in `shape` is dlse_first_row
  Strides dlse_strides;
  int dlse_first_row;
};

using BwdBandParams = Composed<BwdParams, Part<kBand, WindowParams>, Part<kScores, ScoreParams>, Part<kPicked, PickedParams>,
                               Part<kDrawn, DropoutParams>, Part<kListed, ListParams>>;
using PreprocessParams = Composed<BwdParams, Part<kOwnLogit, SinksGradientParams>, Part<kDrawn, DropoutParams>,
                                  Part<kDlse, DlseParams>, Part<kListed, ListParams>>;
using PostprocessParams = Composed<BwdParams, Part<kListed, ListParams>>;

// The backward of sm_90: arrays and workspaces as in BwdParams. Boxes are 64 columns x kBlockM (q, dout) or kBlockN (k, v)
// rows, with 128-byte swizzle; lse_log2 and softmax_d are float32 of dimensions (kBlockM, tile), in boxes of a tile each.
struct BwdTmaParams {
  TensorMap dout, q, k, v, lse_log2, softmax_d;
  Element* dk;
  Element* dv;
  float* dq_accum;
  int* dq_turn;
  float* dk_partial;
  float* dv_partial;
  Strides dk_strides, dv_strides;
  Shape shape;
  float scale_softmax_log2, softmax_scale;
  int splits, head_dim_v;
};

using BwdTmaBandParams = Composed<BwdTmaParams, Part<kBand, WindowParams>, Part<kScores, ScoreParams>,
                                  Part<kPicked, PickedParams>, Part<kDrawn, DropoutParams>, Part<kListed, ListParams>>;

struct FillParams {
  Element* rows;  // (batch, seqlen, num_heads, head_dim), or head_dim_v: its rows [0, num_rows) become 0
  float* lse;     // (batch, num_heads, seqlen): likewise -inf (with kOwnLogit the sink); or null
  Strides row_strides, lse_strides;
  int batch, num_rows, num_heads, head_dim;
};
using FillUnseenParams = Composed<FillParams, Part<kPicked, PickedParams>, Part<kOwnLogit, SinksParams>>;

struct ListTilesParams {
  ListedTile* tiles_q;  // (tiles_of_head_q,), or null: no list is asked for
  ListedTile* tiles_k;
  int* counts;  // (2,), of segments (4,)
  // Results, each null where there is none: rows that no tile comes to become 0, and -inf in lse (with kOwnLogit the
  // sink, if they belong to a sequence).
  Element* out;  // of the queries: out, or dq
  float* lse;
  Element* dk;
  Element* dv;
  Strides out_strides, lse_strides, dk_strides, dv_strides;
  int rows_q, rows_k, tiles_of_head_q, tiles_of_head_k;  // as in ListParams
  int num_heads, num_heads_k;
  int cols_out, cols_dk, cols_dv;
};
using ListTilesBandParams =
    Composed<ListTilesParams, Part<kBand, WindowParams>, Part<kOwnLogit, SinksParams>, Part<true, LengthsParams>,
             Part<kSegments, SegmentParams>>;

struct FindParams {
  int rows_q, rows_k;  // of each row of the batch
};
using FindSegmentsParams = Composed<FindParams, Part<true, LengthsParams>, Part<true, SegmentParams>>;

// Of flash_bwd_sinks. A thread block for each head.
struct SinksBwdParams {
  int batch, num_heads;
  int tiles_of_head;  // of queries, in each row of the batch; of a list at most. 0: nothing was summed up
  int sums_of_tile;
};
using SinksBwdBandParams =
    Composed<SinksBwdParams, Part<kBand, WindowParams>, Part<true, SinksGradientParams>, Part<kListed, LengthsParams>,
             Part<kDlse, DlseParams>, Part<kListed, ListParams>, Part<kSegments, SegmentParams>>;

// Pieces of attention that are merged: out and lse of the queries over some of the keys each. All are laid out alike.
struct MergeParams {
  const void* outs[32];  // (batch, num_rows, num_heads, cols), PieceElement
  const float* lses[32];  // (batch, num_heads, num_rows)
  void* out;  // likewise, over all keys
  float* lse;
  Strides outs_strides, lses_strides, out_strides, lse_strides;
  int batch, num_rows, num_heads, cols;
};

// The gradients of that: of the pieces those that come out, dense ones.
struct MergeBwdParams {
  const void* outs[32];
  const float* lses[32];
  void* douts[32];
  float* dlses[32];
  const void* out;
  const float* lse;
  const void* dout;
  const float* dlse;
  Strides outs_strides, lses_strides, douts_strides, dlses_strides, out_strides, lse_strides, dout_strides, dlse_strides;
  int batch, num_rows, num_heads, cols;
};
