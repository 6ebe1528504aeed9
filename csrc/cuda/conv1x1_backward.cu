#include "pack.cuh"
#include "pixel_gradient.cuh"

namespace densenet_fast::cuda {

void conv1x1_backward(const Context& context, const ImageArgument& grad_norm,
                      const ImageArgument& bottleneck, const void* coefficients,
                      const ImageArgument& features, const NormArgument& norm_argument,
                      const WeightArgument& weight, const ImageArgument& grad_features,
                      const NormGradientResult& grad_affine, const WeightGradient& grad_weight) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const int64_t rows = features.rows();
    const NormGradientSource<P> source{image<const E>(grad_norm), image<const E>(bottleneck),
                                       static_cast<const A*>(coefficients)};
    if (grad_affine.beta) {
      const auto packed = packed_weight<P>(context, weight, 1, true);
      const Cut cut = cut_rows(tiles_of<P, kRowsTiles>(), rows, weight.in, 1,
                               current_device_limits().multiprocessors);
      const MaskedGradient<P, Into::kGradientBuffer> sink{
          image<const E>(features), norm<A>(norm_argument), image<E>(grad_features),
          allocate_sums<A>(context, cut.tiles, weight.in)};
      run_rows_product<P>("conv1x1_dgrad", source, packed, sink, rows, cut, context.stream);
      run_finish_sums<A>(context, sink.partial, cut.tiles, cut.parts, weight.in, norm_argument,
                         grad_affine);
    }
    if (grad_weight.data) {
      run_pixel_gradient<P>(
          context, "conv1x1_wgrad", source,
          ActivatedSource<P>{image<const E>(features), activation<A>(norm_argument)}, rows,
          weight.out, weight.in, grad_weight);
    }
  });
}

}  // namespace densenet_fast::cuda
