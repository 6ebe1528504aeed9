// Where threads wait for each other: all of a block, or those of a warp that a mask names.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "threads.h"

namespace emulator {

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

}  // namespace emulator
