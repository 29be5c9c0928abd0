// The SIMT executor: runs a kernel's grid, block by block, with a fibre for every thread of a block.
//
// A fibre runs until it meets the others: at a barrier, a shuffle, a vote, a wmma operation, or its end. When no fibre of
// a warp can go on, the executor does what the hardware would do with the warp, and refuses what the programming guide
// leaves undefined. Memory accesses are checked as they happen, and counted by warp and instruction afterwards.
#include <ucontext.h>
#include <csetjmp>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "include/simt.h"

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 96 << 10;  // of a fibre
constexpr size_t kGuard = 256;       // bytes around every allocation that nothing may touch
constexpr size_t kSector = 32;       // bytes: the unit of global memory traffic
constexpr int kBanks = 32;
constexpr size_t kGranule = 2;       // bytes of shared memory that are watched together: no kernel stores single bytes

enum class State { kReady, kWaiting, kDone };
enum class Kind { kBarrier, kWarpBarrier, kActiveMask, kShuffle, kVote, kWmma };
enum class Space { kGlobal, kShared };

struct Operation {  // what a waiting fibre waits for
  Kind kind;
  int line;
  unsigned mask;
  uint64_t value;
  int operand, width, shuffle;
  void* fragments[4];
  const void* memory;
  unsigned stride;
  int wmma, layout, types;
  uint64_t result;
};

struct Access {
  uintptr_t instruction, address;
  uint32_t size;
  bool write;
  Space space;
};

struct Fibre {
  jmp_buf context;
  char* stack;
  State state;
  bool started;
  int thread;
  dim3 index;
  Operation operation;
  std::vector<Access> accesses;
};

struct Counts {
  uint64_t blocks, threads, barriers, barrier_arrivals, warp_barriers, shuffles, votes, mma;
  uint64_t global_load_requests, global_load_sectors, global_load_bytes;
  uint64_t global_store_requests, global_store_sectors, global_store_bytes;
  uint64_t shared_requests, shared_wavefronts, bank_conflicts, atomics;
};

// Who touched a piece of shared memory last. Threads are numbered from 1. A phase ends with a barrier of the block, a warp
// phase with a barrier of the warp.
struct Shadow {
  int writer = 0;
  uint64_t write_phase = 0, write_warp_phase = 0;
  int reader = 0, reading_warp = 0;  // -1: several
  uint64_t read_phase = 0, read_warp_phase = 0;
};

struct Executor {
  std::vector<Fibre> fibres;
  Fibre* current = nullptr;
  jmp_buf scheduler;
  ucontext_t launcher, entry;
  void (*kernel)(void**) = nullptr;
  void** arguments = nullptr;
  dim3 grid, block, block_index;
  int threads = 0;
  char *shared_begin = nullptr, *shared_end = nullptr;
  uintptr_t image_begin = 0, image_end = 0;
  std::vector<Shadow> shadow;
  uint64_t phase = 1;
  std::vector<uint64_t> warp_phase;
  std::map<uintptr_t, size_t> allocations;
  std::pair<uintptr_t, size_t> last_allocation{0, 0};
  Counts counts{};
  std::string fault;
  bool counting = true;
} machine;

std::string where(const Fibre& f) {
  char text[160];
  snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", f.index.x, f.index.y, f.index.z,
           machine.block_index.x, machine.block_index.y, machine.block_index.z);
  return text;
}

[[noreturn]] void fail(const std::string& message) {
  machine.fault = message;
  _longjmp(machine.scheduler, 2);
}

int warp_of(int thread) { return thread / kWarp; }

// ---- memory -------------------------------------------------------------------------------------------------------

bool is_allocated(uintptr_t address, size_t size) {
  auto inside = [&](const std::pair<uintptr_t, size_t>& a) {
    return address >= a.first && address + size <= a.first + a.second;
  };
  if (inside(machine.last_allocation)) return true;
  auto next = machine.allocations.upper_bound(address);
  if (next == machine.allocations.begin()) return false;
  auto found = *std::prev(next);
  if (!inside(found)) return false;
  machine.last_allocation = found;
  return true;
}

