// bottleneck = relu(scale * features + shift) * weight^T, statistics of the result in the epilogue.
// The normalised input exists only as a panel of one tile in the first-level cache.
#pragma once

#include "statistics.h"

namespace densenet_fast::cpu {
namespace {

constexpr int kForwardVectors = 2;
// Rows of a tile, at most: an operand that leaves room in a first-level cache of 32 KiB.
constexpr int64_t kForwardTile = 28;

// Rows of a product, cut into tasks and tiles; build(row, rows, c0, width, panel) makes operand A,
// prefetch(row, rows, stream) names what the tile at `row` will read.
template <class S, class Build, class Prefetch>
void product_forward(int64_t rows, int64_t k, Weight<S> weight, Image<S> out,
                     Statistics<Compute<S>> statistics, const Build& build,
                     const Prefetch& prefetch) {
  using T = Compute<S>;
  const int64_t columns = weight.out, width = padded<T>(columns);
  CallMemory<T> packed(width * k);
  pack_matrix<S>(packed.get(), k, columns, kForwardVectors, weight, 0, weight.stride_in,
                 weight.stride_out);
  const EqualParts tasks(rows, kMostTasks, 24);
  const int64_t tile = equal_tile(tasks.size, kForwardTile);
  TaskStatistics<T> partial(tasks.count, columns);
  const int64_t steps = product_steps<T>(tile, k, columns, kForwardVectors);
  for_each_task(tasks.count, [&](int64_t task) {
    T* panel = scratch<T>(Scratch::kOperand, tile * kPanelPitch);
    [[maybe_unused]] T* sums = kNarrow<S> ? scratch<T>(Scratch::kResult, tile * width) : nullptr;
    const int64_t end = tasks.end(task);
    for (int64_t r = tasks.begin(task); r < end; r += tile) {
      const int64_t count = smaller(tile, end - r);
      PrefetchStream stream;
      const int64_t next = r + tile;
      if (next < rows) {
        const int64_t next_count = smaller(tile, rows - next);
        prefetch(next, next_count, stream);
        stream.add(out.data + next * out.pitch, columns * sizeof(S), out.pitch * sizeof(S),
                   next_count, true);
      }
      stream.start(steps);
      S* to = out.data + r * out.pitch;
      const auto multiply = [&](T* sums, int64_t ld) {
        product_tile<T>(
            count, k, columns, kForwardVectors, packed.get(), sums, ld, panel, stream,
            [&](int64_t c0, int64_t width, T* into) { build(r, count, c0, width, into); });
      };
      if constexpr (kNarrow<S>) {
        multiply(sums, width);
        store_rows<T>(sums, width, count, columns, to, out.pitch);
      } else {
        multiply(to, out.pitch);
      }
      if (statistics.mean) {
        accumulate_statistics<T>(to, out.pitch, count, 1, 0, columns, partial.of(task));
      }
    }
  });
  if (statistics.mean) partial.finish(statistics);
}

template <class S>
void conv1x1_forward(Image<const S> features, Activation<Compute<S>> act, Weight<S> weight,
                     Image<S> bottleneck, Statistics<Compute<S>> statistics) {
  using T = Compute<S>;
  product_forward<S>(
      features.rows(), features.c, weight, bottleneck, statistics,
      [&](int64_t row, int64_t rows, int64_t c0, int64_t width, T* panel) {
        activate_panel<T>(features.data + row * features.pitch, features.pitch, rows, c0, width,
                          act.scale, act.shift, panel);
      },
      [&](int64_t row, int64_t rows, PrefetchStream& stream) {
        stream.add(features.data + row * features.pitch, features.c * sizeof(S),
                   features.pitch * sizeof(S), rows, false);
      });
}

}  // namespace
}  // namespace densenet_fast::cpu
