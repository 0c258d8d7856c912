// Where the elements of an accumulator of scores stand: the only place that knows which of its sides are the queries.
//
//   plain       rows are queries, columns keys: both forwards, sm90/flash_bwd_wide.cu
//   transposed  rows are keys, columns queries: sm80/flash_bwd.cu, sm90/flash_bwd.cu
#pragma once

#include "common/accumulator.cuh"

template <bool kTransposed>
struct Position {
  int first_query, first_key;  // of this thread's first element
  FA2_DEVICE int query(int i, int j, int e) const { return first_query + (kTransposed ? col_of(j, e) : row_of(i, e)); }
  FA2_DEVICE int key(int i, int j, int e) const { return first_key + (kTransposed ? row_of(i, e) : col_of(j, e)); }
};