[[noreturn]] void race(size_t byte, bool write, int other, const char* does) {
  const std::string by = other < 0 ? "other threads " : "thread number " + std::to_string(other - 1) + " ";
  fail("race in shared memory: " + where(*machine.current) + (write ? " writes" : " reads") + " byte " +
       std::to_string(byte) + ", which " + by + does + " with no barrier between");
}

// A race: another thread touched the byte, one of the two writes, and no barrier that both took part in lies between.
void check_shared(uintptr_t address, size_t size, bool write) {
  const Fibre& me = *machine.current;
  const int thread = me.thread + 1, warp = warp_of(me.thread);
  const uint64_t warp_phase = machine.warp_phase[warp];
  const size_t first = address - reinterpret_cast<uintptr_t>(machine.shared_begin);
  for (size_t offset = first / kGranule * kGranule; offset < first + size; offset += kGranule) {
    Shadow& piece = machine.shadow[offset / kGranule];
    if (!write && piece.writer == 0) fail(where(me) + " reads shared memory that nothing has written");
    const bool written_before = piece.writer == 0 || piece.writer == thread || piece.write_phase < machine.phase ||
                                (warp_of(piece.writer - 1) == warp && piece.write_warp_phase < warp_phase);
    const bool read_before = piece.reader == 0 || piece.reader == thread || piece.read_phase < machine.phase ||
                             (piece.reading_warp == warp && piece.read_warp_phase < warp_phase);
    if (!written_before) race(offset, write, piece.writer, "writes");
    if (write && !read_before) race(offset, write, piece.reader, "reads");
    if (write) {
      piece = Shadow{thread, machine.phase, warp_phase};
    } else if (piece.reader == 0 || piece.read_phase < machine.phase) {
      piece.reader = thread, piece.reading_warp = warp, piece.read_phase = machine.phase, piece.read_warp_phase = warp_phase;
    } else {
      if (piece.reader != thread) piece.reader = -1;
      if (piece.reading_warp != warp) piece.reading_warp = -1;
      piece.read_warp_phase = std::max(piece.read_warp_phase, warp_phase);
    }
  }
}

void touch(uintptr_t address, size_t size, bool write, uintptr_t instruction, size_t alignment) {
  Fibre* me = machine.current;
  if (me == nullptr) return;
  const auto stack = reinterpret_cast<uintptr_t>(me->stack);
  if (address >= stack && address < stack + kStack) return;  // the thread's own: registers, or local memory
  const auto shared = reinterpret_cast<uintptr_t>(machine.shared_begin);
  const bool is_shared = address >= shared && address < reinterpret_cast<uintptr_t>(machine.shared_end);
  if (!is_shared && address >= machine.image_begin && address < machine.image_end) return;  // constants
  if (is_shared ? address + size > reinterpret_cast<uintptr_t>(machine.shared_end) : !is_allocated(address, size)) {
    char text[200];
    snprintf(text, sizeof text, " %s %zu bytes out of bounds", write ? "writes" : "reads", size);
    fail(where(*me) + text);
  }
  if (address % alignment != 0) {
    fail(where(*me) + (write ? " writes " : " reads ") + std::to_string(size) + " bytes at an address that is no multiple of " +
         std::to_string(alignment));
  }
  if (is_shared) check_shared(address, size, write);
  if (machine.counting) {
    me->accesses.push_back({instruction, address, static_cast<uint32_t>(size), write, is_shared ? Space::kShared : Space::kGlobal});
  }
}

// ---- counting -----------------------------------------------------------------------------------------------------

