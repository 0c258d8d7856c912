// Before kernels whose tiles come from lists (listed.cuh): the lists, and the rows that no tile comes to.
//
// Thread block 0 lists. Sequences are read kNumThreads at a time, a thread each; the tiles of these are then dealt out to all threads,
// whoever's they are: a sequence of a thousand tiles takes no longer than a thousand sequences of one. Rows that see nothing are no part
// of a sequence here, so that every tile meets a block and nobody who takes one ever skips it. First come the tiles of queries with
// the most key blocks, and the other way round (a counting sort: once to count how many meet how many, once to place), or all in the
// order of the sequences (kInOrder).
//
// The other thread blocks look after the rows that belong to no sequence or see nothing, a warp for a few neighbouring rows. They take
// nothing from block 0, and do not wait for it.
#include "common/schedule.cuh"
#include "common/sequences.cuh"

static_assert(sizeof(ListTilesBandParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kBins = kNumThreads;
constexpr int kRowsPerWarp = 16;
static_assert(ceil_pow2(kNumThreads) == kNumThreads, "a binary search over the sequences of all threads");

// With kPositioned, how many rows were left out in front of each sequence here.
template <bool kGiven>
struct InFront {
  FA2_DEVICE void set(int, int, int) {}
};
template <>
struct InFront<true> {
  int in_front_q[kNumThreads], in_front_k[kNumThreads];
  FA2_DEVICE void set(int s, int queries, int keys) { in_front_q[s] = queries, in_front_k[s] = keys; }
};
struct SharedMemory : InFront<kPositioned> {
  int first_q[kNumThreads], seqlen_q[kNumThreads], first_k[kNumThreads], seqlen_k[kNumThreads];
  int end_q[kNumThreads], end_k[kNumThreads];  // tiles of the sequences here up to this one
  int bin_q[kBins], bin_k[kBins];  // how many tiles meet so many blocks, the most first; then where the next of them goes
  int warp_q[kNumWarps], warp_k[kNumWarps];
  int mixed_q, mixed_k;  // whether sequences that have tiles have other numbers of them
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/smxx/list_tiles.py and this struct differ");

// ---- lists --------------------------------------------------------------------------------------------------------------

// x and y summed over the threads up to this one, each on its own. The caller has a barrier between two of these.
FA2_DEVICE void sum_up(SharedMemory& smem, int& x, int& y) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int before_x = __shfl_sync(0xffffffffu, x, lane - d), before_y = __shfl_sync(0xffffffffu, y, lane - d);
    if (lane >= d) x += before_x, y += before_y;
  }
  if (lane == 31) smem.warp_q[warp] = x, smem.warp_k[warp] = y;
  __syncthreads();  // the sums of the warps are there
  int sum_x = lane < warp && lane < kNumWarps ? smem.warp_q[lane] : 0;
  int sum_y = lane < warp && lane < kNumWarps ? smem.warp_k[lane] : 0;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    sum_x += __shfl_xor_sync(0xffffffffu, sum_x, d);
    sum_y += __shfl_xor_sync(0xffffffffu, sum_y, d);
  }
  x += sum_x, y += sum_y;
}

// The bin of tiles that meet so many blocks: one for each number, where there are many one for several. Bin 0 has the most.
FA2_DEVICE int bin_of(int blocks) {
  int octave = 0;
  while (blocks >> octave >= kBins / 2) ++octave;
  const int exact = blocks >> octave;  // above the first octave at least kBins / 4
  const int bin = octave == 0 ? exact : kBins / 2 + (octave - 1) * (kBins / 16) + (exact - kBins / 4) / 4;
  return kBins - 1 - min(bin, kBins - 1);
}

// Whose tile it is, of those here: the first whose end lies behind.
FA2_DEVICE int owner_of(const int (&ends)[kNumThreads], int index) {
  int s = 0;
#pragma unroll
  for (int step = kNumThreads / 2; step > 0; step /= 2)
    if (ends[s + step - 1] <= index) s += step;
  return s;
}

// Whether a sequence has tiles, but not as many as the first that has some.
FA2_DEVICE bool is_another(const int (&ends)[kNumThreads]) {
  const int own = ends[threadIdx.x] - (threadIdx.x > 0 ? ends[threadIdx.x - 1] : 0);
  return own != 0 && own != ends[owner_of(ends, 0)];
}

