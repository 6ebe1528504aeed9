// What crosses from the operators to the kernels: plain pointers and sizes, no torch types, so that
// the kernels can be built and checked alone.
#pragma once

#include <cstdint>

#include "element.h"

namespace densenet_fast::cpu {

// An image batch of one, two or three dimensions, channels last, or a channel slice of one: rows of
// pixels `pitch` elements apart; sizes of dimensions that it has not are 1.
template <class T>
struct Image {
  T* data = nullptr;
  int64_t n = 0, d = 0, h = 0, w = 0, c = 0;
  int64_t pitch = 0;
  int dims = 2;
  int64_t slices() const { return n * d; }
  int64_t rows() const { return n * d * h * w; }
};

// Normalise-and-rectify of C channels: relu(scale * x + shift). Transitions rectify at `floor`:
// where it is NaN, everything passes.
template <class T>
struct Activation {
  const T* scale = nullptr;
  const T* shift = nullptr;
  T floor = 0;
};

// The same, with what the backward needs for x-hat = (x - mean) * rstd.
template <class T>
struct Norm {
  const T* scale = nullptr;
  const T* shift = nullptr;
  const T* mean = nullptr;
  const T* rstd = nullptr;
  T floor = 0;
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

// A weight by its strides (elements): 1x1 `[out, in]`, 3x3 `[out, in, 3, 3]`, or as many threes as
// the images have dimensions: one kernel of `slice_taps()` for each slice of a volume that a slice
// of the output reads. Where S is narrower
// than what it is computed with, `wide` may stand for `data`: it is rounded to S in passing.
// `packed` is what the pack_ function of a forward kernel made of it, or null: the forward then
// packs. The results are the same bits.
template <class S>
struct Weight {
  const S* data = nullptr;
  const Compute<S>* wide = nullptr;
  const Compute<S>* packed = nullptr;
  int64_t out = 0, in = 0;
  int64_t stride_out = 0, stride_in = 0, stride_d = 0, stride_h = 0, stride_w = 0;
  int dims = 2;

  int64_t depth() const { return dims > 2 ? 3 : 1; }
  int64_t lines() const { return dims > 1 ? 3 : 1; }
  int64_t slice_taps() const { return 3 * lines(); }
  int64_t taps() const { return depth() * slice_taps(); }
  // The kernel of slice z.
  Weight slice(int64_t z) const {
    Weight kernel = *this;
    if (data) kernel.data = data + z * stride_d;
    if (wide) kernel.wide = wide + z * stride_d;
    return kernel;
  }
};

// Its gradient, of the weight's type, dense: [out, in, taps], or [out, taps, in]; both null: not
// wanted.
template <class S>
struct WeightGradient {
  S* data = nullptr;
  Compute<S>* wide = nullptr;
  bool channels_last = false;
  bool wanted() const { return data || wide; }
};

// Kernels of one instruction set and one type of images. Gradients that are null are not computed.
template <class S>
struct Kernels {
  using T = Compute<S>;
  void (*channel_statistics)(Image<const S> features, Statistics<T> statistics);
  void (*conv1x1_forward)(Image<const S> features, Activation<T> act, Weight<S> weight,
                          Image<S> bottleneck, Statistics<T> statistics);
  void (*conv1x1_backward)(Image<const S> grad_norm, Image<const S> bottleneck,
                           const T* coefficients, Image<const S> features, Norm<T> norm,
                           Weight<S> weight, Image<S> grad_features, NormGradient<T> grad_affine,
                           WeightGradient<S> grad_weight);
  void (*conv3x3_forward)(Image<const S> bottleneck, Activation<T> act, Weight<S> weight,
                          Image<S> growth, Statistics<T> statistics);
  void (*conv3x3_backward)(Image<const S> grad_growth, Image<const S> bottleneck, Norm<T> norm,
                           Weight<S> weight, Image<S> grad_norm, NormGradient<T> grad_affine,
                           WeightGradient<S> grad_weight, bool accumulate);
  void (*dropout)(Image<S> growth, uint64_t seed, double p, bool channels);
  void (*finish_gradient)(Image<const S> features, Image<const S> grad_features, const T* mean,
                          const T* sum_grad, const T* sum_grad_x, Image<S> out);
  void (*transition_forward)(Image<const S> features, Activation<T> act, Weight<S> weight,
                             Image<S> out, Statistics<T> statistics);
  void (*transition_backward)(Image<const S> grad_out, Image<const S> features, Norm<T> norm,
                              Weight<S> weight, Image<S> grad_features, NormGradient<T> grad_affine,
                              WeightGradient<S> grad_weight);
  void (*norm_relu_avgpool_forward)(Image<const S> features, Activation<T> act, S* out);
  void (*norm_relu_avgpool_backward)(const S* grad_out, Image<const S> features, Norm<T> norm,
                                     Image<S> grad_features, NormGradient<T> grad_affine);
  void (*norm_relu_maxpool_forward)(Image<const S> input, Activation<T> act, Image<S> out,
                                    uint8_t* argmax);
  void (*norm_relu_maxpool_backward)(Image<const S> grad_out, const uint8_t* argmax,
                                     Image<const S> input, Norm<T> norm, bool batch_statistics,
                                     Image<S> grad_input, NormGradient<T> grad_affine);
  void (*stem_convolution_forward)(Image<const S> images, Weight<S> weight, Image<S> out);
  void (*stem_convolution_backward)(Image<const S> grad_out, Image<const S> images,
                                    Weight<S> weight, WeightGradient<S> grad_weight);
  // Weights packed once for many forwards, into so many elements, 64-byte aligned: 1x1 for
  // conv1x1_forward and transition_forward, 3x3 for conv3x3_forward on slices of h x w. What they
  // hold depends on the instruction set and on winograd_allowed().
  int64_t (*packed_conv1x1_size)(Weight<S> weight);
  void (*pack_conv1x1)(Weight<S> weight, T* packed);
  int64_t (*packed_conv3x3_size)(int64_t h, int64_t w, Weight<S> weight);
  void (*pack_conv3x3)(int64_t h, int64_t w, Weight<S> weight, T* packed);
};

// Whether 3x3 convolutions may use Winograd's minimal filtering; true unless the user says no.
bool winograd_allowed();
void allow_winograd(bool allow);

// What one instruction-set file provides.
struct KernelSet {
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const Kernels<bfloat16>* bf16;
};

KernelSet kernels_avx512();
KernelSet kernels_avx2();
KernelSet kernels_baseline();
KernelSet kernels_neon();

}  // namespace densenet_fast::cpu
