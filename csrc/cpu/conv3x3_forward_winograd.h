// The same 3x3 convolution by Winograd's minimal filtering: a run of tiles is activated and
// transformed a panel of channels at a time, multiplied point by point, and transformed back into
// the feature buffer.
#pragma once

#include "statistics.h"
#include "winograd.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kWinogradForwardPanel = 64;
constexpr int kWinogradForwardVectors = 2;

template <class T>
void conv3x3_forward_winograd(Image<const T> bottleneck, Activation<T> act, Weight<T> weight,
                              Image<T> growth, Statistics<T> statistics) {
  constexpr int L = kLanes<T>;
  const int64_t channels = weight.in, k = weight.out, width = padded<T>(k);
  CallMemory<T> packed(kPoints * channels * width);
  pack_transformed_weight<T>(packed.get(), channels, k, kWinogradForwardVectors, weight, false,
                             [&](int64_t c, int64_t o) {
                               return weight.data + o * weight.stride_out + c * weight.stride_in;
                             });

  const WinogradTiles tiles(bottleneck.n, bottleneck.h, bottleneck.w);
  const int64_t per_task = winograd_task_tiles(tiles.count());
  const int64_t tasks = ceil_div(tiles.count(), per_task);
  TaskStatistics<T> partial(tasks, k);
  for_each_task(tasks, [&](int64_t task) {
    T* operand = scratch<T>(Scratch::kOperand, kPoints * kPointPitch);
    T* result = scratch<T>(Scratch::kResult, kPoints * kWinogradTiles * width);
    T* pixels = scratch<T>(Scratch::kActivated, 4 * kWinogradTiles * width);
    const int64_t task_end = smaller(tiles.count(), (task + 1) * per_task);
    for (int64_t begin = task * per_task; begin < task_end; begin += kWinogradTiles) {
      const int64_t end = smaller(task_end, begin + kWinogradTiles);
      PrefetchStream stream;
      const int64_t next_end = smaller(task_end, end + kWinogradTiles);
      if (end < task_end) {
        stream.add(bottleneck.data + tiles.first_pixel(end) * bottleneck.pitch,
                   channels * sizeof(T), bottleneck.pitch * sizeof(T), tiles.pixels(end, next_end),
                   false);
      }
      stream.start(kPoints * product_steps<T>(end - begin, channels, k, kWinogradForwardVectors));
      for (int64_t c0 = 0; c0 < channels; c0 += kWinogradForwardPanel) {
        const int64_t panel = smaller(kWinogradForwardPanel, channels - c0);
        transform_inputs<T, true>(bottleneck, tiles, begin, end, act, c0, panel, operand);
        multiply_points<T>(operand, end - begin, c0, panel, channels, packed.get(), width / L,
                           kWinogradForwardVectors, result, c0 > 0, stream);
      }

      int64_t made = 0;  // pixels of this run, side by side for the statistics
      for (int64_t index = begin; index < end; ++index) {
        const WinogradTile tile = tiles.at(index);
        const int64_t rows = smaller(2, tiles.h - tile.y), columns = smaller(2, tiles.w - tile.x);
        T* out = growth.data +
                 ((tile.image * tiles.h + tile.y) * tiles.w + tile.x) * growth.pitch;
        T* copy = pixels + made * width;
        for (int64_t c = 0; c < k; c += L) {
          Vec<T> y[2][2];
          transform_output<T>(result + (index - begin) * width + c, kWinogradTiles * width, y);
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) {
              store_upto<T>(out + (i * tiles.w + j) * growth.pitch + c, y[i][j], k - c);
              store<T>(copy + (i * columns + j) * width + c, y[i][j]);
            }
          }
        }
        made += rows * columns;
      }
      if (statistics.mean) {
        accumulate_statistics<T>(pixels, width, made, 1, 0, width, partial.of(task));
      }
    }
  });
  if (statistics.mean) partial.finish(statistics);
}

}  // namespace
}  // namespace densenet_fast::cpu