// Sequences [first, first + kNumThreads), as far as there are any, and the ends of their tiles.
FA2_DEVICE void read_sequences(SharedMemory& smem, const ListTilesBandParams& params, int first) {
  const int sequence = first + threadIdx.x, thread = threadIdx.x;
  Run queries{0, 0}, keys{0, 0};
  int in_front_q = 0, in_front_k = 0;
  if (sequence < params.sequences) {
    queries = queries_of(params).run(sequence), keys = keys_of(params).run(sequence);
    // What the host drops of a shape: all that is left sees something, and what does not, NaN or not, meets nobody.
    const Reach reach = reach_of(params);
    const int unseen_q = unseen_rows(queries, keys, reach.behind), unseen_k = unseen_rows(keys, queries, reach.before);
    queries = {queries.first + unseen_q, queries.seqlen - unseen_q}, keys = {keys.first + unseen_k, keys.seqlen - unseen_k};
    if constexpr (kPositioned) {
      in_front_q = queries.first - queries_of(params).start(sequence), in_front_k = keys.first - keys_of(params).start(sequence);
    }
  }
  int tiles_q = ceil_div(queries.seqlen, kBlockM), tiles_k = params.tiles_k ? ceil_div(keys.seqlen, kBlockN) : 0;
  sum_up(smem, tiles_q, tiles_k);
  smem.first_q[thread] = queries.first, smem.seqlen_q[thread] = queries.seqlen;
  smem.first_k[thread] = keys.first, smem.seqlen_k[thread] = keys.seqlen;
  smem.end_q[thread] = tiles_q, smem.end_k[thread] = tiles_k;
  smem.set(thread, in_front_q, in_front_k);
  __syncthreads();  // the sequences are there
  const int lane = thread % 32;
  const int others_q = __any_sync(0xffffffffu, is_another(smem.end_q));
  const int others_k = __any_sync(0xffffffffu, is_another(smem.end_k));
  if (lane == 0) smem.warp_q[thread / 32] = others_q, smem.warp_k[thread / 32] = others_k;
  __syncthreads();  // every warp has said whether it has seen others
  if (thread < 32) {
    const int mixed_q = __any_sync(0xffffffffu, lane < kNumWarps && smem.warp_q[lane]);
    const int mixed_k = __any_sync(0xffffffffu, lane < kNumWarps && smem.warp_k[lane]);
    if (thread == 0) smem.mixed_q = mixed_q, smem.mixed_k = mixed_k;
  }
  __syncthreads();  // whether they are mixed is known
}

// The rest of a tile with kPositioned, as it is found and as it is written.
template <typename Tile, typename Shared>
FA2_DEVICE void set_position(Tile& tile, const Shared& smem, int s) {
  if constexpr (kPositioned) tile.in_front_q = smem.in_front_q[s], tile.in_front_k = smem.in_front_k[s];
}
template <typename Tile>
FA2_DEVICE int4 position_of(const Tile& tile) {
  if constexpr (kPositioned) {
    return {tile.in_front_q, tile.in_front_k, 0, 0};
  } else {
    return {};
  }
}

// Tiles in front of the sequences that are here, and how many are listed already (kInOrder).
struct Before {
  int tiles_q, tiles_k, listed_q, listed_k;
};

// A tile of a list, and its bin; or a bin of -1: there is no such tile, or no place for it (wrong lengths only).
template <bool kOfKeys>
FA2_DEVICE int tile_at(const SharedMemory& smem, const ListTilesBandParams& params, const Before& before, int first_sequence,
                       int index, ListedTile& tile) {
  const int(&ends)[kNumThreads] = kOfKeys ? smem.end_k : smem.end_q;
  if (index >= ends[kNumThreads - 1]) return -1;
  const int s = owner_of(ends, index);
  const int block = index - (s > 0 ? ends[s - 1] : 0), sequence = first_sequence + s;
  const int first_tile_q = before.tiles_q + (s > 0 ? smem.end_q[s - 1] : 0);
  // All of a sequence's tiles or none, of both sides: nobody may wait for the turn of one that is left out.
  if (first_tile_q + ceil_div(smem.seqlen_q[s], kBlockM) > params.tiles_of_head_q) return -1;
  if (params.tiles_k && before.tiles_k + smem.end_k[s] > params.tiles_of_head_k) return -1;
  tile = {smem.first_q[s], smem.seqlen_q[s], smem.first_k[s], smem.seqlen_k[s], sequence, sequence, block,
          kOfKeys ? first_tile_q : first_tile_q + block};
  set_position(tile, smem, s);
  // Neighbours read the same rows, best at the same time, but a diagonal would part them. So the blocks of a run all count as the one
  // that meets most: of equal sequences those that place_in_list takes together; of others two, or the launch order would not be
  // that of the lengths any more, and some multiprocessors would have more to do than others.
  const int run = (kOfKeys ? smem.mixed_k : smem.mixed_q) ? 2 : kListedRun;
  const int first_of_run = block / run * run;
  int blocks;
  if constexpr (kOfKeys) {
    const auto visit = query_blocks(sequence_of_tile(tile, params), first_of_run);
    blocks = visit.end - visit.begin;
  } else {
    const int last_of_run = min(first_of_run + run, ceil_div(tile.seqlen_q, kBlockM)) - 1;
    const auto visit = key_blocks(sequence_of_tile(tile, params), last_of_run);
    blocks = visit.end - visit.begin;
  }
  return bin_of(max(0, blocks));
}

