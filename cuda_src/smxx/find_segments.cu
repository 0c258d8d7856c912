// Before list_tiles.cu, where ids say which rows belong together: the runs of equal ids of either side, and which of them meet.
//
// A thread block looks at a group of neighbouring rows of the batch, all tokens of which it takes as one line; a run ends with its
// row. Of queries and of keys the first run of an id counts, in each row: ids that come again, which they should not, are nobody's.
// First the starts of runs are written down in order, kTokens * kNumThreads tokens at a time. Then runs of queries are entered in a
// table by their ids, kNumThreads at a time, and all runs of keys looked up in it. So a run meets one other at most, whatever the ids.
#include "common/ptx.cuh"
#include "common/sequences.cuh"

static_assert(sizeof(FindSegmentsParams) == kParamsBytes, "kernels/params.py and common/params.cuh differ");

constexpr int kTokens = 8;  // of a thread at a time
constexpr int kSlots = 2 * kNumThreads;
constexpr int kNobody = 0x7fffffff;
constexpr int kNobodys = -1;  // of a run that is no part of a segment
static_assert(ceil_pow2(kSlots) == kSlots, "a slot is some bits of a product");

struct SharedMemory {
  int slots[kSlots];  // which of the runs that are here has an id
  int id[kNumThreads], row[kNumThreads];  // theirs
  int met[kNumThreads];  // the first run of keys with the id
  int warp_q[kNumWarps], warp_k[kNumWarps];
  int sum_q, sum_k;
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/smxx/find_segments.py and this struct differ");

// One side of a group.
struct Line {
  const int* ids;
  Side side;
  int begin, end;  // its tokens
  IdRun* runs;
  int count;  // of runs

  // The id of a token, negative if it is not in use.
  FA2_DEVICE int id_of(int token) const {
    const int row = token / side.rows, place = token - row * side.rows;
    const Run run = side.run(row);
    return run.first <= place && place < run.first + run.seqlen ? ids[token] : -1;
  }
  FA2_DEVICE int length(int run) const { return (run + 1 < count ? runs[run + 1].start : end) - runs[run].start; }
};

// Which of this warp's tokens from `first` on are starts of runs, by the lanes of each 32; how many there are.
FA2_DEVICE int mark_starts(const Line& line, int first, uint32_t (&starts)[kTokens]) {
  const int lane = threadIdx.x % 32;
  int ids[kTokens], count = 0;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int token = first + 32 * i + lane;
    ids[i] = token < line.end ? line.id_of(token) : -1;
  }
  int last = line.begin < first && first < line.end ? line.id_of(first - 1) : -1;  // of the token before
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int token = first + 32 * i + lane, before = __shfl_sync(0xffffffffu, ids[i], lane - 1);
    const bool is_start = token < line.end && (token % line.side.rows == 0 || ids[i] != (lane > 0 ? before : last));
    starts[i] = __ballot_sync(0xffffffffu, is_start);
    count += __popc(starts[i]);
    last = __shfl_sync(0xffffffffu, ids[i], 31);
  }
  return count;
}

// Of this warp, into its runs from `place` on.
FA2_DEVICE void write_starts(const Line& line, int first, const uint32_t (&starts)[kTokens], int place) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int token = first + 32 * i + lane;
    if (starts[i] >> lane & 1) {
      line.runs[place + __popc(starts[i] & ((1u << lane) - 1))] = {token, line.id_of(token) < 0 ? kNobodys : 0};
    }
    place += __popc(starts[i]);
  }
}

// All runs of both sides.
FA2_DEVICE void find_runs(SharedMemory& smem, Line& queries, Line& keys) {
  constexpr int kOfWarp = 32 * kTokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  queries.count = keys.count = 0;
  for (int first = 0; first < max(queries.end - queries.begin, keys.end - keys.begin); first += kNumWarps * kOfWarp) {
    const int first_q = queries.begin + first + warp * kOfWarp, first_k = keys.begin + first + warp * kOfWarp;
    uint32_t starts_q[kTokens], starts_k[kTokens];
    const int count_q = mark_starts(queries, first_q, starts_q), count_k = mark_starts(keys, first_k, starts_k);
    int up_to_q = lane == 0 ? count_q : 0, up_to_k = lane == 0 ? count_k : 0;
    sum_up(smem, up_to_q, up_to_k);
    write_starts(queries, first_q, starts_q, queries.count + up_to_q - count_q);
    write_starts(keys, first_k, starts_k, keys.count + up_to_k - count_k);
    if (threadIdx.x == kNumThreads - 1) smem.sum_q = up_to_q, smem.sum_k = up_to_k;
    __syncthreads();  // how many they are is there; nobody changes it before the next sum
    queries.count += smem.sum_q, keys.count += smem.sum_k;
  }
}

