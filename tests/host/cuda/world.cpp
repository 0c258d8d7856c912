#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "block.h"

namespace fa2_host {

const uint3* thread_index;
uint3 block_index, block_dim, grid_dim;
bool uses_async_proxy;

namespace {

constexpr size_t kBlocksAtOnce = 4;  // under Schedule::kRandom

}  // namespace

World world;

uint32_t random_below(uint32_t n) {
  world.random ^= world.random << 13;
  world.random ^= world.random >> 7;
  world.random ^= world.random << 17;
  return static_cast<uint32_t>((world.random >> 32) * n >> 32);
}

const char* short_name(const char* file) {
  const char* slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Who runs next

int pick_lane(uint32_t ready) {
  switch (schedule()) {
    case Schedule::kLowestFirst: return __builtin_ctz(ready);
    case Schedule::kHighestFirst: return 31 - __builtin_clz(ready);
    case Schedule::kRandom: break;
  }
  const uint32_t turn = random_below(32);
  const uint32_t turned = turn ? ready >> turn | ready << (32 - turn) : ready;
  return (__builtin_ctz(turned) + turn) % 32;
}

// Under kRandom a warp, or a block, is interrupted after a number of steps: sometimes a few, sometimes many.
bool interrupted(int& steps_left) {
  if (schedule() != Schedule::kRandom || steps_left-- > 0) return false;
  steps_left = static_cast<int>(1u << random_below(16));
  return true;
}

// The warp that ran goes on for as long as it can.
int pick_warp(Block& block) {
  const int n = static_cast<int>(block.warps.size());
  const bool random = schedule() == Schedule::kRandom;
  if (!interrupted(block.steps_left) && block.warp >= 0 && block.warps[block.warp].ready) return block.warp;
  const int turn = random ? random_below(n) : 0;
  for (int i = 0; i < n; i++) {
    const int w = schedule() == Schedule::kHighestFirst ? n - 1 - i : (i + turn) % n;
    if (block.warps[w].ready) return w;
  }
  return -1;
}

void go(Context& from, Block* block) {
  block->warp = pick_warp(*block);
  const bool alone = cluster_size() == 1;
  while (block->warp < 0 && block->async && async_land(*block, alone)) block->warp = pick_warp(*block);
  const bool stop = block->warp < 0 || (&from != &world.main && interrupted(world.steps_left));
  if (stop) return Context::change(from, world.main);
  world.fiber = block->warp * 32 + pick_lane(block->warps[block->warp].ready);
  Fiber& next = block->fibers[world.fiber];
  thread_index = &next.index;
  if (&next.context != &from) Context::change(from, next.context);
}

}  // namespace

void sleep(const char* what, Site site) {
  Fiber& self = world.current();
  self.waits_for = what;
  self.site = site;
  go(self.context, world.block);
  self.waits_for = nullptr;
}

namespace {

void thread_main() {
  world.body(world.launch->params);
  Fiber& self = world.current();
  if (!self.copies.empty()) {
    fail("the thread ends with %zu asynchronous copies that it never waited for", self.copies.size());
  }
  if (world.block->async) async_thread_ends();
  Warp& warp = this_warp();
  if (warp.meeting) {
    fail("the thread ends while lanes 0x%08x of its warp wait at %s (%s:%d)", warp.meeting, warp.name,
         short_name(warp.site.file), warp.site.line);
  }
  warp.ready &= ~this_lane();
  warp.exited |= this_lane();
  if (--world.block->live == 0 && world.block->async) async_block_ends();
  go(self.context, world.block);
}

Block* start_block(uint64_t n) {
  if (world.spare.empty()) {
    world.spare.push_back(std::make_unique<Block>(world.threads, world.launch->shared_mem_bytes));
  }
  world.resident.push_back(std::move(world.spare.back()));
  world.spare.pop_back();
  Block* block = world.resident.back().get();
  block->index.x = static_cast<unsigned>(n % grid_dim.x);
  block->index.y = static_cast<unsigned>(n / grid_dim.x % grid_dim.y);
  block->index.z = static_cast<unsigned>(n / grid_dim.x / grid_dim.y);
  block->live = world.threads;
  block->warp = -1;
  memset(block->shared, 0xff, world.launch->shared_mem_bytes);  // NaN in every format
  std::fill(block->warps.begin(), block->warps.end(), Warp());
  block->cluster_arrived = 0;
  block->cluster_waiting.assign(block->warps.size(), 0);
  for (Barrier& barrier : block->barriers) {
    barrier = Barrier();
    barrier.came.assign(block->warps.size(), 0);
    barrier.waiting.assign(block->warps.size(), 0);
  }
  std::fill(block->brought.begin(), block->brought.end(), 0);
  for (auto& places : block->brought_by) places.clear();
  if (uses_async_proxy) async_start(*block);
  for (int t = 0; t < world.threads; t++) {
    Fiber& fiber = block->fibers[t];
    const unsigned x = block_dim.x, y = block_dim.y;
    fiber.index = {t % x, t / x % y, t / (x * y)};
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.polled = nullptr;
    fiber.waits_for = nullptr;
    forget_frames(block->stacks[t], kStackBytes);
    // Stacks are a multiple of the page apart: shifted, so that they do not all fall into the same cache sets.
    fiber.context.prepare(block->stacks[t], kStackBytes - (t % 32) * 128, thread_main);
  }
  return block;
}

// What every thread of a block does, neighbours that do the same taken together.
std::string describe(const Block& block) {
  std::string text, last;
  size_t first = 0;
  const size_t n = block.fibers.size();
  for (size_t t = 0; t <= n; t++) {
    std::string doing;
    if (t < n) {
      const Fiber& fiber = block.fibers[t];
      if (block.warps[t / 32].exited >> (t % 32) & 1) {
        doing = "ended";
      } else if (fiber.waits_for) {
        doing = std::string("wait at ") + fiber.waits_for + " (" + short_name(fiber.site.file) + ":";
        doing += std::to_string(fiber.site.line) + ")";
        if (block.async) doing += async_waits(block, static_cast<int>(t));
      } else {
        doing = "can run";
      }
    }
    if (t == n || (t && doing != last)) {
      text += (text.empty() ? "threads " : "; ") + std::to_string(first) + "-" + std::to_string(t - 1) + " " + last;
      first = t;
    }
    last = doing;
  }
  return text;
}

void write_message(const char* text) {
  snprintf(world.launch->message, world.launch->message_bytes, "%s", text);
  world.failed = true;
}

bool runnable(const Block& block) {
  return std::any_of(block.warps.begin(), block.warps.end(), [](const Warp& warp) { return warp.ready != 0; });
}

// The block that goes on; null if a new one has to be started. Blocks run one after another, and one that sleeps until
// another block's release is taken up again after it; under kRandom, a few are under way at any time.
Block* pick_block(bool more) {
  std::vector<Block*> candidates;
  for (auto& block : world.resident) {
    world.block = block.get();
    // What another block of the cluster has sent may land.
    while (cluster_size() > 1 && !runnable(*block) && async_land(*block, false)) continue;
    if (runnable(*block)) candidates.push_back(block.get());
  }
  if (cluster_size() > 1 && candidates.empty() && !world.resident.empty()) {  // all wait: one of them gets on
    const auto blocks = static_cast<uint32_t>(world.resident.size());
    const uint32_t turn = schedule() == Schedule::kRandom ? random_below(blocks) : 0;
    for (uint32_t i = 0; i < blocks && candidates.empty(); i++) {
      Block* block = world.block = world.resident[(i + turn) % blocks].get();
      while (!runnable(*block) && async_land(*block, true)) continue;
      if (runnable(*block)) candidates.push_back(block);
    }
  }
  if (candidates.empty()) return nullptr;
  if (schedule() != Schedule::kRandom) return candidates.back();
  if (more && world.resident.size() < kBlocksAtOnce && random_below(2) == 0) return nullptr;
  return candidates[random_below(static_cast<uint32_t>(candidates.size()))];
}

void run_grid() {
  const uint64_t clusters = uint64_t{grid_dim.x} * grid_dim.y * grid_dim.z / cluster_size();
  std::vector<uint64_t> order(clusters);
  for (uint64_t i = 0; i < clusters; i++) order[i] = schedule() == Schedule::kHighestFirst ? clusters - 1 - i : i;
  if (schedule() == Schedule::kRandom) {
    for (uint64_t i = clusters; i > 1; i--) std::swap(order[i - 1], order[random_below(static_cast<uint32_t>(i))]);
  }
  for (uint64_t started = 0; !world.failed;) {
    Block* block = pick_block(started < clusters);
    if (!block && started < clusters) {
      for (int rank = 0; rank < cluster_size(); rank++) block = start_block(order[started] * cluster_size() + rank);
      started++;
    }
    if (!block && world.resident.empty()) return;
    if (!block) {
      const Block& stuck = *world.resident.front();
      char head[64];
      snprintf(head, sizeof head, "deadlock in block (%u, %u, %u): ", stuck.index.x, stuck.index.y, stuck.index.z);
      return write_message((head + describe(stuck)).c_str());
    }
    world.block = block;
    block_index = block->index;
    go(world.main, block);
    if (block->live == 0) {
      auto place = std::find_if(world.resident.begin(), world.resident.end(), [=](auto& b) { return &*b == block; });
      world.spare.push_back(std::move(*place));
      world.resident.erase(place);
    }
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// What the twins call

void fail(const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  char whole[1200];
  snprintf(whole, sizeof whole, "block (%u, %u, %u) thread %d: %s", block_index.x, block_index.y, block_index.z,
             world.fiber, text);
  write_message(whole);
  Context abandoned;
  Context::change(abandoned, world.main);
  abort();
}

bool synchronises(const char* name, Site site) {
  for (const SyncSite& known : world.sync_sites) {
    if (same_place(known.site, site) && !strcmp(known.name, name)) return !known.planted;
  }
  const std::string place = std::string(site.file) + ":" + std::to_string(site.line);
  const char* plant = world.launch->plant;
  const size_t length = plant ? strlen(plant) : 0;
  const bool planted = plant && place.size() >= length && !place.compare(place.size() - length, length, plant) &&
                       (place.size() == length || place[place.size() - length - 1] == '/');
  world.sync_sites.push_back({site, name, planted});
  return !planted;
}

const char* sites() {
  static std::string text;
  text.clear();
  for (const SyncSite& known : world.sync_sites) {
    text += std::string(known.site.file) + ":" + std::to_string(known.site.line) + " " + known.name + "\n";
  }
  return text.c_str();
}

namespace {
void met(Block& block, size_t warp) {
  for (uint32_t place : block.brought_by[warp]) block.brought[place] = 0;
  block.brought_by[warp].clear();
}
}  // namespace

void barrier(const char* name, int id, int threads, Site site) {
  if (!synchronises(name, site)) return;
  if (id < 0 || id >= kBarriers) fail("%s: barrier %d, there are %d", name, id, kBarriers);
  Barrier& barrier = world.block->barriers[id];
  if (barrier.arrived == 0) {
    barrier.threads = threads ? threads : world.threads;
    barrier.site = site;
  } else if (!same_place(barrier.site, site)) {
    fail("divergent barrier %d: this thread is at %s:%d, %d others wait at %s:%d", id, short_name(site.file), site.line,
             barrier.arrived, short_name(barrier.site.file), barrier.site.line);
  }
  Warp& warp = this_warp();
  if (++barrier.arrived < barrier.threads) {
    warp.ready &= ~this_lane();
    barrier.waiting[world.fiber / 32] |= this_lane();
  } else {
    barrier.arrived = 0;
    for (size_t w = 0; w < barrier.waiting.size(); w++) {
      world.block->warps[w].ready |= barrier.waiting[w];
      barrier.waiting[w] = 0;
      met(*world.block, w);
    }
    world.block->warp = -1;  // the schedule's favourite goes first, not the last to come
  }
  sleep(name, site);
}

Block& cluster_block(int rank, const char* name, Site site) {
  if (rank < 0 || rank >= cluster_size()) {
    fail("%s (%s:%d): rank %d in a cluster of %d", name, short_name(site.file), site.line, rank, cluster_size());
  }
  const unsigned x = world.block->index.x / cluster_size() * cluster_size() + rank;
  for (auto& block : world.resident) {
    const uint3 index = block->index, mine = world.block->index;
    if (index.x == x && index.y == mine.y && index.z == mine.z && block->live > 0) return *block;
  }
  fail("%s (%s:%d): block (%u, %u, %u) has ended", name, short_name(site.file), site.line, x, world.block->index.y,
       world.block->index.z);
}

void cluster_barrier(const char* name, Site site) {
  if (!synchronises(name, site)) return;
  Block& first = cluster_block(0, name, site);
  if (++first.cluster_arrived < cluster_size() * world.threads) {
    this_warp().ready &= ~this_lane();
    world.block->cluster_waiting[world.fiber / 32] |= this_lane();
  } else {
    first.cluster_arrived = 0;
    for (int rank = 0; rank < cluster_size(); rank++) {
      Block& block = cluster_block(rank, name, site);
      for (size_t w = 0; w < block.warps.size(); w++) {
        block.warps[w].ready |= block.cluster_waiting[w];
        block.cluster_waiting[w] = 0;
      }
    }
    world.steps_left = 0;  // a good moment for the others
  }
  sleep(name, site);
}

void named_barrier(const char* name, int id, int threads, bool waits, Site site) {
  if (!synchronises(name, site)) return;
  if (id < 1 || id >= kBarriers) fail("%s: barrier %d; the named ones are 1 to %d", name, id, kBarriers - 1);
  if (threads <= 0 || threads % 32 || threads > world.threads) {
    fail("%s: barrier %d of %d threads: whole warps of the block are needed", name, id, threads);
  }
  Barrier& barrier = world.block->barriers[id];
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.site = site;
  } else if (barrier.threads != threads) {
    fail("barrier %d has %d threads at %s:%d, but %d at %s:%d", id, threads, short_name(site.file), site.line,
         barrier.threads, short_name(barrier.site.file), barrier.site.line);
  }
  const int w = world.fiber / 32;
  if (barrier.came[w] & this_lane()) {
    fail("%s (%s:%d): this thread comes to barrier %d again, but only %d of %d threads have come", name,
         short_name(site.file), site.line, id, barrier.arrived, threads);
  }
  barrier.came[w] |= this_lane();
  const bool last = ++barrier.arrived == threads;
  if (last) {
    barrier.arrived = 0;
    for (size_t i = 0; i < barrier.came.size(); i++) {
      world.block->warps[i].ready |= barrier.waiting[i];
      barrier.came[i] = barrier.waiting[i] = 0;
    }
    world.block->warp = -1;  // the schedule's favourite goes first, not the last to come
  } else if (waits) {
    this_warp().ready &= ~this_lane();
    barrier.waiting[w] |= this_lane();
    world.current().barrier = id;
  }
  if (last || waits) sleep(name, site);
  world.current().barrier = 0;
}

void collective(const char* name, void* args, Complete complete, Site site) {
  Warp& warp = this_warp();
  if (!warp.meeting) {
    warp.name = name;
    warp.complete = complete;
    warp.site = site;
  } else if (warp.complete != complete || !same_place(warp.site, site)) {
    fail("divergent warp: this lane is at %s (%s:%d), lanes 0x%08x wait at %s (%s:%d)", name, short_name(site.file),
             site.line, warp.meeting, warp.name, short_name(warp.site.file), warp.site.line);
  }
  if (warp.exited) {
    fail("%s (%s:%d) needs the whole warp, but lanes 0x%08x have ended", name, short_name(site.file), site.line,
         warp.exited);
  }
  warp.args[world.fiber % 32] = args;
  warp.meeting |= this_lane();
  if (warp.meeting != kAllLanes) {
    warp.ready &= ~this_lane();
    return sleep(name, site);
  }
  complete(warp.args);
  warp.meeting = 0;
  warp.ready = kAllLanes;
}

void copy_async(void* shared, const void* global, int bytes, int source_bytes) {
  if (source_bytes < 0 || source_bytes > bytes) fail("cp.async: %d source bytes of %d", source_bytes, bytes);
  if (source_bytes && reinterpret_cast<uintptr_t>(global) % bytes) {
    fail("cp.async: global address %p is not %d-byte aligned", global, bytes);
  }
  memset(shared, 0xff, bytes);  // it may land any time from now on: whoever reads it before the wait is wrong
  world.current().copies.push_back({static_cast<char*>(shared), global, bytes, source_bytes});
}

void warp_met() { met(*world.block, world.fiber / 32); }

void check_arrived(const char* shared, int lane, Site site) {
  const uint16_t by = world.block->brought[(shared - world.block->shared) / 16];
  if (by && by != world.fiber / 32 * 32 + lane + 1) {
    fail("%s:%d: lane %d reads what thread %d has copied, but they have not met since", short_name(site.file), site.line, lane, by - 1);
  }
}

void copy_async_commit() { world.current().groups.push_back(world.current().copies.size()); }

void copy_async_wait(int groups_left) {
  Fiber& self = world.current();
  const int landing = static_cast<int>(self.groups.size()) - groups_left;
  if (landing <= 0) return;
  const size_t end = self.groups[landing - 1];
  for (size_t i = 0; i < end; i++) {
    const Copy& copy = self.copies[i];
    if (copy.source_bytes) memcpy(copy.shared, copy.global, copy.source_bytes);
    memset(copy.shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    const uint32_t place = static_cast<uint32_t>((copy.shared - world.block->shared) / 16);
    world.block->brought[place] = static_cast<uint16_t>(world.fiber + 1);
    world.block->brought_by[world.fiber / 32].push_back(place);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + end);
  self.groups.erase(self.groups.begin(), self.groups.begin() + landing);
  for (size_t& group : self.groups) group -= end;
}

int poll(const int* word, Site site) {
  Fiber& self = world.current();
  if (self.polled == word && self.polled_at == world.changes) {
    Warp& warp = this_warp();
    warp.ready &= ~this_lane();
    warp.polling |= this_lane();
    sleep("a word that no other thread changes", site);
  }
  self.polled = word;
  self.polled_at = world.changes;
  return *word;
}

void release() {
  if (world.block->async) async_thread_releases();
  word_changed();
}

void word_changed() {
  world.changes++;
  world.steps_left = 0;  // a good moment for whoever waited for it
  for (auto& block : world.resident) {
    for (Warp& warp : block->warps) {
      warp.ready |= warp.polling;
      warp.polling = 0;
    }
  }
}

char* shared_memory(size_t bytes_needed) {
  if (bytes_needed > world.launch->shared_mem_bytes) {
    fail("the kernel needs %zu bytes of shared memory, the launch has %u", bytes_needed,
         world.launch->shared_mem_bytes);
  }
  return world.block->shared;
}

uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - world.block->shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(world.launch->shared_mem_bytes)) {
    fail("%p is not a pointer to shared memory", pointer);
  }
  return kSharedBase + static_cast<uint32_t>(offset);
}

char* shared_pointer(uint32_t address, uint32_t bytes, Site site) {
  const uint32_t offset = address - kSharedBase, size = world.launch->shared_mem_bytes;
  if (address < kSharedBase || offset > size || bytes > size - offset) {
    fail("%s:%d: %u bytes at offset %lld of %u bytes of shared memory", short_name(site.file), site.line, bytes,
         static_cast<long long>(address) - kSharedBase, size);
  }
  if (offset % bytes) {
    fail("%s:%d: offset %u of shared memory is not %u-byte aligned", short_name(site.file), site.line, offset, bytes);
  }
  return world.block->shared + offset;
}

void await_previous() {
  if (world.awaited_previous || !world.launch->late) return;
  world.awaited_previous = true;
  memcpy(world.launch->late, world.launch->late_bytes, world.launch->late_count);
  word_changed();
}

int run(const Launch& launch, KernelBody body) {
  world.launch = &launch;
  world.body = body;
  world.failed = false;
  world.awaited_previous = false;
  world.threads = static_cast<int>(launch.block[0] * launch.block[1] * launch.block[2]);
  world.random = launch.seed * 0x9e3779b97f4a7c15u + 0x1234567u;
  world.sync_sites.clear();
  world.resident.clear();
  world.spare.clear();
  grid_dim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  block_dim = {launch.block[0], launch.block[1], launch.block[2]};
  if (launch.cluster == 0 || launch.grid[0] % launch.cluster) {
    snprintf(launch.message, launch.message_bytes, "a grid of %u blocks in clusters of %u", launch.grid[0],
             launch.cluster);
    return 1;
  }
  if (world.threads == 0 || world.threads % 32 || world.threads > 1024) {
    snprintf(launch.message, launch.message_bytes, "a block of %d threads: whole warps, at most 1024, are needed",
             world.threads);
    return 1;
  }
#if defined(__SSE__)
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8000);  // flush to zero, as the kernels are compiled with -ftz=true
#endif
  run_grid();
  if (!world.failed && launch.late && !world.awaited_previous) {
    snprintf(launch.message, launch.message_bytes, "nobody waited for the launch before");
    world.failed = true;
  }
#if defined(__SSE__)
  _mm_setcsr(mode);
#endif
  world.resident.clear();
  world.spare.clear();
  return world.failed;
}

}  // namespace fa2_host
