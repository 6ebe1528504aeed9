// Which thread and which block runs next, and the end of those that run without end.
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
#include <random>
#include <string>
#include <vector>

#include "threads.h"

namespace emulator {

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

}  // namespace emulator
