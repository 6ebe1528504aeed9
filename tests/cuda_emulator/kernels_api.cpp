// C entry points to the launchers of csrc/cuda, for ctypes: the same plain functions that the torch
// dispatch calls, with memory of the host. Every function returns null or the text of an error.
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace cuda = densenet_fast::cuda;

namespace {

// Exact-size blocks that start as NaNs. Where the test has named its buffers, these are buffers
// too.
class PoisonedWorkspace : public cuda::Workspace {
 public:
  ~PoisonedWorkspace() override {
    auto& ranges = emulator::global_ranges();
    for (const auto& block : blocks_) {
      std::erase_if(ranges, [&](const auto& range) { return range.begin == block.get(); });
    }
  }
  void* allocate(size_t bytes) override {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1) != 0) throw std::bad_alloc();
    auto* p = static_cast<unsigned char*>(memory);
    blocks_.emplace_back(p, std::free);
    emulator::poison(p, bytes);
    auto& ranges = emulator::global_ranges();
    if (!ranges.empty()) ranges.push_back({p, p + bytes, "workspace"});
    return p;
  }

 private:
  std::vector<std::unique_ptr<unsigned char, void (*)(void*)>> blocks_;
};

template <class Body>
const char* guarded(int dtype, int allow_tf32, const Body& body) {
  static thread_local std::string error;
  try {
    PoisonedWorkspace workspace;
    body(cuda::Context{static_cast<cuda::Dtype>(dtype), allow_tf32 != 0, {nullptr}, &workspace});
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

using I = const cuda::ImageArgument&;
using N = const cuda::NormArgument&;
using W = const cuda::WeightArgument&;
using S = const cuda::StatisticsResult&;
using G = const cuda::NormGradientResult&;
using GW = const cuda::WeightGradient&;

}  // namespace

extern "C" {

const char* df_channel_statistics(int dtype, int tf32, I x, S s) {
  return guarded(dtype, tf32, [&](const auto& c) { cuda::channel_statistics(c, x, s); });
}
const char* df_norm_coefficients(int dtype, int tf32, const cuda::NormCoefficients* norms,
                                 int64_t count) {
  return guarded(dtype, tf32,
                 [&](const auto& c) { cuda::norm_coefficients(c, {norms, norms + count}); });
}
const char* df_update_running_statistics_(int dtype, int tf32, const cuda::RunningUpdate* updates,
                                          int64_t norms, int64_t** counters, int64_t count) {
  return guarded(dtype, tf32, [&](const auto& c) {
    cuda::update_running_statistics(c, {updates, updates + norms}, {counters, counters + count});
  });
}
const char* df_norm_grad_coefficients(int dtype, int tf32, const cuda::NormBackward& next, G sums) {
  return guarded(dtype, tf32, [&](const auto& c) { cuda::norm_grad_coefficients(c, next, sums); });
}
const char* df_conv1x1_forward(int dtype, int tf32, I x, N act, W w, I z, S s) {
  return guarded(dtype, tf32, [&](const auto& c) { cuda::conv1x1_forward(c, x, act, w, z, s); });
}
const char* df_conv1x1_backward(int dtype, int tf32, I g, I z, const void* coefficients, I x,
                                N norm, W w, I gx, G sums, GW gw) {
  return guarded(dtype, tf32, [&](const auto& c) {
    cuda::conv1x1_backward(c, g, z, coefficients, x, norm, w, gx, sums, gw);
  });
}
const char* df_conv3x3_forward(int dtype, int tf32, I z, N act, W w, I y, S s) {
  return guarded(dtype, tf32, [&](const auto& c) { cuda::conv3x3_forward(c, z, act, w, y, s); });
}
const char* df_conv3x3_backward(int dtype, int tf32, I g, I z, N norm, W w, I gz, G sums, GW gw,
                                int accumulate) {
  return guarded(dtype, tf32, [&](const auto& c) {
    cuda::conv3x3_backward(c, g, z, norm, w, gz, sums, gw, accumulate != 0);
  });
}
const char* df_transition_forward(int dtype, int tf32, I x, N act, W w, I out, S s) {
  return guarded(dtype, tf32,
                 [&](const auto& c) { cuda::transition_forward(c, x, act, w, out, s); });
}
const char* df_transition_backward(int dtype, int tf32, I g, I x, N norm, W w, I gx, G sums,
                                   GW gw) {
  return guarded(dtype, tf32,
                 [&](const auto& c) { cuda::transition_backward(c, g, x, norm, w, gx, sums, gw); });
}
const char* df_dropout_(int dtype, int tf32, I y, uint64_t seed, double p, int channels) {
  return guarded(dtype, tf32, [&](const auto& c) { cuda::dropout(c, y, seed, p, channels != 0); });
}
const char* df_finish_gradient(int dtype, int tf32, I x, I g, const void* mean, const void* sum,
                               const void* sum_x, I out) {
  return guarded(dtype, tf32,
                 [&](const auto& c) { cuda::finish_gradient(c, x, g, mean, sum, sum_x, out); });
}
const char* df_norm_relu_avgpool_forward(int dtype, int tf32, I x, N act, void* out) {
  return guarded(dtype, tf32,
                 [&](const auto& c) { cuda::norm_relu_avgpool_forward(c, x, act, out); });
}
const char* df_norm_relu_avgpool_backward(int dtype, int tf32, const void* g, I x, N norm, I gx,
                                          G sums) {
  return guarded(dtype, tf32,
                 [&](const auto& c) { cuda::norm_relu_avgpool_backward(c, g, x, norm, gx, sums); });
}
const char* df_norm_relu_maxpool_forward(int dtype, int tf32, I x, N act, I out, uint8_t* argmax) {
  return guarded(dtype, tf32,
                 [&](const auto& c) { cuda::norm_relu_maxpool_forward(c, x, act, out, argmax); });
}
const char* df_norm_relu_maxpool_backward(int dtype, int tf32, I g, const uint8_t* argmax, I x,
                                          N norm, int batch_statistics, I gx, G sums) {
  return guarded(dtype, tf32, [&](const auto& c) {
    cuda::norm_relu_maxpool_backward(c, g, argmax, x, norm, batch_statistics != 0, gx, sums);
  });
}

}  // extern "C"
