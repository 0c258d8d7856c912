#include "async.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <list>
#include <string>
#include <vector>

#include "block.h"
#include "common/ptx.cuh"

namespace fa2_host {

namespace {

constexpr uint32_t kAtom = 1024;  // 8 rows of 128 bytes: what the swizzle permutes, and the unit of what is remembered
constexpr int kWarpgroup = 4;     // warps
constexpr int kRegisterFile = 65536;
constexpr uint64_t kMapMagic = 0x3270614d726f7354;     // as in tests/host/tensor_map.py
constexpr uint64_t kBarrierSeal = 0x7265697272616221;  // what an mbarrier's 8 bytes hold, beside its offset
constexpr uint32_t kInFlight = 0x7f80dead;             // an accumulator on its way: a NaN that arithmetic changes

using Row = float __attribute__((vector_size(32)));  // 8 columns

// 128-byte swizzle: where a byte of a matrix lies in shared memory.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// ---------------------------------------------------------------------------------------------------------------------
// State

struct MBarrier {
  uint32_t offset, arrivals, pending;
  int initialised_by;
  bool fenced = false;
  uint32_t phase = 0;
  int64_t bytes = 0;         // still to come in this phase
  int64_t unclaimed = 0;     // of those, what no copy has been issued for
  std::vector<int> waiters;  // threads
  int unseen = 0;            // threads that waited for the last phase and have not run since
};

struct Map {
  char* base;
  int64_t dims[5], strides[4];  // dims as in Coordinates; bytes between neighbours, but for columns
  uint32_t rows, row_bytes;     // of the box
  int item;                     // bytes of an element
  bool swizzled;                // rows of 128 bytes; else one after the other, as they are
  uint32_t bytes() const { return rows * row_bytes; }
};

// Of a box.
struct Load {
  Map map;
  Coordinates at;
  uint32_t offset, bytes;
  MBarrier* barrier;
  Site site;
  Block* from = nullptr;  // of the cluster: bytes in a row of its shared memory, instead of a box
  uint32_t from_offset = 0;
};

// Of a box, or of `bytes` in a row, copied or added: then `row` is where to.
struct Store {
  Map map;
  Coordinates at;
  float* row;
  bool adds;
  uint32_t offset, bytes;
  bool has_read;
  Site site;
};

// Of a row: what such a copy or addition has read, and not written yet.
struct Piece {
  float* row;
  bool adds;
  std::vector<float> values;
};

struct Thread {
  std::vector<Store> stores;   // in flight, oldest first
  std::vector<Piece> pieces;   // oldest first
  std::vector<size_t> groups;  // ends of the committed groups in `stores`
  std::vector<std::pair<uint32_t, uint32_t>> stored;  // (offset, bytes) since the last fence_proxy_async
};

// Of one warp: its 16 rows.
struct InFlight {
  size_t group;  // the last one that adds to it
  int n;
  float* lanes[32];
  std::vector<Row> sum;  // [16][n / 8]
};

struct Operand {
  uint32_t start, leading, stride;
  bool down;
};

struct Product {
  const char* name;
  Site site;
  size_t group;
  InFlight* d;
  int n;
  bool accumulate, bf16, a_in_registers;
  uint32_t a_registers[32][4];
  Operand a, b;
  int first_row;  // of A
  bool done;
  std::vector<uint16_t> atoms;  // that it reads
};

struct WgmmaWarp {
  bool fenced = false;
  bool waited = false;   // at an mbarrier since the last fence
  size_t issued = 0;     // products
  size_t committed = 0;  // groups
  size_t delivered = 0;  // groups whose accumulators the threads have
  size_t target = 0;     // groups that it waits for
  bool open = false;     // products since the last commit
  std::list<InFlight> accumulators;
  std::deque<Product> products;
};

struct Issued {
  Wgmma args;
  Site site;
};

struct Atom {
  int writers = 0, readers = 0, dirty = 0;  // loads in flight; unfinished wgmmas and stores; bytes
  Site writer{}, reader{};
};

}  // namespace

struct Async {
  std::deque<MBarrier> barriers;
  std::vector<Thread> threads;
  std::deque<Load> loads;
  std::vector<Atom> atoms;
  std::vector<uint16_t> stored_by;  // thread + 1 of each byte that was stored and not fenced yet
  std::vector<WgmmaWarp> warps;
  std::vector<std::vector<Issued>> groups;  // what the warps of each warpgroup have issued
  std::vector<uint32_t> waiting;            // lanes of each warp in wgmma_wait_group
  std::vector<int> registers;               // per thread, of each warp
  std::vector<uint32_t> wants_registers;    // lanes of each warp
  bool wgmma_reads_late = false;
  std::vector<int> lingering;  // threads at a wait that ends as late as it can
};

void AsyncDeleter::operator()(Async* async) const { delete async; }

namespace {

Async& state() { return *world.block->async; }
Thread& this_thread() { return state().threads[world.fiber]; }
uint32_t offset_of(const void* pointer) { return shared_address(pointer) - kSharedBase; }
unsigned count(size_t n) { return static_cast<unsigned>(n); }

bool coin(bool lowest, bool highest) {
  if (schedule() == Schedule::kRandom) return random_below(2) != 0;
  return schedule() == Schedule::kLowestFirst ? lowest : highest;
}

void sleep_here(const char* name, Site site) {
  this_warp().ready &= ~this_lane();
  sleep(name, site);
}

// Until no other thread of the cluster can run.
void linger(const char* name, Site site) {
  state().lingering.push_back(world.fiber);
  sleep_here(name, site);
}

// The bytes are about to be read by the async proxy.
void check_fenced(uint32_t offset, uint32_t bytes, const char* reader, Site site) {
  Async& async = state();
  for (uint32_t i = offset; i < offset + bytes; i++) {
    if (!async.atoms[i / kAtom].dirty) {
      i |= kAtom - 1;
    } else if (async.stored_by[i]) {
      fail("%s (%s:%d) meets offset %u of shared memory, which thread %d has stored without fence_proxy_async", reader,
           short_name(site.file), site.line, i, async.stored_by[i] - 1);
    }
  }
}

void check_filled(uint32_t atom, const char* reader, Site site) {
  const Atom& a = state().atoms[atom];
  if (a.writers) {
    fail("%s (%s:%d) reads shared memory at offset %u, which the bulk load of %s:%d is still filling", reader,
         short_name(site.file), site.line, atom * kAtom, short_name(a.writer.file), a.writer.line);
  }
}

}  // namespace

void mark_stored(const char* shared, uint32_t bytes, int lane) {
  Async& async = state();
  const int thread = lane < 0 ? world.fiber : world.fiber / 32 * 32 + lane;
  const uint32_t offset = static_cast<uint32_t>(shared - world.block->shared);
  for (uint32_t i = offset; i < offset + bytes; i++) {
    if (!async.stored_by[i]) async.atoms[i / kAtom].dirty++;
    async.stored_by[i] = static_cast<uint16_t>(thread + 1);
  }
  async.threads[thread].stored.emplace_back(offset, bytes);
}

void fence_proxy_async() {
  Async& async = state();
  for (const auto& [offset, bytes] : this_thread().stored) {
    for (uint32_t i = offset; i < offset + bytes; i++) {
      if (async.stored_by[i] != world.fiber + 1) continue;
      async.stored_by[i] = 0;
      async.atoms[i / kAtom].dirty--;
    }
  }
  this_thread().stored.clear();
}

// ---------------------------------------------------------------------------------------------------------------------
// mbarrier

namespace {

MBarrier& find_barrier(const char* user, const void* barrier) {
  const uint32_t offset = offset_of(barrier);
  for (MBarrier& known : state().barriers) {
    if (known.offset != offset) continue;
    uint64_t seal;
    memcpy(&seal, barrier, sizeof seal);
    if (seal != (kBarrierSeal ^ offset)) fail("%s: the mbarrier at offset %u was overwritten", user, offset);
    return known;
  }
  fail("%s: there is no mbarrier at offset %u, or it is not initialised yet", user, offset);
}

void complete_phase(MBarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  if (barrier.unseen) {
    fail("phase %u of the mbarrier at offset %u ends before %d threads have seen the end of the one that they wait for",
         barrier.phase, barrier.offset, barrier.unseen);
  }
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  barrier.unseen = static_cast<int>(barrier.waiters.size());
  for (int thread : barrier.waiters) wake(*world.block, thread);
  if (!barrier.waiters.empty()) world.block->steps_left = 0;  // a good moment for them
  barrier.waiters.clear();
}

}  // namespace

void mbarrier_init(const void* barrier, uint32_t arrivals) {
  const uint32_t offset = offset_of(barrier);
  if (offset % 8) fail("mbarrier_init: offset %u is not 8-byte aligned", offset);
  if (arrivals == 0 || arrivals >= 1u << 20) fail("mbarrier_init: %u arrivals", arrivals);
  for (const MBarrier& known : state().barriers) {
    if (known.offset == offset) fail("mbarrier_init: the one at offset %u is initialised already", offset);
  }
  MBarrier made;
  made.offset = offset;
  made.arrivals = made.pending = arrivals;
  made.initialised_by = world.fiber;
  state().barriers.push_back(made);
  const uint64_t seal = kBarrierSeal ^ offset;
  memcpy(shared_pointer(offset + kSharedBase, 8, {"", 0}), &seal, sizeof seal);
}

void fence_mbarrier_init() {
  for (MBarrier& barrier : state().barriers) {
    if (barrier.initialised_by == world.fiber) barrier.fenced = true;
  }
}

void mbarrier_arrive(const char* name, const void* address, uint32_t bytes, Site site) {
  MBarrier& barrier = find_barrier(name, address);
  if (barrier.pending == 0) {
    fail("%s (%s:%d): all %u arrivals of phase %u at the mbarrier at offset %u have come already", name,
         short_name(site.file), site.line, barrier.arrivals, barrier.phase, barrier.offset);
  }
  barrier.bytes += bytes;
  barrier.unclaimed += bytes;
  barrier.pending--;
  complete_phase(barrier);
}

bool mbarrier_try_wait(const char* name, const void* address, uint32_t parity, Site site) {
  MBarrier& barrier = find_barrier(name, address);
  if (parity > 1) fail("%s (%s:%d): parity %u", name, short_name(site.file), site.line, parity);
  state().warps[world.fiber / 32].waited = true;
  if ((barrier.phase & 1) != parity) return true;
  barrier.waiters.push_back(world.fiber);
  sleep_here(name, site);
  barrier.unseen--;
  return (barrier.phase & 1) != parity;
}

// ---------------------------------------------------------------------------------------------------------------------
// Bulk tensor copies

namespace {

Map read_map(const void* words, int rank, Site site) {
  const uint64_t* w = static_cast<const uint64_t*>(words);
  const char* wrong = nullptr;
  if (reinterpret_cast<uintptr_t>(words) % 64) wrong = "it is not 64-byte aligned";
  else if (w[11] != kMapMagic) wrong = "it was not made by tests/host/tensor_map.py";
  else if (w[0] % 16) wrong = "its pointer is not 16-byte aligned";
  else if (w[10] != 2 && w[10] != 4) wrong = "its elements have not 2 or 4 bytes";
  else if (w[10] == 2 && w[8] != 64) wrong = "its box is not 64 columns of 2 bytes wide";
  else if (w[10] == 4 && (w[8] < 4 || w[8] > 256 || w[8] % 4)) wrong = "its box has not 4 to 256 columns of 4 bytes";
  else if (w[9] < 1 || w[9] > 256) wrong = "its box has not 1 to 256 rows";
  else if (w[14] != static_cast<uint64_t>(rank)) wrong = "it has another rank than the copy";
  const uint64_t dims[] = {w[1], w[2], w[3], w[4], w[12]}, strides[] = {w[5], w[6], w[7], w[13]};
  for (int i = 0; i < 5 && !wrong; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) wrong = "a dimension is not from 1 to 2^32";
    if (i < 4 && (strides[i] % 16 || strides[i] >> 40)) wrong = "a stride is not a multiple of 16 below 2^40";
  }
  if (wrong) fail("%s:%d: no tensor map: %s", short_name(site.file), site.line, wrong);
  Map map{reinterpret_cast<char*>(w[0]), {}, {}, static_cast<uint32_t>(w[9]), static_cast<uint32_t>(w[8] * w[10]),
          static_cast<int>(w[10]), w[10] == 2};
  for (int i = 0; i < 5; i++) map.dims[i] = static_cast<int64_t>(dims[i]);
  for (int i = 0; i < 4; i++) map.strides[i] = static_cast<int64_t>(strides[i]);
  return map;
}

uint32_t place_of_box(const Map& map, const void* shared, const char* name, Site site) {
  const uint32_t offset = offset_of(shared), size = world.launch->shared_mem_bytes;
  const uint32_t alignment = map.swizzled ? kAtom : 128;
  if (offset % alignment) {
    fail("%s (%s:%d): offset %u of shared memory is not %u-byte aligned", name, short_name(site.file), site.line, offset,
         alignment);
  }
  if (map.bytes() > size - offset) {
    fail("%s (%s:%d): %u bytes at offset %u of %u bytes of shared memory", name, short_name(site.file), site.line,
         map.bytes(), offset, size);
  }
  return offset;
}

uint32_t end_atom(uint32_t offset, uint32_t bytes) { return (offset + bytes + kAtom - 1) / kAtom; }

// Calls `each(shared, global, bytes)` for pieces of the box of at most 16 bytes; `global` is null outside the tensor.
template <class Each>
void walk_box(const Map& map, Coordinates at, uint32_t offset, Each each) {
  const int item = map.item, items = 16 / item;
  const bool there = at.head >= 0 && at.head < map.dims[2] && at.fourth >= 0 && at.fourth < map.dims[3] && at.fifth >= 0 &&
                     at.fifth < map.dims[4];
  for (uint32_t r = 0; r < map.rows; r++) {
    const int64_t row = int64_t{at.row} + r;
    for (uint32_t c = 0; c < map.row_bytes / 16; c++) {
      const uint32_t place = offset + r * map.row_bytes + c * 16;
      char* shared = world.block->shared + (map.swizzled ? swizzled(place) : place);
      const int64_t column = int64_t{at.d} + items * c;
      const int64_t first = std::clamp<int64_t>(-column, 0, items);
      const int64_t end = std::clamp<int64_t>(map.dims[0] - column, first, items);
      if (!there || row < 0 || row >= map.dims[1] || first == end) {
        each(shared, nullptr, 16);
        continue;
      }
      char* global = map.base + row * map.strides[0] + at.head * map.strides[1] + at.fourth * map.strides[2] +
                     at.fifth * map.strides[3];
      if (first) each(shared, nullptr, static_cast<int>(item * first));
      each(shared + item * first, global + item * (column + first), static_cast<int>(item * (end - first)));
      if (end < items) each(shared + item * end, nullptr, static_cast<int>(16 - item * end));
    }
  }
}

void land(const Load& load) {
  if (load.from) {
    memcpy(world.block->shared + load.offset, load.from->shared + load.from_offset, load.bytes);
    const uint32_t last = end_atom(load.from_offset, load.bytes);
    for (uint32_t i = load.from_offset / kAtom; i < last; i++) load.from->async->atoms[i].readers--;
  } else {
    walk_box(load.map, load.at, load.offset, [](char* shared, const char* global, int bytes) {
      global ? memcpy(shared, global, bytes) : memset(shared, 0, bytes);
    });
  }
  if (load.from || load.map.swizzled) {
    for (uint32_t i = load.offset / kAtom; i < end_atom(load.offset, load.bytes); i++) state().atoms[i].writers--;
  }
  load.barrier->bytes -= load.bytes;
  complete_phase(*load.barrier);
}

void write_pieces(Thread& thread) {
  for (const Piece& piece : thread.pieces) {
    for (size_t i = 0; i < piece.values.size(); i++) {
      piece.row[i] = piece.adds ? piece.row[i] + piece.values[i] : piece.values[i];
    }
  }
  thread.pieces.clear();
}

void read_source(Store& store) {
  if (store.has_read) return;
  check_fenced(store.offset, store.bytes, "the bulk store", store.site);
  if (store.row) {
    Piece piece{store.row, store.adds, std::vector<float>(store.bytes / sizeof(float))};
    memcpy(piece.values.data(), world.block->shared + store.offset, store.bytes);
    this_thread().pieces.push_back(piece);
  } else {
    walk_box(store.map, store.at, store.offset, [](const char* shared, char* global, int bytes) {
      if (global) memcpy(global, shared, bytes);
    });
  }
  store.has_read = true;
}

// The barrier that a load arrives at, less the bytes that it brings.
MBarrier& claim(const void* address, uint32_t bytes, Site site) {
  MBarrier& barrier = find_barrier("the bulk load", address);
  if (!barrier.fenced) fail("the bulk load uses the mbarrier at offset %u without fence_mbarrier_init", barrier.offset);
  if (barrier.unclaimed < bytes) {
    fail("a bulk load of %u bytes (%s:%d), but the mbarrier at offset %u expects only %lld more in phase %u", bytes,
         short_name(site.file), site.line, barrier.offset, static_cast<long long>(barrier.unclaimed), barrier.phase);
  }
  barrier.unclaimed -= bytes;
  return barrier;
}

void start(const Load& load) {
  if (!coin(true, false)) return land(load);
  memset(world.block->shared + load.offset, 0xff, load.bytes);
  state().loads.push_back(load);
}

void start(Store store) {
  for (uint32_t i = store.offset / kAtom; i < end_atom(store.offset, store.bytes); i++) {
    check_filled(i, "the bulk store", store.site);
    state().atoms[i].readers++;
    state().atoms[i].reader = store.site;
  }
  check_fenced(store.offset, store.bytes, "the bulk store", store.site);
  if (!coin(true, false)) read_source(store);
  this_thread().stores.push_back(store);
}

uint32_t place_of_bytes(const void* shared, const void* global, uint32_t bytes, const char* name, Site site) {
  const uint32_t offset = offset_of(shared), size = world.launch->shared_mem_bytes;
  if (offset % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || bytes == 0) {
    fail("%s (%s:%d): %u bytes between offset %u and %p: all have to be multiples of 16", name, short_name(site.file),
         site.line, bytes, offset, global);
  }
  if (offset > size || bytes > size - offset) {
    fail("%s (%s:%d): %u bytes at offset %u of %u bytes of shared memory", name, short_name(site.file), site.line, bytes,
         offset, size);
  }
  return offset;
}

// Marks what a load is going to fill.
void fill(uint32_t offset, uint32_t bytes, Site site) {
  for (uint32_t i = offset / kAtom; i < end_atom(offset, bytes); i++) {
    Atom& atom = state().atoms[i];
    if (atom.writers || atom.readers) {
      const Site other = atom.writers ? atom.writer : atom.reader;
      fail("the bulk load (%s:%d) writes to offset %u of shared memory, which %s:%d is still %s", short_name(site.file),
           site.line, i * kAtom, short_name(other.file), other.line, atom.writers ? "filling" : "reading");
    }
    atom.writers++;
    atom.writer = site;
  }
}

}  // namespace

