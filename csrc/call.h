// One operator call: its tensors checked, as the arguments of operators.h.
#pragma once

#include <torch/csrc/stable/device.h>

#include <string>

#include "operators.h"
#include "tensors.h"

namespace densenet_fast {

// A Device has a Context for its kernels, is made for the device and the type of the first tensor,
// and knows the limits of its kernels.
template <class Device>
class Call {
 public:
  // `first` decides the device and the type.
  explicit Call(const Tensor& first, bool allow_tf32 = false)
      : place_(first.device()),
        image_type_(first.scalar_type()),
        vector_type_(image_type_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        device_(place_, dtype(image_type_), allow_tf32) {}

  const typename Device::Context& context() const { return device_.context(); }
  Dtype dtype() const { return dtype(image_type_); }

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
  // Images of the same pixels as another.
  ImageArgument image(const Tensor& t, const char* name, const ImageArgument& pixels,
                      int64_t channels) const {
    return checked(image(t, name), name, pixels, channels);
  }
  ImageArgument mutable_image(const Tensor& t, const char* name, const ImageArgument& pixels,
                              int64_t channels) const {
    return checked(mutable_image(t, name), name, pixels, channels);
  }
  ImageArgument mutable_image(const OptionalTensor& t, const char* name,
                              const ImageArgument& like) const {
    return t ? mutable_image(*t, name, like, like.c) : ImageArgument{};
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
    vector(t, size, name);
    return t.mutable_data_ptr();
  }
  void* mutable_vector(const OptionalTensor& t, int64_t size, const char* name) const {
    return t ? mutable_vector(*t, size, name) : nullptr;
  }

  // Contiguous, of the images' type.
  const void* matrix(const Tensor& t, int64_t size, const char* name) const {
    check_vector(t, image_type_, size, name);
    check_device(t, name);
    return t.const_data_ptr();
  }
  void* mutable_matrix(const Tensor& t, int64_t size, const char* name) const {
    matrix(t, size, name);
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

  // [out, in] and `dims` times the kernel's width; a 1x1 convolution's may be without these.
  WeightArgument weight(const Tensor& t, int64_t kernel, int64_t in, int dims) const {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(
        type == image_type_ || (type == ScalarType::Float && image_type_ != ScalarType::Double),
        "`weight` should have type ", image_type_, ", or float32, got ", type);
    check_weight(t, kernel, in, dims);
    check_device(t, "weight");
    WeightArgument w;
    w.data = t.const_data_ptr();
    w.is_float32 = type == ScalarType::Float;
    w.out = t.size(0);
    w.in = t.size(1);
    Device::check_weight(w.out, w.in);
    w.stride_out = t.stride(0);
    w.stride_in = t.stride(1);
    w.dims = dims;
    if (t.dim() > 2) {
      const auto stride = [&](int back) { return back <= dims ? t.stride(t.dim() - back) : 0; };
      w.stride_d = stride(3);
      w.stride_h = stride(2);
      w.stride_w = stride(1);
    }
    return w;
  }
  WeightGradient weight_gradient(const OptionalTensor& t, const Tensor& weight) const {
    if (!t) return {};
    check_weight_gradient(*t, weight);
    check_device(*t, "grad_weight");
    return {t->mutable_data_ptr(), t->scalar_type() == ScalarType::Float, !t->is_contiguous()};
  }

  void check_device(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.device() == place_, "`", name,
                    "` should be on the device of the first tensor");
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
            "densenet_fast: the kernels compute in float16, bfloat16, float32 and float64");
    }
  }

  ImageArgument described_image(const Tensor& t, const char* name) const {
    const Rows r = rows(t, image_type_, name);
    check_device(t, name);
    Device::check_image(r, name);
    return {nullptr, r.n, r.d, r.h, r.w, r.c, r.pitch, r.dims};
  }
  static ImageArgument checked(const ImageArgument& a, const char* name,
                               const ImageArgument& pixels, int64_t channels) {
    const bool fits = a.n == pixels.n && a.d == pixels.d && a.h == pixels.h && a.w == pixels.w &&
                      a.c == channels && a.dims == pixels.dims;
    STD_TORCH_CHECK(fits, "`", name, "` should have shape ", shape(pixels, channels), ", got ",
                    shape(a, a.c));
    return a;
  }
  static std::string shape(const ImageArgument& a, int64_t channels) {
    std::string text = "[" + std::to_string(a.n);
    const int64_t sizes[] = {a.d, a.h, a.w};
    for (int i = 3 - a.dims; i < 3; ++i) text += ", " + std::to_string(sizes[i]);
    return text + ", " + std::to_string(channels) + "]";
  }

  torch::stable::Device place_;
  ScalarType image_type_, vector_type_;
  Device device_;
};

}  // namespace densenet_fast
