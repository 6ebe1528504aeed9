// CUDA's execution model for the host compiler, included in front of every kernel source.
//
// A kernel thread is a fiber. Blocks run one after another; between two synchronisation points the
// threads of a block run in an order that the test chooses (forward, reverse, seeded random), so a
// missing barrier shows as a different result or as poison. Collective operations (barriers, warp
// shuffles, ldmatrix, mma) wait until every participant has arrived and report it when one cannot.
// Shared memory is an exact-size heap block filled with signalling NaNs; what cp.async copies
// becomes visible only at the issuing thread's matching wait.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#undef __constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "kernels use dynamic shared memory only");
#define __constant__

namespace emulator {

enum class Order { kForward, kReverse, kRandom };

struct Device {
  int major = 8, minor = 0;
  int shared_bytes_per_block = 163 * 1024;
  int shared_bytes_per_multiprocessor = 164 * 1024;
  int multiprocessors = 108;
};

inline Device& device() {
  static Device d;
  return d;
}

struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;
};

inline Schedule& schedule() {
  static Schedule s;
  return s;
}

// Ranges of global memory that the test has named; empty: not checked.
struct GlobalRange {
  const unsigned char* begin;
  const unsigned char* end;
  std::string name;
};

inline std::vector<GlobalRange>& global_ranges() {
  static std::vector<GlobalRange> ranges;
  return ranges;
}

struct Launch {
  const char* name;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kWarp = 32;
constexpr uint32_t kPoison =
    0x7fa1dead;  // a signalling NaN as float32, NaNs as float16 and bfloat16

struct PendingCopy {
  unsigned char* to;
  unsigned char bytes[16];
  int size;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int linear = 0;
  bool done = false;
  const char* waiting = nullptr;                 // the collective it waits at, null: runnable
  std::vector<std::vector<PendingCopy>> groups;  // committed, oldest first
  std::vector<PendingCopy> open;                 // not yet committed
};

// A meeting of threads: each brings an argument; the last to come runs the operation for all.
struct Meeting {
  const char* name = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  uint32_t mask = 0;
  std::vector<void*> arguments;
};

class Block {
 public:
  Launch launch;
  uint3 index;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned char* shared = nullptr;
  Thread* current = nullptr;
  Meeting barrier;
  std::vector<Meeting> warps;
  std::string error;

  int threads_alive() const {
    int n = 0;
    for (const auto& t : threads) n += !t->done;
    return n;
  }
};

inline Block*& block() {
  static thread_local Block* b = nullptr;
  return b;
}

inline Thread& self() { return *block()->current; }

inline std::string where() {
  const Block& b = *block();
  char text[256];
  std::snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u), thread %d", b.launch.name,
                b.index.x, b.index.y, b.index.z, b.current ? b.current->linear : -1);
  return text;
}

// Ends the launch with an error: the fiber stops here for good.
[[noreturn]] inline void fail(const std::string& what) {
  Block& b = *block();
  if (b.error.empty()) b.error = where() + ": " + what;
  self().done = true;
  self().fiber.exit();
  std::abort();
}

inline void wait_for(Meeting& meeting, const char* name, uint64_t generation) {
  self().waiting = name;
  while (meeting.generation == generation) self().fiber.yield();
  self().waiting = nullptr;
}

// All threads of the block.
template <class Operation>
void block_meeting(const char* name, void* argument, const Operation& operation) {
  Block& b = *block();
  Meeting& m = b.barrier;
  if (m.arrived == 0) {
    m.name = name;
    m.arguments.assign(b.threads.size(), nullptr);
  } else if (std::strcmp(m.name, name) != 0) {
    fail(std::string("reached ") + name + " while others wait at " + m.name);
  }
  m.arguments[self().linear] = argument;
  const uint64_t generation = m.generation;
  if (++m.arrived == static_cast<int>(b.threads.size())) {
    operation(m.arguments);
    m.arrived = 0;
    ++m.generation;
  } else {
    wait_for(m, name, generation);
  }
}

// The threads of the caller's warp named in `mask`.
template <class Operation>
void warp_meeting(const char* name, uint32_t mask, void* argument, const Operation& operation) {
  Block& b = *block();
  const int warp = self().linear / kWarp, lane = self().linear % kWarp;
  if (!(mask >> lane & 1)) fail(std::string(name) + ": the caller is not in its own mask");
  Meeting& m = b.warps[warp];
  if (m.arrived == 0) {
    m.name = name;
    m.mask = mask;
    m.arguments.assign(kWarp, nullptr);
  } else if (std::strcmp(m.name, name) != 0 || m.mask != mask) {
    fail(std::string("reached ") + name + " while others of the warp wait at " + m.name);
  }
  m.arguments[lane] = argument;
  const uint64_t generation = m.generation;
  if (++m.arrived == __builtin_popcount(mask)) {
    operation(m.arguments);
    m.arrived = 0;
    ++m.generation;
  } else {
    wait_for(m, name, generation);
  }
}