void count_global(const std::vector<const Access*>& lanes) {
  std::vector<uintptr_t> sectors;
  uint64_t bytes = 0;
  for (const Access* a : lanes) {
    bytes += a->size;
    for (uintptr_t s = a->address / kSector; s <= (a->address + a->size - 1) / kSector; ++s) sectors.push_back(s);
  }
  std::sort(sectors.begin(), sectors.end());
  const auto distinct = static_cast<uint64_t>(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
  Counts& c = machine.counts;
  if (lanes[0]->write) {
    ++c.global_store_requests, c.global_store_sectors += distinct, c.global_store_bytes += bytes;
  } else {
    ++c.global_load_requests, c.global_load_sectors += distinct, c.global_load_bytes += bytes;
  }
}

// 128 bytes pass at a time: all lanes of 4 bytes, 16 of 8, 8 of 16. Words of one bank beyond the first cost a pass each.
void count_shared(const std::vector<const Access*>& lanes) {
  const size_t together = lanes[0]->size <= 4 ? kWarp : 128 / lanes[0]->size;
  for (size_t first = 0; first < lanes.size(); first += together) {
    std::vector<uintptr_t> words;
    for (size_t i = first; i < std::min(first + together, lanes.size()); ++i) {
      for (uintptr_t w = lanes[i]->address / 4; w <= (lanes[i]->address + lanes[i]->size - 1) / 4; ++w) words.push_back(w);
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int in_bank[kBanks] = {}, most = 0;
    for (uintptr_t w : words) most = std::max(most, ++in_bank[w % kBanks]);
    machine.counts.shared_wavefronts += most, machine.counts.bank_conflicts += most - 1;
  }
  ++machine.counts.shared_requests;
}

void count_together(const std::vector<const Access*>& lanes) {
  (lanes[0]->space == Space::kGlobal ? count_global : count_shared)(lanes);
}

// The accesses of a warp since it last met: those of one instruction, at its n-th turn, were one of the warp.
void flush(int warp) {
  const int first = warp * kWarp, last = std::min(first + kWarp, machine.threads);
  std::vector<const Access*> lanes;
  bool alike = true;
  for (int t = first + 1; t < last && alike; ++t) {
    const auto &a = machine.fibres[first].accesses, &b = machine.fibres[t].accesses;
    alike = a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](const Access& x, const Access& y) {
              return x.instruction == y.instruction && x.space == y.space;
            });
  }
  if (alike) {
    for (size_t i = 0; i < machine.fibres[first].accesses.size(); ++i) {
      lanes.clear();
      for (int t = first; t < last; ++t) lanes.push_back(&machine.fibres[t].accesses[i]);
      count_together(lanes);
    }
  } else {
    std::map<std::pair<uintptr_t, size_t>, std::vector<const Access*>> groups;
    for (int t = first; t < last; ++t) {
      std::unordered_map<uintptr_t, size_t> turns;
      for (const Access& a : machine.fibres[t].accesses) {
        const uintptr_t key = a.instruction * 2 + (a.space == Space::kShared);
        groups[{key, turns[key]++}].push_back(&a);
      }
    }
    for (const auto& [key, group] : groups) count_together(group);
  }
  for (int t = first; t < last; ++t) machine.fibres[t].accesses.clear();
}

// ---- warps --------------------------------------------------------------------------------------------------------

std::string describe(const Operation& o) {
  const char* names[] = {"__syncthreads", "__syncwarp", "__activemask", "a shuffle", "a vote", "a wmma operation"};
  return std::string(names[static_cast<int>(o.kind)]) + " in line " + std::to_string(o.line);
}

void resume(Fibre* f) { f->state = State::kReady; }

uint64_t shuffled(int base, int lane, const Operation& mine) {
  const int width = mine.width, segment = lane / width * width;
  int source = lane;
  switch (mine.shuffle) {
    case simt::kIndex: source = segment + (mine.operand & (width - 1)); break;
    case simt::kUp: source = lane - mine.operand < segment ? lane : lane - mine.operand; break;
    case simt::kDown: source = lane + mine.operand >= segment + width ? lane : lane + mine.operand; break;
    case simt::kXor: source = (lane ^ mine.operand) >= segment + width ? lane : (lane ^ mine.operand); break;
  }
  if (!(mine.mask >> source & 1)) {
    fail(where(machine.fibres[base + lane]) + ": " + describe(mine) + " reads from inactive lane " + std::to_string(source));
  }
  return machine.fibres[base + source].operation.value;
}

template <typename T>
T scalar(const void* data, size_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + i * sizeof(T), sizeof(T));
  return value;
}

