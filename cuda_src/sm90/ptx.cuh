// Barriers, bulk copies and register control of sm_90. One instruction, one function, named as in the PTX ISA.
// tests/host/cuda/sm90/ptx.cuh has the same functions for a CPU.
#pragma once

#include "common/params.cuh"
#include "common/ptx.cuh"

// ---- mbarrier (PTX ISA 9.7.13.15): a phase completes when all arrivals and all bytes that it expects have come ---------

FA2_DEVICE void mbarrier_init(uint64_t& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)), "r"(arrivals) : "memory");
}
// Makes the initialised barriers visible to the copy engine; __syncthreads() does so for the other threads.
FA2_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FA2_DEVICE void mbarrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&barrier)) : "memory");
}
// One arrival, and `bytes` more to come in this phase.
FA2_DEVICE void mbarrier_arrive_expect_tx(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&barrier)), "r"(bytes) : "memory");
}
// Whether the phase of this parity has completed; waits a while for it.
FA2_DEVICE bool mbarrier_try_wait_parity(uint64_t& barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(smem_address(&barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
// The loop is C++, not PTX: a loop inside one asm block makes ptxas serialise the wgmmas around it.
FA2_DEVICE void mbarrier_wait(uint64_t& barrier, uint32_t parity) {
  while (!mbarrier_try_wait_parity(barrier, parity)) continue;
}

// ---- bulk tensor copies (PTX ISA 9.7.9.27) ------------------------------------------------------------------------------

// smem = the map's box at (d, row, head, batch), zeros outside the tensor; its bytes arrive at the barrier. All of the
// box's bytes count, those outside too. One thread issues it.
FA2_DEVICE void cp_async_bulk_tensor_4d_load(void* smem, const TensorMap& map, uint64_t& barrier, int d, int row, int head,
                                             int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(&barrier)), "r"(d), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// The map's box at (d, row, head, batch) = smem; what lies outside the tensor is not written. One thread issues it.
FA2_DEVICE void cp_async_bulk_tensor_4d_store(const TensorMap& map, const void* smem, int d, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
      ::"l"(&map), "r"(smem_address(smem)), "r"(d), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same with a dimension more, in front of batch.
FA2_DEVICE void cp_async_bulk_tensor_5d_load(void* smem, const TensorMap& map, uint64_t& barrier, int d, int row, int head,
                                             int start, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
      ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(&barrier)), "r"(d), "r"(row), "r"(head), "r"(start), "r"(batch)
      : "memory");
}
FA2_DEVICE void cp_async_bulk_tensor_5d_store(const TensorMap& map, const void* smem, int d, int row, int head, int start,
                                              int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
      ::"l"(&map), "r"(smem_address(smem)), "r"(d), "r"(row), "r"(head), "r"(start), "r"(batch)
      : "memory");
}

// ---- bulk additions of bytes in a row (PTX ISA 9.7.9.25): addresses and sizes are multiples of 16 ---------------------------

// gmem = smem. One thread issues it and commits.
FA2_DEVICE void cp_async_bulk_store(void* gmem, const void* smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               ::"l"(gmem), "r"(smem_address(smem)), "r"(bytes)
               : "memory");
}
// gmem += smem, float by float, each addition relaxed and atomic. One thread issues it and commits.
FA2_DEVICE void cp_reduce_async_bulk_add_f32(float* gmem, const float* smem, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               ::"l"(gmem), "r"(smem_address(smem)), "r"(bytes)
               : "memory");
}

// ---- clusters of thread blocks: the same place in the shared memory of block `rank` -------------------------------------------

// mapa.shared::cluster (PTX ISA 9.7.9.24)
FA2_DEVICE uint32_t mapa(uint32_t address, int rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
// An arrival at that block's barrier.
FA2_DEVICE void mbarrier_arrive_cluster(uint64_t& barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapa(smem_address(&barrier), rank)) : "memory");
}
// That block's `to` = this one's `from`; the bytes arrive at that block's barrier. One thread issues it.
FA2_DEVICE void cp_async_bulk_cluster(void* to, uint64_t& barrier, int rank, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(mapa(smem_address(to), rank)), "r"(smem_address(from)), "r"(bytes),
               "r"(mapa(smem_address(&barrier), rank))
               : "memory");
}
// All threads of the cluster meet, and see what the others have written before (PTX ISA 9.7.13.3).
FA2_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- groups of bulk stores and reductions, of the thread that issued them ---------------------------------------------------

FA2_DEVICE void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most the last kPending store groups of this thread still read shared memory.
template <int kPending>
FA2_DEVICE void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Waits until all but the last kPending of them have written global memory, too.
template <int kPending>
FA2_DEVICE void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- the rest -------------------------------------------------------------------------------------------------------------

// Orders this thread's ordinary stores to shared memory before later reads by wgmma and bulk copies (the async proxy).
FA2_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barriers 1-15 of `threads` threads; 0 is __syncthreads().
FA2_DEVICE void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
FA2_DEVICE void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Registers per thread of this warpgroup from here on.
template <int kRegisters>
FA2_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FA2_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores four 8x8 matrices of 16-bit elements: the inverse of ldmatrix_x4, with the same lanes and registers.
FA2_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
// Each matrix transposed: a lane's address is that of a row of the transposed matrix.
FA2_DEVICE void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
