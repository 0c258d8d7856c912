// What sm_90 does behind a thread's back: mbarriers, bulk tensor copies, wgmma. Used by the twins in sm90/.
//
// A bulk load lands at once or as late as it can: when no thread of the block can run and one of them waits for its
// barrier. wgmma reads its operands, and a bulk store its source, at once or at the wait for it, which then lasts until
// no other thread of the cluster can run. The schedule chooses:
// What a bulk store or addition of bytes in a row has read is in global memory at the next wait of its thread that is for
// that, at the latest.
//
//                  bulk loads land       wgmma reads           bulk stores read      rows are written
//   kLowestFirst   late                  when it is issued     late                  late
//   kHighestFirst  at once               at its wait           at once               at the next wait of any kind
//   kRandom        a coin for each       a coin for the block  a coin for each       a coin at each wait
//
// Whatever is on its way is poison: the destination of a load, the accumulators of a wgmma.
//
// A copy to another block of the cluster is a bulk load of that block's: what it copies is read when it lands.
//
// What is checked besides: mbarriers are initialised, fenced, intact, and get the arrivals and bytes that they expect
// (bytes before the copy that brings them is issued); a load of panels (those of a swizzled map) does not write where a
// wgmma, a store or another load is at work; wgmma and stores do not read what a load is still filling, nor what was stored without fence_proxy_async (by
// st_shared and stmatrix_x4: plain pointers are not watched); the warps of a warpgroup issue the same wgmmas, each group
// after a wgmma_fence of its own; nothing is left on its way when a thread, or the block, ends.
#pragma once
#include "world.h"

namespace fa2_host {

void mbarrier_init(const void* barrier, uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(const char* name, const void* barrier, uint32_t bytes, Site site);
// Sleeps until the phase may have completed.
bool mbarrier_try_wait(const char* name, const void* barrier, uint32_t parity, Site site);

// Of a box, columns first: in a map of rank 4 the fourth is the batch, and the fifth 0.
struct Coordinates {
  int d, row, head, fourth, fifth, rank;
};
void bulk_load(void* shared, const void* map, const void* barrier, Coordinates at, Site site);
void bulk_store(const void* map, const void* shared, Coordinates at, Site site);
// Bytes in a row.
void bulk_store_bytes(void* global, const void* shared, uint32_t bytes, Site site);
void bulk_add(float* global, const float* shared, uint32_t bytes, Site site);
// To the same places in another block of the cluster.
void mbarrier_arrive_cluster(const char* name, const void* barrier, int rank, Site site);
void bulk_copy_cluster(void* to, const void* barrier, int rank, const void* from, uint32_t bytes, Site site);
void bulk_commit_group();
// written: global memory too.
void bulk_wait_group(int pending, bool written, Site site);
void fence_proxy_async();

void set_registers(const char* name, int registers, bool more, Site site);

struct Wgmma {
  float* d;           // n / 2 floats of this thread
  const uint32_t* a;  // 4 registers, or null: then a_descriptor
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool a_down, b_down, accumulate, bf16;
};
void wgmma(const char* name, const Wgmma& args, Site site);
void wgmma_fence(Site site);
void wgmma_commit_group(Site site);
void wgmma_wait_group(int pending, Site site);

}  // namespace fa2_host
