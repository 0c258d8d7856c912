// The world that a kernel sees when g++ compiles it: threads are fibers of one OS thread, a block is run until all its
// threads wait, and everything that threads do together goes through here. Used by the twins of the PTX headers.
//
// What is checked: collectives are met by all 32 lanes at one place in the source; barriers are completed; copies in
// flight are never read (their destination is poison until their wait) and never forgotten; shared addresses are in
// range and aligned; nobody waits for ever. A broken rule ends the launch with a message, see fail().
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

namespace fa2_host {

// A place in the source. Wrappers take one as default argument, so that kernels need no marks.
struct Site {
  const char* file;
  int line;
};
#define FA2_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Schedule : int { kLowestFirst, kHighestFirst, kRandom };

// What the test driver asks for. A copy of it in tests/host/run.py.
struct Launch {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t cluster;       // blocks, along x; the grid is a multiple of it
  uint32_t shared_mem_bytes;
  int32_t schedule;       // Schedule
  uint64_t seed;          // of Schedule::kRandom
  void* late;             // what the launch before wrote: not there before await_previous(); or null
  const void* late_bytes;
  uint64_t late_count;
  const char* plant;      // "file:line" of a synchronisation that is left out, or null
  const void* params;     // the kernel's only argument
  uint64_t params_bytes;
  char* message;          // why the launch failed
  uint64_t message_bytes;
};

using KernelBody = void (*)(const void* params);
int run(const Launch& launch, KernelBody body);  // 0, or 1 with a message

// The launch before this one has ended, and what it wrote is there.
void await_previous();

// The wait-for-each-other sites that launches in this library reached, as "file:line name" lines.
const char* sites();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

extern const uint3* thread_index;  // of the fiber that runs
extern uint3 block_index, block_dim, grid_dim;

// False where the plant says that this synchronisation is to be left out.
bool synchronises(const char* name, Site site);

// The kernel's barriers: 0 is __syncthreads. `threads` is the number that takes part.
void barrier(const char* name, int id, int threads, Site site);

// All threads of all blocks of the cluster.
void cluster_barrier(const char* name, Site site);

// The barriers 1 to 15, which part of the block's threads may come to; who does not wait only arrives.
void named_barrier(const char* name, int id, int threads, bool waits, Site site);

// All lanes of a warp meet; the last one calls `complete` with the `args` of all 32 and then everybody goes on.
using Complete = void (*)(void* const* lanes);
void collective(const char* name, void* args, Complete complete, Site site);

// Asynchronous copies of this thread to shared memory. The destination is poison from here to the wait.
void copy_async(void* shared, const void* global, int bytes, int source_bytes);
// What a thread has waited for is there for the others of its warp when they have met since, at __syncwarp or a barrier of the block:
// lane `lane` of this warp reads 16 bytes that an ldmatrix takes.
void check_arrived(const char* shared, int lane, Site site);
void warp_met();  // __syncwarp
void copy_async_commit();
void copy_async_wait(int groups_left);

// True in the libraries of kernels that include sm90/ptx.cuh or sm90/wgmma.cuh: their ordinary stores to shared memory
// are remembered until the thread's next fence_proxy_async, see async.h.
extern bool uses_async_proxy;
void mark_stored(const char* shared, uint32_t bytes, int lane = -1);  // by this thread, or one of its warp

// A thread that reads the same word twice without a change in between goes to sleep until there is one.
int poll(const int* word, Site site);
void release();       // a change, and what the thread has started before it is done
void word_changed();  // by whoever does not release

constexpr uint32_t kSharedBase = 1024;  // addresses start here, as on GPUs that reserve the first KiB
char* shared_memory(size_t bytes_needed);
uint32_t shared_address(const void* pointer);
char* shared_pointer(uint32_t address, uint32_t bytes, Site site);  // checks range and natural alignment

}  // namespace fa2_host
