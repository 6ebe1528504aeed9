#include "pack.cuh"
#include "pixel_gradient.cuh"
#include "pointwise.cuh"

namespace densenet_fast::cuda {

void transition_forward(const Context& context, const ImageArgument& features,
                        const NormArgument& act, const WeightArgument& weight,
                        const ImageArgument& out, const StatisticsResult& statistics) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const int64_t rows = out.n * out.h * out.w;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const auto packed = packed_weight<P>(context, weight, 1, false);
    StoreStatistics<P> sink{image<E>(out), {}};
    if (statistics.mean) sink.statistics = allocate_statistics<A>(context, tiles, weight.out);
    // Four raw pieces an operand piece: narrow tiles leave shared memory for them everywhere.
    launch_rows_product<P, 64>("transition_forward",
                               PooledSource<P>{image<const E>(features), activation<A>(act)},
                               packed, sink, rows, static_cast<int>(weight.out), context.stream);
    if (statistics.mean) {
      run_finish_statistics<A>(context, sink.statistics, tiles, weight.out, statistics);
    }
  });
}

void transition_backward(const Context& context, const ImageArgument& grad_out,
                         const ImageArgument& features, const NormArgument& norm_argument,
                         const WeightArgument& weight, const ImageArgument& grad_features,
                         const NormGradientResult& grad_affine, const WeightGradient& grad_weight) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const int64_t rows = grad_out.n * grad_out.h * grad_out.w;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const PlainSource<P> source{image<const E>(grad_out)};
    const auto packed = packed_weight<P>(context, weight, 1, true);
    const UnpooledGradient<P> sink{image<const E>(features), norm<A>(norm_argument),
                                   image<E>(grad_features),
                                   allocate_sums<A>(context, tiles, weight.in)};
    run_clear_cut_pixels<E>(context, image<E>(grad_features));
    run_rows_product<P>("transition_dgrad", source, packed, sink, rows, static_cast<int>(weight.in),
                        context.stream);
    run_finish_sums<A>(context, sink.partial, tiles, weight.in, norm_argument, grad_affine);
    if (grad_weight.data) {
      run_pixel_gradient<P>(context, "transition_wgrad", source,
                            PooledSource<P>{image<const E>(features), activation<A>(norm_argument)},
                            rows, weight.out, weight.in, grad_weight);
    }
  });
}

}  // namespace densenet_fast::cuda
