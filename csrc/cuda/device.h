// What the operators need of CUDA: the device and its current stream, memory in stream order, and
// the kernels' limits.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <string>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace densenet_fast::cuda {

// What densenet_fast/operators/ asks behind a call that failed; each thread its own.
void set_failed_allocation(std::string what);
std::string take_failed_allocation();

// Grids have at most 65535 blocks across channels, of 16 at least.
constexpr int64_t kMaxChannels = 65535 * 16;
// The kernels count single dimensions, pixels and tiles with int; all offsets have 64 bits.
constexpr int64_t kMaxPixels = std::numeric_limits<int>::max();
// One thread an element, 256 to a block, 2^31 - 1 blocks.
constexpr int64_t kMaxElements = kMaxPixels * 256;

// Tensors of PyTorch's caching allocator, on the current stream: given back at the end of the call,
// they go to whoever comes next on that stream.
class TensorWorkspace : public Workspace {
 public:
  explicit TensorWorkspace(torch::stable::Device device) : device_(device) {}

  void* allocate(size_t bytes) override {
    const int64_t size[] = {static_cast<int64_t>(bytes)};
    try {
      blocks_.push_back(torch::stable::empty({size, 1}, ScalarType::Byte, std::nullopt, device_));
    } catch (const std::exception& error) {
      // An earlier kernel's failure arrives here too, under its own name; lack of memory may come
      // without text.
      const std::string reason = error.what();
      if (reason.find("CUDA error") != std::string::npos &&
          reason.find("out of memory") == std::string::npos) {
        throw;
      }
      std::string what = "CUDA out of memory: no room for a workspace of " + std::to_string(bytes) +
                         " bytes on device " + std::to_string(device_.index());
      set_failed_allocation(what);
      throw std::runtime_error("densenet_fast: " + what);
    }
    return blocks_.back().mutable_data_ptr();
  }

 private:
  torch::stable::Device device_;
  std::vector<Tensor> blocks_;
};

class Device {
 public:
  using Context = cuda::Context;

  Device(const torch::stable::Device& place, Dtype dtype, bool allow_tf32)
      :
#ifndef DENSENET_FAST_EMULATOR
        guard_(place.index()),
#endif
        workspace_(place),
        context_{dtype, allow_tf32, {current_stream(place.index())}, &workspace_} {
  }

  const Context& context() const { return context_; }

  static void check_image(const Rows& r, const char* name) {
    int64_t pixels = 1;
    for (const int64_t size : {r.n, r.d, r.h, r.w}) {
      STD_TORCH_CHECK(size <= kMaxPixels / pixels, name,
                      " must have at most 2^31 - 1 pixels for the CUDA kernels, got ", sizes(r),
                      ": use smaller batches");
      pixels *= size;
    }
    STD_TORCH_CHECK(r.c <= kMaxChannels, name, " must have at most ", kMaxChannels,
                    " channels for the CUDA kernels, got ", r.c);
    STD_TORCH_CHECK(pixels * r.c <= kMaxElements, name, " must have at most ", kMaxElements,
                    " elements for the CUDA kernels: use smaller batches");
  }
  static void check_weight(int64_t out, int64_t in) {
    STD_TORCH_CHECK(out <= kMaxChannels && out * in <= kMaxElements,
                    "the CUDA kernels take weights of at most ", kMaxChannels, " channels, got ",
                    out, " x ", in);
  }

  template <class Call>
  static const void* packed_weight(const Call&, const Tensor&, const WeightArgument&) {
    throw std::runtime_error("densenet_fast: the CUDA kernels take no packed weights");
  }

#define DF_KERNEL(name)                                                     \
  template <class... Arguments>                                             \
  static void name(const Context& context, const Arguments&... arguments) { \
    cuda::name(context, arguments...);                                      \
  }
  DF_KERNEL(norm_coefficients)
  DF_KERNEL(norm_grad_coefficients)
  DF_KERNEL(pack_weights)
  DF_KERNEL(update_running_statistics)
  DENSENET_FAST_KERNELS(DF_KERNEL)
#undef DF_KERNEL

  // body(context) with memory of one piece, as much as a run of it that launches nothing has asked
  // for: where there is none, nothing has been changed.
  template <class Body>
  static void in_one_piece(const Context& context, const Body& body) {
    std::vector<SplitSums> later;
    Arena counted;
    Context counting = context;
    counting.stream.counting = true;
    counting.workspace = counting.arena = &counted;
    counting.later = &later;
    body(counting);
    Arena arena(context.workspace->allocate(counted.most()));
    Context running = counting;
    running.stream = context.stream;
    running.workspace = running.arena = &arena;
    body(running);
  }

  // What is allocated meanwhile is free for others behind it.
  class Scope {
   public:
    explicit Scope(const Context& context) : arena_(context.arena), mark_(arena_->used()) {}
    ~Scope() { arena_->release(mark_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena* arena_;
    size_t mark_;
  };

  static void add_weight_gradients(const Context& context) {
    add_splits(context, *context.later);
    context.later->clear();
  }

 private:
  static std::string sizes(const Rows& r) {
    std::string text = std::to_string(r.n);
    const int64_t every[] = {r.d, r.h, r.w};
    for (int i = 3 - r.dims; i < 3; ++i) text += " x " + std::to_string(every[i]);
    return text;
  }
  static cudaStream_t current_stream([[maybe_unused]] int32_t index) {
#ifdef DENSENET_FAST_EMULATOR
    return nullptr;
#else
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return static_cast<cudaStream_t>(stream);
#endif
  }

#ifndef DENSENET_FAST_EMULATOR
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  TensorWorkspace workspace_;
  Context context_;
};

}  // namespace densenet_fast::cuda
