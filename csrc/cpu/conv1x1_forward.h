// bottleneck = relu(scale * features + shift) * weight^T, statistics of the result in the epilogue.
// The normalised input exists only as a panel of one tile in the first-level cache.
#pragma once

#include "statistics.h"

namespace densenet_fast::cpu {
namespace {

constexpr int kForwardVectors = 2;
// Rows of a tile, at most: an operand that leaves room in a first-level cache of 32 KiB.
constexpr int64_t kForwardTile = 28;

// Of up to so many rows, every task packs the columns that it makes while it makes them.
constexpr int64_t kFewRows = 64;

template <class S>
int64_t packed_conv1x1_size(Weight<S> weight) {
  return padded<Compute<S>>(weight.out) * weight.in;
}

// A group of columns, panel by panel, as product_tile reads them.
template <class S>
void pack_columns(const Weight<S>& weight, const BlockGroup& group, Compute<S>* packed) {
  using T = Compute<S>;
  const int64_t k = weight.in, vecs = group.end - group.begin, panel = panel_width<T>(k);
  for_each_task(ceil_div(k, panel), [&](int64_t task) {
    const int64_t k0 = task * panel, width = smaller(panel, k - k0);
    for_each_block(group, [&](int64_t v, int nv) {
      pack_block(forward_matrix(weight), k0, width, v, nv,
                 packed + (k0 * vecs + (v - group.begin) * width) * kLanes<T>);
    });
  });
}

template <class S>
void pack_conv1x1(Weight<S> weight, Compute<S>* packed) {
  pack_columns(weight, BlockGroup(vectors<Compute<S>>(weight.out), kForwardVectors), packed);
}

// Rows of a product, cut into tasks and tiles; build(row, rows, c0, width, panel) makes operand A,
// prefetch(row, rows, stream) names what the tile at `row` will read.
template <class S, class Build, class Prefetch>
void product_forward(int64_t rows, int64_t k, Weight<S> weight, Image<S> out,
                     Statistics<Compute<S>> statistics, const Build& build,
                     const Prefetch& prefetch) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t columns = weight.out, width = padded<T>(columns), vecs = vectors<T>(columns);
  const bool few = rows <= kFewRows;

  const EqualParts chunks(rows, few ? 1 : kMostTasks, 24);
  const int64_t tile = few ? rows : equal_tile(chunks.size, kForwardTile);
  // Columns are independent: how many groups of them share the rows changes no result. Every thread
  // packs those that it makes.
  const int64_t blocks = ceil_div(vecs, kForwardVectors), threads = thread_count();
  const int64_t groups = smaller(blocks, larger(chunks.count < 4 * threads ? threads : 1,
                                                ceil_div(k * width, most_own_weight())));
  TaskStatistics<T> partial(chunks.count, columns, groups);
  for_each_task(chunks.count * groups, [&](int64_t task, int64_t before) {
    const int64_t chunk = task % chunks.count, index = task / chunks.count;
    const BlockGroup group(vecs, kForwardVectors, index, groups);
    const int64_t c_begin = group.begin * L, c_end = smaller(columns, group.end * L);
    T* panel = scratch<T>(Scratch::kOperand, tile * kPanelPitch);
    T* block = scratch<T>(Scratch::kActivated, few ? kPanel * kMaxVectors * L : 0);
    const T* packed = weight.packed;
    int64_t packed_vecs = vecs, packed_begin = 0;  // where they lie
    if (!packed && !few) {
      packed_vecs = group.end - group.begin;
      packed_begin = group.begin;
      packed = own_weight<T>(k * packed_vecs * L, before >= 0 && before / chunks.count == index,
                             [&](T* to) { pack_columns(weight, group, to); });
    }
    [[maybe_unused]] T* sums = kNarrow<S> ? scratch<T>(Scratch::kResult, tile * width) : nullptr;
    // Few rows wait for the weights: while a block is multiplied, the next one is fetched.
    const auto prefetch_next_block = [&](int64_t c0, int64_t width, int64_t v, int nv,
                                         PrefetchStream& stream) {
      const int64_t next_c0 = v + nv < group.end ? c0 : c0 + width;
      const int64_t next_v = v + nv < group.end ? v + nv : group.begin;
      if (next_c0 >= k) return stream.clear();
      const int64_t next_width = smaller(width, k - next_c0), count = kForwardVectors * L;
      stream.clear();
      if (packed) {
        stream.add(packed + (next_c0 * packed_vecs + (next_v - packed_begin) * next_width) * L,
                   next_width * count * sizeof(T), 0, 1, false);
      } else if (weight.stride_in == 1 && weight.data) {
        stream.add(weight.data + next_v * L * weight.stride_out + next_c0, next_width * sizeof(S),
                   weight.stride_out * sizeof(S), smaller(count, columns - next_v * L), false);
      }
      stream.start(product_steps<T>(rows, width, nv * L, nv));
    };
    const int64_t end = chunks.end(chunk);
    const int64_t steps = product_steps<T>(tile, k, c_end - c_begin, kForwardVectors);
    for (int64_t r = chunks.begin(chunk); r < end; r += tile) {
      const int64_t count = smaller(tile, end - r);
      PrefetchStream stream;
      const int64_t next = r + tile;
      if (next < rows) {
        const int64_t next_count = smaller(tile, rows - next);
        prefetch(next, next_count, stream);
        stream.add(out.data + next * out.pitch + c_begin, (c_end - c_begin) * sizeof(S),
                   out.pitch * sizeof(S), next_count, true);
      }
      stream.start(steps);
      S* to = out.data + r * out.pitch;
      const auto multiply = [&](T* sums, int64_t ld) {
        product_tile<T>(
            count, k, columns, group, sums, ld, panel, stream,
            [&](int64_t c0, int64_t width, T* into) { build(r, count, c0, width, into); },
            [&](int64_t c0, int64_t width, int64_t v, int nv) -> const T* {
              if (few) prefetch_next_block(c0, width, v, nv, stream);
              if (packed) return packed + (c0 * packed_vecs + (v - packed_begin) * width) * L;
              pack_block(forward_matrix(weight), c0, width, v, nv, block);
              return block;
            });
      };
      if constexpr (kNarrow<S>) {
        multiply(sums, width);
        store_rows<T>(sums + c_begin, width, count, c_end - c_begin, to + c_begin, out.pitch);
      } else {
        multiply(to, out.pitch);
      }
      if (statistics.mean) {
        accumulate_statistics<T>(to + c_begin, out.pitch, count, 1, 0, c_end - c_begin,
                                 partial.of(chunk, index, c_begin));
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