float to_float(const void* data, size_t i, int type) {
  if (type == 2) return scalar<float>(data, i);
  if (type == 0) return static_cast<float>(scalar<_Float16>(data, i));
  const uint32_t word = uint32_t(scalar<uint16_t>(data, i)) << 16;
  return scalar<float>(&word, 0);
}

// Which element of a tile a lane's slot holds: scrambled, so that no kernel can rely on it. 8 slots cover a tile; the 16
// of an operand hold it twice.
int element_of(int lane, int slot) { return ((lane * 8 + slot % 8) * 37 + 11) % 256; }

void copy_element(void* to, size_t i, const void* from, size_t j, int type) {
  const size_t size = type == 2 ? 4 : 2;
  std::memcpy(static_cast<char*>(to) + i * size, static_cast<const char*>(from) + j * size, size);
}

void wmma(int base, const Operation& o) {
  const int type = o.types / 32, slots = o.types % 32;
  auto& fibres = machine.fibres;
  if (o.wmma == 3) {
    ++machine.counts.mma;
    float a[256], b[256], c[256];
    for (int lane = 0; lane < kWarp; ++lane) {
      const Operation& mine = fibres[base + lane].operation;
      for (int s = 0; s < 8; ++s) {
        a[element_of(lane, s)] = to_float(mine.fragments[1], s, type);
        b[element_of(lane, s)] = to_float(mine.fragments[2], s, type);
        c[element_of(lane, s)] = to_float(mine.fragments[3], s, 2);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int s = 0; s < 8; ++s) {
        const int e = element_of(lane, s), row = e / 16, column = e % 16;
        float sum = c[e];
        for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * 16 + column];
        copy_element(fibres[base + lane].operation.fragments[0], s, &sum, 0, 2);
      }
    }
    return;
  }
  const size_t size = type == 2 ? 4 : 2;
  const auto memory = reinterpret_cast<uintptr_t>(o.memory);
  if (memory % 32 != 0) fail("a wmma operation in line " + std::to_string(o.line) + " is at an address that is no multiple of 32");
  if (o.stride * size % 16 != 0) {
    fail("a wmma operation in line " + std::to_string(o.line) + " has rows " + std::to_string(o.stride) + " elements apart, which is no multiple of 16 bytes");
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Fibre& f = fibres[base + lane];
    if (f.operation.memory != o.memory || f.operation.stride != o.stride) {
      fail("a wmma operation in line " + std::to_string(o.line) + ": the lanes of a warp name different tiles");
    }
    // Accounted for as rows of 16 bytes, which is how the hardware moves tiles: 8 lanes at a time, a row each.
    machine.current = &f;
    const unsigned per_row = 16 * size / 16, rows = kWarp / per_row;
    for (unsigned pass = 0; pass < 16 / rows; ++pass) {
      const uintptr_t at = memory + (pass * rows + lane % rows) * o.stride * size + lane / rows * 16;
      touch(at, 16, o.wmma == 2, static_cast<uintptr_t>(o.line) * 8 + pass, 16);
    }
    for (int s = 0; s < slots; ++s) {
      const int e = element_of(lane, s);
      const size_t place = o.layout == 0 ? e / 16 * o.stride + e % 16 : e % 16 * o.stride + e / 16;
      if (o.wmma == 1) copy_element(f.operation.fragments[0], s, o.memory, place, type);
      else copy_element(const_cast<void*>(o.memory), place, f.operation.fragments[0], s, type);
    }
  }
  machine.current = nullptr;
}

// What the lanes of a mask do when all of them have arrived.
void together(int base, unsigned mask) {
  auto& fibres = machine.fibres;
  const Operation& first = fibres[base + __builtin_ctz(mask)].operation;
  switch (first.kind) {
    case Kind::kWarpBarrier:
      ++machine.counts.warp_barriers;
      ++machine.warp_phase[base / kWarp];
      break;
    case Kind::kShuffle: {
      ++machine.counts.shuffles;
      for (int lane = 0; lane < kWarp; ++lane) {
        if (mask >> lane & 1) fibres[base + lane].operation.result = shuffled(base, lane, fibres[base + lane].operation);
      }
      break;
    }
    case Kind::kVote: {
      ++machine.counts.votes;
      unsigned ballot = 0;
      for (int lane = 0; lane < kWarp; ++lane) {
        if (mask >> lane & 1) ballot |= unsigned(fibres[base + lane].operation.value != 0) << lane;
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        if (mask >> lane & 1) fibres[base + lane].operation.result = ballot;
      }
      break;
    }
    case Kind::kWmma: wmma(base, first); break;
    default: break;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) resume(&fibres[base + lane]);
  }
}

