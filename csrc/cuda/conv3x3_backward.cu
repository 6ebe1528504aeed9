#include "conv3x3_product.cuh"
#include "pack.cuh"
#include "pixel_gradient.cuh"

namespace densenet_fast::cuda {
namespace {

template <class P>
void run_tap_gradient(const Context& context, const PlainSource<P>& grad,
                      const ActivatedSource<P>& bottleneck, const ImageArgument& z,
                      const TileCount& count, int64_t out, int64_t in,
                      const WeightGradient& grad_weight) {
  using A = Accumulator<typename P::Element>;
  using T = TapTile<P>;
  const Taps taps(z.dims);
  const DeviceLimits device = current_device_limits();
  // A block has one slice of the kernel.
  const int64_t across = ceil_div(out, T::BI), down = ceil_div(in, T::BJ) * taps.slices;
  const int parts = count.gradient_parts(across, down, device.multiprocessors);
  const PixelCut cut(count.tiles() * parts, across, down, device.multiprocessors);
  const TileGrid grid(count, parts, z);
  // Nine warps are three times a sequence's taps: each time for other pixels, as splits are.
  const int64_t splits = cut.splits * (kWarpTaps / taps.of_slice());
  const auto limit = static_cast<size_t>(device.shared_bytes_per_block);
  const int stages = tap_shared_bytes<P>(grid, 2) <= limit ? 2 : 1;
  const int64_t size = taps.all() * out * in;
  A* partial = static_cast<A*>(context.workspace->allocate(sizeof(A) * splits * size));
  launch(taps.rows == 1 ? &tap_product<P, true> : &tap_product<P, false>,
         LaunchConfig{"conv3x3_wgrad",
                      dim3(static_cast<unsigned>(across), static_cast<unsigned>(down),
                           static_cast<unsigned>(cut.splits)),
                      dim3(kTapThreads), tap_shared_bytes<P>(grid, stages), context.stream},
         grad, bottleneck, partial, grid, static_cast<int>(count.tiles() * parts),
         static_cast<int>(cut.units), stages);
  leave_splits(context, {partial, static_cast<int>(splits), size, taps.all(), static_cast<int>(in),
                         grad_weight});
}

}  // namespace

void conv3x3_backward(const Context& context, const ImageArgument& grad_growth,
                      const ImageArgument& bottleneck, const NormArgument& norm_argument,
                      const WeightArgument& weight, const ImageArgument& grad_norm,
                      const NormGradientResult& grad_affine, const WeightGradient& grad_weight,
                      bool accumulate) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    using A = Accumulator<E>;
    const auto z = image<const E>(bottleneck);
    const TileCount count = best_shape(bottleneck);
    const PlainSource<P> grad{image<const E>(grad_growth)};
    if (grad_affine.beta) {
      const auto packed = packed_weight<P>(context, weight, 3, true);
      const Cut cut = count.cut(tiles_of<P, kRowsTiles>(), weight.in, 1,
                                current_device_limits().multiprocessors);
      const MaskedGradient<P, Into::kNormGradient> sink{
          z,
          norm<A>(norm_argument),
          image<E>(grad_norm),
          allocate_sums<A>(context, cut.tiles, weight.in),
          {},
          accumulate};
      run_conv3x3_product<kRowsTiles, P>("conv3x3_dgrad", grad, packed, sink, count, bottleneck,
                                         cut, context.stream);
      run_finish_sums<A>(context, sink.partial, cut.tiles, cut.parts, weight.in, norm_argument,
                         grad_affine);
    }
    if (grad_weight.data) {
      run_tap_gradient<P>(context, grad, ActivatedSource<P>{z, activation<A>(norm_argument)},
                          bottleneck, count, weight.out, weight.in, grad_weight);
    }
  });
}

}  // namespace densenet_fast::cuda