// Tiles of the sequences that are here into their bins.
template <bool kOfKeys>
FA2_DEVICE void count_tiles(SharedMemory& smem, const ListTilesBandParams& params, const Before& before, int first_sequence) {
  const int tiles = (kOfKeys ? smem.end_k : smem.end_q)[kNumThreads - 1];
  for (int first = 0; first < tiles; first += kNumThreads) {
    ListedTile tile;
    const int bin = tile_at<kOfKeys>(smem, params, before, first_sequence, first + threadIdx.x, tile);
    const uint32_t same = __match_any_sync(0xffffffffu, bin);  // of the warp, whose first adds for all
    if (bin >= 0 && (same & ((1u << threadIdx.x % 32) - 1)) == 0) {
      atomicAdd(&(kOfKeys ? smem.bin_k : smem.bin_q)[bin], __popc(same));
    }
  }
}

// And out of them into the list.
template <bool kOfKeys>
FA2_DEVICE void place_tiles(SharedMemory& smem, const ListTilesBandParams& params, Before& before, int first_sequence) {
  const int tiles = (kOfKeys ? smem.end_k : smem.end_q)[kNumThreads - 1];
  for (int first = 0; first < tiles; first += kNumThreads) {
    ListedTile tile;
    const int bin = tile_at<kOfKeys>(smem, params, before, first_sequence, first + threadIdx.x, tile);
    int place = 0;
    if constexpr (kInOrder) {
      int& listed = kOfKeys ? before.listed_k : before.listed_q;
      int up_to_here = bin >= 0, unused = 0;
      sum_up(smem, up_to_here, unused);
      place = listed + up_to_here - 1;
      if (threadIdx.x == kNumThreads - 1) smem.bin_q[0] = up_to_here;
      __syncthreads();  // how many they are is there; nobody changes it before the next sum
      listed += smem.bin_q[0];
    } else {
      const int lane = threadIdx.x % 32;
      const uint32_t same = __match_any_sync(0xffffffffu, bin), in_front = same & ((1u << lane) - 1);
      if (bin >= 0 && in_front == 0) place = atomicAdd(&(kOfKeys ? smem.bin_k : smem.bin_q)[bin], __popc(same));
      place = __shfl_sync(0xffffffffu, place, __ffs(static_cast<int>(same)) - 1) + __popc(in_front);
    }
    if (bin >= 0) {
      int4* words = reinterpret_cast<int4*>((kOfKeys ? params.tiles_k : params.tiles_q) + place);
      words[0] = int4{tile.first_q, tile.seqlen_q, tile.first_k, tile.seqlen_k};
      words[1] = int4{tile.batch_q, tile.batch_k, tile.block, tile.tile};
      if constexpr (kPositioned) words[2] = position_of(tile);
    }
  }
}

FA2_DEVICE void list_all(SharedMemory& smem, const ListTilesBandParams& params) {
  smem.bin_q[threadIdx.x] = smem.bin_k[threadIdx.x] = 0;  // a barrier comes with the sequences
  auto all_sequences = [&](auto placing) {
    Before before{0, 0, 0, 0};
    for (int first = 0; first < params.sequences; first += kNumThreads) {
      // Few sequences are still here when tiles are placed.
      if (kInOrder || !decltype(placing)::value || params.sequences > kNumThreads) read_sequences(smem, params, first);
      if constexpr (decltype(placing)::value) {
        place_tiles<false>(smem, params, before, first);
        if (params.tiles_k) place_tiles<true>(smem, params, before, first);
      } else {
        count_tiles<false>(smem, params, before, first);
        if (params.tiles_k) count_tiles<true>(smem, params, before, first);
      }
      // One more than there is room for is enough: no number of wrong lengths comes round to small numbers.
      before.tiles_q = min(before.tiles_q + smem.end_q[kNumThreads - 1], params.tiles_of_head_q + 1);
      before.tiles_k = min(before.tiles_k + smem.end_k[kNumThreads - 1], params.tiles_of_head_k + 1);
      __syncthreads();  // everybody is done with these sequences
    }
    return before;
  };
  if constexpr (kInOrder) {
    const Before all = all_sequences(True{});
    if (threadIdx.x == 0) params.counts[0] = all.listed_q, params.counts[1] = all.listed_k;
  } else {
    all_sequences(False{});
    const int in_bin_q = smem.bin_q[threadIdx.x], in_bin_k = smem.bin_k[threadIdx.x];
    int end_q = in_bin_q, end_k = in_bin_k;
    sum_up(smem, end_q, end_k);
    smem.bin_q[threadIdx.x] = end_q - in_bin_q, smem.bin_k[threadIdx.x] = end_k - in_bin_k;
    if (threadIdx.x == kNumThreads - 1) params.counts[0] = end_q, params.counts[1] = end_k;
    __syncthreads();  // everybody knows where a bin's tiles go
    all_sequences(True{});
  }
}

