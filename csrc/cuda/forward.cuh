// Forward products: their results are stored with statistics, their reductions may be split.
#pragma once

#include "pack.cuh"

namespace densenet_fast::cuda {

// Calls run(sink) and does what is left to do then.
template <class P, class Run>
void store_with_statistics(const Context& context, const ImageArgument& out, const Cut& cut,
                           const StatisticsResult& statistics, const Run& run) {
  using A = Accumulator<typename P::Element>;
  StoreStatistics<P> sink{image<typename P::Element>(out), {}};
  if (cut.splits > 1) {
    sink.split = static_cast<A*>(
        context.workspace->allocate(sizeof(A) * cut.splits * sink.out.rows() * out.c));
    run(sink);
    return add_row_splits(context, out, sink.split, cut.splits, statistics);
  }
  if (statistics.mean) sink.statistics = allocate_statistics<A>(context, cut.tiles, out.c);
  run(sink);
  if (statistics.mean) {
    run_finish_statistics<A>(context, sink.statistics, cut.tiles, cut.parts, out.c, statistics);
  }
}

}  // namespace densenet_fast::cuda