// ---- which of them meet ---------------------------------------------------------------------------------------------------

FA2_DEVICE int slot_of(int id, int row) {
  return (static_cast<uint32_t>(id) * 0x9e3779b1u ^ static_cast<uint32_t>(row) * 0x85ebca6bu) >> 16 & (kSlots - 1);
}

// Enters this thread's run: of several with its id the first stays.
FA2_DEVICE void enter(SharedMemory& smem, int id, int row) {
  const int own = threadIdx.x;
  for (int slot = slot_of(id, row);; slot = (slot + 1) % kSlots) {
    const int other = atomicCAS(&smem.slots[slot], kNobody, own);
    if (other == kNobody) return;
    if (smem.id[other] == id && smem.row[other] == row) {
      atomicMin(&smem.slots[slot], own);
      return;
    }
  }
}

// Who has that id, of those that are here; or kNobody.
FA2_DEVICE int look_up(const SharedMemory& smem, int id, int row) {
  for (int slot = slot_of(id, row);; slot = (slot + 1) % kSlots) {
    const int run = smem.slots[slot];
    if (run == kNobody || (smem.id[run] == id && smem.row[run] == row)) return run;
  }
}

// The segments: runs of queries and of keys that have the same id in the same row. How many there are.
FA2_DEVICE int meet(SharedMemory& smem, const Line& queries, const Line& keys, ListedPlace* segments) {
  const int own = threadIdx.x;
  int found = 0;
  for (int first = 0; first < queries.count; first += kNumThreads) {
    const int run = first + own, token = run < queries.count ? queries.runs[run].start : 0;
    const int id = run < queries.count ? queries.id_of(token) : -1, row = token / queries.side.rows;
    smem.id[own] = id, smem.row[own] = row, smem.met[own] = kNobody;
    smem.slots[own] = smem.slots[own + kNumThreads] = kNobody;
    __syncthreads();  // the runs are there, and nobody in a slot
    if (id >= 0) enter(smem, id, row);
    __syncthreads();  // all are entered
    for (int other = own; other < keys.count; other += kNumThreads) {
      if (keys.runs[other].met != 0) continue;  // nobody's, or it has met one of an earlier round
      const int token_k = keys.runs[other].start;
      const int whose = look_up(smem, keys.id_of(token_k), token_k / keys.side.rows);
      if (whose != kNobody) atomicMin(&smem.met[whose], other);
    }
    __syncthreads();  // everybody has met his first
    const int met = smem.met[own];
    if (id >= 0 && look_up(smem, id, row) != own) queries.runs[run].met = kNobodys;  // the id has come before
    int place = met != kNobody, unused = 0;
    sum_up(smem, place, unused);
    if (met != kNobody) {
      const int seqlen_q = queries.length(run), seqlen_k = keys.length(met);
      queries.runs[run].met = seqlen_k, keys.runs[met].met = seqlen_q;
      const int first_q = token - row * queries.side.rows, first_k = keys.runs[met].start - row * keys.side.rows;
      segments[found + place - 1] = {first_q, seqlen_q, first_k, seqlen_k, row, row, 0, token};
    }
    if (own == kNumThreads - 1) smem.sum_q = place;
    __syncthreads();  // how many they are is there, and everybody is done with the table
    found += smem.sum_q;
  }
  return found;
}

extern "C" __global__ void __launch_bounds__(kNumThreads) find_segments(const __grid_constant__ FindSegmentsParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  griddepcontrol_launch_dependents();  // list_tiles may start, and waits
  const int first_row = blockIdx.x * params.rows_of_group, end_row = min(first_row + params.rows_of_group, params.batch_rows);
  const Side side_q = queries_of(params), side_k = keys_of(params);
  Line queries{params.segment_ids_q, side_q, first_row * side_q.rows, end_row * side_q.rows, params.runs_q, 0};
  Line keys{params.segment_ids_k, side_k, first_row * side_k.rows, end_row * side_k.rows, params.runs_k, 0};
  queries.runs += queries.begin, keys.runs += keys.begin;
  find_runs(smem, queries, keys);
  const int found = meet(smem, queries, keys, params.segments + first_row * min(side_q.rows, side_k.rows));
  if (threadIdx.x == 0) {
    int* counts = params.found + 3 * blockIdx.x;
    counts[0] = found, counts[1] = queries.count, counts[2] = keys.count;
  }
}
