// Threads, blocks, the meetings at which threads wait for each other, and the launch.
//
// Scheduling is an input. A thread runs until it has to wait; then the next one is chosen among
// those that can run: the lowest, the highest, or a random one. So in forward order the first warp
// is as far ahead of the others as the barriers allow, in reverse order the last one, and two
// accesses that no barrier separates happen in both orders.
#pragma once

#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

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

// What ends a kernel that would not end by itself.
struct Limits {
  uint64_t arrivals_per_block = uint64_t{1} << 30;
  double seconds_without_arrival = 10;  // of CPU time
};

inline Limits& limits() {
  static Limits l;
  return l;
}

struct Counts {
  uint64_t launches = 0, blocks = 0;
  uint64_t arrivals = 0;  // of threads at collectives
};

inline Counts& counts() {
  static Counts c;
  return c;
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
constexpr int kMaxThreads = 1024;

// A NaN as float64, float32, float16 and bfloat16 alike.
constexpr uint16_t kPoison = 0x7ff5;

inline void poison(unsigned char* memory, size_t bytes) {
  for (size_t i = 0; i + 2 <= bytes; i += 2) std::memcpy(memory + i, &kPoison, 2);
}

// Where in the source a thread waits.
struct Site {
  const char* name = nullptr;  // of the collective; null: nowhere
  const char* file = nullptr;
  int line = 0;

  bool operator==(const Site& other) const {
    return line == other.line && (name == other.name || std::strcmp(name, other.name) == 0) &&
           (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(name) + " (" + (slash ? slash + 1 : file) + ":" + std::to_string(line) + ")";
  }
};

struct PendingCopy {
  unsigned char* to;
  unsigned char bytes[16];
  int size;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int linear = 0;
  bool started = false;
  bool done = false;
  bool inside = false;  // the emulator, not the kernel, is at work
  Site waiting;
  std::vector<PendingCopy> copies;  // asynchronous, oldest first
  std::vector<size_t> groups;       // committed: where in `copies` each ends
};

// Threads of a warp that wait for each other; the last to come runs the operation for all.
struct Meeting {
  Site site;
  uint32_t mask = 0;  // 0: no meeting
  int arrived = 0;
  void* arguments[kWarp];
};

struct Warp {
  Meeting meetings[4];  // at the same time, of disjoint masks
  uint32_t ready = 0;   // lanes that can run
  uint32_t clock = 0;   // __syncwarp of the whole warp so far
};

struct Barrier {
  Site site;
  int arrived = 0;
  int votes = 0;   // predicates of those who have arrived
  int result = 0;  // votes of the meeting before
};

struct Block {
  Launch launch;
  uint3 index;
  int threads = 0;
  Thread* thread = nullptr;   // [threads]
  Thread* current = nullptr;  // null: the scheduler runs
  Barrier barrier;
  Warp warps[kMaxThreads / kWarp];
  uint32_t ready_warps = 0;
  unsigned char* shared = nullptr;
  uint32_t interval = 0;  // barriers so far, counted through all blocks of all launches
  uint32_t first_interval = 0;
  uint64_t arrivals = 0;
  volatile uint64_t resumed = 0;
  bool cancelled = false;  // threads that wait unwind their stacks
  std::string error;

  int warp_count() const { return (threads + kWarp - 1) / kWarp; }
  uint32_t lanes(int warp) const {
    const int n = std::min(kWarp, threads - warp * kWarp);
    return n == kWarp ? 0xffffffffu : (1u << n) - 1;
  }
};

constinit inline thread_local Block* current_block = nullptr;

inline Block* block() { return current_block; }
inline Thread& self() { return *current_block->current; }

// The emulator's own accesses are not the kernel's.
class Inside {
 public:
  Inside() : thread_(self()), before_(thread_.inside) { thread_.inside = true; }
  ~Inside() { thread_.inside = before_; }

 private:
  Thread& thread_;
  const bool before_;
};

inline std::string where(int thread) {
  const Block& b = *block();
  std::string text = std::string("kernel ") + b.launch.name + ", block (" +
                     std::to_string(b.index.x) + ", " + std::to_string(b.index.y) + ", " +
                     std::to_string(b.index.z) + ")";
  return thread < 0 ? text : text + ", thread " + std::to_string(thread);
}

struct Stopped {};  // unwinds a thread's stack

inline void record(int thread, const std::string& what) {
  Block& b = *block();
  if (b.error.empty()) b.error = where(thread) + ": " + what;
}

// Ends the launch with an error.
[[noreturn]] inline void fail_at(int thread, const std::string& what) {
  record(thread, what);
  throw Stopped{};
}
[[noreturn]] inline void fail(const std::string& what) { fail_at(self().linear, what); }

inline void leave_for_good() {
  Block& b = *block();
  Thread& t = self();
  t.done = t.inside = true;
  b.warps[t.linear / kWarp].ready &= ~(1u << t.linear % kWarp);
  t.fiber.exit();
}

// The same where no exception may pass: the stack stays as it is.
[[noreturn]] inline void fail_without_unwinding(const std::string& what) {
  record(self().linear, what);
  leave_for_good();
  std::abort();
}

// ---- Meetings
// ------------------------------------------------------------------------------------

inline void suspend() {
  Block& b = *block();
  self().fiber.yield();
  if (b.cancelled) throw Stopped{};
}

inline void count_arrival() {
  Block& b = *block();
  if (++b.arrivals > limits().arrivals_per_block) {
    fail("more than " + std::to_string(limits().arrivals_per_block) +
         " arrivals at collectives in one block: the kernel does not end");
  }
}

inline void wait_at(const Site& site) {
  Block& b = *block();
  Thread& t = self();
  t.waiting = site;
  b.warps[t.linear / kWarp].ready &= ~(1u << t.linear % kWarp);
  suspend();
  t.waiting = {};
}

// All threads of the block. Returns how many of them brought a true predicate.
inline int block_meeting(const Site& site, bool vote) {
  const Inside inside;
  count_arrival();
  Block& b = *block();
  Barrier& m = b.barrier;
  if (m.arrived == 0) {
    m.site = site;
  } else if (!(m.site == site)) {
    fail("reached " + site.text() + " while others wait at " + m.site.text());
  }
  m.votes += vote;
  if (++m.arrived < b.threads) {
    wait_at(site);
  } else {
    m.result = m.votes;
    m.arrived = m.votes = 0;
    ++b.interval;
    for (int w = 0; w < b.warp_count(); ++w) {
      b.warps[w].ready = b.lanes(w);
      b.ready_warps |= 1u << w;
    }
    suspend();  // whose turn it is depends on the order alone
  }
  return m.result;
}

// The threads of the caller's warp named in `mask`; `operation` gets one argument per lane, null
// where the mask has none.
template <class Operation>
void warp_meeting(const Site& site, uint32_t mask, void* argument, const Operation& operation) {
  const Inside inside;
  count_arrival();
  Block& b = *block();
  const int index = self().linear / kWarp, lane = self().linear % kWarp;
  Warp& warp = b.warps[index];
  if (!(mask >> lane & 1)) fail(site.text() + ": the caller is not in its own mask");
  if (mask & ~b.lanes(index)) {
    fail(site.text() + ": the mask names lanes that the block of " + std::to_string(b.threads) +
         " threads does not have");
  }
  Meeting* meeting = nullptr;
  for (Meeting& m : warp.meetings) {
    if (m.mask == mask && m.site == site) {
      meeting = &m;
      break;
    }
    if (m.mask & mask) {
      fail("reached " + site.text() + " while others of the warp wait at " + m.site.text() +
           (m.mask == mask ? "" : " with another mask"));
    }
    if (m.mask == 0 && !meeting) meeting = &m;
  }
  if (!meeting) fail(site.text() + ": too many meetings in one warp");
  Meeting& m = *meeting;
  if (m.mask == 0) {
    m.mask = mask;
    m.site = site;
    std::fill(m.arguments, m.arguments + kWarp, nullptr);
  }
  m.arguments[lane] = argument;
  if (++m.arrived < __builtin_popcount(mask)) {
    wait_at(site);
  } else {
    operation(m.arguments);
    m.arrived = 0;
    m.mask = 0;
    warp.ready |= mask;
    suspend();
  }
}

// ---- Running a kernel
// ----------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {
    for (int i = 0; i < 4; ++i) next();
  }
  uint32_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(z >> 32);
  }

 private:
  uint64_t state_;
};

