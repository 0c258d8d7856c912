// Small kernels, right and wrong, that the instrument itself is tested with: test_instrument.py. One launch, one case.
#include "sm80/ptx.cuh"


struct InstrumentParams {
  const uint16_t* a;  // inputs and outputs as the case wants them
  const uint16_t* b;
  float* out;
  int* counter;
  int which, n;
};

struct alignas(16) SharedMemory {
  uint16_t x[16 * 32];
  float y[128];
};

namespace {

// D = A B of one 16x8x16 product; A is (16, 16), B is given as its columns (8, 16), or as its rows (16, 8).
template <class T>
void product(const InstrumentParams& p, SharedMemory& smem, bool b_is_rows) {
  const int l = threadIdx.x;
  for (int i = l; i < 256; i += 32) smem.x[i] = p.a[i];
  for (int i = l; i < 128; i += 32) smem.x[256 + i] = p.b[i];
  __syncthreads();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, smem_address(&smem.x[(l % 16) * 16 + l / 16 * 8]));
  if (b_is_rows) {
    ldmatrix_x4_trans(b, smem_address(&smem.x[256 + (l % 16) * 8]));
  } else {
    ldmatrix_x4(b, smem_address(&smem.x[256 + (l % 8) * 16 + (l / 8 % 2) * 8]));
  }
  float d[4] = {1, 1, 1, 1};
  mma_m16n8k16<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) p.out[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = d[i];
}

void convert(const InstrumentParams& p) {
  for (int i = threadIdx.x; i < 65536; i += 32) {
    p.out[i] = to_float(half_t{static_cast<uint16_t>(i)});
    p.out[65536 + i] = to_float(bf16_t{static_cast<uint16_t>(i)});
  }
  for (int i = threadIdx.x; i < p.n; i += 32) {
    float x;
    memcpy(&x, p.b + 2 * i, 4);
    p.counter[2 * i] = static_cast<int>(cvt_pack<half_t>(x, 0.f));
    p.counter[2 * i + 1] = static_cast<int>(cvt_pack<bf16_t>(0.f, x));
  }
}

// y[t] = x[t + 8 of another warp] through shared memory, filled by cp.async.
void copies(const InstrumentParams& p, SharedMemory& smem) {
  const int t = threadIdx.x;
  if (t < 64) {
    cp_async_16(smem_address(&smem.x[8 * t]), p.a + 8 * t, t == 63 ? p.n : 16);
  }
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncthreads();  // the copies of the other threads
  p.out[t] = smem.x[(8 * t + 128) % 512];
  if (p.counter) {  // once more, into the same place
    __syncthreads();  // everybody has read
    if (t < 64) cp_async_16(smem_address(&smem.x[8 * t]), p.b + 8 * t, 16);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    __syncthreads();  // the second copies of the other threads
    p.out[128 + t] = smem.x[(8 * t + 128) % 512];
  }
}

// Two groups in flight; the first is waited for alone.
void groups(const InstrumentParams& p, SharedMemory& smem) {
  const int t = threadIdx.x;
  cp_async_16(smem_address(&smem.x[8 * t]), p.a + 8 * t, 16);
  cp_async_commit_group();
  cp_async_16(smem_address(&smem.x[256 + 8 * t]), p.b + 8 * t, 16);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  p.out[t] = smem.x[8 * t];
  p.out[32 + t] = smem.x[256 + 8 * t];  // wrong: not there yet
  cp_async_wait_group<0>();
  p.out[64 + t] = smem.x[256 + 8 * t];
}

// What a lane hands to its neighbour through shared memory needs __syncwarp.
void neighbours(const InstrumentParams& p, SharedMemory& smem) {
  const int t = threadIdx.x;
  smem.y[t] = static_cast<float>(t);
  __syncwarp();  // the neighbour has written
  p.out[t] = smem.y[t ^ 1];
}

// Blocks add to `out` in the order of their index.
void in_turn(const InstrumentParams& p) {
  if (threadIdx.x == 0) {
    while (ld_acquire(p.counter) != static_cast<int>(blockIdx.x)) {
    }
  }
  __syncthreads();
  if (threadIdx.x == 5) p.out[0] = p.out[0] * 0.5f + static_cast<float>(blockIdx.x);
  __syncthreads();
  if (threadIdx.x == 0 && static_cast<int>(blockIdx.x) != p.n) red_release_add(p.counter, 1);
}

}  // namespace

extern "C" __global__ void instrument(const __grid_constant__ InstrumentParams p) {
  FA2_SHARED_MEMORY(SharedMemory, smem);
  const int t = threadIdx.x;
  switch (p.which) {
    case 0: return product<half_t>(p, smem, false);
    case 1: return product<bf16_t>(p, smem, true);
    case 2: return convert(p);
    case 3: return copies(p, smem);
    case 4: return groups(p, smem);
    case 5: return neighbours(p, smem);
    case 6: return in_turn(p);
    case 7:  // shuffles, and ids in three dimensions
      p.out[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] = __shfl_sync(0xffffffffu, t, 7);
      p.counter[t] = __shfl_xor_sync(0xffffffffu, 100 + t, 3);
      return;
    // From here on every case breaks a rule.
    case 10:  // half a warp at one place, half at another
      if (t < 16) {
        __shfl_xor_sync(0xffffffffu, t, 1);
      } else {
        __shfl_xor_sync(0xffffffffu, t, 1);
      }
      return;
    case 11:  // lanes that have left
      if (t < 16) return;
      __syncwarp();
      return;
    case 12:  // a barrier that one warp never comes to
      if (t / 32 != 1) __syncthreads();
      return;
    case 13:  // two barriers at once
      if (t / 32 == 1) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      return;
    case 14: st_shared_v4(smem_address(&smem) + sizeof(SharedMemory) - 16 * p.n, uint4{}); return;
    case 15: ld_shared_v4(smem_address(&smem) + 8); return;
    case 16:  // a copy that nobody waits for
      cp_async_16(smem_address(&smem.x[8 * t]), p.a + 8 * t, 16);
      cp_async_commit_group();
      return;
    case 17: cp_async_16(smem_address(&smem.x[0]), p.a + 1, 16); return;
    case 18: smem.y[128 + p.n] = 1.f; return;  // past the end of shared memory, by a plain pointer
    case 19: p.out[p.n] = 1.f; return;         // past the end of an output
    case 20: {                                 // endless recursion: the stack ends at a guard page
      volatile char frame[4096];
      frame[t] = 1;
      InstrumentParams again = p;
      again.n = p.n + frame[t];
      instrument(again);
      p.out[0] = frame[t];
      return;
    }
    case 21: p.out[t] = smem.y[t]; return;  // never written
    case 22: {                              // an accumulator that is never cleared
      float sum;
      for (int i = 0; i < p.n; i++) sum = i ? sum + 1 : 0;
      p.out[t] = sum;
      return;
    }
    case 24: {  // an ldmatrix of what the other lanes have copied, whom this one has not met since
      cp_async_16(smem_address(&smem.x[8 * t]), p.a + 8 * t, 16);
      cp_async_commit_group();
      cp_async_wait_group<0>();
      if (p.n) __syncwarp();
      uint32_t r[4];
      ldmatrix_x4(r, smem_address(&smem.x[8 * (t ^ 1)]));
      p.out[t] = static_cast<float>(r[0]);
      return;
    }
    case 23: p.counter[0] += 0x7fffffff; return;  // int overflow
  }
}
