// The launch of a kernel: one block after the other, each by the fibers of its threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "meetings.h"
#include "scheduling.h"

namespace emulator {

// A call of the kernel with its arguments.
struct Body {
  void (*call)(const void* closure);
  const void* closure;
};

inline void thread_entry(void* argument) {
  const auto* body = static_cast<const Body*>(argument);
  try {
    self().inside = false;
    body->call(body->closure);
    self().inside = true;
    if (!self().copies.empty()) fail("exited with asynchronous copies under way");
  } catch (const Stopped&) {
  } catch (const std::exception& error) {
    record(self().linear, std::string("exception: ") + error.what());
  } catch (...) {
    record(self().linear, "exception");
  }
  leave_for_good();
}

// Some threads have ended or wait here, others there, and none can run.
inline std::string stuck_report(const Block& b) {
  struct Group {
    std::string what;
    int first, count;
  };
  std::vector<Group> groups;
  for (int i = 0; i < b.threads; ++i) {
    const Thread& t = b.thread[i];
    const std::string what = t.done ? "exited" : "at " + t.waiting.text();
    auto g = std::find_if(groups.begin(), groups.end(),
                          [&](const Group& group) { return group.what == what; });
    if (g == groups.end()) {
      groups.push_back({what, i, 1});
    } else {
      ++g->count;
    }
  }
  std::string text = "threads diverged at a collective:";
  for (const Group& g : groups) {
    text += (&g == &groups.front() ? " " : "; ") + std::to_string(g.count) + " of " +
            std::to_string(b.threads) + " threads (" + std::to_string(g.first) +
            (g.count > 1 ? ", ...) " : ") ") + g.what;
  }
  return text;
}

// Shared memory of a block, of exactly the size asked for: AddressSanitizer sees every overrun.
// With access checks on it has margins instead, which they know.
class SharedMemory {
 public:
#ifdef DENSENET_FAST_CHECK_ACCESSES
  static constexpr size_t kMargin = 64 * 1024;
#else
  static constexpr size_t kMargin = 0;
#endif
  explicit SharedMemory(size_t bytes)
      : bytes_(bytes),
        memory_(
            static_cast<unsigned char*>(std::malloc(std::max<size_t>(bytes, 1) + 2 * kMargin))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~SharedMemory() { std::free(memory_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  unsigned char* get() const { return memory_ + kMargin; }
  void poison() const { emulator::poison(get(), bytes_); }

 private:
  size_t bytes_;
  unsigned char* memory_;
};

inline void run_block(Block& b, Body& body, uint64_t salt) {
  const int n = b.threads;
  b.barrier = {};
  b.cancelled = false;
  b.arrivals = 0;
  b.first_interval = ++b.interval;
  b.ready_warps = 0;
  for (int w = 0; w < b.warp_count(); ++w) {
    b.warps[w] = {};
    b.warps[w].ready = b.lanes(w);
    b.ready_warps |= 1u << w;
  }
  for (int i = 0; i < n; ++i) {
    Thread& t = b.thread[i];
    t.linear = i;
    t.index = {static_cast<unsigned>(i) % b.launch.block.x,
               static_cast<unsigned>(i) / b.launch.block.x % b.launch.block.y,
               static_cast<unsigned>(i) / (b.launch.block.x * b.launch.block.y)};
    t.started = t.done = false;
    t.inside = true;  // but for the kernel's own code
    t.waiting = {};
    t.copies.clear();
    t.groups.clear();
    t.fiber.prepare(&thread_entry, &body);
  }
  Scheduler scheduler(salt);
  while (b.error.empty() && b.ready_warps) {
    const int i = scheduler.next(b);
    Thread& t = b.thread[i];
    b.current = &t;
    t.started = true;
    b.resumed = b.resumed + 1;
    t.fiber.resume();
    b.current = nullptr;
    if (b.warps[i / kWarp].ready == 0) b.ready_warps &= ~(1u << i / kWarp);
  }
  const bool all_done = std::all_of(b.thread, b.thread + n, [](const Thread& t) { return t.done; });
  if (b.error.empty() && !all_done) b.error = where(-1) + ": " + stuck_report(b);
  // After an error: those who wait unwind their stacks.
  b.cancelled = true;
  for (int i = 0; i < n; ++i) {
    Thread& t = b.thread[i];
    if (!t.started || t.done) continue;
    b.current = &t;
    t.fiber.resume();
    b.current = nullptr;
  }
  counts().arrivals += b.arrivals;
  ++counts().blocks;
}

// Threads, and above all their stacks, serve one launch after the other.
inline Thread* thread_pool() {
  static thread_local std::unique_ptr<Thread[]> pool;
  if (!pool) pool = std::make_unique<Thread[]>(kMaxThreads);
  return pool.get();
}

inline void run(const Launch& launch, Body body) {
  if (block()) throw Error(std::string("kernel ") + launch.name + ": launched by a kernel");
  const dim3 grid = launch.grid, threads = launch.block;
  const uint64_t block_threads = uint64_t{1} * threads.x * threads.y * threads.z;
  if (!grid.x || !grid.y || !grid.z || !block_threads || block_threads > kMaxThreads ||
      threads.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw Error(std::string("kernel ") + launch.name + ": invalid launch geometry");
  }
  if (launch.shared_bytes > static_cast<size_t>(device().shared_bytes_per_block)) {
    throw Error(std::string("kernel ") + launch.name + ": " + std::to_string(launch.shared_bytes) +
                " bytes of shared memory requested, the device has " +
                std::to_string(device().shared_bytes_per_block));
  }
  constinit static thread_local uint32_t interval = 0;
  const SharedMemory shared(launch.shared_bytes);
  const auto b = std::make_unique<Block>();
  b->launch = launch;
  b->threads = static_cast<int>(block_threads);
  b->thread = thread_pool();
  b->shared = shared.get();
  b->interval = interval;
  ++counts().launches;
  current_block = b.get();
  struct Restore {
    ~Restore() { current_block = nullptr; }
  } restore;
  {
    const Watchdog watchdog;
    const int64_t blocks = int64_t{1} * grid.x * grid.y * grid.z;
    for (const int64_t i : ordered_blocks(blocks)) {
      b->index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      shared.poison();
      run_block(*b, body, static_cast<uint64_t>(i) * 7919);
      if (!b->error.empty()) break;
    }
  }
  interval = b->interval;
  if (!b->error.empty()) throw Error(b->error);
}

template <class Call>
void run(const Launch& launch, const Call& call) {
  run(launch, Body{[](const void* closure) { (*static_cast<const Call*>(closure))(); }, &call});
}

}  // namespace emulator