void mbarrier_arrive_cluster(const char* name, const void* barrier, int rank, Site site) {
  Block* const self = world.block;
  const uint32_t offset = offset_of(barrier);
  world.block = &cluster_block(rank, name, site);
  mbarrier_arrive(name, world.block->shared + offset, 0, site);
  world.block = self;
  world.steps_left = 0;  // a good moment for the other block
}

void bulk_copy_cluster(void* to, const void* barrier, int rank, const void* from, uint32_t bytes, Site site) {
  constexpr const char* kName = "the copy to another block";
  Block* const self = world.block;
  const uint32_t source = place_of_bytes(from, nullptr, bytes, kName, site), barrier_offset = offset_of(barrier);
  const uint32_t offset = place_of_bytes(to, nullptr, bytes, kName, site);
  if (source % kAtom || offset % kAtom || bytes % kAtom) fail("%s: whole groups of 8 rows are looked after", kName);
  check_fenced(source, bytes, kName, site);
  for (uint32_t i = source / kAtom; i < end_atom(source, bytes); i++) {
    check_filled(i, kName, site);
    state().atoms[i].readers++;
    state().atoms[i].reader = site;
  }
  world.block = &cluster_block(rank, kName, site);
  MBarrier& arrives_at = claim(world.block->shared + barrier_offset, bytes, site);
  fill(offset, bytes, site);
  check_fenced(offset, bytes, kName, site);
  start(Load{{}, {}, offset, bytes, &arrives_at, site, self, source});
  world.block = self;
  world.steps_left = 0;  // a good moment for the other block
}