inline uint32_t full_warp() {
  const int warp = self().linear / kWarp;
  const int lanes = std::min<int>(kWarp, static_cast<int>(block()->threads.size()) - warp * kWarp);
  return lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1;
}

// ---- Memory ------------------------------------------------------------------------------------

inline unsigned char* dynamic_shared() { return block()->shared; }

inline void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const Block& b = *block();
  const auto* c = static_cast<const unsigned char*>(p);
  if (c < b.shared || c + bytes > b.shared + b.launch.shared_bytes) {
    fail(std::string(what) + ": shared address outside the block's " +
         std::to_string(b.launch.shared_bytes) + " bytes, at offset " +
         std::to_string(c - b.shared));
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    fail(std::string(what) + ": shared address not aligned to " + std::to_string(alignment));
  }
}

inline void check_global(const void* p, size_t bytes, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    fail(std::string(what) + ": global address not aligned to " + std::to_string(alignment));
  }
  if (global_ranges().empty() || bytes == 0) return;
  const auto* c = static_cast<const unsigned char*>(p);
  for (const GlobalRange& r : global_ranges()) {
    if (c >= r.begin && c + bytes <= r.end) return;
  }
  fail(std::string(what) + ": global address outside every buffer");
}

inline void cp_async(void* shared, const void* global, int size, int valid) {
  if (valid < 0 || valid > size) fail("cp.async: source size out of range");
  check_shared(shared, size, size, "cp.async");
  if (valid > 0) check_global(global, valid, size, "cp.async");
  PendingCopy copy{static_cast<unsigned char*>(shared), {}, size};
  std::memcpy(copy.bytes, global, valid);
  self().open.push_back(copy);
  // Until the wait, the destination is nobody's to read.
  for (int i = 0; i + 4 <= size; i += 4) {
    std::memcpy(static_cast<unsigned char*>(shared) + i, &kPoison, 4);
  }
}

inline void cp_async_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

inline void cp_async_wait(int pending) {
  auto& groups = self().groups;
  const int ready = static_cast<int>(groups.size()) - pending;
  for (int g = 0; g < ready; ++g) {
    for (const PendingCopy& c : groups[g]) std::memcpy(c.to, c.bytes, c.size);
  }
  if (ready > 0) groups.erase(groups.begin(), groups.begin() + ready);
}

// ---- Warp collectives
// ----------------------------------------------------------------------------

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int (*source)(int lane, int argument),
          int argument) {
  struct Slot {
    T in, out;
  } slot{value, value};
  warp_meeting(name, mask, &slot, [&](std::vector<void*>& slots) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!slots[lane]) continue;
      const int from = source(lane, argument);
      auto* to = static_cast<Slot*>(slots[lane]);
      if (from >= 0 && from < kWarp && slots[from]) to->out = static_cast<Slot*>(slots[from])->in;
    }
  });
  return slot.out;
}

inline uint32_t ballot(uint32_t mask, bool predicate) {
  struct Slot {
    bool in;
    uint32_t out;
  } slot{predicate, 0};
  warp_meeting("__ballot_sync", mask, &slot, [](std::vector<void*>& slots) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (slots[i] && static_cast<Slot*>(slots[i])->in) bits |= 1u << i;
    }
    for (void* s : slots) {
      if (s) static_cast<Slot*>(s)->out = bits;
    }
  });
  return slot.out;
}

// Row r of matrix q is at the address lane 8q + r gave; lane i receives elements 2(i % 4) and
// 2(i % 4) + 1 of row i / 4 (transposed: of column i / 4).
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  check_shared(row, 16, 16, "ldmatrix");
  struct Slot {
    const void* row;
    uint32_t* out;
  } slot{row, r};
  const char* name = transposed ? "ldmatrix.trans" : "ldmatrix";
  warp_meeting(name, 0xffffffffu, &slot, [&](std::vector<void*>& slots) {
    const auto element = [&](int matrix, int i, int j) {
      uint16_t bits;
      const auto* base =
          static_cast<const unsigned char*>(static_cast<Slot*>(slots[8 * matrix + i])->row);
      std::memcpy(&bits, base + 2 * j, 2);
      return bits;
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int q = 0; q < 4; ++q) {
        const uint32_t low = transposed ? element(q, t, g) : element(q, g, t);
        const uint32_t high = transposed ? element(q, t + 1, g) : element(q, g, t + 1);
        static_cast<Slot*>(slots[lane])->out[q] = low | high << 16;
      }
    }
  });
}

