// What the world is made of: blocks, warps and threads, and how a thread goes to sleep. Used by world.cpp and async.cpp
// alone.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "world.h"

namespace fa2_host {

struct Async;  // async.cpp
struct AsyncDeleter {
  void operator()(Async* async) const;
};

constexpr int kBarriers = 16;
constexpr uint32_t kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------------------
// Blocks, warps, threads

struct Copy {
  char* shared;
  const void* global;
  int bytes, source_bytes;
};

struct Fiber {
  Context context;
  uint3 index;
  std::vector<Copy> copies;         // in flight, oldest first
  std::vector<size_t> groups;       // ends of the committed groups in `copies`
  const int* polled = nullptr;      // the last word read by poll()
  uint64_t polled_at = 0;           // world.changes at that time
  const char* waits_for = nullptr;  // what it sleeps on, for messages
  Site site{};
  int barrier = 0;                  // the named barrier that it waits at
};

struct Warp {
  uint32_t ready = kAllLanes, meeting = 0, polling = 0, exited = 0;
  void* args[32];
  const char* name;
  Complete complete;
  Site site;
};

struct Barrier {
  int arrived = 0, threads = 0;
  Site site{};
  std::vector<uint32_t> came, waiting;  // lanes of each warp; `came` only of named barriers
};

struct Block {
  Block(int threads, size_t shared_bytes) : stacks(threads), fibers(threads), warps(threads / 32) {
    void* memory;  // exactly as long as asked for, so that the address sanitizer sees an index that leaves it
    if (posix_memalign(&memory, 1024, shared_bytes)) abort();
    shared = static_cast<char*>(memory);
    brought.resize(shared_bytes / 16 + 1);
    brought_by.resize(threads / 32);
  }
  ~Block() { free(shared); }
  Block(const Block&) = delete;

  Stacks stacks;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  char* shared;
  // Who has brought each 16 bytes by a copy that others have not met him since (its thread + 1, else 0), and where those are, by warp.
  std::vector<uint16_t> brought;
  std::vector<std::vector<uint32_t>> brought_by;
  uint3 index{};
  int live = 0;
  int warp = -1;       // the one whose lanes run
  int steps_left = 0;  // until another warp may run, under kRandom
  std::unique_ptr<Async, AsyncDeleter> async;  // only of kernels for sm_90
  int cluster_arrived = 0;                // threads of the cluster at its barrier; of its first block
  std::vector<uint32_t> cluster_waiting;  // those of this block, of each warp
};

struct SyncSite {
  Site site;
  const char* name;
  bool planted;
};

struct World {
  const Launch* launch = nullptr;
  KernelBody body = nullptr;
  int threads = 0;
  Context main;
  std::vector<std::unique_ptr<Block>> resident, spare;
  Block* block = nullptr;
  int fiber = -1;
  int steps_left = 0;  // until another block may run, under kRandom
  uint64_t changes = 0;  // of words that are polled
  uint64_t random = 1;
  bool failed = false;
  bool awaited_previous = false;  // whether what the launch before wrote is there
  std::vector<SyncSite> sync_sites;

  Fiber& current() { return block->fibers[fiber]; }
};

extern World world;

uint32_t random_below(uint32_t n);
inline Schedule schedule() { return static_cast<Schedule>(world.launch->schedule); }
inline bool same_place(Site a, Site b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }
const char* short_name(const char* file);

// The block of this rank in the cluster of the one that runs.
Block& cluster_block(int rank, const char* name, Site site);
inline int cluster_size() { return static_cast<int>(world.launch->cluster); }

inline Warp& this_warp() { return world.block->warps[world.fiber / 32]; }
inline uint32_t this_lane() { return 1u << (world.fiber % 32); }
// Who takes itself out of its warp's `ready` sleeps until somebody puts it back.
void sleep(const char* what, Site site);
inline void wake(Block& block, int thread) { block.warps[thread / 32].ready |= 1u << (thread % 32); }

// The parts of async.cpp that world.cpp calls, for blocks that have an Async.
void async_start(Block& block);
// Nobody of the block can run: something that somebody waits for comes about, if there is such; of what lasts until nobody
// else of the cluster can run only if all_wait.
bool async_land(Block& block, bool all_wait);
void async_thread_ends();       // nothing of this thread's may be on its way
void async_thread_releases();   // nor may any addition of its be, which whoever acquires expects to see
void async_block_ends();
std::string async_waits(const Block& block, int thread);  // more about what a thread waits for

}  // namespace fa2_host
