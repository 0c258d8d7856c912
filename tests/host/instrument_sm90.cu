// Small kernels for sm_90, right and wrong, that the instrument itself is tested with: test_instrument_sm90.py.
// Warpgroup 0 computes; where there are more, a thread of the next one copies. `flaw` chooses a mistake; 0 is none.
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

struct InstrumentParams {
  TensorMap a, b, c;
  float* out;
  int* counter;
  int which, n, flaw;
  int row, head, batch;  // where a box starts
};

enum Flaw {
  kNone,
  kWrongParity,
  kFewBytes,
  kManyBytes,
  kWrongStride,
  kReadEarly,
  kWriteEarly,
  kWrongCount,
  kTooFewThreads,
  kUnwaitedLoad,
  kOtherDescriptor,
  kOneWarpMore,
  kUnaligned,
  kTwoArrivals,
  kSourceReused,
  kOverwritten,
  kWrongLeading,
  kNoMap,
  kNeverFirst,
  kAlwaysFirst,
  kUnwaitedFirst,
};

struct SharedMemory {
  alignas(1024) uint16_t a[4][64 * 64];
  alignas(1024) uint16_t b[4][256 * 64];
  uint64_t full[2], empty[2];
};

namespace {

void start(const InstrumentParams& p, SharedMemory& smem, int empty_arrivals) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      mbarrier_init(smem.full[i], 1);
      mbarrier_init(smem.empty[i], empty_arrivals);
    }
    fence_mbarrier_init();
  }
  __syncthreads();  // everybody knows the barriers
}

template <int kNTiles>
void write(const InstrumentParams& p, const Accumulator<1, kNTiles>& d) {
  const int row = threadIdx.x / 32 * 16 + accumulator_row();
  for (int j = 0; j < kNTiles; j++) {
    for (int e = 0; e < 4; e++) {
      p.out[(row + 8 * (e / 2)) * 8 * kNTiles + 8 * j + accumulator_col() + e % 2] = d.x[0][j][e];
    }
  }
}

// D = A B^T of 64 rows of A, N rows of B, 128 columns; along the rows.
template <int kN>
void along_rows(const InstrumentParams& p, SharedMemory& smem) {
  start(p, smem, 1);
  if (threadIdx.x == 0) {
    const int bytes = 2 * (64 + kN) * 128;
    const int announced = bytes + (p.flaw == kFewBytes ? -1024 : p.flaw == kManyBytes ? 1024 : 0);
    mbarrier_arrive_expect_tx(smem.full[0], announced);  // the operands' bytes
    for (int i = 0; i < 2; i++) {
      void* to = p.flaw == kUnaligned ? smem.a[i] + 64 : smem.a[i];
      cp_async_bulk_tensor_4d_load(to, p.flaw == kNoMap ? p.c : p.a, smem.full[0], 64 * i, p.row, p.head, p.batch);
      cp_async_bulk_tensor_4d_load(smem.b[i], p.b, smem.full[0], 64 * i, p.row, p.head, p.batch);
    }
    if (p.flaw == kUnwaitedLoad) {
      mbarrier_arrive_expect_tx(smem.full[1], 64 * 128);
      cp_async_bulk_tensor_4d_load(smem.a[2], p.a, smem.full[1], 0, 0, 0, 0);
    }
    if (p.flaw == kOverwritten) smem.full[0] = 0;
  }
  mbarrier_wait(smem.full[0], p.flaw == kWrongParity);  // for the operands
  Accumulator<1, kN / 8> d;
  wgmma_fence();  // before the products
  for (int k = 0; k < 8; k++) {
    uint64_t a = matrix_descriptor(smem_address(smem.a[k / 4]) + k % 4 * 32, 0);
    uint64_t b = matrix_descriptor(smem_address(smem.b[k / 4]) + k % 4 * 32, 0);
    if (p.flaw == kWrongStride) b -= 64ull << 31;  // 512 bytes less between groups of 8 rows
    if (p.flaw == kOtherDescriptor && threadIdx.x / 32 == 2) b += 2;
    if (p.flaw == kOneWarpMore && k == 7 && threadIdx.x / 32 == 3) wgmma_ss<bf16_t, false, false>(d, a, b, true);
    wgmma_ss<bf16_t, false, false>(d, a, b, k > 0);
  }
  wgmma_commit_group();
  if (p.flaw == kReadEarly) write(p, d);
  if (p.flaw == kWriteEarly) d.x[0][0][1] *= 2;
  wgmma_wait_group<0>();  // for the products
  pin(d);
  if (p.flaw != kReadEarly) write(p, d);
}

