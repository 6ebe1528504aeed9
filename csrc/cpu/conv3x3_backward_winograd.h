// The same backward by Winograd's minimal filtering. A run of tiles makes, for a panel of
// bottleneck channels, the weight gradient's products (the adjoint of the forward's) and the
// data gradient as the convolution with flipped kernels, masked and summed on its way out of the
// transform.
#pragma once

#include "conv3x3_backward.h"
#include "winograd.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kNarrowVolume = 48;  // channels of a volume that make one group of column blocks

// A dY A' of the rows of tiles [begin, end); outside the image dY is zero.
template <int M, class T, class S>
void transform_output_gradients(const Image<const S>& g, const WinogradTiles& tiles, int64_t begin,
                                int64_t end, const PointPlaces places, T* to) {
  constexpr int L = kLanes<T>, P = Filter<T, M>::kPoints;
  T* next = to;
  for_each_row(tiles, begin, end, 0, [&](const WinogradTile& tile, int64_t behind) {
    T* row = next;
    next += kPanelPitch;
    const bool there = tiles.has_slice(tile, behind);
    const int64_t height = there ? smaller(M, g.h - tile.y) : 0, width = smaller(M, g.w - tile.x);
    const S* from = g.data + tiles.pixel(tile, there ? behind : 0) * g.pitch;
    for (int64_t c = 0; c < g.c; c += L) {
      const int64_t n = g.c - c;
      Vec<T> rows[P][M] = {};
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        if (j >= width) break;
        Vec<T> y[M] = {}, of_column[P];
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
          if (i >= height) break;
          y[i] = load_upto<T>(from + (i * g.w + j) * g.pitch + c, n);
        }
        Filter<T, M>::output_adjoint(y, of_column);
        for (int i = 0; i < P; ++i) rows[i][j] = of_column[i];
      }
      for (int i = 0; i < P; ++i) {
        Vec<T> points[P];
        Filter<T, M>::output_adjoint(rows[i], points);
        for (int j = 0; j < P; ++j) store<T>(row + places.at(P * j + i) + c, points[j]);
      }
    }
  });
}

// G' S G: the gradient of L kernels, taps in order, from points `stride` apart.
template <int M, class T>
DF_INLINE void transform_weight_gradient(const T* s, int64_t stride, Vec<T> (&taps)[9]) {
  constexpr int P = Filter<T, M>::kPoints;
  Vec<T> rows[3][P];
  for (int j = 0; j < P; ++j) {
    Vec<T> e[P], g[3];
    for (int i = 0; i < P; ++i) e[i] = load<T>(s + (P * j + i) * stride);
    Filter<T, M>::kernel_adjoint(e, g);
    for (int i = 0; i < 3; ++i) rows[i][j] = g[i];
  }
  for (int i = 0; i < 3; ++i) {
    Vec<T> g[3];
    Filter<T, M>::kernel_adjoint(rows[i], g);
    for (int j = 0; j < 3; ++j) taps[3 * i + j] = g[j];
  }
}

// The data gradient of the rows of tiles [begin, end), of channels [c0, c0 + columns), masked by
// the activation. Adds the sums of D and D * (x - mean) of whole vectors. The gradient is D, or has
// scale * D added.
template <int M, class T, class S>
void finish_data_gradient(const T* result, int64_t ldr, int64_t pitch, const WinogradTiles& tiles,
                          int64_t begin, int64_t end, const Image<const S>& x,
                          const PaddedNorm<T>& norm, const Image<S>& gradient, int64_t c0,
                          int64_t columns, bool accumulate, T* sum, T* sum_centred) {
  constexpr int L = kLanes<T>;
  const T* next = result;
  for_each_row(tiles, begin, end, 0, [&](const WinogradTile& tile, int64_t behind) {
    const T* row = next;
    next += ldr;
    if (!tiles.has_slice(tile, behind)) return;
    const int64_t pixel = tiles.pixel(tile, behind);
    const int64_t height = smaller(M, tiles.h - tile.y), width = smaller(M, tiles.w - tile.x);
    for (int64_t c = 0; c < columns; c += L) {
      Vec<T> y[M][M];
      transform_output<M, T>([&](int p) { return load<T>(row + p * pitch + c); }, y);
      const int64_t n = columns - c;
      const Vec<T> scale = load<T>(norm.scale() + c0 + c), shift = load<T>(norm.shift() + c0 + c);
      const Vec<T> mean = load<T>(norm.mean() + c0 + c);
      Vec<T> added = load<T>(sum + c), added_centred = load<T>(sum_centred + c);
      const auto finish_pixel = [&](int64_t i, int64_t j) {
        const int64_t at = pixel + i * tiles.w + j;
        const Vec<T> value = load_upto<T>(x.data + at * x.pitch + c0 + c, n);
        Vec<T> d = where_positive<T>(fma<T>(scale, value, shift), y[i][j]);
        if (!accumulate) d = rounded<S>(d);  // sums of what will be read again
        added += d;
        added_centred = fma<T>(d, value - mean, added_centred);
        if (!gradient.data) return;
        S* to = gradient.data + at * gradient.pitch + c0 + c;
        store_upto<T>(to, accumulate ? fma<T>(scale, d, load_upto<T>(to, n)) : d, n);
      };
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) finish_pixel(i, j);
      }
      store<T>(sum + c, added);
      store<T>(sum_centred + c, added_centred);
    }
  });
}