// One step for a warp of which no fibre can go on; false if it waits for other warps, or is done.
bool step(int warp) {
  auto& fibres = machine.fibres;
  const int base = warp * kWarp, lanes = std::min(kWarp, machine.threads - base);
  bool moved = false;
  for (int lane = 0; lane < lanes; ++lane) {
    Fibre& f = fibres[base + lane];
    if (f.state != State::kWaiting || f.operation.kind == Kind::kBarrier || f.operation.kind == Kind::kActiveMask) continue;
    const Operation& mine = f.operation;
    if (!(mine.mask >> lane & 1)) fail(where(f) + ": " + describe(mine) + " has a mask without the calling lane");
    for (int other = 0; other < kWarp; ++other) {
      if (!(mine.mask >> other & 1)) continue;
      if (other >= lanes || fibres[base + other].state == State::kDone) {
        fail(where(f) + ": " + describe(mine) + " names inactive lane " + std::to_string(other));
      }
      const Operation& theirs = fibres[base + other].operation;
      if (theirs.kind != mine.kind || theirs.line != mine.line || theirs.mask != mine.mask) {
        fail(where(f) + " is at " + describe(mine) + ", and lane " + std::to_string(other) + " of its mask is at " +
             describe(theirs));
      }
    }
    flush(warp);
    together(base, mine.mask);
    moved = true;
  }
  if (moved) return true;
  for (int lane = 0; lane < lanes; ++lane) {  // who asks for the active lanes in one line is together
    Fibre& f = fibres[base + lane];
    if (f.state != State::kWaiting || f.operation.kind != Kind::kActiveMask) continue;
    unsigned active = 0;
    for (int other = 0; other < lanes; ++other) {
      const Fibre& g = fibres[base + other];
      if (g.state == State::kWaiting && g.operation.kind == Kind::kActiveMask && g.operation.line == f.operation.line)
        active |= 1u << other;
    }
    for (int other = 0; other < lanes; ++other) {
      if (active >> other & 1) fibres[base + other].operation.result = active, resume(&fibres[base + other]);
    }
    moved = true;
  }
  return moved;
}

// All fibres of the block wait at a barrier, or are done.
void pass_barrier() {
  const Fibre* first = nullptr;
  uint64_t any = 0;
  for (int t = 0; t < machine.threads; ++t) {
    const Fibre& f = machine.fibres[t];
    if (f.state == State::kDone) continue;
    if (first == nullptr) first = &f;
    if (f.operation.line != first->operation.line) {
      fail("divergent barrier: " + where(*first) + " is at " + describe(first->operation) + ", " + where(f) + " at " +
           describe(f.operation));
    }
    any |= f.operation.value;
  }
  for (int t = 0; t < machine.threads; ++t) {
    if (machine.fibres[t].state == State::kDone) {
      fail("divergent barrier: " + where(*first) + " is at " + describe(first->operation) + ", and " +
           where(machine.fibres[t]) + " has returned");
    }
  }
  const int warps = (machine.threads + kWarp - 1) / kWarp;
  for (int warp = 0; warp < warps; ++warp) flush(warp);
  ++machine.phase, ++machine.counts.barriers;
  machine.counts.barrier_arrivals += warps;
  for (uint64_t& p : machine.warp_phase) ++p;
  for (int t = 0; t < machine.threads; ++t) machine.fibres[t].operation.result = any, resume(&machine.fibres[t]);
}

// ---- fibres -------------------------------------------------------------------------------------------------------

void begin() {
  machine.kernel(machine.arguments);
  machine.current->state = State::kDone;
  _longjmp(machine.scheduler, 1);
}

