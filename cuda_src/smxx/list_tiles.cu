// Before kernels whose tiles come from lists (listed.cuh): the lists, and the rows that no tile comes to.
//
// Thread block 0 lists. Sequences are read kNumThreads at a time, a thread each; the tiles of these are then dealt out to all threads,
// whoever's they are: a sequence of a thousand tiles takes no longer than a thousand sequences of one. Rows that see nothing are no part
// of a sequence here, so that every tile meets a block and nobody who takes one ever skips it. First come the tiles of queries with
// the most key blocks, and the other way round (a counting sort: once to count how many meet how many, once to place), or all in the
// order of the sequences (kInOrder).
//
// Of segments (kSegments), find_segments.cu has said where they are. They may be as many as there are tokens, and a tile for each would be
// more than there is memory for: then those of few keys come to a list of their own (kShort), whole, which needs no memory for tiles.
//
// The other thread blocks look after the rows that belong to no sequence or see nothing, a warp for a few neighbouring rows. They take
// nothing from block 0, and do not wait for it.
#include "common/schedule.cuh"
#include "common/sequences.cuh"
#include "common/statistics.cuh"

static_assert(sizeof(ListTilesBandParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kBins = kNumThreads;
constexpr int kRowsPerWarp = 16;
static_assert(ceil_pow2(kNumThreads) == kNumThreads, "a binary search over the sequences of all threads");

// With kPositioned, how many rows were left out in front of each sequence here.
template <bool kGiven>
struct InFront {
  FA2_DEVICE void set(int, int, int) {}
  FA2_DEVICE int queries(int) const { return 0; }
  FA2_DEVICE int keys(int) const { return 0; }
};
template <>
struct InFront<true> {
  int in_front_q[kNumThreads], in_front_k[kNumThreads];
  FA2_DEVICE void set(int s, int queries, int keys) { in_front_q[s] = queries, in_front_k[s] = keys; }
  FA2_DEVICE int queries(int s) const { return in_front_q[s]; }
  FA2_DEVICE int keys(int s) const { return in_front_k[s]; }
};
struct SharedMemory : InFront<kPositioned> {
  int first_q[kNumThreads], seqlen_q[kNumThreads], first_k[kNumThreads], seqlen_k[kNumThreads], batch[kNumThreads];
  int end_q[kNumThreads], end_k[kNumThreads];  // tiles of the sequences here up to this one
  int bin_q[kBins], bin_k[kBins];  // how many tiles meet so many blocks, the most first; then where the next of them goes
  int warp_q[kNumWarps], warp_k[kNumWarps];
  int mixed_q, mixed_k;  // whether sequences that have tiles have other numbers of them
  int end_of_group[kNumThreads];  // segments of the groups up to this one
  int apart;  // whether those of few keys are listed by themselves
  int sum;
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/smxx/list_tiles.py and this struct differ");

// ---- lists --------------------------------------------------------------------------------------------------------------

// The bin of tiles that meet so many blocks: one for each number, where there are many one for several. Bin 0 has the most.
FA2_DEVICE int bin_of(int blocks) {
  int octave = 0;
  while (blocks >> octave >= kBins / 2) ++octave;
  const int exact = blocks >> octave;  // above the first octave at least kBins / 4
  const int bin = octave == 0 ? exact : kBins / 2 + (octave - 1) * (kBins / 16) + (exact - kBins / 4) / 4;
  return kBins - 1 - min(bin, kBins - 1);
}

// Whose it is, of those here, tile or segment: the first whose end lies behind.
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

// The rest of a tile with kPositioned, as it is found and as it is written.
template <typename Tile>
FA2_DEVICE void set_position(Tile& tile, int in_front_q, int in_front_k) {
  if constexpr (kPositioned) tile.in_front_q = in_front_q, tile.in_front_k = in_front_k;
}
template <typename Tile>
FA2_DEVICE int4 position_of(const Tile& tile) {
  if constexpr (kPositioned) {
    return {tile.in_front_q, tile.in_front_k, 0, 0};
  } else {
    return {};
  }
}
template <typename Tile>
FA2_DEVICE void write_listed(Tile* place, const Tile& tile) {
  int4* words = reinterpret_cast<int4*>(place);
  words[0] = int4{tile.first_q, tile.seqlen_q, tile.first_k, tile.seqlen_k};
  words[1] = int4{tile.batch_q, tile.batch_k, tile.block, tile.tile};
  if constexpr (kPositioned) words[2] = position_of(tile);
}

// Both sides of a sequence, and how many rows are left out in front of each.
struct Pair {
  Run queries, keys;
  int batch, in_front_q, in_front_k;
};

// What the host drops of a shape: all that is left sees something, and what does not, NaN or not, meets nobody. start_q, start_k: the
// first rows of the sequence, in use or not; of a segment those of its row of the batch.
FA2_DEVICE Pair trimmed(const ListTilesBandParams& params, Run queries, Run keys, int start_q, int start_k, int batch) {
  const Reach reach = reach_of(params);
  const int unseen_q = unseen_rows(queries, keys, reach.behind), unseen_k = unseen_rows(keys, queries, reach.before);
  queries = {queries.first + unseen_q, queries.seqlen - unseen_q}, keys = {keys.first + unseen_k, keys.seqlen - unseen_k};
  return {queries, keys, batch, queries.first - start_q, keys.first - start_k};
}

// Sequence `index`, which there is.
template <typename Params>
FA2_DEVICE Pair sequence_at(const SharedMemory& smem, const Params& params, int index) {
  if constexpr (kSegments) {
    const int group = owner_of(smem.end_of_group, index), place = index - (group > 0 ? smem.end_of_group[group - 1] : 0);
    const ListedPlace& segment = params.segments[group * params.rows_of_group * min(params.rows_q, params.rows_k) + place];
    const Run queries{segment.first_q, segment.seqlen_q}, keys{segment.first_k, segment.seqlen_k};
    return trimmed(params, queries, keys, 0, 0, segment.batch_q);
  } else {
    const Side queries = queries_of(params), keys = keys_of(params);
    return trimmed(params, queries.run(index), keys.run(index), queries.start(index), keys.start(index), index);
  }
}

// How many sequences there are. A template, as all that looks at segments, so that nobody asks for them where there are none.
template <typename Params>
FA2_DEVICE int count_sequences(SharedMemory& smem, const Params& params) {
  if constexpr (kSegments) {
    int found = threadIdx.x < params.groups ? params.found[3 * threadIdx.x] : 0, unused = 0;
    sum_up(smem, found, unused);
    smem.end_of_group[threadIdx.x] = found;
    __syncthreads();  // the ends are there
    return smem.end_of_group[kNumThreads - 1];
  } else {
    return params.sequences;
  }
}

template <typename Params>
FA2_DEVICE bool is_short(const Params& params, const Pair& sequence) {
  if constexpr (kSegments) {
    return 0 < sequence.keys.seqlen && sequence.keys.seqlen <= params.short_keys;
  } else {
    return false;
  }
}

// Whether all tiles of all sequences have room. If not, the short ones are put apart, and the others are few enough.
template <typename Params>
FA2_DEVICE void list_shorts(SharedMemory& smem, const Params& params, int sequences) {
  if constexpr (kSegments) {
    if (!params.shorts) return;
    int tiles_q = 0, tiles_k = 0;
    for (int index = threadIdx.x; index < sequences; index += kNumThreads) {
      const Pair sequence = sequence_at(smem, params, index);
      tiles_q += ceil_div(sequence.queries.seqlen, kBlockM), tiles_k += ceil_div(sequence.keys.seqlen, kBlockN);
    }
    sum_up(smem, tiles_q, tiles_k);
    const bool has_room = tiles_q <= params.tiles_of_head_q && tiles_k <= params.tiles_of_head_k;
    if (threadIdx.x == kNumThreads - 1) smem.apart = !has_room;
    __syncthreads();  // all know whether there is
    int listed = 0;
    for (int first = 0; smem.apart && first < sequences; first += kNumThreads) {
      const int index = first + threadIdx.x;
      const Pair sequence = index < sequences ? sequence_at(smem, params, index) : Pair{};
      const Run &queries = sequence.queries, &keys = sequence.keys;
      int place = is_short(params, sequence), unused = 0;
      sum_up(smem, place, unused);
      if (is_short(params, sequence)) {
        ListedTile tile{queries.first, queries.seqlen, keys.first, keys.seqlen, sequence.batch, sequence.batch};
        tile.tile = sequence.batch * params.rows_q + queries.first;
        set_position(tile, sequence.in_front_q, sequence.in_front_k);
        write_listed(params.shorts + listed + place - 1, tile);
      }
      if (threadIdx.x == kNumThreads - 1) smem.sum = place;
      __syncthreads();  // how many they are is there; nobody changes it before the next of these sums
      listed += smem.sum;
    }
    if (threadIdx.x == 0) params.counts[2] = params.counts[3] = listed;
  }
}

// Sequences [first, first + kNumThreads), as far as there are any, and the ends of their tiles.
FA2_DEVICE void read_sequences(SharedMemory& smem, const ListTilesBandParams& params, int first, int sequences) {
  const int index = first + threadIdx.x, thread = threadIdx.x;
  const Pair sequence = index < sequences ? sequence_at(smem, params, index) : Pair{};
  const bool is_apart = smem.apart && is_short(params, sequence);
  const Run queries = is_apart ? Run{0, 0} : sequence.queries, keys = is_apart ? Run{0, 0} : sequence.keys;
  int tiles_q = ceil_div(queries.seqlen, kBlockM), tiles_k = params.tiles_k ? ceil_div(keys.seqlen, kBlockN) : 0;
  sum_up(smem, tiles_q, tiles_k);
  smem.batch[thread] = sequence.batch;
  smem.first_q[thread] = queries.first, smem.seqlen_q[thread] = queries.seqlen;
  smem.first_k[thread] = keys.first, smem.seqlen_k[thread] = keys.seqlen;
  smem.end_q[thread] = tiles_q, smem.end_k[thread] = tiles_k;
  smem.set(thread, sequence.in_front_q, sequence.in_front_k);
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

// Tiles in front of the sequences that are here, and how many are listed already (kInOrder).
struct Before {
  int tiles_q, tiles_k, listed_q, listed_k;
};

// A tile of a list, and its bin; or a bin of -1: there is no such tile, or no place for it (wrong lengths only).
template <bool kOfKeys>
FA2_DEVICE int tile_at(const SharedMemory& smem, const ListTilesBandParams& params, const Before& before, int index,
                       ListedTile& tile) {
  const int(&ends)[kNumThreads] = kOfKeys ? smem.end_k : smem.end_q;
  if (index >= ends[kNumThreads - 1]) return -1;
  const int s = owner_of(ends, index);
  const int block = index - (s > 0 ? ends[s - 1] : 0), batch = smem.batch[s];
  const int first_tile_q = before.tiles_q + (s > 0 ? smem.end_q[s - 1] : 0);
  // All of a sequence's tiles or none, of both sides: nobody may wait for the turn of one that is left out.
  if (first_tile_q + ceil_div(smem.seqlen_q[s], kBlockM) > params.tiles_of_head_q) return -1;
  if (params.tiles_k && before.tiles_k + smem.end_k[s] > params.tiles_of_head_k) return -1;
  tile = {smem.first_q[s], smem.seqlen_q[s], smem.first_k[s], smem.seqlen_k[s], batch, batch, block,
          kOfKeys ? first_tile_q : first_tile_q + block};
  set_position(tile, smem.queries(s), smem.keys(s));
  // Neighbours read the same rows, best at the same time, but a diagonal would part them. So the blocks of a run all count as the one
  // that meets most: of equal short sequences those that place_in_list takes together; of others two, or the launch order would not be
  // that of the lengths any more, and some multiprocessors would have more to do than others.
  const bool is_short = (kOfKeys ? ceil_div(tile.seqlen_k, kBlockN) : ceil_div(tile.seqlen_q, kBlockM)) <= 2 * kListedRun;
  const int run = is_short && !(kOfKeys ? smem.mixed_k : smem.mixed_q) ? kListedRun : 2;
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
FA2_DEVICE void count_tiles(SharedMemory& smem, const ListTilesBandParams& params, const Before& before) {
  const int tiles = (kOfKeys ? smem.end_k : smem.end_q)[kNumThreads - 1];
  for (int first = 0; first < tiles; first += kNumThreads) {
    ListedTile tile;
    const int bin = tile_at<kOfKeys>(smem, params, before, first + threadIdx.x, tile);
    const uint32_t same = __match_any_sync(0xffffffffu, bin);  // of the warp, whose first adds for all
    if (bin >= 0 && (same & ((1u << threadIdx.x % 32) - 1)) == 0) {
      atomicAdd(&(kOfKeys ? smem.bin_k : smem.bin_q)[bin], __popc(same));
    }
  }
}

// And out of them into the list.
template <bool kOfKeys>
FA2_DEVICE void place_tiles(SharedMemory& smem, const ListTilesBandParams& params, Before& before) {
  const int tiles = (kOfKeys ? smem.end_k : smem.end_q)[kNumThreads - 1];
  for (int first = 0; first < tiles; first += kNumThreads) {
    ListedTile tile;
    const int bin = tile_at<kOfKeys>(smem, params, before, first + threadIdx.x, tile);
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
    if (bin >= 0) write_listed((kOfKeys ? params.tiles_k : params.tiles_q) + place, tile);
  }
}

FA2_DEVICE void list_all(SharedMemory& smem, const ListTilesBandParams& params) {
  smem.bin_q[threadIdx.x] = smem.bin_k[threadIdx.x] = 0;
  if (threadIdx.x == 0) smem.apart = 0;  // a barrier comes with the sequences, or with the groups of them
  const int sequences = count_sequences(smem, params);
  list_shorts(smem, params, sequences);
  auto all_sequences = [&](auto placing) {
    Before before{0, 0, 0, 0};
    for (int first = 0; first < sequences; first += kNumThreads) {
      // Few sequences are still here when tiles are placed.
      if (kInOrder || !decltype(placing)::value || sequences > kNumThreads) read_sequences(smem, params, first, sequences);
      if constexpr (decltype(placing)::value) {
        place_tiles<false>(smem, params, before);
        if (params.tiles_k) place_tiles<true>(smem, params, before);
      } else {
        count_tiles<false>(smem, params, before);
        if (params.tiles_k) count_tiles<true>(smem, params, before);
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

// A stretch of rows of a side, as far as one question answers for all of them: which row of the batch, the number of its first row
// among those of all the batch, and the first row behind the stretch. Rows [run_from, seen_to) are of a sequence and in use, and from
// seen_from on they are seen, or see something. All but `batch` count the rows of all the batch.
struct Stretch {
  int batch;
  int64_t origin, until, run_from, seen_from, seen_to;
};

// What lies around row `at` of a side: the sequence whose rows these are, used or not.
FA2_DEVICE Stretch stretch_at(const Side& own, const Side& other, int sequences, int reach, int64_t at) {
  int sequence;  // or -1, or `sequences`, where they are in front of all, or behind
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
    until = sequence < sequences ? own.starts[sequence + 1] : own.rows;
  } else {
    sequence = static_cast<int>(at / own.rows);
    origin = static_cast<int64_t>(sequence) * own.rows;
    until = origin + own.rows;
  }
  Stretch stretch{own.starts ? 0 : sequence, origin, until, 0, 0, 0};
  if (0 <= sequence && sequence < sequences) {
    const Run run = own.run(sequence);
    stretch.run_from = origin + run.first;
    stretch.seen_from = stretch.run_from + unseen_rows(run, other.run(sequence), reach);
    stretch.seen_to = stretch.run_from + run.seqlen;
  }
  return stretch;
}

// Likewise a run of equal ids. runs: of all groups; side: 1 of the queries, 2 of the keys.
template <typename Params>
FA2_DEVICE Stretch run_at(const Params& params, const IdRun* runs, int side, int rows, int reach, int64_t at) {
  const int batch = static_cast<int>(at / rows), group = batch / params.rows_of_group;
  const int first = group * params.rows_of_group * rows, end = min((group + 1) * params.rows_of_group, params.batch_rows) * rows;
  const IdRun* own = runs + first;
  const int count = params.found[3 * group + side];
  int before = 0;  // that start no later, less one: with each row of the batch a run starts
  for (int left = count - 1; left > 0;) {
    const int half = (left + 1) / 2;
    if (own[before + half].start <= at) {
      before += half, left -= half;
    } else {
      left = half - 1;
    }
  }
  const int start = own[before].start, until = before + 1 < count ? own[before + 1].start : end;
  const int met = own[before].met, seen_from = start + unseen_rows({0, until - start}, {0, max(met, 0)}, reach);
  return {batch, static_cast<int64_t>(batch) * rows, until, met < 0 ? until : start, seen_from, until};
}

// Calls clear(batch, row, is_of_run) for those of `rows` rows that nobody sees or that see nothing; is_of_run: they are of a sequence,
// and in use. around(at): the stretch of a row.
template <typename Around, typename Clear>
FA2_DEVICE void clear_unseen(int64_t rows, const Around& around, const Clear& clear) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x - 1) * kNumWarps + threadIdx.x / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x - 1) * kNumWarps * kRowsPerWarp;
  for (int64_t first = warp * kRowsPerWarp; first < rows; first += step) {
    const int64_t end = min(first + kRowsPerWarp, rows);
    for (int64_t at = first; at < end;) {
      const Stretch stretch = around(at);
      const int64_t until = min(max(stretch.until, at + 1), end);
      for (; at < until; ++at)
        if (at < stretch.seen_from || at >= stretch.seen_to)
          clear(stretch.batch, at - stretch.origin, at >= stretch.run_from && at < stretch.seen_to);
    }
  }
}

// clear_unseen for the rows of the queries, or of the keys.
template <bool kOfKeys, typename Params, typename Clear>
FA2_DEVICE void clear_side(const Params& params, const Clear& clear) {
  const Reach both = reach_of(params);
  const int reach = kOfKeys ? both.before : both.behind;
  if constexpr (kSegments) {
    const int rows = kOfKeys ? params.rows_k : params.rows_q;
    const IdRun* runs = kOfKeys ? params.runs_k : params.runs_q;
    clear_unseen(static_cast<int64_t>(params.batch_rows) * rows,
                 [&](int64_t at) { return run_at(params, runs, kOfKeys ? 2 : 1, rows, reach, at); }, clear);
  } else {
    const Side queries = queries_of(params), keys = keys_of(params);
    const Side &own = kOfKeys ? keys : queries, &other = kOfKeys ? queries : keys;
    clear_unseen(own.starts ? own.rows : static_cast<int64_t>(own.rows) * params.sequences,
                 [&](int64_t at) { return stretch_at(own, other, params.sequences, reach, at); }, clear);
  }
}

FA2_DEVICE void clear_all(const ListTilesBandParams& params) {
  clear_side<false>(params, [&](int64_t batch, int64_t row, bool is_of_run) {
    clear_row(params.out, params.out_strides, batch, row, params.num_heads, params.cols_out);
    if (params.lse == nullptr) return;
    const Strides& strides = params.lse_strides;
    for (int head = threadIdx.x % 32; head < params.num_heads; head += 32) {
      params.lse[batch * strides.batch + head * strides.head + row * strides.row] = is_of_run ? own_logit(params, head) : -kInfinity;
    }
  });
  if (params.dk == nullptr) return;
  clear_side<true>(params, [&](int64_t batch, int64_t row, bool) {
    clear_row(params.dk, params.dk_strides, batch, row, params.num_heads_k, params.cols_dk);
    clear_row(params.dv, params.dv_strides, batch, row, params.num_heads_k, params.cols_dv);
  });
}

extern "C" __global__ void __launch_bounds__(kNumThreads) list_tiles(const __grid_constant__ ListTilesBandParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  griddepcontrol_launch_dependents();  // who takes the tiles may start, and waits
  if constexpr (kSegments) griddepcontrol_wait();  // the segments are found
  if (blockIdx.x == 0) return list_all(smem, params);
  clear_all(params);
}
