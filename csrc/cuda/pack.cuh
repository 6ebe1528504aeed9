// Weights rearranged for the products' tiles: zero padded, 16-byte aligned, in the images' type.
#pragma once

#include "reductions.cuh"
#include "rows_product.cuh"

namespace densenet_fast::cuda {

// What a packed weight's column and reduction index stand for.
struct PackOrder {
  int64_t columns, channels;              // of the product: N and K (per tap)
  int64_t stride_column, stride_channel;  // in the weight
  int64_t stride_h, stride_w;
  int taps;      // 1 or 9
  bool flipped;  // taps reversed: the data gradient
};

template <class Source, class E>
__global__ void __launch_bounds__(kThreads)
    pack_weight(const Source* weight, PackOrder order, int columns, int64_t size, E* packed) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  const int64_t k = i % kStep<E>, column = i / kStep<E> % columns;
  const int64_t tap = i / kStep<E> / columns % order.taps;
  const int64_t channel = i / kStep<E> / columns / order.taps * kStep<E> + k;
  const int64_t from = order.flipped ? order.taps - 1 - tap : tap;
  packed[i] = column < order.columns && channel < order.channels
                  ? narrow<E>(static_cast<Accumulator<E>>(
                        widen(weight[column * order.stride_column + channel * order.stride_channel +
                                     from / 3 * order.stride_h + from % 3 * order.stride_w])))
                  : narrow<E>(0);
}

template <class P>
PackedWeight<typename P::Element> run_pack(const Context& context, const WeightArgument& weight,
                                           const PackOrder& order) {
  using E = typename P::Element;
  constexpr int kColumns = 128;  // the widest tile
  const int columns = static_cast<int>((order.columns + kColumns - 1) / kColumns * kColumns);
  const int steps = static_cast<int>((order.channels + kStep<E> - 1) / kStep<E>);
  const int64_t size = int64_t{steps} * order.taps * columns * kStep<E>;
  E* packed = static_cast<E*>(context.workspace->allocate(sizeof(E) * size));
  const LaunchConfig config{"pack_weight",
                            dim3(static_cast<unsigned>((size + kThreads - 1) / kThreads)),
                            dim3(kThreads), 0, context.stream};
  if (weight.is_float32 && sizeof(E) == 2) {
    launch(&pack_weight<float, E>, config, static_cast<const float*>(weight.data), order, columns,
           size, packed);
  } else {
    launch(&pack_weight<E, E>, config, static_cast<const E*>(weight.data), order, columns, size,
           packed);
  }
  return {packed, steps, columns};
}

// Order of a 1x1 weight [out, in] for the forward (columns: out) or the data gradient (columns:
// in).
inline PackOrder forward_order(const WeightArgument& w, int taps = 1) {
  return {w.out, w.in, w.stride_out, w.stride_in, w.stride_h, w.stride_w, taps, false};
}
inline PackOrder gradient_order(const WeightArgument& w, int taps = 1) {
  return {w.in, w.out, w.stride_in, w.stride_out, w.stride_h, w.stride_w, taps, true};
}

}  // namespace densenet_fast::cuda
