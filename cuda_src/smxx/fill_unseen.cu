// Rows that no softmax reaches: queries that see no key (out = 0, lse = -inf or what there is of a logit, dQ = 0), keys that no query sees (dK = dV = 0).
#include "common/picked.cuh"
#include "common/statistics.cuh"

static_assert(sizeof(FillUnseenParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

// One thread per (batch, row, head, 16 elements).
extern "C" __global__ void __launch_bounds__(kFillThreads) fill_unseen(const __grid_constant__ FillUnseenParams params) {
  const int pieces = ceil_div(params.head_dim, 16);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  const int piece = index % pieces;
  const int64_t row_index = index / pieces;
  const int head = row_index % params.num_heads;
  const int row = row_index / params.num_heads % params.num_rows;
  const int64_t batch = row_index / params.num_heads / params.num_rows;
  if (batch >= params.batch || !is_unmet(params, batch, head, row)) return;
  const Strides &rs = params.row_strides, &ls = params.lse_strides;
  Element* elements = params.rows + batch * rs.batch + row * rs.row + head * rs.head;
  for (int i = piece * 16; i < min(piece * 16 + 16, params.head_dim); ++i) elements[i] = Element{0};
  if (piece == 0 && params.lse) params.lse[batch * ls.batch + row * ls.row + head * ls.head] = own_logit(params, head);
}