// ---- rows that no tile comes to -------------------------------------------------------------------------------------------

// Row `row` of a row of the batch, all heads: zeros. A warp.
FA2_DEVICE void clear_row(Element* array, const Strides& strides, int64_t batch, int64_t row, int heads, int cols) {
  Element* elements = array + batch * strides.batch + row * strides.row;
  constexpr int kPiece = kAligned ? 8 : 1;
  const int pieces = ceil_div(cols, kPiece);
  for (int i = threadIdx.x % 32; i < heads * pieces; i += 32) {
    Element* piece = elements + i / pieces * strides.head + i % pieces * kPiece;
    if constexpr (kAligned) {
      *reinterpret_cast<uint4*>(piece) = uint4{0, 0, 0, 0};
    } else {
      *piece = Element{0};
    }
  }
}

// Calls clear(batch, row) for the rows of a side that belong to no run, or stand in front of one and see nothing.
template <typename Clear>
FA2_DEVICE void clear_unseen(const Side& own, const Side& other, int sequences, int reach, const Clear& clear) {
  const int64_t rows = own.starts ? own.rows : static_cast<int64_t>(own.rows) * sequences;
  const int64_t warp = static_cast<int64_t>(blockIdx.x - 1) * kNumWarps + threadIdx.x / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x - 1) * kNumWarps * kRowsPerWarp;
  for (int64_t first = warp * kRowsPerWarp; first < rows; first += step) {
    const int64_t end = min(first + kRowsPerWarp, rows);
    for (int64_t at = first; at < end;) {
      // The sequence whose rows these are, used or not; -1 or `sequences` where they are in front of all, or behind.
      int sequence;
      int64_t origin = 0, until;
      if (own.starts) {
        int count = 0;  // of starts that are not behind
        for (int left = sequences + 1; left > 0;) {
          const int half = (left + 1) / 2;
          if (own.starts[count + half - 1] <= at) {
            count += half, left -= half;
          } else {
            left = half - 1;
          }
        }
        sequence = count - 1;
        until = sequence < sequences ? own.starts[sequence + 1] : rows;
      } else {
        sequence = static_cast<int>(at / own.rows);
        origin = static_cast<int64_t>(sequence) * own.rows;
        until = origin + own.rows;
      }
      until = min(max(until, at + 1), end);
      int64_t seen_from = 0, seen_to = 0;
      if (0 <= sequence && sequence < sequences) {
        const Run run = own.run(sequence);
        seen_from = run.first + unseen_rows(run, other.run(sequence), reach), seen_to = run.first + run.seqlen;
      }
      for (; at < until; ++at) {
        const int64_t row = at - origin;
        if (row < seen_from || row >= seen_to) clear(own.starts ? 0 : sequence, row);
      }
    }
  }
}

FA2_DEVICE void clear_all(const ListTilesBandParams& params) {
  const Reach reach = reach_of(params);
  const Side queries = queries_of(params), keys = keys_of(params);
  clear_unseen(queries, keys, params.sequences, reach.behind, [&](int64_t batch, int64_t row) {
    clear_row(params.out, params.out_strides, batch, row, params.num_heads, params.cols_out);
    if (params.lse == nullptr) return;
    const Strides& strides = params.lse_strides;
    for (int head = threadIdx.x % 32; head < params.num_heads; head += 32) {
      params.lse[batch * strides.batch + head * strides.head + row * strides.row] = -kInfinity;
    }
  });
  if (params.dk == nullptr) return;
  clear_unseen(keys, queries, params.sequences, reach.before, [&](int64_t batch, int64_t row) {
    clear_row(params.dk, params.dk_strides, batch, row, params.num_heads_k, params.cols_dk);
    clear_row(params.dv, params.dv_strides, batch, row, params.num_heads_k, params.cols_dv);
  });
}

extern "C" __global__ void __launch_bounds__(kNumThreads) list_tiles(const __grid_constant__ ListTilesBandParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  griddepcontrol_launch_dependents();  // who takes the tiles may start, and waits
  if (blockIdx.x == 0) return list_all(smem, params);
  clear_all(params);
}