// D = A B of 64 rows of A, 64 rows of B, N columns from column p.row on; down B's rows. A from shared memory or from registers.
template <int kN>
void down_rows(const InstrumentParams& p, SharedMemory& smem, bool in_registers) {
  constexpr int kPanels = (kN + 63) / 64;
  start(p, smem, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(smem.full[0], 64 * 128);
    cp_async_bulk_tensor_4d_load(smem.a[0], p.a, smem.full[0], 0, 0, 0, 0);
    mbarrier_arrive_expect_tx(smem.full[1], kPanels * 64 * 128);
    for (int i = 0; i < kPanels; i++) {
      cp_async_bulk_tensor_4d_load(smem.b[0] + i * 64 * 64, p.b, smem.full[1], 64 * i, 0, 0, 0);
    }
  }
  mbarrier_wait(smem.full[0], 0);
  uint32_t a[4][4];
  if (in_registers) {
    const int row = threadIdx.x / 32 * 16 + accumulator_row();
    for (int k = 0; k < 4; k++) {
      for (int i = 0; i < 4; i++) {
        const int r = row + i % 2 * 8, column = 16 * k + accumulator_col() + i / 2 * 8;
        memcpy(&a[k][i], smem.a[0] + r * 64 + ((column / 8) ^ (r % 8)) * 8 + column % 8, 4);
      }
    }
  }
  while (!mbarrier_try_wait_parity(smem.full[1], 0)) continue;
  Accumulator<1, kN / 8> d;
  d.clear();
  const uint32_t panel = p.flaw == kWrongLeading ? 128 * 128 : 64 * 128;
  for (int k = 0; k < 4; k++) {  // a group for each
    const uint64_t b = matrix_descriptor(smem_address(smem.b[0]) + k * 16 * 128 + p.row * 2, panel);
    wgmma_fence();
    if (in_registers) {
      wgmma_rs<half_t, true>(d, a[k], b, true);
    } else {
      wgmma_ss<half_t, false, true>(d, matrix_descriptor(smem_address(smem.a[0]) + k * 32, 0), b, true);
    }
    wgmma_commit_group();
  }
  wgmma_wait_group<1>();
  wgmma_wait_group<0>();
  pin(d);
  write(p, d);
}

// D = sum of n products A(i) B^T with A(i) = rows 64 i of A: through a ring of two buffers.
void ring(const InstrumentParams& p, SharedMemory& smem) {
  start(p, smem, p.flaw == kTwoArrivals ? 3 : 4);
  if (threadIdx.x >= 128) {
    setmaxnreg_dec<24>();
    if (threadIdx.x != 128) return;
    for (int i = 0; i < p.n; i++) {
      mbarrier_wait(smem.empty[i % 2], i / 2 % 2 ^ 1);  // until the buffer is free
      mbarrier_arrive_expect_tx(smem.full[i % 2], 2 * 64 * 128);
      cp_async_bulk_tensor_4d_load(smem.a[i % 2], p.a, smem.full[i % 2], 0, 64 * i, 0, 0);
      cp_async_bulk_tensor_4d_load(smem.b[i % 2], p.b, smem.full[i % 2], 0, 64 * i, 0, 0);
    }
    return;
  }
  setmaxnreg_inc<240>();
  Accumulator<1, 8> d;
  for (int i = 0; i < p.n; i++) {
    mbarrier_wait(smem.full[i % 2], i / 2 % 2);  // until the buffer is full
    wgmma_fence();  // of the ring
    for (int k = 0; k < 4; k++) {
      wgmma_ss<bf16_t, false, false>(d, matrix_descriptor(smem_address(smem.a[i % 2]) + k * 32, 0),
                              matrix_descriptor(smem_address(smem.b[i % 2]) + k * 32, 0), i + k > 0);
    }
    wgmma_commit_group();
    if (p.flaw == kSourceReused && threadIdx.x % 32 == 0) mbarrier_arrive(smem.empty[i % 2]);
    wgmma_wait_group<0>();  // of the ring
    if (p.flaw != kSourceReused && threadIdx.x % 32 == 0) mbarrier_arrive(smem.empty[i % 2]);  // the buffer is free
  }
  pin(d);
  write(p, d);
}

