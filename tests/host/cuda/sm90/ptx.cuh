// The functions of cuda_src/sm90/ptx.cuh on a CPU. Found first by the order of -I.
#pragma once

#include "async.h"
#include "common/params.cuh"
#include "common/ptx.cuh"

namespace fa2_host {
inline const bool kUsesAsyncProxy = uses_async_proxy = true;
}

inline void mbarrier_init(uint64_t& barrier, uint32_t arrivals) { fa2_host::mbarrier_init(&barrier, arrivals); }
inline void fence_mbarrier_init(FA2_HOST_SITE) {
  if (fa2_host::synchronises("fence_mbarrier_init", {file, line})) fa2_host::fence_mbarrier_init();
}
inline void mbarrier_arrive(uint64_t& barrier, FA2_HOST_SITE) {
  if (fa2_host::synchronises("mbarrier_arrive", {file, line})) {
    fa2_host::mbarrier_arrive("mbarrier_arrive", &barrier, 0, {file, line});
  }
}
inline void mbarrier_arrive_expect_tx(uint64_t& barrier, uint32_t bytes, FA2_HOST_SITE) {
  if (fa2_host::synchronises("mbarrier_arrive_expect_tx", {file, line})) {
    fa2_host::mbarrier_arrive("mbarrier_arrive_expect_tx", &barrier, bytes, {file, line});
  }
}
inline bool mbarrier_try_wait_parity(uint64_t& barrier, uint32_t parity, FA2_HOST_SITE) {
  constexpr const char* kName = "mbarrier_try_wait_parity";
  return !fa2_host::synchronises(kName, {file, line}) ||
         fa2_host::mbarrier_try_wait(kName, &barrier, parity, {file, line});
}
inline void mbarrier_wait(uint64_t& barrier, uint32_t parity, FA2_HOST_SITE) {
  if (!fa2_host::synchronises("mbarrier_wait", {file, line})) return;
  while (!fa2_host::mbarrier_try_wait("mbarrier_wait", &barrier, parity, {file, line})) continue;
}

inline void cp_async_bulk_tensor_4d_load(void* smem, const TensorMap& map, uint64_t& barrier, int d, int row, int head,
                                         int batch, FA2_HOST_SITE) {
  fa2_host::bulk_load(smem, &map, &barrier, {d, row, head, batch, 0, 4}, {file, line});
}
inline void cp_async_bulk_tensor_4d_store(const TensorMap& map, const void* smem, int d, int row, int head, int batch,
                                          FA2_HOST_SITE) {
  fa2_host::bulk_store(&map, smem, {d, row, head, batch, 0, 4}, {file, line});
}
inline void cp_async_bulk_tensor_5d_load(void* smem, const TensorMap& map, uint64_t& barrier, int d, int row, int head,
                                         int start, int batch, FA2_HOST_SITE) {
  fa2_host::bulk_load(smem, &map, &barrier, {d, row, head, start, batch, 5}, {file, line});
}
inline void cp_async_bulk_tensor_5d_store(const TensorMap& map, const void* smem, int d, int row, int head, int start,
                                          int batch, FA2_HOST_SITE) {
  fa2_host::bulk_store(&map, smem, {d, row, head, start, batch, 5}, {file, line});
}
inline void cp_async_bulk_store(void* gmem, const void* smem, uint32_t bytes, FA2_HOST_SITE) {
  fa2_host::bulk_store_bytes(gmem, smem, bytes, {file, line});
}
inline void cp_reduce_async_bulk_add_f32(float* gmem, const float* smem, uint32_t bytes, FA2_HOST_SITE) {
  fa2_host::bulk_add(gmem, smem, bytes, {file, line});
}
inline void cp_async_bulk_commit_group() { fa2_host::bulk_commit_group(); }
template <int kPending>
inline void cp_async_bulk_wait_group_read(FA2_HOST_SITE) {
  if (fa2_host::synchronises("cp_async_bulk_wait_group_read", {file, line})) {
    fa2_host::bulk_wait_group(kPending, false, {file, line});
  }
}
template <int kPending>
inline void cp_async_bulk_wait_group(FA2_HOST_SITE) {
  if (fa2_host::synchronises("cp_async_bulk_wait_group", {file, line})) {
    fa2_host::bulk_wait_group(kPending, true, {file, line});
  }
}

inline void mbarrier_arrive_cluster(uint64_t& barrier, int rank, FA2_HOST_SITE) {
  if (fa2_host::synchronises("mbarrier_arrive_cluster", {file, line})) {
    fa2_host::mbarrier_arrive_cluster("mbarrier_arrive_cluster", &barrier, rank, {file, line});
  }
}
inline void cp_async_bulk_cluster(void* to, uint64_t& barrier, int rank, const void* from, uint32_t bytes, FA2_HOST_SITE) {
  fa2_host::bulk_copy_cluster(to, &barrier, rank, from, bytes, {file, line});
}
inline void cluster_sync(FA2_HOST_SITE) { fa2_host::cluster_barrier("cluster_sync", {file, line}); }

inline void fence_proxy_async(FA2_HOST_SITE) {
  if (fa2_host::synchronises("fence_proxy_async", {file, line})) fa2_host::fence_proxy_async();
}

inline void bar_sync(int id, int threads, FA2_HOST_SITE) {
  fa2_host::named_barrier("bar_sync", id, threads, true, {file, line});
}
inline void bar_arrive(int id, int threads, FA2_HOST_SITE) {
  fa2_host::named_barrier("bar_arrive", id, threads, false, {file, line});
}

template <int kRegisters>
inline void setmaxnreg_inc(FA2_HOST_SITE) {
  fa2_host::set_registers("setmaxnreg_inc", kRegisters, true, {file, line});
}
template <int kRegisters>
inline void setmaxnreg_dec(FA2_HOST_SITE) {
  fa2_host::set_registers("setmaxnreg_dec", kRegisters, false, {file, line});
}

namespace fa2_host {
struct Stmatrix {
  char* row;          // 8 elements of the matrix that this lane's address belongs to
  const uint32_t* r;  // 4 registers
};
template <bool kTransposed>
inline void stmatrix(const char* name, uint32_t address, const uint32_t (&r)[4], Site site) {
  Stmatrix args{shared_pointer(address, 16, site), r};
  collective(name, &args, [](void* const* lanes) {
    for (int l = 0; l < 32; l++) {
      const uint32_t* registers = static_cast<const Stmatrix*>(lanes[l])->r;
      for (int i = 0; i < 4; i++) {
        for (int half = 0; half < 2; half++) {
          const int row = kTransposed ? 2 * (l % 4) + half : l / 4, col = kTransposed ? l / 4 : 2 * (l % 4) + half;
          const uint16_t element = static_cast<uint16_t>(registers[i] >> 16 * half);
          memcpy(static_cast<const Stmatrix*>(lanes[8 * i + row])->row + 2 * col, &element, 2);
        }
      }
    }
    for (int l = 0; l < 32; l++) mark_stored(static_cast<const Stmatrix*>(lanes[l])->row, 16, l);
  }, site);
}
}  // namespace fa2_host

inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4], FA2_HOST_SITE) {
  fa2_host::stmatrix<false>("stmatrix_x4", address, r, {file, line});
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4], FA2_HOST_SITE) {
  fa2_host::stmatrix<true>("stmatrix_x4_trans", address, r, {file, line});
}
