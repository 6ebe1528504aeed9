#include "emulator_api.h"

#include <cstdint>

extern "C" {

// "forward", "reverse" or "random", which the seed makes repeatable.
const char* emulator_set_order(const char* order, uint64_t seed) {
  return emulator::guarded([&] {
    const std::string name = order;
    if (name != "forward" && name != "reverse" && name != "random") {
      throw emulator::Error("the order is \"forward\", \"reverse\" or \"random\", not \"" + name +
                            "\"");
    }
    emulator::schedule() = {name == "forward"   ? emulator::Order::kForward
                            : name == "reverse" ? emulator::Order::kReverse
                                                : emulator::Order::kRandom,
                            seed};
  });
}

void emulator_set_device(int major, int minor, int shared_bytes_per_block,
                         int shared_bytes_per_multiprocessor, int multiprocessors) {
  emulator::device() = {major, minor, shared_bytes_per_block, shared_bytes_per_multiprocessor,
                        multiprocessors};
}

void emulator_set_limits(uint64_t arrivals_per_block, double seconds_without_arrival) {
  emulator::limits() = {arrivals_per_block, seconds_without_arrival};
}

// Once a buffer is named, kernels may touch named buffers only.
const char* emulator_register_range(const void* begin, uint64_t bytes, const char* name) {
  return emulator::guarded([&] {
    const auto* first = static_cast<const unsigned char*>(begin);
    emulator::global_ranges().push_back({first, first + bytes, name});
  });
}

void emulator_clear_ranges() { emulator::global_ranges().clear(); }

const char* emulator_last_error() { return emulator::last_error().c_str(); }

// Launches, blocks and arrivals of threads at collectives since the last reset.
void emulator_counts(uint64_t* result) {
  const emulator::Counts& c = emulator::counts();
  result[0] = c.launches;
  result[1] = c.blocks;
  result[2] = c.arrivals;
}

void emulator_reset_counts() { emulator::counts() = {}; }

}  // extern "C"
