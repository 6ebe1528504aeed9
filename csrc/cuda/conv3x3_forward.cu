#include "conv3x3_product.cuh"
#include "pack.cuh"

namespace densenet_fast::cuda {

void conv3x3_forward(const Context& context, const ImageArgument& bottleneck,
                     const NormArgument& act, const WeightArgument& weight,
                     const ImageArgument& growth, const StatisticsResult& statistics) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const auto z = image<const E>(bottleneck);
    const TileGrid tiles(choose_tile(z.n, z.h, z.w), z.n, z.h, z.w);
    const auto packed = packed_weight<P>(context, weight, 3, false);
    StoreStatistics<P> sink{image<E>(growth), {}};
    if (statistics.mean)
      sink.statistics = allocate_statistics<A>(context, tiles.tiles(), weight.out);
    run_conv3x3_product<P>("conv3x3_forward", ActivatedSource<P>{z, activation<A>(act)}, packed,
                           sink, tiles, static_cast<int>(weight.out), context.stream);
    if (statistics.mean) {
      run_finish_statistics<A>(context, sink.statistics, tiles.tiles(), weight.out, statistics);
    }
  });
}

}  // namespace densenet_fast::cuda