// Rows 0-63 of `c` = those of `a`, negated: through registers, stmatrix and a bulk store. Twice, for the second panel.
void store(const InstrumentParams& p, SharedMemory& smem) {
  start(p, smem, 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(smem.full[0], 2 * 64 * 128);
    for (int i = 0; i < 2; i++) {
      cp_async_bulk_tensor_4d_load(smem.a[i], p.a, smem.full[0], 64 * i, p.row, p.head, p.batch);
    }
  }
  mbarrier_wait(smem.full[0], 0);
  for (int i = 0; i < 2; i++) {
    for (int k = 0; k < 4; k++) {  // 16 columns
      uint32_t r[4];
      for (int m = 0; m < 4; m++) {
        const int row = 16 * warp + lane / 4 + m % 2 * 8, column = 16 * k + lane % 4 * 2 + m / 2 * 8;
        memcpy(&r[m], smem.a[i] + row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8, 4);
        r[m] ^= 0x80008000u;
      }
      const int row = 16 * warp + lane % 16, chunk = 2 * k + lane / 16;
      stmatrix_x4(smem_address(smem.b[0]) + row * 128 + (chunk ^ row % 8) * 16, r);
    }
    fence_proxy_async();  // what this thread stored
    const int threads = p.flaw == kWrongCount && warp == 2 ? 96 : p.flaw == kTooFewThreads ? 256 : 128;
    bar_sync(3, threads);  // everybody has stored
    if (threadIdx.x == 0) {
      cp_async_bulk_tensor_4d_store(p.c, smem.b[0], 64 * i, p.row, p.head, p.batch);
      cp_async_bulk_commit_group();
      if (p.flaw == kSourceReused) bar_arrive(4, 128);
      cp_async_bulk_wait_group_read<0>();  // the store has read
      if (p.flaw != kSourceReused) bar_arrive(4, 128);  // the buffer may be written again
    } else if (warp > 0) {
      bar_sync(4, 128);  // until it may
    }
    if (threadIdx.x > 0 && warp == 0) bar_sync(4, 128);
    __syncwarp();
  }
}

// out = a box of n floats: no swizzle, and an address of 128 bytes is enough.
void floats(const InstrumentParams& p, SharedMemory& smem) {
  start(p, smem, 1);
  float* to = reinterpret_cast<float*>(smem.b) + (p.flaw == kUnaligned ? 16 : 32);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(smem.full[0], p.n * sizeof(float));
    cp_async_bulk_tensor_4d_load(to, p.a, smem.full[0], 0, p.row, p.head, p.batch);
  }
  mbarrier_wait(smem.full[0], 0);  // for the floats
  for (int i = threadIdx.x; i < p.n; i += 128) p.out[i] = to[i];
}

// out = the sum over blocks of n floats, block + index: who comes first writes, all others wait for that and add.
void sum(const InstrumentParams& p, SharedMemory& smem) {
  constexpr int kWritten = 1 << 30;
  float* floats = reinterpret_cast<float*>(smem.a) + (p.flaw == kUnaligned ? 2 : 0);
  for (int i = threadIdx.x; i < p.n; i += 32) {
    st_shared_b32(smem_address(floats + i), __float_as_uint(static_cast<float>(blockIdx.x + i)));
  }
  fence_proxy_async();  // what this lane stored of the sum
  __syncwarp();  // the sum's floats are there
  if (threadIdx.x) return;
  const int seen = atom_acquire_add(p.counter, 1), bytes = 4 * p.n - (p.flaw == kFewBytes ? 8 : 0);
  if (p.flaw == kAlwaysFirst || (seen == 0 && p.flaw != kNeverFirst)) {
    cp_async_bulk_store(p.out, floats, bytes);
  } else {
    while (seen && p.flaw != kUnwaitedFirst && ld_acquire(p.counter) < kWritten) continue;
    cp_reduce_async_bulk_add_f32(p.out, floats, bytes);
  }
  cp_async_bulk_commit_group();
  cp_async_bulk_wait_group<0>();  // they are in global memory
  if (seen == 0) red_release_add(p.counter, kWritten);
}

