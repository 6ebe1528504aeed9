// Tensors as the kernels' argument structs. S is the type of images, T that of vectors.
#pragma once

#include "args.h"
#include "tensors.h"

namespace densenet_fast::cpu {
namespace {

template <class T>
constexpr ScalarType kScalarType = ScalarType::Float;
template <>
constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
constexpr ScalarType kScalarType<bfloat16> = ScalarType::BFloat16;

// The stable ABI has no typed pointers of our own types: the callers have checked the type.
template <class T>
const T* elements(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_elements(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class S>
Image<S> image(const Tensor& t, const char* name) {
  using Element = std::remove_const_t<S>;
  const Rows r = rows(t, kScalarType<Element>, name);
  if constexpr (std::is_const_v<S>) {
    return {elements<Element>(t), r.n, r.h, r.w, r.c, r.pitch};
  } else {
    return {mutable_elements<Element>(t), r.n, r.h, r.w, r.c, r.pitch};
  }
}

template <class T>
const T* vector(const Tensor& t, int64_t size, const char* name) {
  check_vector(t, kScalarType<T>, size, name);
  return elements<T>(t);
}

template <class T>
T* mutable_vector(const Tensor& t, int64_t size, const char* name) {
  check_vector(t, kScalarType<T>, size, name);
  return mutable_elements<T>(t);
}

template <class T>
T* mutable_vector(const OptionalTensor& t, int64_t size, const char* name) {
  return t ? mutable_vector<T>(*t, size, name) : nullptr;
}

template <class T>
Activation<T> activation(const Tensor& scale, const Tensor& shift, int64_t channels) {
  return {vector<T>(scale, channels, "scale"), vector<T>(shift, channels, "shift")};
}

template <class T>
Norm<T> norm(const Tensor& scale, const Tensor& shift, const Tensor& mean, const Tensor& rstd,
             int64_t channels) {
  return {vector<T>(scale, channels, "scale"), vector<T>(shift, channels, "shift"),
          vector<T>(mean, channels, "mean"), vector<T>(rstd, channels, "rstd")};
}

template <class T>
Statistics<T> statistics(const OptionalTensor& mean, const OptionalTensor& var, int64_t channels) {
  check_statistics(mean, var);
  return {mutable_vector<T>(mean, channels, "mean"), mutable_vector<T>(var, channels, "var")};
}

template <class T>
NormGradient<T> norm_gradient(const OptionalTensor& gamma, const OptionalTensor& beta, bool needed,
                              int64_t channels) {
  check_norm_gradient(gamma, beta, needed);
  return {mutable_vector<T>(gamma, channels, "grad_gamma"),
          mutable_vector<T>(beta, channels, "grad_beta")};
}

template <class T>
NormGradient<T> norm_gradient(const Tensor& gamma, const Tensor& beta, int64_t channels) {
  return norm_gradient<T>(OptionalTensor(gamma), OptionalTensor(beta), true, channels);
}

// Whether a weight or its gradient has the type of computation where images are narrower.
template <class S>
bool is_wide(const Tensor& t, const char* name) {
  if (kNarrow<S> && t.scalar_type() == kScalarType<Compute<S>>) return true;
  check_type(t, kScalarType<S>, name);
  return false;
}

template <class S>
Weight<S> weight(const Tensor& t, int64_t dims, int64_t in) {
  const bool wide = is_wide<S>(t, "weight");
  check_weight(t, dims, in);
  Weight<S> w;
  if (wide) {
    w.wide = elements<Compute<S>>(t);
  } else {
    w.data = elements<S>(t);
  }
  w.out = t.size(0);
  w.in = t.size(1);
  w.stride_out = t.stride(0);
  w.stride_in = t.stride(1);
  if (dims == 4) {
    w.stride_h = t.stride(2);
    w.stride_w = t.stride(3);
  }
  return w;
}

template <class S>
WeightGradient<S> weight_gradient(const OptionalTensor& t, const Tensor& weight) {
  WeightGradient<S> gradient;
  if (!t) return gradient;
  check_vector(*t, weight.scalar_type(), weight.numel(), "grad_weight");
  if (is_wide<S>(*t, "grad_weight")) {
    gradient.wide = mutable_elements<Compute<S>>(*t);
  } else {
    gradient.data = mutable_elements<S>(*t);
  }
  return gradient;
}

// body(T{}) with the type of a vector of statistics or coefficients.
template <class F>
void dispatch_vector(const Tensor& t, const F& body) {
  if (t.scalar_type() == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});  // a vector of any other type fails its check
  }
}

// body(S{}) with the type of an image.
template <class F>
void dispatch(const Tensor& t, const F& body) {
  if (t.scalar_type() == ScalarType::Float) {
    body(float{});
  } else if (t.scalar_type() == ScalarType::BFloat16) {
    body(bfloat16{});
  } else {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double,
                    "the CPU kernels compute in bfloat16, float32 and float64");
    body(double{});
  }
}

}  // namespace
}  // namespace densenet_fast::cpu
