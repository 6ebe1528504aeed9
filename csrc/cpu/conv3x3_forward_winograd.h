// The same 3x3 convolution by Winograd's minimal filtering: a run of tiles is activated and
// transformed a panel of channels at a time, multiplied point by point, and transformed back into
// the feature buffer.
#pragma once

#include "statistics.h"
#include "winograd.h"

namespace densenet_fast::cpu {
namespace {

constexpr int kWinogradForwardVectors = 2;

// Stores a tile's outputs in the slice so many behind its own to pixels of the growth, and to
// `copy` one after another; returns how many pixels those are. Of columns [c0, c0 + width), where
// the growth has them.
template <int M, class T, class S>
DF_INLINE int64_t store_outputs(const T* result, int64_t pitch, const WinogradTiles& tiles,
                                const WinogradTile& tile, int64_t behind, const Image<S>& growth,
                                T* copy, int64_t c0, int64_t width) {
  constexpr int L = kLanes<T>;
  if (!tiles.has_slice(tile, behind)) return 0;
  const int64_t rows = smaller(M, tiles.h - tile.y), columns = smaller(M, tiles.w - tile.x);
  S* out = growth.data + tiles.pixel(tile, behind) * growth.pitch + c0;
  for (int64_t c = 0; c < width; c += L) {
    Vec<T> y[M][M];
    transform_output<M, T>([&](int p) { return load<T>(result + p * pitch + c); }, y);
    const int64_t n = growth.c - c0 - c;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        store_upto<T>(out + (i * tiles.w + j) * growth.pitch + c, y[i][j], n);
        store<T>(copy + (i * columns + j) * width + c, rounded<S>(y[i][j]));
      }
    }
  }
  return rows * columns;
}

template <class S>
DF_INLINE int64_t packed_winograd_size(const Weight<S>& weight) {
  using T = Compute<S>;
  return tile_points(tile_size(weight.dims)) *
         packed_pitch(weight.in * weight.depth(), padded<T>(weight.out));
}

// One operand [slices of kernels, in, out] for each point, one after the other.
template <int M, class S>
void pack_winograd(const Weight<S>& weight, Compute<S>* packed) {
  const int64_t rows = weight.in * weight.depth();
  const int64_t stride = packed_pitch(rows, padded<Compute<S>>(weight.out));
  pack_blocks(weight.in, rows, weight.out, kWinogradForwardVectors, packed,
              [&](int64_t i, int64_t count, int64_t v, int nv, Compute<S>* block) {
                pack_points<M, false>(weight, 0, i, count, v, nv, block, stride);
              });
}

template <int M, class S>
void conv3x3_forward_winograd(Image<const S> bottleneck, Activation<Compute<S>> act,
                              const Weight<S>& weight, Image<S> growth,
                              Statistics<Compute<S>> statistics) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  constexpr int64_t kPoints = tile_points(M);
  const int64_t channels = bottleneck.c, k = growth.c, vecs = vectors<T>(k);
  const int64_t packed_rows = channels * weight.depth();
  const WinogradTiles tiles(bottleneck);
  const int64_t thick = tiles.thick;
  const EqualParts tasks(tiles.count(), kMostTasks, ceil_div(kWinogradRows / 3, thick));
  const int64_t run = tiles.run(tasks.size);
  // Every thread packs what it reads, some columns alone where threads would be idle otherwise:
  // what another one has packed would come from its cache.
  const bool own = !weight.packed && packed_winograd_size(weight) <= most_own_weight();
  const int64_t threads = thread_count();
  const bool idle = tasks.count < 2 * threads && tasks.count % threads != 0;
  const int64_t groups = own && idle ? smaller(vecs, threads) : 1;
  const int prefer = groups > 1 ? 1 : kWinogradForwardVectors;
  const CallMemory<T> memory(weight.packed || own ? 0 : packed_winograd_size(weight));
  if (!weight.packed && !own) pack_winograd<M>(weight, memory.get());
  TaskStatistics<T> partial(tasks.count, k, groups);
  for_each_task(tasks.count * groups, [&](int64_t index, int64_t before) {
    const int64_t task = index % tasks.count, group_index = index / tasks.count;
    const BlockGroup group(vecs, prefer, group_index, groups);
    const int64_t k0 = group.begin * L, width = (group.end - group.begin) * L;
    const int64_t pitch = result_pitch(run * thick, width);
    const int64_t stride = packed_pitch(packed_rows, own ? width : padded<T>(k));
    const T* packed;
    if (own) {
      const bool made = before >= 0 && before / tasks.count == group_index;
      packed = own_weight<T>(kPoints * stride, made, [&](T* to) {
        for_each_block(group, [&](int64_t v, int nv) {
          pack_points<M, false>(weight, 0, 0, channels, v, nv,
                                to + (v - group.begin) * L * packed_rows, stride);
        });
      });
    } else {
      packed = (weight.packed ? weight.packed : memory.get()) + k0 * packed_rows;
    }
    const PointPlaces places(kPoints, run * tiles.read(), padded<T>(smaller(kPanel, channels)));
    T* operand = scratch<T>(Scratch::kOperand, places.size());
    T* result = scratch<T>(Scratch::kResult, kPoints * pitch);
    T* pixels = scratch<T>(Scratch::kActivated, M * M * run * thick * width);
    const int64_t task_end = tasks.end(task);
    for (int64_t begin = tasks.begin(task); begin < task_end; begin += run) {
      const int64_t end = smaller(task_end, begin + run), count = end - begin;
      PrefetchStream stream;
      const int64_t next_end = smaller(task_end, end + run);
      if (end < task_end) {
        const int64_t next = tiles.first_pixel(end), pixels = tiles.pixels(end, next_end);
        const int64_t slice = tiles.h * tiles.w * sizeof(S);
        stream.add(bottleneck.data + next * bottleneck.pitch, channels * sizeof(S),
                   bottleneck.pitch * sizeof(S), pixels, false, thick, slice * bottleneck.pitch);
        stream.add(growth.data + next * growth.pitch, k * sizeof(S), growth.pitch * sizeof(S),
                   pixels, true, thick, slice * growth.pitch);
      }
      stream.start(kPoints *
                   product_steps<T>(count * thick, packed_rows, k, kWinogradForwardVectors));
      const PointProducts<T> products{kPoints, count * thick, channels, {tiles, count},
                                      stride,  pitch,         group};
      for (int64_t c0 = 0; c0 < channels; c0 += kPanel) {
        const int64_t panel = smaller(kPanel, channels - c0);
        transform_inputs<M, true, T>(bottleneck, tiles, begin, end, act, c0, panel, places,
                                     operand);
        products.run(operand, places, c0, panel, packed, result, stream);
      }
      int64_t made = 0;  // pixels of this run, side by side for the statistics
      const T* row = result;
      for_each_row(tiles, begin, end, 0, [&](const WinogradTile& tile, int64_t behind) {
        made += store_outputs<M, T>(row, pitch, tiles, tile, behind, growth, pixels + made * width,
                                    k0, width);
        row += width;
      });
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
