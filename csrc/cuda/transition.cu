#include "forward.cuh"
#include "pixel_gradient.cuh"
#include "pointwise.cuh"

namespace densenet_fast::cuda {
namespace {

// The mean of the activation over each window. `unit` becomes as many ones, and twice as many
// zeros.
template <class E>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(Image<const E> x, Activation<Accumulator<E>> act, PooledPixels pooled, Image<E> out,
                Accumulator<E>* unit, int ones) {
  using A = Accumulator<E>;
  constexpr int V = kPieceElements<E>;
  const PieceIndex<E> at(out.rows(), out.c);
  const int64_t across = int64_t{gridDim.y} * blockDim.x;
  const int64_t threads = across * gridDim.x * blockDim.y;
  for (int64_t i = at.row * across + at.channel / V; i < 3 * int64_t{ones}; i += threads) {
    unit[i] = i < ones ? A(1) : A(0);
  }
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

// Volumes pooled for the 1x1 convolution's kernels, with coefficients that change nothing. Of fewer
// dimensions a product pools while it loads; eight pieces a piece would leave it no shared memory.
struct PooledVolumes {
  ImageArgument image;
  NormArgument identity;
  const void* gradient_map;
};

template <class E>
PooledVolumes pool(const Context& context, const ImageArgument& features, const NormArgument& act,
                   const ImageArgument& out) {
  using A = Accumulator<E>;
  PooledVolumes result{out, {}, nullptr};
  ImageArgument& to = result.image;
  to.c = features.c;
  to.pitch = ceil_div(features.c, kPieceElements<E>) * kPieceElements<E>;
  to.data = context.workspace->allocate(sizeof(E) * to.rows() * to.pitch);
  const int64_t ones = out.c > features.c ? out.c : features.c;
  A* const unit = static_cast<A*>(context.workspace->allocate(sizeof(A) * 3 * ones));
  result.identity.scale = unit + ones - features.c;
  result.identity.shift = unit + ones;
  result.identity.linear = true;
  result.gradient_map = unit + ones - out.c;
  const auto x = image<const E>(features);
  launch(&pool_kernel<E>, pieces<E>(context, "pool", to.rows(), to.c), x, activation<A>(act),
         PooledPixels(features.dims, x.d, x.h, x.w), image<E>(to), unit, static_cast<int>(ones));
  return result;
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
    if (features.dims > 2) {
      const PooledVolumes pooled = pool<E>(context, features, act, out);
      return conv1x1_forward(context, pooled.image, pooled.identity, weight, out, statistics);
    }
    const int64_t rows = out.rows();
    const auto packed = packed_weight<P>(context, weight, 1, false);
    const auto x = image<const E>(features);
    const Cut cut = cut_rows(tiles_of<P, kPooledTiles>(), rows, weight.out, 1,
                             current_device_limits().multiprocessors);
    store_with_statistics<P>(context, out, cut, statistics, [&](const auto& sink) {
      run_rows_product<P, kPooledTiles>(
          "transition_forward",
          pooled_source<P>(features, act, PooledPixels(features.dims, x.d, x.h, x.w)), packed, sink,
          rows, cut, context.stream);
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
    if (features.dims > 2) {
      const PooledVolumes volumes = pool<E>(context, features, norm_argument, grad_out);
      return conv1x1_backward(context, grad_out, grad_out, volumes.gradient_map, volumes.image,
                              volumes.identity, weight, {}, {}, grad_weight);
    }
    run_pixel_gradient<P>(context, "transition_wgrad", source,
                          pooled_source<P>(features, norm_argument, pooled), rows, weight.out,
                          weight.in, grad_weight);
  });
}

}  // namespace densenet_fast::cuda