// A shifted map begins in front of its array: where a box lies outside wholly, an H200 was seen to touch memory there.
void check_box(const Map& map, const Coordinates& at, const char* name, Site site) {
  const int columns = map.row_bytes / map.item;
  const bool there = at.row < map.dims[1] && at.row + static_cast<int>(map.rows) > 0 && at.d < map.dims[0] && at.d + columns > 0;
  if (at.rank == 5 && !there) {
    fail("%s (%s:%d) of a box wholly outside a shifted map: column %d of %lld, row %d of %lld", name, short_name(site.file),
         site.line, at.d, static_cast<long long>(map.dims[0]), at.row, static_cast<long long>(map.dims[1]));
  }
}

void bulk_load(void* shared, const void* words, const void* address, Coordinates at, Site site) {
  constexpr const char* kName = "the bulk load";
  const Map map = read_map(words, at.rank, site);
  check_box(map, at, kName, site);
  const uint32_t offset = place_of_box(map, shared, kName, site), bytes = map.bytes();
  MBarrier& barrier = claim(address, bytes, site);
  if (map.swizzled) fill(offset, bytes, site);
  check_fenced(offset, bytes, kName, site);
  start(Load{map, at, offset, bytes, &barrier, site});
}

void bulk_store(const void* words, const void* shared, Coordinates at, Site site) {
  const Map map = read_map(words, at.rank, site);
  check_box(map, at, "the bulk store", site);
  start(Store{map, at, nullptr, false, place_of_box(map, shared, "the bulk store", site), map.bytes(), false, site});
}

