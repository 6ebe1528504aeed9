// The only way a kernel is started: shared memory requested, the launch checked, errors that name
// the kernel and its geometry. Under the emulator the same call runs the kernel's threads as
// fibers.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace densenet_fast::cuda {

struct LaunchConfig {
  const char* name;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  Stream stream;
};

// What the choice of tiles and stages depends on.
struct DeviceLimits {
  int major;
  int minor;
  int shared_bytes_per_block;  // with opt-in
  int shared_bytes_per_multiprocessor;
  int multiprocessors;
};

inline std::string describe(const LaunchConfig& c) {
  const auto dims = [](const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  return std::string(c.name) + ", grid " + dims(c.grid) + ", block " + dims(c.block) + ", " +
         std::to_string(c.shared_bytes) + " bytes of shared memory";
}

#ifdef DENSENET_FAST_EMULATOR

template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& c, A&&... args) {
  if (c.stream.counting) return;
  ::emulator::run({c.name, c.grid, c.block, c.shared_bytes},
                  [&] { kernel(static_cast<P>(args)...); });
}

inline DeviceLimits current_device_limits() {
  const auto d = ::emulator::device();
  return {d.major, d.minor, d.shared_bytes_per_block, d.shared_bytes_per_multiprocessor,
          d.multiprocessors};
}

#else

inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) {
    throw std::runtime_error("densenet_fast: " + what + ": " + cudaGetErrorString(error));
  }
}

// Text only for a failure: putting it together takes as long as a launch.
inline void check_launch(cudaError_t error, const LaunchConfig& c) {
  if (error != cudaSuccess) check(error, describe(c) + " (or an earlier kernel's failure)");
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Asked for by each kernel once on each device, unless it comes to need more.
inline void allow_shared_memory(const void* kernel, const LaunchConfig& c) {
  if (c.shared_bytes <= 48 * 1024) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& bytes = allowed[{kernel, current_device()}];
  if (c.shared_bytes <= bytes) return;
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(c.shared_bytes)),
               c);
  bytes = c.shared_bytes;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& c, A&&... args) {
  if (c.stream.counting) return;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), c);
  [&](P... parameters) {
    void* pointers[] = {static_cast<void*>(&parameters)...};
    check_launch(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), c.grid, c.block, pointers,
                                  c.shared_bytes, c.stream.handle),
                 c);
  }(static_cast<P>(args)...);
  check_launch(cudaGetLastError(), c);
}

// Asked for once on each device.
inline DeviceLimits current_device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  return known[device] = {attribute(cudaDevAttrComputeCapabilityMajor),
                          attribute(cudaDevAttrComputeCapabilityMinor),
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                          attribute(cudaDevAttrMultiProcessorCount)};
}

#endif

}  // namespace densenet_fast::cuda
