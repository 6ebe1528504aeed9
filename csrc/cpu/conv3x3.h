// Which way a 3x3 convolution goes, by its shape.
#pragma once

#include "conv3x3_backward_winograd.h"
#include "conv3x3_forward_taps.h"
#include "conv3x3_forward_winograd.h"

namespace densenet_fast::cpu {
namespace {

enum class Conv3x3 { kWinograd, kTaps, kDirect };

template <class S>
Conv3x3 forward_way(int64_t h, int64_t w, const Weight<S>& weight) {
  if (use_winograd(h, w, weight)) return Conv3x3::kWinograd;
  const bool taps = weight.dims == 2 && taps_product_is_faster<Compute<S>>(weight.out);
  return taps ? Conv3x3::kTaps : Conv3x3::kDirect;
}

template <class S>
int64_t packed_conv3x3_size(int64_t h, int64_t w, Weight<S> weight) {
  using T = Compute<S>;
  switch (forward_way(h, w, weight)) {
    case Conv3x3::kWinograd:
      return packed_winograd_size(weight);
    case Conv3x3::kTaps:
      return weight.in * padded<T>(9 * weight.out);
    default:
      return weight.taps() * weight.in * padded<T>(weight.out);
  }
}

template <class S>
void pack_conv3x3(int64_t h, int64_t w, Weight<S> weight, Compute<S>* packed) {
  switch (forward_way(h, w, weight)) {
    case Conv3x3::kWinograd:
      return weight.dims > 2 ? pack_winograd<tile_size(3)>(weight, packed)
                             : pack_winograd<tile_size(2)>(weight, packed);
    case Conv3x3::kTaps:
      return pack_taps(weight, packed);
    default:
      return pack_direct(weight, packed);
  }
}

template <class S>
void conv3x3_forward(Image<const S> bottleneck, Activation<Compute<S>> act, Weight<S> weight,
                     Image<S> growth, Statistics<Compute<S>> statistics) {
  const int64_t h = bottleneck.h, w = bottleneck.w;
  const Conv3x3 way = forward_way(h, w, weight);
  if (way == Conv3x3::kWinograd) {
    return (weight.dims > 2 ? conv3x3_forward_winograd<tile_size(3), S>
                            : conv3x3_forward_winograd<tile_size(2), S>)(bottleneck, act, weight,
                                                                         growth, statistics);
  }
  const int64_t size = packed_conv3x3_size(h, w, weight);
  const bool own = !weight.packed && size <= most_own_weight();
  const CallMemory<Compute<S>> memory(weight.packed || own ? 0 : size);
  if (!weight.packed && !own) pack_conv3x3(h, w, weight, memory.get());
  // What a thread reads that has run the task `before`.
  const auto packed = [&](int64_t before) -> const Compute<S>* {
    if (!own) return weight.packed ? weight.packed : memory.get();
    return own_weight<Compute<S>>(size, before >= 0,
                                  [&](Compute<S>* to) { pack_conv3x3(h, w, weight, to); });
  };
  if (way == Conv3x3::kTaps) {
    return conv3x3_forward_taps<S>(bottleneck, act, packed, growth, statistics);
  }
  conv3x3_forward_direct<S>(bottleneck, act, weight, packed, growth, statistics);
}

template <class S>
void conv3x3_backward(Image<const S> grad_growth, Image<const S> bottleneck, Norm<Compute<S>> norm,
                      Weight<S> weight, Image<S> grad_norm, NormGradient<Compute<S>> grad_affine,
                      WeightGradient<S> grad_weight, bool accumulate) {
  if (use_winograd(bottleneck.h, bottleneck.w, weight)) {
    return (weight.dims > 2 ? conv3x3_backward_winograd<tile_size(3), S>
                            : conv3x3_backward_winograd<tile_size(2), S>)(grad_growth, bottleneck,
                                                                          norm, weight, grad_norm,
                                                                          grad_affine, grad_weight,
                                                                          accumulate);
  }
  (accumulate ? conv3x3_backward_direct<S, true>
              : conv3x3_backward_direct<S, false>)(grad_growth, bottleneck, norm, weight, grad_norm,
                                                   grad_affine, grad_weight);
}

}  // namespace
}  // namespace densenet_fast::cpu
