// Lists of blocks from their kinds (classify_blocks.cu), in four steps, each a launch: how many entries rows have; where rows begin, and
// which come first; the entries of query blocks; those of key blocks.
#include "common/blocks.cuh"
#include "common/ptx.cuh"

static_assert(sizeof(ListBlocksParams) == kParamsBytes, "kernels/smxx/list_blocks.py and common/blocks.cuh differ");

struct SharedMemory {
  int warps[2][kNumWarps];
};
static_assert(sizeof(SharedMemory) == kSharedBytes, "kernels/smxx/list_blocks.py and this struct differ");

// ---- 0: count ---------------------------------------------------------------------------------------------------------------

FA2_DEVICE int sum_of_warp(int x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

// A warp for a query block, a thread for a key block: neighbours read neighbouring kinds.
FA2_DEVICE void count_row(const ListBlocksParams& params, int64_t row) {
  const unsigned char* kinds = params.kinds + row * params.grid.key_blocks;
  int partial = 0, full = 0;
  for (int n = threadIdx.x % 32; n < params.grid.key_blocks; n += 32) partial += kinds[n] == kPartial, full += kinds[n] == kFull;
  partial = sum_of_warp(partial), full = sum_of_warp(full);
  if (threadIdx.x % 32 == 0) params.rows_q[row] = int4{0, partial, full, 0};
}

FA2_DEVICE void count_column(const ListBlocksParams& params, int64_t column) {
  const int n = column % params.grid.key_blocks;
  const int64_t mask = column / params.grid.key_blocks;
  int partial = 0, full = 0;
  for (int m = 0; m < params.grid.query_blocks; ++m) {
    const int kind = params.kinds[(mask * params.grid.query_blocks + m) * params.grid.key_blocks + n];
    partial += kind == kPartial, full += kind == kFull;
  }
  params.rows_k[column] = int4{0, partial, full, 0};
}

// ---- 1: sum up --------------------------------------------------------------------------------------------------------------

// x and y summed over the threads before this one, and over all. A barrier on either side.
FA2_DEVICE void sum_before(SharedMemory& smem, int& x, int& y, int& all_x, int& all_y) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own_x = x, own_y = y;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int before_x = __shfl_sync(0xffffffffu, x, lane - d), before_y = __shfl_sync(0xffffffffu, y, lane - d);
    if (lane >= d) x += before_x, y += before_y;
  }
  if (lane == 31) smem.warps[0][warp] = x, smem.warps[1][warp] = y;
  __syncthreads();  // the sums of the warps are there
  all_x = all_y = 0;
  int sum_x = 0, sum_y = 0;
  for (int w = 0; w < kNumWarps; ++w) {
    if (w == warp) sum_x = all_x, sum_y = all_y;
    all_x += smem.warps[0][w], all_y += smem.warps[1][w];
  }
  x += sum_x - own_x, y += sum_y - own_y;
  __syncthreads();  // everybody has read them
}

// One thread block: the first entry of every row, and the partial blocks before it.
template <bool kOfKeys>
FA2_DEVICE void sum_up(SharedMemory& smem, const ListBlocksParams& params, int64_t rows) {
  int entries = 0, partial = 0;
  for (int64_t first = 0; first < rows; first += kNumThreads) {
    const int64_t row = first + threadIdx.x;
    int4* own = (kOfKeys ? params.rows_k : params.rows_q) + row;
    int x = 0, y = 0, all_x, all_y;
    if (row < rows) x = own->y + own->z, y = own->y;
    sum_before(smem, x, y, all_x, all_y);
    if (row < rows) {
      own->x = entries + x;
      if constexpr (!kOfKeys) params.first_partial[row] = partial + y;
    }
    entries += all_x, partial += all_y;
  }
  if (!kOfKeys && threadIdx.x == 0) params.counts[0] = entries, params.counts[1] = partial;
}