void bulk_add(float* global, const float* shared, uint32_t bytes, Site site) {
  start(Store{{}, {}, global, true, place_of_bytes(shared, global, bytes, "the bulk addition", site), bytes, false, site});
}

void bulk_store_bytes(void* global, const void* shared, uint32_t bytes, Site site) {
  const uint32_t offset = place_of_bytes(shared, global, bytes, "the bulk store", site);
  start(Store{{}, {}, static_cast<float*>(global), false, offset, bytes, false, site});
}

void bulk_commit_group() { this_thread().groups.push_back(this_thread().stores.size()); }

void bulk_wait_group(int pending, bool written, Site site) {
  Thread& self = this_thread();
  const int ending = static_cast<int>(self.groups.size()) - pending;
  if (ending > 0) {
    const size_t end = self.groups[ending - 1];
    const auto late = [](const Store& store) { return !store.has_read; };
    if (std::any_of(self.stores.begin(), self.stores.begin() + end, late)) linger("cp_async_bulk_wait_group", site);
    for (size_t i = 0; i < end; i++) {
      Store& store = self.stores[i];
      read_source(store);
      const uint32_t last = end_atom(store.offset, store.bytes);
      for (uint32_t a = store.offset / kAtom; a < last; a++) state().atoms[a].readers--;
    }
    self.stores.erase(self.stores.begin(), self.stores.begin() + end);
    self.groups.erase(self.groups.begin(), self.groups.begin() + ending);
    for (size_t& group : self.groups) group -= end;
  }
  if (written || coin(false, true)) write_pieces(self);
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma. Each warp issues its 16 rows for itself, as far ahead of the others as the schedule lets it; a wait ends when
// all four have issued what it waits for, and then all four have read their operands.

namespace {

const char* difference(const Wgmma& a, const Wgmma& b) {
  if (!a.a != !b.a) return "A in registers or in shared memory";
  if (a.a_descriptor != b.a_descriptor) return "the descriptor of A";
  if (a.b_descriptor != b.b_descriptor) return "the descriptor of B";
  if (a.n != b.n) return "the width";
  if (a.a_down != b.a_down) return "the direction of A";
  if (a.b_down != b.b_down) return "the direction of B";
  if (a.accumulate != b.accumulate) return "whether to accumulate";
  return a.bf16 != b.bf16 ? "the type" : nullptr;
}

// `columns`: of an operand whose sum runs down its rows.
Operand decode(uint64_t descriptor, bool down, int columns, const char* which, Site site) {
  const auto field = [=](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const Operand operand{field(0), field(16), field(32), down};
  constexpr uint64_t kFields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
  const char* wrong = nullptr;
  if (descriptor & ~kFields) wrong = "bits outside its fields, or a base offset";
  else if (descriptor >> 62 != 1) wrong = "another swizzle than 128 bytes";
  else if (operand.start & 0x380) wrong = "a start inside a group of 8 rows";
  else if (down && (operand.start & 0x7f) && (operand.start & 0x7f) + 2 * columns > 128) wrong = "columns that leave the row";
  else if (!down && (operand.start & 0x7f) + 32 > 128) wrong = "16 elements that leave the row";
  else if (operand.start < kSharedBase) wrong = "a start below shared memory";
  if (wrong) {
    fail("%s:%d: the descriptor of %s, 0x%016llx, has %s", short_name(site.file), site.line, which,
         static_cast<unsigned long long>(descriptor), wrong);
  }
  return operand;
}

// The atoms of `rows` rows (along the sum: 16 of them, `n` columns).
void touch(const Product& product, const Operand& operand, int first_row, int rows, std::vector<uint16_t>& atoms) {
  const int groups = operand.down ? 2 : rows / 8, panels = operand.down ? ceil_div(rows, 64) : 1;
  for (int p = 0; p < panels; p++) {
    for (int g = 0; g < groups; g++) {
      const uint64_t begin = uint64_t{operand.start & ~0x7fu} - kSharedBase + uint64_t{operand.leading} * p +
                             uint64_t{operand.stride} * (g + (operand.down ? 0 : first_row / 8));
      if (begin + kAtom > world.launch->shared_mem_bytes) {
        fail("%s (%s:%d) reads 1024 bytes at offset %llu of %u bytes of shared memory", product.name,
             short_name(product.site.file), product.site.line, static_cast<unsigned long long>(begin),
             world.launch->shared_mem_bytes);
      }
      for (uint64_t atom = begin / kAtom; atom * kAtom < begin + kAtom; atom++) {
        const auto place = static_cast<uint16_t>(atom);
        if (std::find(atoms.begin(), atoms.end(), place) == atoms.end()) atoms.push_back(place);
      }
    }
  }
}

// 8 elements: of row `r` from column `c` on, counted from the operand's start.
Row chunk(const Product& product, const Operand& operand, int r, int c) {
  const uint32_t panel = operand.down ? c / 64 : 0;
  const uint32_t address = swizzled(operand.start + panel * operand.leading + r / 8 * operand.stride + r % 8 * 128 +
                                    (c - static_cast<int>(panel) * 64) * 2);
  const uint32_t offset = address - kSharedBase;
  if (state().atoms[offset / kAtom].dirty) check_fenced(offset, 16, product.name, product.site);
  uint16_t bits[8];
  memcpy(bits, world.block->shared + offset, sizeof bits);
  Row row;
  for (int i = 0; i < 8; i++) row[i] = product.bf16 ? to_float(bf16_t{bits[i]}) : to_float(half_t{bits[i]});
  return row;
}

void read_operands(const Product& p, float (&a)[16][16], Row (&b)[16][32]) {
  if (p.a_in_registers) {
    for (int m = 0; m < 16; m++) {
      for (int k = 0; k < 16; k++) {  // rows g, g+8; k = 2t, 2t+1 and 2t+8, 2t+9
        const uint32_t pair = p.a_registers[m % 8 * 4 + k % 8 / 2][m / 8 + k / 8 * 2];
        const auto bits = static_cast<uint16_t>(pair >> 16 * (k % 2));
        a[m][k] = p.bf16 ? to_float(bf16_t{bits}) : to_float(half_t{bits});
      }
    }
  } else if (p.a.down) {
    for (int k = 0; k < 16; k++) {
      for (int m = 0; m < 16; m += 8) {
        const Row row = chunk(p, p.a, k, p.first_row + m);
        for (int i = 0; i < 8; i++) a[m + i][k] = row[i];
      }
    }
  } else {
    for (int m = 0; m < 16; m++) {
      for (int k = 0; k < 16; k += 8) {
        const Row row = chunk(p, p.a, p.first_row + m, k);
        memcpy(&a[m][k], &row, sizeof row);
      }
    }
  }
  for (int j = 0; j < p.n / 8; j++) {
    if (p.b.down) {
      for (int k = 0; k < 16; k++) b[k][j] = chunk(p, p.b, k, 8 * j);
    } else {
      for (int n = 0; n < 8; n++) {
        for (int k = 0; k < 16; k += 8) {
          const Row row = chunk(p, p.b, 8 * j + n, k);
          for (int i = 0; i < 8; i++) b[k + i][j][n] = row[i];
        }
      }
    }
  }
}

void multiply(Product& p) {
  if (p.done) return;
  static float a[16][16];
  static Row b[16][32];
  read_operands(p, a, b);
  const int columns = p.n / 8;
  for (int m = 0; m < 16; m++) {
    for (int j = 0; j < columns; j++) {
      Row sum{};
      for (int k = 0; k < 16; k++) sum += a[m][k] * b[k][j];
      Row& d = p.d->sum[m * columns + j];
      d = p.accumulate ? d + sum : sum;
    }
  }
  p.done = true;
}

float& element(InFlight& d, int lane, int j, int e) {
  Row& row = d.sum[(lane / 4 + 8 * (e / 2)) * (d.n / 8) + j];
  return reinterpret_cast<float*>(&row)[2 * (lane % 4) + e % 2];
}

InFlight& accumulator(WgmmaWarp& warp, void* const* lanes, Site site) {
  const Wgmma& first = *static_cast<const Wgmma*>(lanes[0]);
  for (InFlight& known : warp.accumulators) {
    if (known.lanes[0] != first.d) continue;
    if (known.n != first.n) {
      fail("%s:%d: an accumulator on its way has another width", short_name(site.file), site.line);
    }
    return known;
  }
  InFlight& made = warp.accumulators.emplace_back();
  made.n = first.n;
  made.sum.resize(16 * first.n / 8);
  for (int l = 0; l < 32; l++) {
    made.lanes[l] = static_cast<const Wgmma*>(lanes[l])->d;
    for (int i = 0; i < first.n / 2; i++) {
      if (first.accumulate) element(made, l, i / 4, i % 4) = made.lanes[l][i];
      memcpy(&made.lanes[l][i], &kInFlight, 4);
    }
  }
  return made;
}

void issue(void* const* lanes) {
  Async& async = state();
  const int w = world.fiber / 32;
  WgmmaWarp& warp = async.warps[w];
  const char* name = this_warp().name;
  const Site site = this_warp().site;
  const Wgmma& args = *static_cast<const Wgmma*>(lanes[0]);
  if ((w / kWarpgroup + 1) * kWarpgroup > static_cast<int>(async.warps.size())) fail("%s needs four warps", name);
  for (int l = 1; l < 32; l++) {
    const char* differs = difference(args, *static_cast<const Wgmma*>(lanes[l]));
    if (differs) fail("%s (%s:%d): the lanes differ in %s", name, short_name(site.file), site.line, differs);
  }
  if (!warp.open && !warp.fenced) {
    fail("%s (%s:%d) is the first of its group, and there was no wgmma_fence since the last commit or wait", name,
         short_name(site.file), site.line);
  }
  if (warp.waited) {
    fail("%s (%s:%d) follows a wait for an mbarrier, and no wgmma_fence is between: ptxas would serialise (C7519)", name,
         short_name(site.file), site.line);
  }
  std::vector<Issued>& issued = async.groups[w / kWarpgroup];
  if (warp.issued == issued.size()) issued.push_back({args, site});
  const Issued& other = issued[warp.issued++];
  const char* differs = same_place(other.site, site) ? difference(args, other.args) : "the place";
  if (differs) {
    fail("divergent warpgroup: its warps differ in %s; this one is at %s (%s:%d), another was at %s:%d", differs, name,
         short_name(site.file), site.line, short_name(other.site.file), other.site.line);
  }
  warp.open = true;

  Product& p = warp.products.emplace_back();
  p.name = name;
  p.site = site;
  p.group = warp.committed;
  p.n = args.n;
  p.accumulate = args.accumulate;
  p.bf16 = args.bf16;
  p.a_in_registers = args.a != nullptr;
  p.first_row = w % kWarpgroup * 16;
  p.done = false;
  p.b = decode(args.b_descriptor, args.b_down, args.n, "B", site);
  touch(p, p.b, 0, p.n, p.atoms);
  if (p.a_in_registers) {
    for (int l = 0; l < 32; l++) memcpy(p.a_registers[l], static_cast<const Wgmma*>(lanes[l])->a, 16);
  } else {
    p.a = decode(args.a_descriptor, args.a_down, 64, "A", site);
    touch(p, p.a, p.first_row, 16, p.atoms);
  }
  bool dirty = false;
  for (uint16_t i : p.atoms) {
    check_filled(i, name, site);
    async.atoms[i].readers++;
    async.atoms[i].reader = site;
    dirty |= async.atoms[i].dirty != 0;
  }
  p.d = &accumulator(warp, lanes, site);
  p.d->group = warp.committed;
  if (!async.wgmma_reads_late) {
    multiply(p);
  } else if (dirty) {  // look at what is read, and read it later
    static float a[16][16];
    static Row b[16][32];
    read_operands(p, a, b);
  }
}

// All four warps have committed the first `groups` groups: their operands are read.
void finish(int warpgroup, size_t groups) {
  Async& async = state();
  for (int w = warpgroup * kWarpgroup; w < (warpgroup + 1) * kWarpgroup; w++) {
    std::deque<Product>& products = async.warps[w].products;
    while (!products.empty() && products.front().group < groups) {
      multiply(products.front());
      for (uint16_t i : products.front().atoms) async.atoms[i].readers--;
      products.pop_front();
    }
  }
}

void deliver(WgmmaWarp& warp) {
  for (auto d = warp.accumulators.begin(); d != warp.accumulators.end();) {
    if (d->group >= warp.target) {
      ++d;
      continue;
    }
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < d->n / 2; i++) {
        if (memcmp(&d->lanes[l][i], &kInFlight, 4)) {
          fail("lane %d has written to element %d of an accumulator while wgmma was working on it", l, i);
        }
        d->lanes[l][i] = element(*d, l, i / 4, i % 4);
      }
    }
    d = warp.accumulators.erase(d);
  }
  warp.delivered = warp.target;
  std::vector<int>& lingering = state().lingering;
  const auto foreign = [](int thread) { return thread / 32 != world.fiber / 32; };
  const auto mine = std::stable_partition(lingering.begin(), lingering.end(), foreign);
  std::for_each(mine, lingering.end(), [](int thread) { wake(*world.block, thread); });
  lingering.erase(mine, lingering.end());
}

}  // namespace