// Each block of a pair: D = B^T A of its own 64 x 64 A, and of the other's, which that one sends as B.
void pair(const InstrumentParams& p, SharedMemory& smem) {
  const int rank = blockIdx.x % 2;
  start(p, smem, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(smem.full[1], 64 * 128 - (p.flaw == kFewBytes ? 1024 : 0));  // what the other block will send
  }
  cluster_sync();  // the other block's barriers are there
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(smem.full[0], 64 * 128);
    cp_async_bulk_tensor_4d_load(smem.a[0], p.a, smem.full[0], 0, 64 * rank, 0, 0);
    mbarrier_wait(smem.full[0], 0);  // to send it
    cp_async_bulk_cluster(smem.b[0], smem.full[1], rank ^ 1, smem.a[0], 64 * 128);
    if (p.flaw == kSourceReused) {
      mbarrier_arrive_expect_tx(smem.empty[1], 64 * 128);
      cp_async_bulk_tensor_4d_load(smem.a[0], p.a, smem.empty[1], 0, 0, 0, 0);
    }
  }
  mbarrier_wait(smem.full[0], 0);  // for A
  mbarrier_wait(smem.full[1], 0);  // for B
  Accumulator<1, 64 / 8> d;
  if (p.flaw != kReadEarly) wgmma_fence();  // of the pair
  for (int k = 0; k < 4; k++) {
    const uint32_t rows = k * 16 * 128;
    wgmma_ss<bf16_t, true, true>(d, matrix_descriptor(smem_address(smem.b[0]) + rows, 64 * 128),
                                 matrix_descriptor(smem_address(smem.a[0]) + rows, 64 * 128), k > 0);
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();  // of the pair
  pin(d);
  const int row = threadIdx.x / 32 * 16 + accumulator_row();
  for (int j = 0; j < 8; j++)
    for (int e = 0; e < 4; e++)
      p.out[(64 * rank + row + 8 * (e / 2)) * 64 + 8 * j + accumulator_col() + e % 2] = d.x[0][j][e];
  if (threadIdx.x == 0) {
    mbarrier_arrive_cluster(smem.empty[0], rank ^ 1);  // the other block's A has been read
    if (p.flaw == kTwoArrivals) mbarrier_arrive_cluster(smem.empty[0], rank ^ 1);
  }
  mbarrier_wait(smem.empty[0], 0);  // until this block's has
}

template <int kN>
void of_width(const InstrumentParams& p, SharedMemory& smem) {
  if (p.which == 0) return along_rows<kN>(p, smem);
  down_rows<kN>(p, smem, p.which == 2);
}

// Who asks for more registers than the others have given back sleeps for ever.
void registers(const InstrumentParams& p) {
  if (threadIdx.x >= 128) return p.n ? setmaxnreg_dec<144>() : setmaxnreg_dec<104>();
  setmaxnreg_inc<240>();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) instrument(const __grid_constant__ InstrumentParams p) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  switch (p.which) {
    case 3: return ring(p, smem);
    case 4: return store(p, smem);
    case 5: return registers(p);
    case 6: return floats(p, smem);
    case 7: return sum(p, smem);
    case 8: return pair(p, smem);
  }
  switch (p.n) {
    case 32: return of_width<32>(p, smem);
    case 64: return of_width<64>(p, smem);
    case 96: return of_width<96>(p, smem);
    case 128: return of_width<128>(p, smem);
    case 192: return of_width<192>(p, smem);
    case 256: return of_width<256>(p, smem);
  }
}
