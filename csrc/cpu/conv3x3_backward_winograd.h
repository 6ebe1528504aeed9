// The same backward by Winograd's minimal filtering. A run of tiles makes, for a panel of
// bottleneck channels, the weight gradient's 16 products (the adjoint of the forward's) and the
// data gradient as the convolution with flipped kernels, masked and summed on its way out of the
// transform.
#pragma once

#include "conv3x3_backward.h"
#include "winograd.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kNarrowVolume = 48;  // channels of a volume that make one group of column blocks

// A dY A' of tiles [begin, end) at a point of the depth; outside the image dY is zero.
template <int W, class T, class S>
void transform_output_gradients(const Image<const S>& g, const WinogradTiles& tiles, int64_t begin,
                                int64_t end, DepthPoint point, const PointPlaces places, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t index = begin; index < end; ++index, to += kPanelPitch) {
    const WinogradTile tile = tiles.at(index);
    const TileSlices<S> slices(g, tiles, tile, point);
    const int64_t height = smaller(2, g.h - tile.y), width = smaller(W, g.w - tile.x);
    const Vec<T> share = splat<T>(slices.share[0]), other = splat<T>(slices.share[1]);
    for (int64_t c = 0; c < g.c; c += L) {
      const int64_t n = g.c - c;
      Vec<T> rows[4][W] = {};
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) {
        if (j >= width) break;
        Vec<T> y[2] = {}, of_column[4];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          if (i >= height) break;
          const int64_t place = (i * g.w + j) * g.pitch + c;
          y[i] = load_upto<T>(slices.data[0] + place, n);
          if (tiles.points == 1) continue;
          y[i] = fma<T>(other, load_upto<T>(slices.data[1] + place, n), share * y[i]);
        }
        Filter<T, 2>::output_adjoint(y, of_column);
        for (int i = 0; i < 4; ++i) rows[i][j] = of_column[i];
      }
      for (int i = 0; i < 4; ++i) {
        constexpr int P = Filter<T, W>::kPoints;
        Vec<T> points[P];
        Filter<T, W>::output_adjoint(rows[i], points);
        for (int j = 0; j < P; ++j) store<T>(to + places.at(4 * j + i) + c, points[j]);
      }
    }
  }
}

// G' S G: the gradient of L kernels, taps in order, from points `stride` apart.
template <int W, class T>
DF_INLINE void transform_weight_gradient(const T* s, int64_t stride, Vec<T> (&taps)[9]) {
  constexpr int P = Filter<T, W>::kPoints;
  Vec<T> rows[3][P];
  for (int j = 0; j < P; ++j) {
    Vec<T> e[4], g[3];
    for (int i = 0; i < 4; ++i) e[i] = load<T>(s + (4 * j + i) * stride);
    Filter<T, 2>::kernel_adjoint(e, g);
    for (int i = 0; i < 3; ++i) rows[i][j] = g[i];
  }
  for (int i = 0; i < 3; ++i) {
    Vec<T> g[3];
    Filter<T, W>::kernel_adjoint(rows[i], g);
    for (int j = 0; j < 3; ++j) taps[3 * i + j] = g[j];
  }
}

// The slices of the kernels' gradients from those at the points of their depth, whose products `s`
// has, points of a slice `stride` apart and those of the depth `deep`: G' once more.
template <int W, class T>
DF_INLINE void transform_weight_slices(const T* s, int64_t stride, int64_t deep, int points,
                                       Vec<T> (&slices)[3][9]) {
  transform_weight_gradient<W, T>(s, stride, slices[0]);
  if (points == 1) return;
  Vec<T> second[9];
  transform_weight_gradient<W, T>(s + deep, stride, slices[1]);
  transform_weight_gradient<W, T>(s + 2 * deep, stride, second);
  transform_weight_gradient<W, T>(s + 3 * deep, stride, slices[2]);
  const Vec<T> half = splat<T>(T(0.5));
  for (int t = 0; t < 9; ++t) {
    const Vec<T> even = slices[1][t] + second[t];
    slices[0][t] = fma<T>(half, even, slices[0][t]);
    slices[2][t] = fma<T>(half, even, slices[2][t]);
    slices[1][t] = half * (slices[1][t] - second[t]);
  }
}

