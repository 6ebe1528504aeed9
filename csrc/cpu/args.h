// What crosses from the operators to the kernels: plain pointers and sizes, no torch types, so that
// the kernels can be built and checked alone.
#pragma once

#include <cstdint>

namespace densenet_fast::cpu {

// An NHWC image batch, or a channel slice of one: rows of pixels `pitch` elements apart.
template <class T>
struct Image {
  T* data = nullptr;
  int64_t n = 0, h = 0, w = 0, c = 0;
  int64_t pitch = 0;
  int64_t rows() const { return n * h * w; }
};

// Normalise-and-rectify of C channels: relu(scale * x + shift).
template <class T>
struct Activation {
  const T* scale = nullptr;
  const T* shift = nullptr;
};

// The same, with what the backward needs for x-hat = (x - mean) * rstd.
template <class T>
struct Norm {
  const T* scale = nullptr;
  const T* shift = nullptr;
  const T* mean = nullptr;
  const T* rstd = nullptr;
};

template <class T>
struct Statistics {  // both null: not wanted
  T* mean = nullptr;
  T* var = nullptr;
};

template <class T>
struct NormGradient {
  T* gamma = nullptr;
  T* beta = nullptr;
};

// A weight by its strides (elements): 1x1 `[out, in]`, 3x3 `[out, in, 3, 3]`.
template <class T>
struct Weight {
  const T* data = nullptr;
  int64_t out = 0, in = 0;
  int64_t stride_out = 0, stride_in = 0, stride_h = 0, stride_w = 0;
};

// Kernels of one instruction set and one element type. Gradients that are null are not computed;
// weight gradients are written contiguously.
template <class T>
struct Kernels {
  void (*channel_statistics)(Image<const T> features, Statistics<T> statistics);
  void (*conv1x1_forward)(Image<const T> features, Activation<T> act, Weight<T> weight,
                          Image<T> bottleneck, Statistics<T> statistics);
  void (*conv1x1_backward)(Image<const T> grad_norm, Image<const T> bottleneck,
                           const T* coefficients, Image<const T> features, Norm<T> norm,
                           Weight<T> weight, Image<T> grad_features, NormGradient<T> grad_affine,
                           T* grad_weight);
  void (*conv3x3_forward)(Image<const T> bottleneck, Activation<T> act, Weight<T> weight,
                          Image<T> growth, Statistics<T> statistics);
  void (*conv3x3_backward)(Image<const T> grad_growth, Image<const T> bottleneck, Norm<T> norm,
                           Weight<T> weight, Image<T> grad_norm, NormGradient<T> grad_affine,
                           T* grad_weight);
  void (*dropout)(Image<T> growth, uint64_t seed, double p);
  void (*finish_gradient)(Image<const T> features, Image<const T> grad_features, const T* mean,
                          const T* sum_grad, const T* sum_grad_x, Image<T> out);
  void (*transition_forward)(Image<const T> features, Activation<T> act, Weight<T> weight,
                             Image<T> out, Statistics<T> statistics);
  void (*transition_backward)(Image<const T> grad_out, Image<const T> features, Norm<T> norm,
                              Weight<T> weight, Image<T> grad_features, NormGradient<T> grad_affine,
                              T* grad_weight);
  void (*norm_relu_avgpool_forward)(Image<const T> features, Activation<T> act, T* out);
  void (*norm_relu_avgpool_backward)(const T* grad_out, Image<const T> features, Norm<T> norm,
                                     Image<T> grad_features, NormGradient<T> grad_affine);
  void (*norm_relu_maxpool_forward)(Image<const T> input, Activation<T> act, Image<T> out,
                                    uint8_t* argmax);
  void (*norm_relu_maxpool_backward)(Image<const T> grad_out, const uint8_t* argmax,
                                     Image<const T> input, Norm<T> norm, bool batch_statistics,
                                     Image<T> grad_input, NormGradient<T> grad_affine);
};

// Whether 3x3 convolutions may use Winograd's minimal filtering; true unless the user says no.
bool winograd_allowed();
void allow_winograd(bool allow);

// What one instruction-set file provides.
struct KernelSet {
  const Kernels<float>* f32;
  const Kernels<double>* f64;
};

KernelSet kernels_avx512();
KernelSet kernels_avx2();
KernelSet kernels_baseline();
KernelSet kernels_neon();

}  // namespace densenet_fast::cpu