struct HalfOperand {
  static float value(uint16_t bits) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
  }
};

struct BfloatOperand {
  static float value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
};

struct MmaSlot {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Position of element `i` of a lane's fragment, PTX ISA "Matrix fragments for mma.m16n8k16/k8".
struct Position {
  int row, column;
};
inline Position fragment_a16(int lane, int i) {  // 8 elements of 16 bits, 16 x 16
  return {lane / 4 + (i / 2 % 2) * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
inline Position fragment_b16(int lane, int i) {  // 4 elements, 16 x 8
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}
inline Position fragment_a_tf32(int lane, int i) {  // 4 elements, 16 x 8
  return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4};
}
inline Position fragment_b_tf32(int lane, int i) {  // 2 elements, 8 x 8
  return {lane % 4 + i * 4, lane / 4};
}
inline Position fragment_c(int lane, int i) {  // 4 elements, 16 x 8
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

template <int K>
void accumulate(std::vector<void*>& slots, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<MmaSlot*>(slots[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const Position p = fragment_c(lane, i);
      float sum = 0;  // products are exact in float32; the hardware's order of addition is its own
      for (int k = 0; k < K; ++k) sum += a[p.row][k] * b[k][p.column];
      d[i] += sum;
    }
  }
}

template <class Operand>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operand) {
  MmaSlot slot{d, a, b};
  warp_meeting("mma.m16n8k16", 0xffffffffu, &slot, [](std::vector<void*>& slots) {
    float am[16][16], bm[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* s = static_cast<MmaSlot*>(slots[lane]);
      for (int i = 0; i < 8; ++i) {
        const Position p = fragment_a16(lane, i);
        am[p.row][p.column] = Operand::value(static_cast<uint16_t>(s->a[i / 2] >> 16 * (i % 2)));
      }
      for (int i = 0; i < 4; ++i) {
        const Position p = fragment_b16(lane, i);
        bm[p.row][p.column] = Operand::value(static_cast<uint16_t>(s->b[i / 2] >> 16 * (i % 2)));
      }
    }
    accumulate<16>(slots, am, bm);
  });
}

inline uint32_t float_to_tf32(float x) {  // nearest, ties away: 13 bits of the mantissa go
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaSlot slot{d, a, b};
  warp_meeting("mma.m16n8k8.tf32", 0xffffffffu, &slot, [](std::vector<void*>& slots) {
    const auto value = [](uint32_t bits) {
      bits &= ~0x1fffu;  // the hardware reads 19 bits
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    };
    float am[16][8], bm[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* s = static_cast<MmaSlot*>(slots[lane]);
      for (int i = 0; i < 4; ++i) {
        const Position p = fragment_a_tf32(lane, i);
        am[p.row][p.column] = value(s->a[i]);
      }
      for (int i = 0; i < 2; ++i) {
        const Position p = fragment_b_tf32(lane, i);
        bm[p.row][p.column] = value(s->b[i]);
      }
    }
    accumulate<8>(slots, am, bm);
  });
}

// ---- Running a kernel
// ------------------------------------------------------------------------------

inline std::vector<int64_t> ordered(int64_t n, uint64_t salt) {
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  if (schedule().order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (schedule().order == Order::kRandom) {
    std::mt19937_64 generator(schedule().seed * 1000003 + salt);
    std::shuffle(order.begin(), order.end(), generator);
  }
  return order;
}

struct ThreadStart {
  Thread* thread;
  const std::function<void()>* body;
};

inline void thread_entry(void* argument) {
  auto* start = static_cast<ThreadStart*>(argument);
  Thread* thread = start->thread;
  (*start->body)();
  thread->done = true;
  thread->fiber.exit();
}

inline std::string stuck_report(const Block& b) {
  std::string text = std::string("kernel ") + b.launch.name + ", block (" +
                     std::to_string(b.index.x) + ", " + std::to_string(b.index.y) + ", " +
                     std::to_string(b.index.z) + "): threads diverged at a collective:";
  int listed = 0;
  for (const auto& t : b.threads) {
    if (listed == 4) break;
    if (t->waiting) {
      text += " thread " + std::to_string(t->linear) + " waits at " + t->waiting + ";";
      ++listed;
    }
  }
  for (const auto& t : b.threads) {
    if (t->done) {
      text += " thread " + std::to_string(t->linear) + " has exited";
      break;
    }
  }
  return text;
}

inline void run_block(Block& b, const std::function<void()>& body, uint64_t salt) {
  const int n = static_cast<int>(b.threads.size());
  std::vector<ThreadStart> starts(n);
  // malloc: an exact-size block that AddressSanitizer guards.
  std::unique_ptr<unsigned char, void (*)(void*)> memory(
      static_cast<unsigned char*>(std::malloc(std::max<size_t>(b.launch.shared_bytes, 1))),
      std::free);
  b.shared = memory.get();
  for (size_t i = 0; i + 4 <= b.launch.shared_bytes; i += 4) std::memcpy(b.shared + i, &kPoison, 4);
  b.barrier = {};
  b.warps.assign((n + kWarp - 1) / kWarp, {});
  for (int i = 0; i < n; ++i) {
    Thread& t = *b.threads[i];
    t.done = false;
    t.waiting = nullptr;
    t.groups.clear();
    t.open.clear();
    starts[i] = {&t, &body};
    t.fiber.prepare(&thread_entry, &starts[i]);
  }
  uint64_t round = 0;
  while (b.error.empty() && b.threads_alive() > 0) {
    bool progress = false;
    const uint64_t before = b.barrier.generation;
    uint64_t warps_before = 0;
    for (const Meeting& m : b.warps) warps_before += m.generation;
    for (const int64_t i : ordered(n, salt + ++round)) {
      Thread& t = *b.threads[i];
      if (t.done) continue;
      const bool was_waiting = t.waiting != nullptr;
      b.current = &t;
      t.fiber.resume();
      if (!b.error.empty()) break;
      progress |= t.done || !was_waiting || t.waiting == nullptr;
    }
    uint64_t warps_after = 0;
    for (const Meeting& m : b.warps) warps_after += m.generation;
    progress |= b.barrier.generation != before || warps_after != warps_before;
    if (!progress && b.error.empty()) b.error = stuck_report(b);
  }
  for (const auto& t : b.threads) {
    if (b.error.empty() && (!t->open.empty() || [&] {
          for (const auto& g : t->groups) {
            if (!g.empty()) return true;
          }
          return false;
        }())) {
      b.error = std::string("kernel ") + b.launch.name + ", thread " + std::to_string(t->linear) +
                ": exited with asynchronous copies under way";
    }
  }
  b.current = nullptr;
}

inline void run(const Launch& launch, const std::function<void()>& body) {
  const int64_t blocks = int64_t{1} * launch.grid.x * launch.grid.y * launch.grid.z;
  const int threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  if (blocks == 0 || threads == 0 || threads > 1024) {
    throw Error(std::string("kernel ") + launch.name + ": invalid launch geometry");
  }
  if (launch.shared_bytes > static_cast<size_t>(device().shared_bytes_per_block)) {
    throw Error(std::string("kernel ") + launch.name + ": " + std::to_string(launch.shared_bytes) +
                " bytes of shared memory requested, the device has " +
                std::to_string(device().shared_bytes_per_block));
  }
  Block b;
  b.launch = launch;
  for (int i = 0; i < threads; ++i) {
    b.threads.push_back(std::make_unique<Thread>());
    Thread& t = *b.threads.back();
    t.linear = i;
    t.index = {static_cast<unsigned>(i) % launch.block.x,
               static_cast<unsigned>(i) / launch.block.x % launch.block.y,
               static_cast<unsigned>(i) / (launch.block.x * launch.block.y)};
  }
  Block* const outer = block();
  block() = &b;
  for (const int64_t i : ordered(blocks, 0)) {
    b.index = {static_cast<unsigned>(i % launch.grid.x),
               static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
               static_cast<unsigned>(i / launch.grid.x / launch.grid.y)};
    run_block(b, body, static_cast<uint64_t>(i) * 7919);
    if (!b.error.empty()) break;
  }
  block() = outer;
  if (!b.error.empty()) throw Error(b.error);
}

}  // namespace emulator

// ---- The names kernels use
// -------------------------------------------------------------------------

#define threadIdx (::emulator::self().index)
#define blockIdx (::emulator::block()->index)
#define blockDim (::emulator::block()->launch.block)
#define gridDim (::emulator::block()->launch.grid)
#define warpSize 32

inline void __syncthreads() {
  ::emulator::block_meeting("__syncthreads", nullptr, [](std::vector<void*>&) {});
}

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  ::emulator::warp_meeting("__syncwarp", mask, nullptr, [](std::vector<void*>&) {});
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return ::emulator::shuffle<T>(
      "__shfl_xor_sync", mask, value, [](int lane, int x) { return lane ^ x; }, lanes);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int lanes) {
  return ::emulator::shuffle<T>(
      "__shfl_down_sync", mask, value, [](int lane, int x) { return lane + x; }, lanes);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return ::emulator::shuffle<T>("__shfl_sync", mask, value, [](int, int x) { return x; }, source);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  return ::emulator::ballot(mask, predicate);
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

template <class T>
T __ldg(const T* p) {
  return *p;
}

template <class T>
T atomicAdd(T*, T) {
  ::emulator::fail("atomicAdd: reductions have a fixed order here");
}