// The data gradient of tiles [begin, end) and channels [c0, c0 + columns), with the products at a
// point of the depth added to `slices`: of the slice that is whole with it, masked by the
// activation. Adds the sums of D and D * (x - mean) of whole vectors. The gradient is D, or has
// scale * D added.
template <int W, class T, class S>
void finish_data_gradient(const T* result, int64_t ldr, int64_t pitch, const WinogradTiles& tiles,
                          int64_t begin, int64_t end, int64_t z, T* slices, const Image<const S>& x,
                          const PaddedNorm<T>& norm, const Image<S>& gradient, int64_t c0,
                          int64_t columns, bool accumulate, T* sum, T* sum_centred) {
  constexpr int L = kLanes<T>;
  const int64_t slice = tiles.finished_slice(z);
  for (int64_t index = begin; index < end; ++index, result += ldr) {
    const WinogradTile tile = tiles.at(index);
    const bool finished = slice >= 0 && tiles.has_slice(tile, slice);
    const int64_t pixel = tiles.pixel(tile) + slice * tiles.h * tiles.w;
    const int64_t height = smaller(2, tiles.h - tile.y), width = smaller(W, tiles.w - tile.x);
    for (int64_t c = 0; c < columns; c += L, slices += 4 * W * L) {
      Vec<T> y[2][W];
      transform_output<W, T>([&](int p) { return load<T>(result + p * pitch + c); }, y);
      add_depth_point<W, T>(tiles, z, y, slices);
      if (!finished) continue;
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
  }
}

template <int W, class S>
void conv3x3_backward_winograd(Image<const S> grad_growth, Image<const S> bottleneck,
                               Norm<Compute<S>> norm, Weight<S> weight, Image<S> grad_norm,
                               NormGradient<Compute<S>> grad_affine, WeightGradient<S> grad_weight,
                               bool accumulate) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>, kPoints = 4 * Filter<T, W>::kPoints;
  const int64_t k = weight.out, channels = weight.in;
  const int64_t width = padded<T>(channels);
  const int64_t panels = ceil_div(channels, kPanel);
  const bool want_data = grad_affine.beta != nullptr, want_weight = grad_weight.wanted();
  const PaddedNorm<T> padded_norm(norm, channels);

  // Tasks: equal parts of the tiles, each with its own sums and weight gradient, for one panel of
  // channels, in groups of column blocks where threads would be idle. In volumes a gradient's
  // transforms cost as much as five tiles, so that parts are larger, but where a single part had
  // but one group.
  const WinogradTiles tiles(bottleneck);
  const int points = tiles.points;
  const int prefer = points > 1 ? 2 : kBackwardVectors;
  const auto panel_vectors = [&](int64_t c0) { return vectors<T>(smaller(kPanel, channels - c0)); };
  const bool narrow = channels <= kNarrowVolume;
  const EqualParts parts(tiles.count(), points > 1 && narrow ? 4 : 16,
                         points == 1 ? 64
                         : narrow    ? 32
                                     : 128);
  const int64_t run = equal_tile(parts.size, kWinogradTiles);
  const int64_t groups = smaller(ceil_div(panel_vectors(0), prefer),
                                 ceil_div(2 * thread_count(), parts.count * panels));
  // Of a single part every task packs what it reads and stores what it makes.
  const bool single = parts.count == 1;
  const int64_t packed_panel = points * kPoints * packed_pitch(k, smaller(kPanel, width));
  const CallMemory<T> packed(want_data && !single ? panels * packed_panel : 0);
  for (int64_t q = 0; want_data && !single && q < panels; ++q) {
    const int64_t c0 = q * kPanel, stride = packed_pitch(k, panel_vectors(c0) * L);
    pack_blocks(k, k, smaller(kPanel, channels - c0), prefer, packed.get() + q * packed_panel,
                [&](int64_t i, int64_t count, int64_t v, int nv, T* block) {
                  pack_points<W, true>(weight, c0, i, count, v, nv, block, stride,
                                       kPoints * stride);
                });
  }
  CallMemory<T> partial_sums(2 * parts.count * width);
  CallMemory<T> partial_weight(want_weight && !single ? parts.count * weight.taps() * k * width
                                                      : 0);

  for_each_task(parts.count * panels * groups, [&](int64_t task) {
    const int64_t part = task / groups / panels, panel_begin = task / groups % panels * kPanel;
    const BlockGroup group(panel_vectors(panel_begin), prefer, task % groups, groups);
    const int64_t c0 = panel_begin + group.begin * L, panel = (group.end - group.begin) * L;
    if (panel == 0) return;
    const int64_t columns = smaller(panel, channels - c0);
    const int64_t stride = packed_pitch(k, single ? panel : group.vecs * L);
    const int64_t deep_stride = kPoints * stride;
    const T* b = packed.get() + panel_begin / kPanel * packed_panel + group.begin * L * k;
    if (single && want_data) {
      T* own = scratch<T>(Scratch::kWeight, points * deep_stride);
      for_each_block(group, [&](int64_t v, int nv) {
        pack_points<W, true>(weight, panel_begin, 0, k, v, nv, own + (v - group.begin) * L * k,
                             stride, deep_stride);
      });
      b = own;
    }
    T* sums = partial_sums.get() + 2 * part * width;
    for (int64_t c = c0; c < c0 + panel; ++c) sums[c] = sums[width + c] = T(0);
    const int64_t pitch = result_pitch(run, panel);
    const PointPlaces of_gradients(kPoints, run, padded<T>(k)), of_inputs(kPoints, run, panel);
    T* gradients = scratch<T>(Scratch::kOperand, of_gradients.size());
    T* inputs =
        scratch<T>(Scratch::kResult,
                   larger(of_inputs.size(), kPoints * pitch + depth_sums(tiles, run, panel)));
    T* slices = inputs + kPoints * pitch;
    const int64_t ldp = panel + L, deep_products = kPoints * k * ldp;
    T* products = scratch<T>(Scratch::kActivated, want_weight ? points * deep_products : 1);
    const int64_t part_begin = parts.begin(part), part_end = parts.end(part);

    const auto add_weight = [&](int64_t begin, int64_t end, int64_t z, PrefetchStream& stream) {
      transform_output_gradients<W, T>(grad_growth, tiles, begin, end, tiles.output_point(z),
                                       of_gradients, gradients);
      transform_inputs<W, true, T>(bottleneck, tiles, begin, end, tiles.input_point(z),
                                   {norm.scale, norm.shift}, c0, columns, of_inputs, inputs);
      T* to = products + z * deep_products;
      for (int64_t point = 0; point < kPoints; ++point) {
        for_each_block(group, [&](int64_t v, int nv) {
          const int64_t column = (v - group.begin) * L;
          for_each_row_tile(k, nv, [&](int64_t first, int rows) {
            TransposedProduct<T> p{gradients + of_gradients.at(point) + first,
                                   inputs + of_inputs.at(point) + column,
                                   kPanelPitch,
                                   end - begin,
                                   to + (point * k + first) * ldp + column,
                                   ldp,
                                   begin > part_begin,
                                   &stream};
            kMicrokernels<T>.transposed[nv][rows](p);
          });
        });
      }
    };
    const auto make_data = [&](int64_t begin, int64_t end, PrefetchStream& stream) {
      for (int64_t z = 0; z < points; ++z) {
        transform_inputs<W, false, T>(grad_growth, tiles, begin, end, tiles.input_point(z), {}, 0,
                                      k, of_gradients, gradients);
        multiply_points<T>(kPoints, gradients, of_gradients, end - begin, 0, k, k,
                           b + z * deep_stride, stride, group, inputs, pitch, false, stream);
        finish_data_gradient<W, T>(inputs, panel, pitch, tiles, begin, end, z, slices, bottleneck,
                                   padded_norm, grad_norm, c0, columns, accumulate, sums + c0,
                                   sums + width + c0);
      }
    };

    PrefetchStream stream;
    if (points > 1) {
      // Point by point of the depth, so that its products stay in the cache.
      for (int64_t z = 0; want_weight && z < points; ++z) {
        for (int64_t begin = part_begin; begin < part_end; begin += run) {
          add_weight(begin, smaller(part_end, begin + run), z, stream);
        }
      }
      for (int64_t begin = part_begin; want_data && begin < part_end; begin += run) {
        make_data(begin, smaller(part_end, begin + run), stream);
      }
    }
    for (int64_t begin = part_begin; points == 1 && begin < part_end; begin += run) {
      const int64_t end = smaller(part_end, begin + run), count = end - begin;
      stream.clear();
      if (end < part_end) {
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
        const int64_t runs = grad_weight.channels_last ? 9 : 1, taps = 9 / runs;
        stream.add(grad_weight.data + c0 * taps, columns * taps * sizeof(S),
                   channels * taps * sizeof(S), k * runs, true);
      }
      const int64_t blocks = ceil_div(panel / L, prefer);
      stream.start(
          kPoints * blocks *
          ((want_weight ? ceil_div(k, kMaxRows[prefer]) * ceil_div(count, kPrefetchEvery) : 0) +
           (want_data ? ceil_div(count, kMaxRows[prefer]) * ceil_div(k, kPrefetchEvery) : 0)));
      if (want_weight) add_weight(begin, end, 0, stream);
      if (want_data) make_data(begin, end, stream);
    }

    T* to = partial_weight.get() + part * weight.taps() * k * width + c0;
    for (int64_t o = 0; want_weight && o < k; ++o) {
      for (int64_t c = 0; c < panel; c += L) {
        Vec<T> slices[3][9];
        transform_weight_slices<W, T>(products + o * ldp + c, k * ldp, deep_products, points,
                                      slices);
        for (int z = 0; z < weight.depth(); ++z) {
          if (single) {
            store_kernel_gradients(weight, grad_weight, o, c0 + c, z, slices[z], columns - c);
            continue;
          }
          for (int t = 0; t < 9; ++t) {
            store<T>(to + ((z * 9 + t) * k + o) * width + c, slices[z][t]);
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
