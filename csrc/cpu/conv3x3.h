// Which way a 3x3 convolution goes, by its shape.
#pragma once

#include "conv3x3_backward_winograd.h"
#include "conv3x3_forward_taps.h"
#include "conv3x3_forward_winograd.h"

namespace densenet_fast::cpu {
namespace {

template <class S>
void conv3x3_forward(Image<const S> bottleneck, Activation<Compute<S>> act, Weight<S> weight,
                     Image<S> growth, Statistics<Compute<S>> statistics) {
  if (use_winograd(bottleneck.h, bottleneck.w, weight.out)) {
    conv3x3_forward_winograd<S>(bottleneck, act, weight, growth, statistics);
  } else if (taps_product_is_faster<Compute<S>>(weight.out)) {
    conv3x3_forward_taps<S>(bottleneck, act, weight, growth, statistics);
  } else {
    conv3x3_forward_direct<S>(bottleneck, act, weight, growth, statistics);
  }
}

template <class S>
void conv3x3_backward(Image<const S> grad_growth, Image<const S> bottleneck, Norm<Compute<S>> norm,
                      Weight<S> weight, Image<S> grad_norm, NormGradient<Compute<S>> grad_affine,
                      WeightGradient<S> grad_weight) {
  const bool winograd = use_winograd(bottleneck.h, bottleneck.w, weight.out);
  (winograd ? conv3x3_backward_winograd<S> : conv3x3_backward_direct<S>)(grad_growth, bottleneck,
                                                                         norm, weight, grad_norm,
                                                                         grad_affine, grad_weight);
}

}  // namespace
}  // namespace densenet_fast::cpu