// A thread for a row: its place among those of its mask, with most entries first, the first of equal ones first.
FA2_DEVICE void order(int4* rows, int64_t row, int count) {
  int4* own = rows + row / count * count;
  const int r = row % count, entries = own[r].y + own[r].z;
  int place = 0;
  for (int other = 0; other < count; ++other) {
    const int its = own[other].y + own[other].z;
    place += its > entries || (its == entries && other < r);
  }
  own[place].w = r;
}

// ---- 2 and 3: write ---------------------------------------------------------------------------------------------------------

FA2_DEVICE void write_row(const ListBlocksParams& params, int64_t row) {
  const int lane = threadIdx.x % 32;
  const uint32_t before = (1u << lane) - 1;
  const int4 own = params.rows_q[row];
  const int first_partial = params.first_partial[row], columns = params.grid.key_blocks;
  int partial = 0, full = 0;  // so far
  for (int first = 0; first < columns; first += 32) {
    const int n = first + lane;
    const int kind = n < columns ? params.kinds[row * columns + n] : +kEmpty;
    const uint32_t partial_ones = __ballot_sync(0xffffffffu, kind == kPartial);
    const uint32_t full_ones = __ballot_sync(0xffffffffu, kind == kFull);
    const int partial_before = partial + __popc(partial_ones & before), full_before = full + __popc(full_ones & before);
    // With less room than there are, numbers are wrong, but of bits that there are.
    const int number = kind == kPartial ? min(first_partial + partial_before, params.max_partial - 1) : kind == kFull ? -1 : -2;
    if (n < columns) params.numbers[row * columns + n] = int2{number, partial_before + full_before};
    const int place = own.x + (kind == kPartial ? partial_before : own.y + full_before);
    if (kind != kEmpty && place < params.max_entries) params.entries_q[place] = int2{n, number};
    partial += __popc(partial_ones), full += __popc(full_ones);
  }
}

FA2_DEVICE void write_column(const ListBlocksParams& params, int64_t column) {
  const int columns = params.grid.key_blocks;
  const int n = column % columns;
  const int64_t mask = column / columns;
  const int4 own = params.rows_k[column];
  int partial = own.x, full = own.x + own.y;
  for (int m = 0; m < params.grid.query_blocks; ++m) {
    const int2 number = params.numbers[(mask * params.grid.query_blocks + m) * columns + n];
    if (number.x == -2) continue;
    const int place = number.x == -1 ? full++ : partial++;
    if (place < params.max_entries) params.entries_k[place] = int2{m, number.x}, params.ranks[place] = number.y;
  }
}

extern "C" __global__ void __launch_bounds__(kNumThreads) list_blocks(const __grid_constant__ ListBlocksParams params) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  const BlockGrid& grid = params.grid;
  const int64_t rows = static_cast<int64_t>(grid.masks) * grid.query_blocks;
  const int64_t columns = static_cast<int64_t>(grid.masks) * grid.key_blocks;
  if (params.step == 1) {
    if (blockIdx.x == 0) return sum_up<false>(smem, params, rows);
    if (blockIdx.x == 1) return sum_up<true>(smem, params, columns);
    const int64_t thread = static_cast<int64_t>(blockIdx.x - 2) * kNumThreads + threadIdx.x;
    if (thread < rows) return order(params.rows_q, thread, grid.query_blocks);
    if (thread - rows < columns) order(params.rows_k, thread - rows, grid.key_blocks);
    return;
  }
  // Warps for rows, and behind them threads for columns.
  const int64_t row_blocks = params.step == 3 ? 0 : (rows + kNumWarps - 1) / kNumWarps;
  if (blockIdx.x < row_blocks) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kNumWarps + threadIdx.x / 32;
    if (row >= rows) return;
    if (params.step == 0) {
      count_row(params, row);
    } else {
      write_row(params, row);
    }
    return;
  }
  const int64_t column = (blockIdx.x - row_blocks) * kNumThreads + threadIdx.x;
  if (column >= columns) return;
  if (params.step == 0) {
    count_column(params, column);
  } else {
    write_column(params, column);
  }
}