// Chooses the thread that runs next.
class Scheduler {
 public:
  explicit Scheduler(uint64_t salt)
      : order_(schedule().order), random_(schedule().seed * 1000003 + salt) {
    // From a new warp at every step to one warp as far as it can go.
    stay_ = (uint32_t{1} << random_.next() % 12) - 1;
  }

  int next(const Block& b) {
    if (order_ == Order::kForward) {
      const int w = __builtin_ctz(b.ready_warps);
      return w * kWarp + __builtin_ctz(b.warps[w].ready);
    }
    if (order_ == Order::kReverse) {
      const int w = 31 - __builtin_clz(b.ready_warps);
      return w * kWarp + 31 - __builtin_clz(b.warps[w].ready);
    }
    const uint32_t r = random_.next();
    if (!(b.ready_warps >> warp_ & 1) || (r >> 10 & stay_) == 0) {
      warp_ = one_of(b.ready_warps, r & 31);
    }
    return warp_ * kWarp + one_of(b.warps[warp_].ready, r >> 5 & 31);
  }

 private:
  static int one_of(uint32_t bits, uint32_t from) {
    const uint32_t rotated = from ? bits >> from | bits << (32 - from) : bits;
    return static_cast<int>((__builtin_ctz(rotated) + from) & 31);
  }