void wait_for(Operation operation) {
  Fibre* me = machine.current;
  me->operation = operation;
  me->state = State::kWaiting;
  machine.current = nullptr;
  if (_setjmp(me->context) == 0) _longjmp(machine.scheduler, 1);
}

void run(Fibre* f) {
  machine.current = f;
  if (f->started) _longjmp(f->context, 1);
  f->started = true;
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = f->stack;
  fresh.uc_stack.ss_size = kStack;
  fresh.uc_link = nullptr;
  makecontext(&fresh, begin, 0);
  setcontext(&fresh);
}

// Runs one block to its end. The scheduler has no frames that a fibre's jump could lose: state lies in `machine`.
void run_block() {
  for (int t = 0; t < machine.threads; ++t) {
    Fibre& f = machine.fibres[t];
    f.state = State::kReady, f.started = false, f.thread = t;
    const unsigned x = machine.block.x, y = machine.block.y;
    f.index = {t % x, t / x % y, t / (x * y)};
    f.accesses.clear();
  }
  std::fill(machine.shared_begin, machine.shared_end, static_cast<char>(0xff));
  machine.shadow.assign((machine.shared_end - machine.shared_begin + kGranule - 1) / kGranule, Shadow{});
  static volatile int next;
  next = 0;
  const int warps = (machine.threads + kWarp - 1) / kWarp;
  while (true) {
    if (_setjmp(machine.scheduler) == 2) return;
    machine.current = nullptr;
    for (; next < machine.threads; next = next + 1) {
      if (machine.fibres[next].state == State::kReady) run(&machine.fibres[next]);
    }
    bool moved = false;
    for (int warp = 0; warp < warps; ++warp) moved |= step(warp);
    if (!moved) {
      const bool done = std::all_of(machine.fibres.begin(), machine.fibres.begin() + machine.threads,
                                    [](const Fibre& f) { return f.state == State::kDone; });
      if (done) break;
      pass_barrier();
    }
    next = 0;
  }
  for (int warp = 0; warp < warps; ++warp) flush(warp);
}

}  // namespace

