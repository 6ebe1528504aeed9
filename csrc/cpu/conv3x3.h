// Which way a 3x3 convolution goes, by its shape.
#pragma once

#include "conv3x3_backward_winograd.h"
#include "conv3x3_forward_taps.h"
#include "conv3x3_forward_winograd.h"

namespace densenet_fast::cpu {
namespace {

template <class T>
void conv3x3_forward(Image<const T> bottleneck, Activation<T> act, Weight<T> weight,
                     Image<T> growth, Statistics<T> statistics) {
  if (use_winograd(bottleneck.h, bottleneck.w, weight.out)) {
    conv3x3_forward_winograd<T>(bottleneck, act, weight, growth, statistics);
  } else if (taps_product_is_faster<T>(weight.out)) {
    conv3x3_forward_taps<T>(bottleneck, act, weight, growth, statistics);
  } else {
    conv3x3_forward_direct<T>(bottleneck, act, weight, growth, statistics);
  }
}

template <class T>
void conv3x3_backward(Image<const T> grad_growth, Image<const T> bottleneck, Norm<T> norm,
                      Weight<T> weight, Image<T> grad_norm, NormGradient<T> grad_affine,
                      T* grad_weight) {
  const bool winograd = use_winograd(bottleneck.h, bottleneck.w, weight.out);
  (winograd ? conv3x3_backward_winograd<T> : conv3x3_backward_direct<T>)(grad_growth, bottleneck,
                                                                         norm, weight, grad_norm,
                                                                         grad_affine, grad_weight);
}

}  // namespace
}  // namespace densenet_fast::cpu
