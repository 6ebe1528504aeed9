// The operators on CUDA tensors.
#include "dispatch.h"

#include "device.h"

namespace densenet_fast::cuda {
namespace {

thread_local std::string failed_allocation;

}  // namespace

void set_failed_allocation(std::string what) { failed_allocation = std::move(what); }
std::string take_failed_allocation() { return std::exchange(failed_allocation, std::string()); }

}  // namespace densenet_fast::cuda

#ifndef DENSENET_FAST_CUDA_KEY
#define DENSENET_FAST_CUDA_KEY CUDA  // the emulator's tests run the same dispatch on CPU tensors
#endif

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, DENSENET_FAST_CUDA_KEY, m) {
  densenet_fast::Operators<densenet_fast::cuda::Device>::add_to(m);
}