void wgmma(const char* name, const Wgmma& args, Site site) {
  collective(name, const_cast<Wgmma*>(&args), issue, site);
}

void wgmma_fence(Site site) {
  collective("wgmma_fence", nullptr, [](void* const*) {
    WgmmaWarp& warp = state().warps[world.fiber / 32];
    warp.fenced = true;
    warp.waited = false;
  }, site);
}

void wgmma_commit_group(Site site) {
  collective("wgmma_commit_group", nullptr, [](void* const*) {
    const int w = world.fiber / 32, first = w / kWarpgroup * kWarpgroup;
    WgmmaWarp& warp = state().warps[w];
    warp.committed++;
    warp.open = warp.fenced = false;
    for (int i = first; i < std::min(first + kWarpgroup, static_cast<int>(state().warps.size())); i++) {
      world.block->warps[i].ready |= state().waiting[i];
      state().waiting[i] = 0;
    }
  }, site);
}

void wgmma_wait_group(int pending, Site site) {
  constexpr const char* kName = "wgmma_wait_group";
  collective(kName, &pending, [](void* const* lanes) {
    WgmmaWarp& warp = state().warps[world.fiber / 32];
    const size_t left = *static_cast<const int*>(lanes[0]);
    warp.target = std::max(warp.delivered, warp.committed > left ? warp.committed - left : 0);
    warp.fenced = false;
  }, site);
  Async& async = state();
  const int w = world.fiber / 32, warpgroup = w / kWarpgroup;
  WgmmaWarp& warp = async.warps[w];
  for (bool lingered = !async.wgmma_reads_late; warp.delivered < warp.target;) {
    size_t committed = warp.committed;
    for (int i = warpgroup * kWarpgroup; i < (warpgroup + 1) * kWarpgroup; i++) {
      committed = std::min(committed, async.warps[i].committed);
    }
    if (committed < warp.target) {
      async.waiting[w] |= this_lane();
      sleep_here(kName, site);
    } else if (!lingered) {
      lingered = true;
      linger(kName, site);
    } else {
      finish(warpgroup, warp.target);
      deliver(warp);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Registers

void set_registers(const char* name, int registers, bool more, Site site) {
  if (registers % 8 || registers < 24 || registers > 256) fail("%s of %d registers: 24, 32, ..., 256", name, registers);
  collective(name, nullptr, [](void* const*) {}, site);
  Async& async = state();
  const int w = world.fiber / 32;
  while (async.registers[w] != registers) {
    int& mine = async.registers[w];
    if (more != (registers > mine)) fail("%s to %d registers, of %d", name, registers, mine);
    int total = 32 * (registers - mine);
    for (int each : async.registers) total += 32 * each;
    if (more && total > kRegisterFile) {
      async.wants_registers[w] |= this_lane();
      sleep_here(name, site);
      continue;
    }
    mine = registers;
    for (size_t i = 0; i < async.wants_registers.size() && !more; i++) {
      world.block->warps[i].ready |= async.wants_registers[i];
      async.wants_registers[i] = 0;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What world.cpp calls

void async_start(Block& block) {
  block.async.reset(new Async);
  Async& async = *block.async;
  const size_t bytes = world.launch->shared_mem_bytes, warps = block.warps.size();
  async.threads.resize(block.fibers.size());
  async.atoms.resize((bytes + kAtom - 1) / kAtom);
  async.stored_by.assign(bytes, 0);
  async.warps.resize(warps);
  async.groups.resize((warps + kWarpgroup - 1) / kWarpgroup);
  async.waiting.assign(warps, 0);
  async.registers.assign(warps, std::min(256, kRegisterFile / world.threads / 8 * 8));
  async.wants_registers.assign(warps, 0);
  async.wgmma_reads_late = coin(false, true);
}

bool async_land(Block& block, bool all_wait) {
  std::deque<Load>& loads = block.async->loads;
  std::vector<int>& lingering = block.async->lingering;
  const bool can_land = lingering.empty() || coin(true, true);
  for (auto load = loads.begin(); can_land && load != loads.end(); ++load) {
    if (load->barrier->waiters.empty()) continue;
    const Load landing = *load;
    loads.erase(load);
    land(landing);
    return true;
  }
  if (lingering.empty() || !all_wait) return false;
  // Whoever came first, or somebody of the warpgroup that came last, or anybody.
  size_t place = schedule() == Schedule::kRandom ? random_below(count(lingering.size())) : 0;
  const auto warpgroup = [](int thread) { return thread / 32 / kWarpgroup; };
  if (coin(false, true)) while (warpgroup(lingering[place]) != warpgroup(lingering.back())) place++;
  wake(block, lingering[place]);
  lingering.erase(lingering.begin() + place);
  return true;
}

void async_thread_releases() {
  if (const size_t left = this_thread().pieces.size() + this_thread().stores.size()) {
    fail("the thread releases a counter while %u of its bulk stores or additions are on their way", count(left));
  }
}

void async_thread_ends() {
  write_pieces(this_thread());
  if (const size_t left = this_thread().stores.size()) {
    fail("the thread ends with %u bulk stores that it never waited for", count(left));
  }
  const WgmmaWarp& warp = state().warps[world.fiber / 32];
  if (!warp.accumulators.empty()) {
    const Product* p = warp.products.empty() ? nullptr : &warp.products.front();
    fail("the thread ends with wgmmas that it never waited for (%s:%d)", p ? short_name(p->site.file) : "all read",
         p ? p->site.line : 0);
  }
}

void async_block_ends() {
  Async& async = state();
  if (!async.loads.empty()) {
    const Load& load = async.loads.front();
    fail("the block ends with %u bulk loads that nobody waited for (%s:%d)", count(async.loads.size()),
         short_name(load.site.file), load.site.line);
  }
  for (size_t w = 0; w < async.warps.size(); w++) {
    const size_t first = w / kWarpgroup * kWarpgroup;
    if (async.warps[w].issued != async.warps[first].issued) {
      fail("warps %u and %u of a warpgroup issued %u and %u wgmmas", count(first), count(w), count(async.warps[first].issued),
           count(async.warps[w].issued));
    }
    if (async.registers[w] != async.registers[first]) {
      fail("warps %u and %u of a warpgroup have %d and %d registers", count(first), count(w), async.registers[first],
           async.registers[w]);
    }
  }
}

std::string async_waits(const Block& block, int thread) {
  if (const int id = block.fibers[thread].barrier) {
    const Barrier& barrier = block.barriers[id];
    return " for barrier " + std::to_string(id) + ": " + std::to_string(barrier.arrived) + " of " +
           std::to_string(barrier.threads) + " threads have come";
  }
  for (const MBarrier& barrier : block.async->barriers) {
    if (std::find(barrier.waiters.begin(), barrier.waiters.end(), thread) == barrier.waiters.end()) continue;
    return " for parity " + std::to_string(barrier.phase & 1) + " of the mbarrier at offset " +
           std::to_string(barrier.offset) + ", whose phase " + std::to_string(barrier.phase) + " lacks " +
           std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) + " arrivals and " +
           std::to_string(barrier.bytes) + " bytes";
  }
  return "";
}

}  // namespace fa2_host