  Order order_;
  Random random_;
  uint32_t stay_;
  int warp_ = 0;
};

inline std::vector<int64_t> ordered_blocks(int64_t n) {
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  if (schedule().order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (schedule().order == Order::kRandom) {
    std::mt19937_64 generator(schedule().seed);
    std::shuffle(order.begin(), order.end(), generator);
  }
  return order;
}

// Stops a thread that runs on and on without reaching a collective: a timer of CPU time whose
// signal leaves the fiber for good.
class Watchdog {
 public:
  Watchdog() {
    struct sigaction action = {};
    action.sa_handler = &Watchdog::tick;
    action.sa_flags = SA_NODEFER | SA_RESTART;  // a fiber that stops here never returns from it
    sigaction(kSignal(), &action, nullptr);
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = kSignal();
#ifdef sigev_notify_thread_id
    event.sigev_notify_thread_id = static_cast<pid_t>(syscall(SYS_gettid));
#else
    event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
#endif
    running_ = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) == 0;
    if (!running_) return;
    const double half = limits().seconds_without_arrival / 2;
    itimerspec interval = {};
    interval.it_interval.tv_sec = static_cast<time_t>(half);
    interval.it_interval.tv_nsec =
        static_cast<long>((half - static_cast<double>(interval.it_interval.tv_sec)) * 1e9);
    interval.it_value = interval.it_interval;
    seen() = 0;
    timer_settime(timer_, 0, &interval, nullptr);
  }
  ~Watchdog() {
    if (running_) timer_delete(timer_);
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  static int kSignal() { return SIGRTMIN + 5; }
  static uint64_t& seen() {
    constinit static thread_local uint64_t resumed = 0;
    return resumed;
  }
  static void tick(int) {
    Block* b = block();
    if (!b || !b->current || !b->error.empty()) return;
    if (b->resumed != seen()) {
      seen() = b->resumed;
      return;
    }
    fail_without_unwinding(
        "runs on without end: " + std::to_string(limits().seconds_without_arrival) +
        " s without reaching a barrier or the end");
  }

  timer_t timer_ = {};
  bool running_ = false;
};

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
