// Which elements of a tile count. The blocks that need to ask are named by visit.cuh.
#pragma once

#include "common/visit.cuh"
#include "common/position.cuh"

// S = -inf where a query does not see a key.
template <int kMTiles, int kNTiles>
FA2_DEVICE void mask_scores(Accumulator<kMTiles, kNTiles>& acc_s, const Sequence& sequence, const Position<false>& position) {
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = position.query(i, 0, 2 * h);
      const int begin = key_begin(sequence, query) - position.first_key, end = key_end(sequence, query) - position.first_key;
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e)
          if (col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_s.x[i][j][e] = -kInfinity;
    }
}

// P = 0 likewise, of the rows that are 8 * h below this thread's first one. After exp2: no -inf may meet a derivative.
template <int kNTiles>
FA2_DEVICE void mask_p(Accumulator<1, kNTiles>& acc_p, int h, const Sequence& sequence, const Position<false>& position) {
  const int query = position.query(0, 0, 2 * h);
  const int begin = key_begin(sequence, query) - position.first_key, end = key_end(sequence, query) - position.first_key;
#pragma unroll
  for (int j = 0; j < kNTiles; ++j)
#pragma unroll
    for (int e = 2 * h; e < 2 * h + 2; ++e)
      if (col_of(j, e) >= end || (kBand && col_of(j, e) < begin)) acc_p.x[0][j][e] = 0.f;
}