template <int M, class S>
void conv3x3_backward_winograd(Image<const S> grad_growth, Image<const S> bottleneck,
                               Norm<Compute<S>> norm, Weight<S> weight, Image<S> grad_norm,
                               NormGradient<Compute<S>> grad_affine, WeightGradient<S> grad_weight,
                               bool accumulate) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>, kPoints = tile_points(M);
  const int64_t k = weight.out, channels = weight.in, depth = weight.depth();
  const int64_t width = padded<T>(channels);
  const int64_t panels = ceil_div(channels, kPanel);
  const bool want_data = grad_affine.beta != nullptr, want_weight = grad_weight.wanted();
  const PaddedNorm<T> padded_norm(norm, channels);

  // Tasks: equal parts of the tiles, each with its own sums and weight gradient, for one panel of
  // channels, in groups of column blocks where threads would be idle. In volumes a gradient's
  // transforms cost more, so that parts are larger, but where a single part had but one group.
  const WinogradTiles tiles(bottleneck);
  const int64_t border = tiles.border, thick = tiles.thick;
  const int prefer = border ? 2 : kBackwardVectors;
  const auto panel_vectors = [&](int64_t c0) { return vectors<T>(smaller(kPanel, channels - c0)); };
  const bool narrow = channels <= kNarrowVolume;
  const EqualParts parts(tiles.count(), border && narrow ? 4 : 16,
                         border ? ceil_div(narrow ? 32 : 128, thick) : 64);
  // A volume's products, a gradient of three slices, are more than the cache: the longer a run is,
  // the fewer times they are read and written.
  const int64_t run = tiles.run(parts.size, (border && !narrow ? 2 : 1) * kWinogradRows);
  const int64_t groups = smaller(ceil_div(panel_vectors(0), prefer),
                                 ceil_div(2 * thread_count(), parts.count * panels));
  // Every thread packs what it reads, and of a single part stores what it makes.
  const bool single = parts.count == 1;
  const int64_t packed_rows = k * depth;
  const int64_t packed_panel = kPoints * packed_pitch(packed_rows, smaller(kPanel, width));
  const bool own = single || panels * packed_panel <= most_own_weight();
  const CallMemory<T> packed(want_data && !own ? panels * packed_panel : 0);
  for (int64_t q = 0; want_data && !own && q < panels; ++q) {
    const int64_t c0 = q * kPanel, stride = packed_pitch(packed_rows, panel_vectors(c0) * L);
    pack_blocks(k, packed_rows, smaller(kPanel, channels - c0), prefer,
                packed.get() + q * packed_panel,
                [&](int64_t i, int64_t count, int64_t v, int nv, T* block) {
                  pack_points<M, true>(weight, c0, i, count, v, nv, block, stride);
                });
  }
  CallMemory<T> partial_sums(2 * parts.count * width);
  CallMemory<T> partial_weight(want_weight && !single ? parts.count * weight.taps() * k * width
                                                      : 0);

  for_each_task(parts.count * panels * groups, [&](int64_t task, int64_t before) {
    const int64_t part = task / groups / panels, index = task % (groups * panels);
    const int64_t panel_begin = index / groups * kPanel;
    const BlockGroup group(panel_vectors(panel_begin), prefer, index % groups, groups);
    const int64_t c0 = panel_begin + group.begin * L, panel = (group.end - group.begin) * L;
    if (panel == 0) return;
    const int64_t columns = smaller(panel, channels - c0);
    const int64_t stride = packed_pitch(packed_rows, own ? panel : group.vecs * L);
    const T* b = packed.get() + panel_begin / kPanel * packed_panel + group.begin * L * packed_rows;
    if (own && want_data) {
      const bool made = before >= 0 && before % (groups * panels) == index;
      b = own_weight<T>(kPoints * stride, made, [&](T* to) {
        for_each_block(group, [&](int64_t v, int nv) {
          pack_points<M, true>(weight, panel_begin, 0, k, v, nv,
                               to + (v - group.begin) * L * packed_rows, stride);
        });
      });
    }
    T* sums = partial_sums.get() + 2 * part * width;
    for (int64_t c = c0; c < c0 + panel; ++c) sums[c] = sums[width + c] = T(0);
    const int64_t rows = run * thick, read_rows = run * tiles.read();
    const int64_t widest = smaller(panel, kMaxVectors * L);  // of a column block
    const int64_t pitch = result_pitch(rows, widest);
    const PointPlaces of_gradients(kPoints, read_rows, padded<T>(k));
    const PointPlaces of_inputs(kPoints, read_rows, widest);
    T* gradients = scratch<T>(Scratch::kOperand, of_gradients.size());
    T* inputs = scratch<T>(Scratch::kResult, larger(of_inputs.size(), kPoints * pitch));
    const int64_t ldp = panel + L;
    T* products = scratch<T>(Scratch::kActivated, want_weight ? kPoints * packed_rows * ldp : 1);
    const int64_t part_begin = parts.begin(part), part_end = parts.end(part);

    // Column block by column block, so that its products stay in the cache.
    const auto add_weight = [&](int64_t begin, int64_t end, PrefetchStream& stream) {
      const int64_t count = end - begin;
      transform_output_gradients<M, T>(grad_growth, tiles, begin, end, of_gradients, gradients);
      for_each_block(group, [&](int64_t v, int nv) {
        const int64_t column = (v - group.begin) * L;
        transform_inputs<M, true, T>(bottleneck, tiles, begin, end, {norm.scale, norm.shift},
                                     c0 + column, smaller(nv * L, columns - column), of_inputs,
                                     inputs);
        for (int64_t point = 0; point < kPoints; ++point) {
          for (int64_t z = 0; z < depth; ++z) {
            for_each_row_tile(k, nv, [&](int64_t first, int outputs) {
              TransposedProduct<T> p{gradients + of_gradients.at(point) + first,
                                     inputs + of_inputs.at(point) + z * count * kPanelPitch,
                                     kPanelPitch,
                                     count * thick,
                                     products + ((point * depth + z) * k + first) * ldp + column,
                                     ldp,
                                     begin > part_begin,
                                     &stream};
              kMicrokernels<T>.transposed[nv][outputs](p);
            });
          }
        }
      });
    };
    const auto make_data = [&](int64_t begin, int64_t end, PrefetchStream& stream) {
      const int64_t count = end - begin;
      transform_inputs<M, false, T>(grad_growth, tiles, begin, end, {}, 0, k, of_gradients,
                                    gradients);
      for_each_block(group, [&](int64_t v, int nv) {
        const int64_t column = (v - group.begin) * L, wide = nv * L;
        const PointProducts<T> to_data{kPoints, count * thick,     k, {tiles, count}, stride,
                                       pitch,   group.block(v, nv)};
        to_data.run(gradients, of_gradients, 0, k, b + column * packed_rows, inputs, stream);
        finish_data_gradient<M, T>(inputs, wide, pitch, tiles, begin, end, bottleneck, padded_norm,
                                   grad_norm, c0 + column, smaller(wide, columns - column),
                                   accumulate, sums + c0 + column, sums + width + c0 + column);
      });
    };

    PrefetchStream stream;
    for (int64_t begin = part_begin; begin < part_end; begin += run) {
      const int64_t end = smaller(part_end, begin + run), count = (end - begin) * thick;
      stream.clear();
      if (end < part_end && !border) {
        const int64_t first = tiles.first_pixel(end);
        const int64_t pixels = tiles.pixels(end, smaller(part_end, end + run));
        stream.add(bottleneck.data + first * bottleneck.pitch + c0, columns * sizeof(S),
                   bottleneck.pitch * sizeof(S), pixels, false);
        stream.add(grad_growth.data + first * grad_growth.pitch, k * sizeof(S),
                   grad_growth.pitch * sizeof(S), pixels, false);
        if (grad_norm.data) {
          stream.add(grad_norm.data + first * grad_norm.pitch + c0, columns * sizeof(S),
                     grad_norm.pitch * sizeof(S), pixels, true);
        }
      }
      if (single && end == part_end && grad_weight.data) {
        const int64_t runs = grad_weight.channels_last ? weight.taps() : 1;
        const int64_t taps = weight.taps() / runs;
        stream.add(grad_weight.data + c0 * taps, columns * taps * sizeof(S),
                   channels * taps * sizeof(S), k * runs, true);
      }
      const int64_t blocks = ceil_div(panel / L, prefer);
      stream.start(
          kPoints * blocks * depth *
          ((want_weight ? ceil_div(k, kMaxRows[prefer]) * ceil_div(count, kPrefetchEvery) : 0) +
           (want_data ? ceil_div(count, kMaxRows[prefer]) * ceil_div(k, kPrefetchEvery) : 0)));
      if (want_weight) add_weight(begin, end, stream);
      if (want_data) make_data(begin, end, stream);
    }

    T* to = partial_weight.get() + part * weight.taps() * k * width + c0;
    for (int64_t o = 0; want_weight && o < k; ++o) {
      for (int64_t c = 0; c < panel; c += L) {
        for (int64_t z = 0; z < depth; ++z) {
          Vec<T> taps[9];
          transform_weight_gradient<M, T>(products + (z * k + o) * ldp + c, packed_rows * ldp,
                                          taps);
          if (single) {
            store_kernel_gradients(weight, grad_weight, o, c0 + c, z, taps, columns - c);
            continue;
          }
          for (int t = 0; t < 9; ++t) {
            store<T>(to + ((z * 9 + t) * k + o) * width + c, taps[t]);
          }
        }
      }
    }
  });

  if (want_data) {
    finish_sums<T>(partial_sums.get(), parts.count, width, norm, channels, grad_affine);
  }
  if (want_weight && !single) {
    finish_weight(partial_weight.get(), parts.count, weight.taps() * k, width,
                  TapsWeight<S>{weight, grad_weight});
  }
}

}  // namespace
}  // namespace densenet_fast::cpu
