// What of each block of 128 x 128 is seen: nothing, all, or a part (step 0); and of those of which a part is, a bit for each element, in
// the order of accumulators (step 1). A thread block for each.
//
// A warp takes a row of a block at a time. Bit 2j + e of word t of a row is column 8j + 2t + e: so if lane 2j + e looks at that column, a
// vote of the warp is the word.
#include "common/ptx.cuh"
#include "common/seen.cuh"

static_assert(sizeof(SeenParams) == kParamsBytes, "kernels/smxx/classify_blocks.py and common/seen.cuh differ");

struct SharedMemory {
  uint4 words[kBlock];  // of each query
  int any[kNumWarps], all[kNumWarps];
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/smxx/classify_blocks.py and this struct differ");

// Where a block is.
struct Block {
  int mask, m, n;
};

// The column of this lane in word t.
FA2_DEVICE int column_of(int t) {
  const int lane = threadIdx.x % 32;
  return 8 * (lane / 2) + 2 * t + lane % 2;
}

// A row's words.
template <typename Seen>
FA2_DEVICE uint4 words_of(const Seen& seen) {
  uint4 words;
  words.x = __ballot_sync(0xffffffffu, seen(column_of(0)));
  words.y = __ballot_sync(0xffffffffu, seen(column_of(1)));
  words.z = __ballot_sync(0xffffffffu, seen(column_of(2)));
  words.w = __ballot_sync(0xffffffffu, seen(column_of(3)));
  return words;
}

// Of query `row` of a block. Past the ends nothing is seen.
FA2_DEVICE uint4 words_of_query(const ClassifyBlocksParams& params, const SeenBy& by, const Block& at, int row) {
  const int batch = at.mask / params.num_heads, head = at.mask % params.num_heads;
  const int query = at.m * kBlock + row, offset = params.seqlen_k - params.seqlen_q;
  return words_of([&](int column) {
    const int key = at.n * kBlock + column;
    return query < params.seqlen_q && key < params.seqlen_k && is_seen(by, batch, head, query, key, offset);
  });
}

FA2_DEVICE void classify(SharedMemory& smem, const ClassifyBlocksParams& params, const SeenBy& by, const Block& at, int64_t index) {
  const int warp = threadIdx.x / 32;
  const int rows = min(+kBlock, params.seqlen_q - at.m * kBlock);
  uint32_t any = 0, all = 0xffffffffu;
  for (int row = warp; row < rows; row += kNumWarps) {
    const uint4 words = words_of_query(params, by, at, row);
    any |= words.x | words.y | words.z | words.w;
    all &= words.x & words.y & words.z & words.w;
  }
  if (threadIdx.x % 32 == 0) smem.any[warp] = any != 0, smem.all[warp] = all == 0xffffffffu;
  __syncthreads();  // every warp has said what it saw
  if (threadIdx.x != 0) return;
  int some = 0, whole = 1;
  for (int w = 0; w < kNumWarps; ++w) some |= smem.any[w], whole &= smem.all[w];
  params.kinds[index] = whole ? kFull : some ? kPartial : kEmpty;
}

FA2_DEVICE void write_bits(SharedMemory& smem, const ClassifyBlocksParams& params, const SeenBy& by, const Block& at, int64_t index) {
  if (params.kinds[index] != kPartial) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4* plain = params.bits + static_cast<int64_t>(params.numbers[index].x) * 2 * kBlock;
  for (int row = warp; row < kBlock; row += kNumWarps) {
    const uint4 words = words_of_query(params, by, at, row);
    if (lane == 0) smem.words[row] = words;
  }
  __syncthreads();  // all queries are there
  plain[threadIdx.x] = smem.words[threadIdx.x];
  uint4* transposed = plain + kBlock;
  for (int key = warp; key < kBlock; key += kNumWarps) {
    const uint4 words = words_of([&](int query) {
      const uint4& own = smem.words[query];
      const uint32_t word = key % 8 / 2 == 0 ? own.x : key % 8 / 2 == 1 ? own.y : key % 8 / 2 == 2 ? own.z : own.w;
      return (word >> (2 * (key / 8) + key % 2) & 1) != 0;
    });
    if (lane == 0) transposed[key] = words;
  }
}

extern "C" __global__ void __launch_bounds__(kNumThreads) classify_blocks(const __grid_constant__ SeenParams all) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  static_assert(kNumThreads == kBlock, "a thread for each row of a block");
  const ClassifyBlocksParams& params = all;  // captures may have the names of its fields
  const int64_t index = blockIdx.x;
  const int n = index % params.grid.key_blocks;
  const int64_t row = index / params.grid.key_blocks;
  const Block at{static_cast<int>(row / params.grid.query_blocks), static_cast<int>(row % params.grid.query_blocks), n};
  if (params.step == 0) {
    classify(smem, params, all, at, index);
  } else {
    write_bits(smem, params, all, at, index);
  }
}
