// The launch of a sample, whose error is the entry point's result.
#pragma once

#include "cuda/launch.cuh"
#include "emulator_api.h"

namespace {

template <class... P, class... A>
const char* run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...),
                A... args) {
  return emulator::guarded([&] {
    densenet_fast::cuda::launch(
        kernel, densenet_fast::cuda::LaunchConfig{name, grid, block, shared_bytes, nullptr},
        args...);
  });
}

}  // namespace
