// Weights rearranged for the products' tiles: zero padded, 16-byte aligned, in the images' type.
#pragma once

#include "reductions.cuh"
#include "rows_product.cuh"

namespace densenet_fast::cuda {

// The shape of a packed weight: for the forward a product's columns are the outputs, for the data
// gradient the inputs.
template <class E>
PackedWeight<E> packed_shape(const WeightArgument& weight, int kernel, bool gradient) {
  constexpr int kColumns = 128;  // the widest tile
  constexpr int kFewColumns = 32;
  const int64_t columns = gradient ? weight.in : weight.out;
  const int tile = kernel == 3 && columns <= kFewColumns ? kFewColumns : kColumns;
  const int64_t channels = gradient ? weight.out : weight.in;
  return {static_cast<const E*>(weight.packed[gradient]),
          static_cast<int>((channels + kStep<E> - 1) / kStep<E>),
          static_cast<int>((columns + tile - 1) / tile * tile)};
}

template <class P>
PackedWeight<typename P::Element> packed_weight(const Context& context, WeightArgument weight,
                                                int kernel, bool gradient) {
  if (!weight.packed[gradient]) pack_weights(context, {{&weight, kernel, gradient}});
  return packed_shape<typename P::Element>(weight, kernel, gradient);
}

}  // namespace densenet_fast::cuda