extern "C" {

dim3 simt_thread_idx() { return machine.current->index; }
dim3 simt_block_idx() { return machine.block_index; }
dim3 simt_block_dim() { return machine.block; }
dim3 simt_grid_dim() { return machine.grid; }

static Operation operation(Kind kind, int line, unsigned mask, uint64_t value) {
  Operation o{};
  o.kind = kind, o.line = line, o.mask = mask, o.value = value;
  return o;
}

int simt_barrier(int line, int, int value) {
  Fibre* me = machine.current;
  wait_for(operation(Kind::kBarrier, line, 0, value));
  return static_cast<int>(me->operation.result);
}

void simt_warp_barrier(int line, unsigned mask) { wait_for(operation(Kind::kWarpBarrier, line, mask, 0)); }

unsigned simt_active_mask(int line) {
  Fibre* me = machine.current;
  wait_for(operation(Kind::kActiveMask, line, 0, 0));
  return static_cast<unsigned>(me->operation.result);
}

uint64_t simt_shuffle(int line, unsigned mask, uint64_t value, int operand, int width, int kind) {
  Fibre* me = machine.current;
  Operation o = operation(Kind::kShuffle, line, mask, value);
  o.operand = operand, o.width = width, o.shuffle = kind;
  wait_for(o);
  return me->operation.result;
}

unsigned simt_vote(int line, unsigned mask, int predicate) {
  Fibre* me = machine.current;
  wait_for(operation(Kind::kVote, line, mask, predicate));
  return static_cast<unsigned>(me->operation.result);
}

void simt_atomic(void* address, size_t size) {
  ++machine.counts.atomics;
  if (!is_allocated(reinterpret_cast<uintptr_t>(address), size)) fail(where(*machine.current) + ": an atomic out of bounds");
}

void simt_wmma(int line, int kind, void* fragments[4], const void* memory, unsigned stride, int layout, int types) {
  Operation o = operation(Kind::kWmma, line, 0xffffffffu, 0);
  std::copy(fragments, fragments + 4, o.fragments);
  o.memory = memory, o.stride = stride, o.layout = layout, o.types = types, o.wmma = kind;
  wait_for(o);
}

// ---- what the test device calls -----------------------------------------------------------------------------------

void* simt_allocate(size_t bytes) {
  auto* block = static_cast<char*>(std::aligned_alloc(256, (bytes + 2 * kGuard + 255) / 256 * 256));
  if (block == nullptr) return nullptr;
  std::fill(block, block + bytes + 2 * kGuard, static_cast<char>(0xff));  // NaN, until it is written
  machine.allocations[reinterpret_cast<uintptr_t>(block + kGuard)] = bytes;
  return block + kGuard;
}

void simt_free(void* data) {
  machine.allocations.erase(reinterpret_cast<uintptr_t>(data));
  machine.last_allocation = {0, 0};
  std::free(static_cast<char*>(data) - kGuard);
}

// Runs a kernel. `image` and `shared` are the limits of the kernel's library and of its shared memory. Null if all went
// well, else what is wrong with the kernel.
const char* simt_launch(void (*kernel)(void**), void** arguments, const unsigned* grid, const unsigned* block,
                        const uintptr_t* image, char* const* shared) {
  machine.kernel = kernel, machine.arguments = arguments;
  machine.grid = {grid[0], grid[1], grid[2]}, machine.block = {block[0], block[1], block[2]};
  machine.threads = static_cast<int>(block[0] * block[1] * block[2]);
  machine.image_begin = image[0], machine.image_end = image[1];
  machine.shared_begin = shared[0], machine.shared_end = shared[1];
  machine.fault.clear();
  if (machine.threads < 1 || machine.threads > 1024) {
    machine.fault = "a block has 1 to 1024 threads, not " + std::to_string(machine.threads);
    return machine.fault.c_str();
  }
  while (machine.fibres.size() < static_cast<size_t>(machine.threads)) {
    machine.fibres.emplace_back();
    machine.fibres.back().stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  machine.warp_phase.assign((machine.threads + kWarp - 1) / kWarp, 1);
  for (unsigned z = 0; z < grid[2]; ++z) {
    for (unsigned y = 0; y < grid[1]; ++y) {
      for (unsigned x = 0; x < grid[0]; ++x) {
        machine.block_index = {x, y, z};
        run_block();
        machine.current = nullptr;
        if (!machine.fault.empty()) return machine.fault.c_str();
        ++machine.counts.blocks, machine.counts.threads += machine.threads;
      }
    }
  }
  return nullptr;
}

void simt_counts(uint64_t* out) { std::memcpy(out, &machine.counts, sizeof machine.counts); }
void simt_reset_counts() { machine.counts = Counts{}; }
void simt_count(int on) { machine.counting = on != 0; }

// ---- what the compiler calls before each access --------------------------------------------------------------------

#define CALLER (reinterpret_cast<uintptr_t>(__builtin_return_address(0)))
#define SIMT_ACCESS(n)                                                                                          \
  void __tsan_read##n(void* a) { touch(reinterpret_cast<uintptr_t>(a), n, false, CALLER, n); }                  \
  void __tsan_write##n(void* a) { touch(reinterpret_cast<uintptr_t>(a), n, true, CALLER, n); }                  \
  void __tsan_unaligned_read##n(void* a) { touch(reinterpret_cast<uintptr_t>(a), n, false, CALLER, n); }        \
  void __tsan_unaligned_write##n(void* a) { touch(reinterpret_cast<uintptr_t>(a), n, true, CALLER, n); }        \
  void __tsan_volatile_read##n(void* a) { touch(reinterpret_cast<uintptr_t>(a), n, false, CALLER, n); }         \
  void __tsan_volatile_write##n(void* a) { touch(reinterpret_cast<uintptr_t>(a), n, true, CALLER, n); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
void __tsan_read_range(void* a, size_t n) { touch(reinterpret_cast<uintptr_t>(a), n, false, CALLER, 4); }
void __tsan_write_range(void* a, size_t n) { touch(reinterpret_cast<uintptr_t>(a), n, true, CALLER, 4); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
}
