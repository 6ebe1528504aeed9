// One operator call on CUDA tensors: the device and its current stream, memory in stream order, and
// tensors as the arguments of kernels.h.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <string>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace densenet_fast::cuda {

// What ops.py sets before a call, and what it asks behind one that failed; each thread its own.
bool allow_tf32();
void set_allow_tf32(bool allow);
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

class Call {
 public:
  // `first` decides the device and the type: float16, bfloat16, float32 or float64.
  explicit Call(const Tensor& first)
      : device_(first.device()),
#ifndef DENSENET_FAST_EMULATOR
        guard_(device_.index()),
#endif
        image_type_(first.scalar_type()),
        vector_type_(image_type_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        workspace_(device_),
        context_{dtype(image_type_), allow_tf32(), current_stream(device_.index()), &workspace_} {
  }

  const Context& context() const { return context_; }

  ImageArgument image(const Tensor& t, const char* name) const {
    ImageArgument a = described_image(t, name);
    // The kernels' images have one type of pointer; those of inputs are never written through.
    a.data = const_cast<void*>(t.const_data_ptr());
    return a;
  }
  ImageArgument mutable_image(const Tensor& t, const char* name) const {
    ImageArgument a = described_image(t, name);
    a.data = t.mutable_data_ptr();
    return a;
  }

  const void* vector(const Tensor& t, int64_t size, const char* name) const {
    check_vector(t, vector_type_, size, name);
    check_device(t, name);
    return t.const_data_ptr();
  }
  const void* vector(const OptionalTensor& t, int64_t size, const char* name) const {
    return t ? vector(*t, size, name) : nullptr;
  }
  void* mutable_vector(const Tensor& t, int64_t size, const char* name) const {
    check_vector(t, vector_type_, size, name);
    check_device(t, name);
    return t.mutable_data_ptr();
  }
  void* mutable_vector(const OptionalTensor& t, int64_t size, const char* name) const {
    return t ? mutable_vector(*t, size, name) : nullptr;
  }

  // Contiguous [rows, channels] of the images' type.
  const void* matrix(const Tensor& t, int64_t size, const char* name) const {
    check_vector(t, image_type_, size, name);
    check_device(t, name);
    return t.const_data_ptr();
  }
  void* mutable_matrix(const Tensor& t, int64_t size, const char* name) const {
    check_vector(t, image_type_, size, name);
    check_device(t, name);
    return t.mutable_data_ptr();
  }

  NormArgument activation(const Tensor& scale, const Tensor& shift, int64_t channels) const {
    NormArgument a;
    a.scale = vector(scale, channels, "scale");
    a.shift = vector(shift, channels, "shift");
    return a;
  }
  NormArgument norm(const Tensor& scale, const Tensor& shift, const Tensor& mean,
                    const Tensor& rstd, int64_t channels) const {
    NormArgument a = activation(scale, shift, channels);
    a.mean = vector(mean, channels, "mean");
    a.rstd = vector(rstd, channels, "rstd");
    return a;
  }
  StatisticsResult statistics(const OptionalTensor& mean, const OptionalTensor& var,
                              int64_t channels) const {
    check_statistics(mean, var);
    return {mutable_vector(mean, channels, "mean"), mutable_vector(var, channels, "var")};
  }
  NormGradientResult norm_gradient(const OptionalTensor& gamma, const OptionalTensor& beta,
                                   bool needed, int64_t channels) const {
    check_norm_gradient(gamma, beta, needed);
    return {mutable_vector(gamma, channels, "grad_gamma"),
            mutable_vector(beta, channels, "grad_beta")};
  }

  WeightArgument weight(const Tensor& t, int64_t dims, int64_t in) const {
    check_weight_type(t, "weight");
    check_weight(t, dims, in);
    check_device(t, "weight");
    WeightArgument w;
    w.data = t.const_data_ptr();
    w.is_float32 = t.scalar_type() == ScalarType::Float;
    w.out = t.size(0);
    w.in = t.size(1);
    STD_TORCH_CHECK(w.out <= kMaxChannels && w.out * w.in <= kMaxElements,
                    "the CUDA kernels take weights of at most ", kMaxChannels, " channels, got ",
                    w.out, " x ", w.in);
    w.stride_out = t.stride(0);
    w.stride_in = t.stride(1);
    if (dims == 4) {
      w.stride_h = t.stride(2);
      w.stride_w = t.stride(3);
    }
    return w;
  }
  WeightGradient weight_gradient(const OptionalTensor& t, const Tensor& weight) const {
    if (!t) return {};
    check_vector(*t, weight.scalar_type(), weight.numel(), "grad_weight");
    check_device(*t, "grad_weight");
    return {t->mutable_data_ptr(), t->scalar_type() == ScalarType::Float};
  }

  void check_device(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.device() == device_, name, " is on another device than the first tensor");
  }

 private:
  static Dtype dtype(ScalarType type) {
    switch (type) {
      case ScalarType::Half:
        return Dtype::kFloat16;
      case ScalarType::BFloat16:
        return Dtype::kBfloat16;
      case ScalarType::Float:
        return Dtype::kFloat32;
      case ScalarType::Double:
        return Dtype::kFloat64;
      default:
        throw std::runtime_error(
            "densenet_fast: the CUDA kernels compute in float16, bfloat16, float32 and float64");
    }
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

  ImageArgument described_image(const Tensor& t, const char* name) const {
    const Rows r = rows(t, image_type_, name);
    check_device(t, name);
    STD_TORCH_CHECK(r.n <= kMaxPixels && r.h <= kMaxPixels && r.w <= kMaxPixels &&
                        r.n * r.h <= kMaxPixels && r.n * r.h * r.w <= kMaxPixels,
                    name, " must have at most 2^31 - 1 pixels for the CUDA kernels, got ", r.n,
                    " x ", r.h, " x ", r.w, ": use smaller batches");
    STD_TORCH_CHECK(r.c <= kMaxChannels, name, " must have at most ", kMaxChannels,
                    " channels for the CUDA kernels, got ", r.c);
    STD_TORCH_CHECK(r.n * r.h * r.w * r.c <= kMaxElements, name, " must have at most ",
                    kMaxElements, " elements for the CUDA kernels: use smaller batches");
    ImageArgument a;
    a.n = r.n;
    a.h = r.h;
    a.w = r.w;
    a.c = r.c;
    a.pitch = r.pitch;
    return a;
  }

  void check_weight_type(const Tensor& t, const char* name) const {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(
        type == image_type_ || (type == ScalarType::Float && image_type_ != ScalarType::Double),
        name, " must have the features' dtype or float32");
  }

  torch::stable::Device device_;
#ifndef DENSENET_FAST_EMULATOR
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  ScalarType image_type_, vector_type_;
  TensorWorkspace workspace_;
  Context context_;
};

}  // namespace densenet_fast::cuda
