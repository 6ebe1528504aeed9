// Weights rearranged for the products' tiles: steps zero padded, 16-byte aligned, in the images'
// type.
#pragma once

#include "reductions.cuh"
#include "rows_product.cuh"

namespace densenet_fast::cuda {

// The shape of a packed weight: for the forward a product's columns are the outputs, for the data
// gradient the inputs.
template <class E>
PackedWeight<E> packed_shape(const WeightArgument& weight, bool gradient) {
  const int64_t channels = gradient ? weight.out : weight.in;
  return {static_cast<const E*>(weight.packed[gradient]),
          static_cast<int>(ceil_div(channels, kStep<E>)),
          static_cast<int>(gradient ? weight.in : weight.out)};
}

template <class P>
PackedWeight<typename P::Element> packed_weight(const Context& context, WeightArgument weight,
                                                int kernel, bool gradient) {
  if (!weight.packed[gradient]) pack_weights(context, {{&weight, kernel, gradient}});
  return packed_shape<typename P::Element>(weight, gradient);
}

}  // namespace densenet_fast::cuda
