#include "forward.cuh"
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
    const auto packed = packed_weight<P>(context, weight, 1, false);
    const auto x = image<const E>(features);
    const Cut cut = cut_rows(tiles_of<P, kPooledTiles>(), rows, weight.out, 1,
                             current_device_limits().multiprocessors);
    store_with_statistics<P>(context, out, cut, statistics, [&](const auto& sink) {
      run_rows_product<P, kPooledTiles>(
          "transition_forward", PooledSource<P>{x, activation<A>(act), PooledPixels(x.h, x.w)},
          packed, sink, rows, cut, context.stream);
    });
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
    const auto x = image<const E>(features);
    const PooledPixels pooled(x.h, x.w);
    const PlainSource<P> source{image<const E>(grad_out)};
    const auto packed = packed_weight<P>(context, weight, 1, true);
    const Cut cut = cut_rows(tiles_of<P, kPooledTiles>(), rows, weight.in, 1,
                             current_device_limits().multiprocessors);
    const MaskedGradient<P, Into::kUnpooled> sink{
        x, norm<A>(norm_argument), image<E>(grad_features),
        allocate_sums<A>(context, cut.tiles, weight.in), pooled};
    run_clear_cut_pixels<E>(context, image<E>(grad_features));
    run_rows_product<P, kPooledTiles>("transition_dgrad", source, packed, sink, rows, cut,
                                      context.stream);
    run_finish_sums<A>(context, sink.partial, cut.tiles, cut.parts, weight.in, norm_argument,
                       grad_affine);
    if (grad_weight.data) {
      run_pixel_gradient<P>(context, "transition_wgrad", source,
                            PooledSource<P>{x, activation<A>(norm_argument), pooled}, rows,
                            weight.out, weight.in, grad_weight);
    }
  });
}

}  // namespace densenet_fast::cuda
