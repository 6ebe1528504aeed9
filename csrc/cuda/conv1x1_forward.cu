#include "pack.cuh"

namespace densenet_fast::cuda {

void conv1x1_forward(const Context& context, const ImageArgument& features, const NormArgument& act,
                     const WeightArgument& weight, const ImageArgument& bottleneck,
                     const StatisticsResult& statistics) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const int64_t rows = features.n * features.h * features.w;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const auto packed = packed_weight<P>(context, weight, 1, false);
    StoreStatistics<P> sink{image<E>(bottleneck), {}};
    if (statistics.mean) sink.statistics = allocate_statistics<A>(context, tiles, weight.out);
    run_rows_product<P>("conv1x1_forward",
                        ActivatedSource<P>{image<const E>(features), activation<A>(act)}, packed,
                        sink, rows, static_cast<int>(weight.out), context.stream);
    if (statistics.mean) {
      run_finish_statistics<A>(context, sink.statistics, tiles, weight.out, statistics);
    }
  });
}

}  // namespace densenet_fast::cuda
