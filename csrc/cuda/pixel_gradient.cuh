// Launching the weight gradients: splits, partial results and their sum.
#pragma once

#include "pixel_product.cuh"
#include "reductions.cuh"

namespace densenet_fast::cuda {

template <class P, bool kNarrow, class SourceI, class SourceJ>
void launch_pixel_gradient(const Context& context, const char* name, const SourceI& source_i,
                           const SourceJ& source_j, int64_t rows, int64_t out, int64_t in,
                           const WeightGradient& grad_weight) {
  using E = typename P::Element;
  using A = Accumulator<E>;
  using T = PixelTile<E, kNarrow>;
  const int64_t across = (out + T::BI - 1) / T::BI, down = (in + T::BJ - 1) / T::BJ;
  const DeviceLimits device = current_device_limits();
  const int64_t per_split =
      rows_per_split(rows, across * down, device.multiprocessors, kStagePixels<E>);
  const int64_t splits = (rows + per_split - 1) / per_split;
  A* partial = static_cast<A*>(context.workspace->allocate(sizeof(A) * splits * out * in));
  constexpr size_t kStage = pixel_stage_bytes<E, SourceI, SourceJ, kNarrow>();
  const int stages = 2 * kStage <= static_cast<size_t>(device.shared_bytes_per_block) ? 2 : 1;
  launch(&pixel_product<P, SourceI, SourceJ, kNarrow>,
         LaunchConfig{name,
                      dim3(static_cast<unsigned>(across), static_cast<unsigned>(down),
                           static_cast<unsigned>(splits)),
                      dim3(kThreads), stages * kStage, context.stream},
         source_i, source_j, partial, rows, per_split, stages);
  leave_splits(context, {partial, static_cast<int>(splits), out * in, 1, grad_weight});
}

template <class P, class SourceI, class SourceJ>
void run_pixel_gradient(const Context& context, const char* name, const SourceI& source_i,
                        const SourceJ& source_j, int64_t rows, int64_t out, int64_t in,
                        const WeightGradient& grad_weight) {
  if (sizeof(typename P::Element) == 2 && out > 64) {
    launch_pixel_gradient<P, false>(context, name, source_i, source_j, rows, out, in, grad_weight);
  } else {
    launch_pixel_gradient<P, true>(context, name, source_i, source_j, rows, out, in, grad_weight);
  }
}

}  // namespace densenet_fast::cuda
