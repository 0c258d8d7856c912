// Before the backward: D = rowsum(dO * O) (Dao 2023, algorithm 2, line 4), lse in base 2, and zeros for dQ or its turns. A gradient
// of lse is taken off D: lse has the derivative P, so that dS = P * (dP - D) gains P * dlse. And sums over rows, for the
// gradient of a head's own logit.
//
// One thread block per kBlockM query rows of a head, or for several short sequences (kShort); a row is shared by the lanes that hold
// its 16-byte chunks. Heads are taken from the last to the first: what flash_bwd begins with is the last that has been touched, and
// still in L2.
#include "common/bwd_tiles.cuh"
#include "common/chunk.cuh"
#include "common/dq_accum.cuh"
#include "common/real.cuh"
#include "common/statistics.cuh"

static_assert(sizeof(PreprocessParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kLanesPerRow = ceil_pow2(kHeadDimV / 8);  // eight columns each
constexpr int kRowsPerPass = kNumThreads / kLanesPerRow, kPasses = ceil_div(kBlockM, kRowsPerPass);
constexpr int kPassesAtOnce = kPasses < 4 ? kPasses : 4;  // all of their loads are issued, then they are used
static_assert(kPasses % kPassesAtOnce == 0);
static_assert(kBlockM <= kNumThreads, "a thread for each row's lse");

enum { kPiecesOfEight = 8 / kPiece };
using Chunk = ChunkOf<Element, kPiecesOfEight>;

extern "C" __global__ void __launch_bounds__(kNumThreads) flash_bwd_preprocess(const __grid_constant__ PreprocessParams params) {
  griddepcontrol_launch_dependents();  // flash_bwd may start: it waits before it needs what is written here
  const Shape& shape = params.shape;
  // Of a list of short sequences each thread block takes one after the other, kBlockM rows at a time.
  const int m_blocks = kShort ? listed_sequences(params) : query_tiles_of_head(params);
  int64_t linear = gridDim.x - 1 - blockIdx.x;
  int skipped = 0;
  Real logit_sum_before = 0.f;  // of the sequence's rows before those
  if (kShort && linear >= static_cast<int64_t>(m_blocks) * shape.num_heads) return;
  do {
    const int place = linear % m_blocks, row_of_tiles = linear / m_blocks;
    int head = row_of_tiles % shape.num_heads, batch = row_of_tiles / shape.num_heads;
    if (kListed && !has_query_tile(params, place)) return;
    const auto entry = query_tile_at(params, place, batch);
    const Sequence& sequence = sequence_of_tile(shape, entry, params);
    int64_t tile = kListed ? static_cast<int64_t>(head) * m_blocks + entry.tile : linear;
    int first_row = (kListed ? entry.block : place) * kBlockM;
    // Their statistics lie one behind the other, row by row; those of tiles are whole, rows that do not exist included.
    if constexpr (kShort) first_row = skipped, tile = statistics_of(params, head, entry) + skipped;
    constexpr int kPlaces = kShort ? 1 : kBlockM;
    const int rows = min(kBlockM, (kListed ? sequence.seqlen_q : shape.seqlen_q) - first_row);
    if constexpr (kListed) first_row = query_row(entry, first_row), batch = query_batch(entry);

    const Strides &os = params.out_strides, &dos = params.dout_strides, &ls = params.lse_strides;
    const Element* gmem_out = params.out + batch * os.batch + head * os.head + first_row * os.row;
    const Element* gmem_dout = params.dout + batch * dos.batch + head * dos.head + first_row * dos.row;
    const Real* gmem_lse = params.lse + batch * ls.batch + head * ls.head + first_row * ls.row;
    const int own_row = threadIdx.x;
    const Real lse = own_row < rows ? gmem_lse[own_row * ls.row] : -kInfinity;
    const int pass_row = threadIdx.x / kLanesPerRow, col = threadIdx.x % kLanesPerRow * 8;
    const Real logit = own_logit(params, head);
    Real logit_sum = 0.f;
#pragma unroll 1
    for (int first = 0; first < kPasses; first += kPassesAtOnce) {
      Chunk out[kPassesAtOnce], dout[kPassesAtOnce];
      Real row_lse[kPassesAtOnce];  // kOwnLogit: of the lane that is the first of a row; with +inf a lane adds nothing
#pragma unroll
      for (int pass = 0; pass < kPassesAtOnce; ++pass) {
        const int row = (first + pass) * kRowsPerPass + pass_row, cols = row < rows ? head_dim_v(params) : 0;
        out[pass] = load_chunks<kPiecesOfEight>(gmem_out + row * os.row, col, cols);
        dout[pass] = load_chunks<kPiecesOfEight>(gmem_dout + row * dos.row, col, cols);
        row_lse[pass] = kOwnLogit && row < rows && col == 0 ? gmem_lse[row * ls.row] : kInfinity;
      }
#pragma unroll
      for (int pass = 0; pass < kPassesAtOnce; ++pass) {
        Real d = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) d = fma(to_real(out[pass].x[i]), to_real(dout[pass].x[i]), d);
#pragma unroll
        for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2) d += __shfl_xor_sync(0xffffffffu, d, lanes);
        const int row = (first + pass) * kRowsPerPass + pass_row;
        if (kDlse && row < rows && col == 0) d -= dlse_of(params, batch, head, first_row + row);
        if (kOwnLogit) logit_sum -= ex2((logit - row_lse[pass]) * kLog2E) * d;
        if constexpr (kDrawn) d *= part_kept(params);
        if (row < (kShort ? rows : kBlockM) && col == 0) params.softmax_d[tile * kPlaces + row] = d;
      }
    }
    if constexpr (kShort) {
      logit_sum_before += logit_sum;
      store_own_logit_sum<kNumWarps>(params, sums_of(params, head, place), logit_sum_before);
    } else {
      store_own_logit_sum<kNumWarps>(params, tile, logit_sum);
    }
    // P = exp2(... - inf) = 0: a row past the end, or one whose every score is -inf, adds nothing to any gradient.
    if (own_row < (kShort ? rows : kBlockM)) params.lse_log2[tile * kPlaces + own_row] = lse == -kInfinity ? kInfinity : lse * kLog2E;

    if constexpr (kClearDq) {
      constexpr int kAtOnce = 16 / sizeof(Real);
      float4* dq = reinterpret_cast<float4*>(params.dq_accum + tile * kDqTileFloats);
      for (int i = threadIdx.x; i < kDqTileFloats / kAtOnce; i += kNumThreads) dq[i] = float4{0.f, 0.f, 0.f, 0.f};
    }
    if (!kShort && threadIdx.x < kDqParts) params.dq_turn[tile * kDqParts + threadIdx.x] = 0;
    if constexpr (kShort) {
      skipped = skipped + kBlockM < sequence.seqlen_q ? skipped + kBlockM : 0;
      if (skipped == 0) linear += gridDim.x, logit_sum_before = 0.f;
    }
  } while (kShort && linear < static_cast<int64_t>(m_blocks) * shape.num_heads);
}
