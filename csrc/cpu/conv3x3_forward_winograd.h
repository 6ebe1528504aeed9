// The same 3x3 convolution by Winograd's minimal filtering: a run of tiles is activated and
// transformed a panel of channels at a time, multiplied point by point, and transformed back into
// the feature buffer.
#pragma once

#include "statistics.h"
#include "winograd.h"

namespace densenet_fast::cpu {
namespace {

constexpr int kWinogradForwardVectors = 2;

// Adds a tile's products at a point of the depth to `sums`, and stores the slice that is whole with
// it to pixels of the growth, and to `copy` one after another; returns how many pixels those are.
// Of columns [c0, c0 + width), where the growth has them.
template <int W, class T, class S>
DF_INLINE int64_t store_outputs(const T* result, int64_t pitch, const WinogradTiles& tiles,
                                int64_t index, int64_t z, T* sums, const Image<S>& growth, T* copy,
                                int64_t c0, int64_t width) {
  constexpr int L = kLanes<T>;
  const WinogradTile tile = tiles.at(index);
  const int64_t slice = tiles.finished_slice(z);
  const bool finished = slice >= 0 && tiles.has_slice(tile, slice);
  const int64_t rows = smaller(2, tiles.h - tile.y), columns = smaller(W, tiles.w - tile.x);
  S* out = growth.data + (tiles.pixel(tile) + slice * tiles.h * tiles.w) * growth.pitch + c0;
  for (int64_t c = 0; c < width; c += L, sums += 4 * W * L) {
    Vec<T> y[2][W];
    transform_output<W, T>([&](int p) { return load<T>(result + p * pitch + c); }, y);
    add_depth_point<W, T>(tiles, z, y, sums);
    if (!finished) continue;
    const int64_t n = growth.c - c0 - c;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        store_upto<T>(out + (i * tiles.w + j) * growth.pitch + c, y[i][j], n);
        store<T>(copy + (i * columns + j) * width + c, rounded<S>(y[i][j]));
      }
    }
  }
  return finished ? rows * columns : 0;
}

template <class S>
DF_INLINE int64_t packed_winograd_size(const Weight<S>& weight) {
  using T = Compute<S>;
  return depth_points(weight.dims) * slice_points(weight.dims) *
         packed_pitch(weight.in, padded<T>(weight.out));
}

// One operand [in, out] for each point, one after the other, for each point of the depth.
template <int W, class S>
void pack_winograd(const Weight<S>& weight, Compute<S>* packed) {
  const int64_t stride = packed_pitch(weight.in, padded<Compute<S>>(weight.out));
  const int64_t deep = slice_points(weight.dims) * stride;
  pack_blocks(weight.in, weight.in, weight.out, kWinogradForwardVectors, packed,
              [&](int64_t i, int64_t count, int64_t v, int nv, Compute<S>* block) {
                pack_points<W, false>(weight, 0, i, count, v, nv, block, stride, deep);
              });
}

template <int W, class S>
void conv3x3_forward_winograd(Image<const S> bottleneck, Activation<Compute<S>> act,
                              const Weight<S>& weight, Image<S> growth,
                              Statistics<Compute<S>> statistics) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  constexpr int64_t kPoints = 4 * Filter<T, W>::kPoints;
  const int64_t channels = bottleneck.c, k = growth.c, vecs = vectors<T>(k);
  const WinogradTiles tiles(bottleneck);
  const EqualParts tasks(tiles.count(), kMostTasks, kWinogradTiles / 3);
  const int64_t run = equal_tile(tasks.size, kWinogradTiles);
  // Of a single part every task packs what it reads, some columns where threads would be idle; as
  // scratch, which stays, so that features of any width do not.
  const bool single = tasks.count == 1 && !weight.packed && channels <= 2 * kPanel;
  const int64_t groups = single ? smaller(vecs, thread_count()) : 1;
  const int prefer = groups > 1 ? 1 : kWinogradForwardVectors;
  const CallMemory<T> memory(weight.packed || single ? 0 : packed_winograd_size(weight));
  if (!weight.packed && !single) pack_winograd<W>(weight, memory.get());
  TaskStatistics<T> partial(tasks.count, k, groups);
  for_each_task(tasks.count * groups, [&](int64_t index) {
    const int64_t task = index / groups, group_index = index % groups;
    const BlockGroup group(vecs, prefer, group_index, groups);
    const int64_t k0 = group.begin * L, width = (group.end - group.begin) * L;
    const int64_t pitch = result_pitch(run, width), stride = packed_pitch(channels, width);
    const T* packed = weight.packed ? weight.packed : memory.get();
    if (single) {
      T* own = scratch<T>(Scratch::kWeight, tiles.points * kPoints * stride);
      for_each_block(group, [&](int64_t v, int nv) {
        pack_points<W, false>(weight, 0, 0, channels, v, nv, own + (v - group.begin) * L * channels,
                              stride, kPoints * stride);
      });
      packed = own;
    }
    const PointPlaces places(kPoints, run, padded<T>(smaller(kPanel, channels)));
    T* operand = scratch<T>(Scratch::kOperand, places.size());
    T* result = scratch<T>(Scratch::kResult, kPoints * pitch + depth_sums(tiles, run, width));
    T* sums = result + kPoints * pitch;
    T* pixels = scratch<T>(Scratch::kActivated, 2 * W * tiles.thick * run * width);
    const int64_t task_end = tasks.end(task);
    for (int64_t begin = tasks.begin(task); begin < task_end; begin += run) {
      const int64_t end = smaller(task_end, begin + run);
      PrefetchStream stream;
      const int64_t next_end = smaller(task_end, end + run);
      if (end < task_end) {
        stream.add(bottleneck.data + tiles.first_pixel(end) * bottleneck.pitch,
                   channels * sizeof(S), bottleneck.pitch * sizeof(S), tiles.pixels(end, next_end),
                   false);
        stream.add(growth.data + tiles.first_pixel(end) * growth.pitch, k * sizeof(S),
                   growth.pitch * sizeof(S), tiles.pixels(end, next_end), true);
      }
      stream.start(tiles.points * kPoints *
                   product_steps<T>(end - begin, channels, k, kWinogradForwardVectors));
      int64_t made = 0;  // pixels of this run, side by side for the statistics
      for (int64_t z = 0; z < tiles.points; ++z) {
        const T* b = packed + z * kPoints * stride;
        for (int64_t c0 = 0; c0 < channels; c0 += kPanel) {
          const int64_t panel = smaller(kPanel, channels - c0);
          transform_inputs<W, true, T>(bottleneck, tiles, begin, end, tiles.input_point(z), act, c0,
                                       panel, places, operand);
          multiply_points<T>(kPoints, operand, places, end - begin, c0, panel, channels, b, stride,
                             group, result, pitch, c0 > 0, stream);
        }
        for (int64_t i = 0; i < end - begin; ++i) {
          made += store_outputs<W, T>(result + i * width, pitch, tiles, begin + i, z,
                                      sums + 4 * W * i * width, growth, pixels + made * width, k0,
                                      width);
        }
      }
      if (statistics.mean) {
        accumulate_statistics<T>(pixels, width, made, 1, 0, width,
                                 partial.of(task, group_index, k0));
      }
    }
  });
  if (statistics.mean) partial.finish(statistics);
}

}  // namespace
}  // namespace densenet_fast::cpu
