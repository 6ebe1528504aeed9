#include "conv3x3_product.cuh"
#include "pack.cuh"
#include "pixel_gradient.cuh"

namespace densenet_fast::cuda {
namespace {

template <class P>
void run_tap_gradient(const Context& context, const PlainSource<P>& grad,
                      const ActivatedSource<P>& bottleneck, const TileGrid& tiles, int64_t out,
                      int64_t in, const WeightGradient& grad_weight) {
  using E = typename P::Element;
  using A = Accumulator<E>;
  using T = TapTile<E>;
  const DeviceLimits device = current_device_limits();
  const size_t stage = tap_stage_bytes<E>(tiles.shape.halo_pixels());
  const int stages = 2 * stage <= static_cast<size_t>(device.shared_bytes_per_block) ? 2 : 1;
  const int64_t across = (out + T::BI - 1) / T::BI, down = (in + T::BJ - 1) / T::BJ;
  const int64_t total = tiles.tiles();
  const int64_t wanted = (2 * device.multiprocessors + across * down - 1) / (across * down);
  const int64_t most = total / 2 > 1 ? total / 2 : 1;  // two tiles a split at least
  const int64_t per_split =
      (total + (wanted < most ? wanted : most) - 1) / (wanted < most ? wanted : most);
  const int64_t splits = (total + per_split - 1) / per_split;
  A* partial = static_cast<A*>(context.workspace->allocate(sizeof(A) * splits * 9 * out * in));
  launch(&tap_product<P>,
         LaunchConfig{"conv3x3_wgrad",
                      dim3(static_cast<unsigned>(across), static_cast<unsigned>(down),
                           static_cast<unsigned>(splits)),
                      dim3(kTapThreads), stages * stage, context.stream},
         grad, bottleneck, partial, tiles, per_split, stages);
  leave_splits(context, {partial, static_cast<int>(splits), 9 * out * in, 9, grad_weight});
}

}  // namespace

void conv3x3_backward(const Context& context, const ImageArgument& grad_growth,
                      const ImageArgument& bottleneck, const NormArgument& norm_argument,
                      const WeightArgument& weight, const ImageArgument& grad_norm,
                      const NormGradientResult& grad_affine, const WeightGradient& grad_weight) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const auto z = image<const E>(bottleneck);
    const TileGrid tiles(choose_tile(z.n, z.h, z.w), z.n, z.h, z.w);
    const PlainSource<P> grad{image<const E>(grad_growth)};
    if (grad_affine.beta) {
      const auto packed = packed_weight<P>(context, weight, 3, true);
      const MaskedGradient<P, Into::kNormGradient> sink{
          z, norm<A>(norm_argument), image<E>(grad_norm),
          allocate_sums<A>(context, tiles.tiles(), weight.in)};
      run_conv3x3_product<P>("conv3x3_dgrad", grad, packed, sink, tiles,
                             static_cast<int>(weight.in), context.stream);
      run_finish_sums<A>(context, sink.partial, tiles.tiles(), weight.in, norm_argument,
                         grad_affine);
    }
    if (grad_weight.data) {
      run_tap_gradient<P>(context, grad, ActivatedSource<P>{z, activation<A>(norm_argument)}, tiles,
                          weight.out, weight.in, grad_weight);
    }
  });
}

}  // namespace densenet_fast::cuda
