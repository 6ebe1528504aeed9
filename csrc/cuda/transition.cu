#include "forward.cuh"
#include "pixel_gradient.cuh"
#include "pointwise.cuh"

namespace densenet_fast::cuda {
namespace {

// The mean of the activation over each window.
template <class E>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(Image<const E> x, Activation<Accumulator<E>> act, PooledPixels pooled,
                Image<E> out) {
  using A = Accumulator<E>;
  constexpr int V = kPieceElements<E>;
  const PieceIndex<E> at(out.rows(), out.c);
  if (at.valid <= 0) return;
  A sum[V] = {};
  pooled.for_each_corner(at.row, [&](int64_t pixel) {
    const auto piece = load_piece<E>(x.data + pixel * x.pitch + at.channel, at.valid, x.alignment);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = v < at.valid ? at.channel + v : at.channel;
      sum[v] +=
          relu(multiply_add(act.scale[c], A(widen(piece.element[v])), act.shift[c]), act.floor);
    }
  });
  Piece<E> result;
#pragma unroll
  for (int v = 0; v < V; ++v) result.element[v] = narrow<E>(A(pooled.share) * sum[v]);
  store_piece<E>(out.data + at.in(out), result, at.valid, out.alignment);
}

// Volumes are pooled into memory, for pixels as those of `out`. Of fewer dimensions a product pools
// while it loads; eight pieces a piece would leave it no shared memory.
template <class P>
PlainSource<P> pooled_volumes(const Context& context, const ImageArgument& features,
                              const NormArgument& act, const ImageArgument& out) {
  using E = typename P::Element;
  ImageArgument to = out;
  to.c = features.c;
  to.pitch = ceil_div(features.c, kPieceElements<E>) * kPieceElements<E>;
  to.data = context.workspace->allocate(sizeof(E) * to.rows() * to.pitch);
  const auto x = image<const E>(features);
  launch(&pool_kernel<E>, pieces<E>(context, "pool", to.rows(), to.c), x,
         activation<Accumulator<E>>(act), PooledPixels(features.dims, x.d, x.h, x.w), image<E>(to));
  return {image<const E>(to)};
}

template <class P>
PooledSource<P> pooled_source(const ImageArgument& features, const NormArgument& act,
                              const PooledPixels& pooled) {
  const auto x = image<const typename P::Element>(features);
  return {x, activation<Accumulator<typename P::Element>>(act), pooled,
          features.dims > 1 ? x.w * x.pitch : 0};
}

}  // namespace

void transition_forward(const Context& context, const ImageArgument& features,
                        const NormArgument& act, const WeightArgument& weight,
                        const ImageArgument& out, const StatisticsResult& statistics) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    const int64_t rows = out.rows();
    const auto packed = packed_weight<P>(context, weight, 1, false);
    const auto x = image<const E>(features);
    const Cut cut = cut_rows(tiles_of<P, kPooledTiles>(), rows, weight.out, 1,
                             current_device_limits().multiprocessors);
    const auto run = [&](const auto& source) {
      store_with_statistics<P>(context, out, cut, statistics, [&](const auto& sink) {
        run_rows_product<P, kPooledTiles>("transition_forward", source, packed, sink, rows, cut,
                                          context.stream);
      });
    };
    if (features.dims > 2) return run(pooled_volumes<P>(context, features, act, out));
    run(pooled_source<P>(features, act, PooledPixels(features.dims, x.d, x.h, x.w)));
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
    const int64_t rows = grad_out.rows();
    const auto x = image<const E>(features);
    const PooledPixels pooled(features.dims, x.d, x.h, x.w);
    const PlainSource<P> source{image<const E>(grad_out)};
    const auto packed = packed_weight<P>(context, weight, 1, true);
    const Cut cut = cut_rows(tiles_of<P, kPooledTiles>(), rows, weight.in, 1,
                             current_device_limits().multiprocessors);
    const MaskedGradient<P, Into::kUnpooled> sink{
        x, norm<A>(norm_argument), image<E>(grad_features),
        allocate_sums<A>(context, cut.tiles, weight.in), pooled};
    run_clear_cut_pixels<E>(context, image<E>(grad_features), features.dims);
    run_rows_product<P, kPooledTiles>("transition_dgrad", source, packed, sink, rows, cut,
                                      context.stream);
    run_finish_sums<A>(context, sink.partial, cut.tiles, cut.parts, weight.in, norm_argument,
                       grad_affine);
    if (!grad_weight.data) return;
    const auto run = [&](const auto& activated) {
      run_pixel_gradient<P>(context, "transition_wgrad", source, activated, rows, weight.out,
                            weight.in, grad_weight);
    };
    if (features.dims > 2)
      return run(pooled_volumes<P>(context, features, norm_argument, grad_out));
    run(pooled_source<P>(features, norm_argument, pooled));
  });
}

}  // namespace densenet_fast::cuda
