// What a launch consists of (settings, threads, warps, blocks) and how it ends with an error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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

}  // namespace emulator
