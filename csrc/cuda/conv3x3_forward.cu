#include "conv3x3_product.cuh"
#include "forward.cuh"

namespace densenet_fast::cuda {

void conv3x3_forward(const Context& context, const ImageArgument& bottleneck,
                     const NormArgument& act, const WeightArgument& weight,
                     const ImageArgument& growth, const StatisticsResult& statistics) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const TileCount count = best_shape(bottleneck);
    const auto packed = packed_weight<P>(context, weight, 3, false);
    const Cut cut = count.cut_forward(tiles_of<P, kForwardTiles>(), weight.out,
                                      packed.steps * Taps(bottleneck.dims).slices,
                                      current_device_limits().multiprocessors);
    store_with_statistics<P>(context, growth, cut, statistics, [&](const auto& sink) {
      run_conv3x3_product<kForwardTiles, P>(
          "conv3x3_forward", ActivatedSource<P>{image<const E>(bottleneck), activation<A>(act)},
          packed, sink, count, bottleneck, cut, context.stream);
    });
  });
}

}  // namespace densenet_fast::cuda
