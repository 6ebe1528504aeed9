// Launching the weight gradients: splits, partial results and their sum.
#pragma once

#include "pixel_product.cuh"
#include "reductions.cuh"

namespace densenet_fast::cuda {

template <class P, bool kNarrow, class SourceI, class SourceJ>
void launch_pixel_gradient(const Context& context, const char* name, const SourceI& source_i,
                           const SourceJ& source_j, int64_t rows, const PixelCut& cut,
                           const WeightGradient& grad_weight, int64_t out, int64_t in) {
  using A = Accumulator<typename P::Element>;
  A* partial = static_cast<A*>(context.workspace->allocate(sizeof(A) * cut.splits * out * in));
  const auto limit = static_cast<size_t>(current_device_limits().shared_bytes_per_block);
  const int stages = pixel_shared_bytes<P, SourceI, SourceJ, kNarrow>(2) <= limit ? 2 : 1;
  launch(&pixel_product<P, SourceI, SourceJ, kNarrow>,
         LaunchConfig{name,
                      dim3(static_cast<unsigned>(cut.across), static_cast<unsigned>(cut.down),
                           static_cast<unsigned>(cut.splits)),
                      dim3(kThreads), pixel_shared_bytes<P, SourceI, SourceJ, kNarrow>(stages),
                      context.stream},
         source_i, source_j, partial, rows, cut.units * kStagePixels<typename P::Element>, stages);
  leave_splits(context, {partial, static_cast<int>(cut.splits), out * in, 1, static_cast<int>(in),
                         grad_weight});
}

template <class P, class SourceI, class SourceJ>
void run_pixel_gradient(const Context& context, const char* name, const SourceI& source_i,
                        const SourceJ& source_j, int64_t rows, int64_t out, int64_t in,
                        const WeightGradient& grad_weight) {
  using E = typename P::Element;
  const int multiprocessors = current_device_limits().multiprocessors;
  const auto cut = [&](auto tile) {
    using T = decltype(tile);
    return PixelCut(ceil_div(rows, kStagePixels<E>), ceil_div(out, T::BI), ceil_div(in, T::BJ),
                    multiprocessors);
  };
  const PixelCut narrow = cut(PixelTile<E, true>{});
  if constexpr (sizeof(E) == 2) {
    const PixelCut wide = cut(PixelTile<E, false>{});
    if (takes_wide(wide, out, multiprocessors)) {
      return launch_pixel_gradient<P, false>(context, name, source_i, source_j, rows, wide,
                                             grad_weight, out, in);
    }
  }
  launch_pixel_gradient<P, true>(context, name, source_i, source_j, rows, narrow, grad_weight, out,
                                 in);
}

}  // namespace densenet_fast::cuda
