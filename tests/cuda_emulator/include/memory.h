// Addresses: what a kernel may touch, and asynchronous copies.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "access_checks.h"
#include "execution.h"

namespace emulator {

inline unsigned char* dynamic_shared() { return block()->shared; }

inline int64_t shared_offset(const void* p) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) -
                              reinterpret_cast<uintptr_t>(block()->shared));
}

inline void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const int64_t offset = shared_offset(p);
  const auto size = static_cast<int64_t>(block()->launch.shared_bytes);
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > size) {
    fail(std::string(what) + ": shared address outside the block's " + std::to_string(size) +
         " bytes, at offset " + std::to_string(offset));
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    fail(std::string(what) + ": shared address not aligned to " + std::to_string(alignment) +
         " bytes, at offset " + std::to_string(offset));
  }
}

// Buffers of global memory that the test has named; none: not checked.
struct GlobalRange {
  const unsigned char* begin;
  const unsigned char* end;
  std::string name;
};

inline std::vector<GlobalRange>& global_ranges() {
  static std::vector<GlobalRange> ranges;
  return ranges;
}

// Of `bytes` at `p`: empty if they are inside a buffer.
inline std::string outside_ranges(const void* p, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  const GlobalRange* nearest = nullptr;
  uintptr_t distance = ~uintptr_t{0};
  for (const GlobalRange& r : global_ranges()) {
    const auto begin = reinterpret_cast<uintptr_t>(r.begin);
    const auto end = reinterpret_cast<uintptr_t>(r.end);
    if (at >= begin && at + bytes <= end) return "";
    const uintptr_t d = at < begin ? begin - at : at >= end ? at - end : 0;
    if (d < distance) {
      distance = d;
      nearest = &r;
    }
  }
  std::string text = "global address outside every buffer";
  if (nearest) {
    const auto offset = static_cast<int64_t>(at - reinterpret_cast<uintptr_t>(nearest->begin));
    text += ": " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " +
            nearest->name + ", which has " + std::to_string(nearest->end - nearest->begin);
  }
  return text;
}

inline void check_global(const void* p, size_t bytes, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    fail(std::string(what) + ": global address not aligned to " + std::to_string(alignment) +
         " bytes");
  }
  if (global_ranges().empty() || bytes == 0) return;
  const std::string wrong = outside_ranges(p, bytes);
  if (!wrong.empty()) fail(std::string(what) + ": " + wrong);
}

// The copy is done at once, to where nobody sees it: until the wait the destination is poison.
inline void cp_async(void* shared, const void* global, int size, int valid) {
  const Inside inside;
  if (valid < 0 || valid > size) {
    fail("cp.async: " + std::to_string(valid) + " of " + std::to_string(size) + " bytes asked for");
  }
  check_shared(shared, size, size, "cp.async");
  check_global(global, valid, size, "cp.async");
  PendingCopy copy{static_cast<unsigned char*>(shared), {}, size};
  if (valid > 0) std::memcpy(copy.bytes, global, valid);
  self().copies.push_back(copy);
  access_checks::copy_started(shared, size);
  poison(copy.to, size);
}

inline void cp_async_commit() {
  const Inside inside;
  self().groups.push_back(self().copies.size());
}

inline void cp_async_wait(int pending) {
  const Inside inside;
  auto& groups = self().groups;
  auto& copies = self().copies;
  const int ready = static_cast<int>(groups.size()) - pending;
  if (ready <= 0) return;
  const size_t end = groups[ready - 1];
  for (size_t i = 0; i < end; ++i) {
    std::memcpy(copies[i].to, copies[i].bytes, copies[i].size);
    access_checks::copy_finished(copies[i].to, copies[i].size);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(end));
  groups.erase(groups.begin(), groups.begin() + ready);
  for (size_t& g : groups) g -= end;
}

}  // namespace emulator
