#include "forward.cuh"

namespace densenet_fast::cuda {

void conv1x1_forward(const Context& context, const ImageArgument& features, const NormArgument& act,
                     const WeightArgument& weight, const ImageArgument& bottleneck,
                     const StatisticsResult& statistics) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const int64_t rows = features.rows();
    const auto packed = packed_weight<P>(context, weight, 1, false);
    const Cut cut = cut_forward(tiles_of<P, kRowsTiles>(), rows, weight.out, packed.steps,
                                current_device_limits().multiprocessors);
    store_with_statistics<P>(context, bottleneck, cut, statistics, [&](const auto& sink) {
      run_rows_product<P>("conv1x1_forward",
                          ActivatedSource<P>{image<const E>(features), activation<A>(act)}, packed,
                          sink, rows, cut, context.stream);
    });
  });
}

}  // namespace densenet_fast::cuda
