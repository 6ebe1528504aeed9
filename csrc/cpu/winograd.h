// Winograd's minimal filtering F(2x2, 3x3), Lavin and Gray 2015 (arXiv:1509.09308): 2x2 outputs of
// a 3x3 convolution from 4x4 inputs by 16 multiplications where the direct way needs 36.
//
//   Y  = A' [(G g G') . (B' d B)] A        per tile; the sum over channels is 16 matrix products
//   dg = G' [(A dY A') . (B' d B)] G       its adjoint: weight gradients
//
// Of volumes 2x2x4 outputs, by F(2, 3) in depth around F(2x4, 3x3), from four slices by 96
// multiplications where the direct way needs 432. The depth's transform is linear, so that each of
// its four points is an image of one or two slices, and a slice of the output is a sum of three
// points' products, added as they come.
//
// Transformed operands are tiles at kPanelPitch, points of narrow ones side by side. Tiles are
// counted image by image, row by row, so that runs of them serve images of any size, also many
// small ones at once; what a tile has beyond its image is zero before and dropped behind.
#pragma once

#include "winograd_filter.h"
#include "winograd_tiles.h"

namespace densenet_fast::cpu {
namespace {

// B' d B of a tile, to its points; load_row(i, d) gives row i of d. Rows are transformed as they
// are loaded, the two inner ones first, so that few vectors live at once.
template <int W, class T, class LoadRow>
DF_INLINE void store_transformed_input(const LoadRow& load_row, const PointPlaces& places, T* to) {
  constexpr int P = Filter<T, W>::kPoints;
  const auto row = [&](int i, Vec<T>(&f)[P]) {
    Vec<T> d[P];
    load_row(i, d);
    Filter<T, W>::input(d, f);
  };
  Vec<T> f1[P], f2[P], outer[P];
  row(1, f1);
  row(2, f2);
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) {
    store<T>(to + places.at(4 * j + 1), f1[j] + f2[j]);
    store<T>(to + places.at(4 * j + 2), f2[j] - f1[j]);
  }
  row(0, outer);
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) store<T>(to + places.at(4 * j), outer[j] - f2[j]);
  row(3, outer);
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) store<T>(to + places.at(4 * j + 3), f1[j] - outer[j]);
}

// What a tile reads at a point of the depth: `share` of a slice and of another one, from its first
// pixel in each. What its image has not is read from where it has something, and counts nothing.
template <class S>
struct TileSlices {
  using T = Compute<S>;
  const S* data[2];
  T share[2];
  bool whole;  // the image has both, and the first counts once

  TileSlices(const Image<const S>& x, const WinogradTiles& tiles, const WinogradTile& tile,
             DepthPoint point) {
    const S* at = x.data + tiles.pixel(tile) * x.pitch;
    const bool has[] = {tiles.has_slice(tile, point.first),
                        point.sign && tiles.has_slice(tile, point.second)};
    const int64_t slice = x.h * x.w * x.pitch;
    data[0] = at + (has[0] ? point.first : 0) * slice;
    data[1] = at + (has[1] ? point.second : 0) * slice;
    share[0] = has[0];
    share[1] = has[1] ? static_cast<T>(point.sign) : T(0);
    whole = has[0] && (has[1] || !point.sign);
  }
};

// Which of the N rows or columns of a tile's input, from `at` - 1 on, there are in `size`.
template <int N>
struct TileSpan {
  bool has[N];
  bool whole = true;
  TileSpan(int64_t at, int64_t size) {
    for (int i = 0; i < N; ++i) {
      has[i] = static_cast<uint64_t>(at + i - 1) < static_cast<uint64_t>(size);
      whole = whole && has[i];
    }
  }
};

// Transforms channels [c0, c0 + width) of tiles [begin, end) at a point of the depth: of
// relu(scale * x + shift), or of x itself. Whole vectors are stored, zero behind the last channel.
template <int W, bool kActivate, class T, class S>
void transform_inputs(const Image<const S>& x, const WinogradTiles& tiles, int64_t begin,
                      int64_t end, DepthPoint point, Activation<T> act, int64_t c0, int64_t width,
                      const PointPlaces places, T* to) {
  constexpr int L = kLanes<T>, P = Filter<T, W>::kPoints;
  const int64_t pitch = x.pitch, row_pitch = x.w * pitch;
  for (int64_t index = begin; index < end; ++index, to += kPanelPitch) {
    const WinogradTile tile = tiles.at(index);
    const TileSlices<S> slices(x, tiles, tile, point);
    const TileSpan<4> down(tile.y, x.h);
    const TileSpan<P> across(tile.x, x.w);
    const bool inside = slices.whole && down.whole && across.whole;
    int64_t column[P];  // the second one is always there
    for (int j = 0; j < P; ++j) column[j] = across.has[j] ? (j - 1) * pitch : 0;

    // One vector of channels, `n` of them; kInside: nothing is missing.
    const auto transform = [&]<bool kInside, bool kDeep>(int64_t c, int64_t n) {
      const auto get = [&](const S* from) {
        return kInside ? load<T>(from) : load_upto<T>(from, n);
      };
      Vec<T> a[P], b[P];
#pragma GCC unroll 6
      for (int j = 0; j < P; ++j) {
        a[j] = b[j] = zero<T>();
        if (!kInside && !across.has[j]) continue;
        a[j] = kActivate ? load_upto<T>(act.scale + c0 + c, n) : splat<T>(T(1));
        if (kActivate) b[j] = load_upto<T>(act.shift + c0 + c, n);
      }
      const auto value = [&](int slice, int i, int j) {
        const int64_t at = kInside ? (j - 1) * pitch : column[j];
        const Vec<T> v = get(slices.data[slice] + (i - 1) * row_pitch + at + c0 + c);
        if (kActivate) return relu<T>(fma<T>(a[j], v, b[j]));
        return kInside ? v : a[j] * v;
      };
      const Vec<T> share = splat<T>(slices.share[0]), other = splat<T>(slices.share[1]);
      store_transformed_input<W, T>(
          [&](int i, Vec<T>(&d)[P]) {
#pragma GCC unroll 6
            for (int j = 0; j < P; ++j) d[j] = zero<T>();
            if (!kInside && !down.has[i]) return;
#pragma GCC unroll 6
            for (int j = 0; j < P; ++j) {
              d[j] = value(0, i, j);
              if (kDeep && !kInside) d[j] = share * d[j];
              if (kDeep) d[j] = fma<T>(other, value(1, i, j), d[j]);
            }
          },
          places, to + c);
    };
    const auto all_channels = [&]<bool kDeep>() {
      int64_t c = 0;
      for (; inside && c + L <= width; c += L) transform.template operator()<true, kDeep>(c, L);
      for (; c < width; c += L) transform.template operator()<false, kDeep>(c, width - c);
    };
    if (point.sign) {
      all_channels.template operator()<true>();
    } else {
      all_channels.template operator()<false>();
    }
  }
}

// A' M A of one tile and vector: y[row][column], of load(point).
template <int W, class T, class Load>
DF_INLINE void transform_output(const Load& load, Vec<T> (&y)[2][W]) {
  constexpr int P = Filter<T, W>::kPoints;
  Vec<T> s[2][P];
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) {
    const Vec<T> m[4] = {load(4 * j), load(4 * j + 1), load(4 * j + 2), load(4 * j + 3)};
    Vec<T> rows[2];
    Filter<T, 2>::output(m, rows);
    s[0][j] = rows[0];
    s[1][j] = rows[1];
  }
  for (int i = 0; i < 2; ++i) Filter<T, W>::output(s[i], y[i]);
}

// Adds what point `z` of the depth makes of a tile to the sums of its slices, [2, 2, W] vectors,
// and makes of y the slice that is whole with it, if one is.
template <int W, class T>
DF_INLINE void add_depth_point(const WinogradTiles& tiles, int64_t z, Vec<T> (&y)[2][W], T* sums) {
  constexpr int L = kLanes<T>;
  if (tiles.points == 1) return;
#pragma GCC unroll 8
  for (int p = 0; p < 2 * W; ++p) {
    T *first = sums + p * L, *second = sums + (2 * W + p) * L;
    Vec<T>& value = y[p / W][p % W];
    if (z == 0) {
      store<T>(first, value);
    } else if (z == 1) {
      store<T>(first, load<T>(first) + value);
      store<T>(second, value);
    } else if (z == 2) {
      store<T>(second, load<T>(second) - value);
      value = load<T>(first) + value;
    } else {
      value = load<T>(second) + value;
    }
  }
}
// Elements of these sums, for tiles of `width` channels.
DF_INLINE int64_t depth_sums(const WinogradTiles& tiles, int64_t count, int64_t width) {
  return tiles.points > 1 ? 4 * tiles.wide * count * width : 0;
}

// G g G' of L kernels at once, turned around where kFlipped, to points `stride` apart.
template <int W, bool kFlipped, class T>
DF_INLINE void store_transformed_weight(const Vec<T> (&taps)[9], T* to, int64_t stride) {
  constexpr int P = Filter<T, W>::kPoints;
  Vec<T> e[4][3];
  for (int j = 0; j < 3; ++j) {
    const auto tap = [&](int i) { return taps[kFlipped ? 8 - 3 * i - j : 3 * i + j]; };
    const Vec<T> g[3] = {tap(0), tap(1), tap(2)};
    Vec<T> of_column[4];
    Filter<T, 2>::kernel(g, of_column);
    for (int i = 0; i < 4; ++i) e[i][j] = of_column[i];
  }
  for (int i = 0; i < 4; ++i) {
    Vec<T> points[P];
    Filter<T, W>::kernel(e[i], points);
    for (int j = 0; j < P; ++j) store<T>(to + (4 * j + i) * stride, points[j]);
  }
}

// The taps of L kernels, as load_kernels has them, at the points of the depth's transform.
template <bool kBackward, class S>
DF_INLINE void load_depth_points(const Weight<S>& weight, int64_t out, int64_t in,
                                 Vec<Compute<S>> (&points)[4][9]) {
  using T = Compute<S>;
  if (depth_points(weight.dims) == 1) return load_kernels<kBackward>(weight, out, in, points[0]);
  load_kernels<kBackward>(weight.slice(kBackward ? 2 : 0), out, in, points[0]);  // or flipped
  load_kernels<kBackward>(weight.slice(1), out, in, points[1]);
  load_kernels<kBackward>(weight.slice(kBackward ? 0 : 2), out, in, points[3]);
  const Vec<T> half = splat<T>(T(0.5));
  for (int t = 0; t < 9; ++t) {
    const Vec<T> outer = points[0][t] + points[3][t], inner = points[1][t];
    points[1][t] = half * (outer + inner);
    points[2][t] = half * (outer - inner);
  }
}

// Transforms rows [i, i + count) of a column block: of the forward's operands [in, out], or with
// flipped kernels of the data gradient's, [out, in] from channel `in` on. Points of a slice are
// `stride` apart, those of the depth `deep`.
template <int W, bool kBackward, class S>
void pack_points(const Weight<S>& weight, int64_t in, int64_t i, int64_t count, int64_t v, int nv,
                 Compute<S>* block, int64_t stride, int64_t deep) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  for (int64_t r = i; r < i + count; ++r) {
    for (int u = 0; u < nv; ++u) {
      const int64_t column = (v + u) * L;
      Vec<T> points[4][9];
      load_depth_points<kBackward>(weight, kBackward ? r : column, kBackward ? in + column : r,
                                   points);
      for (int z = 0; z < depth_points(weight.dims); ++z) {
        store_transformed_weight<W, kBackward, T>(points[z], block + z * deep + (r * nv + u) * L,
                                                  stride);
      }
    }
  }
}

// For each of `points`: result[point] (+)= operand[point] * packed[point], [k0, k0 + width) of the
// reduction's k, for a group of column blocks. The result is [points, tiles, vectors of the group],
// points `pitch` apart; those of `packed` are `stride` apart, from the group's first on.
template <class T>
DF_INLINE void multiply_points(int64_t points, const T* operand, const PointPlaces& places,
                               int64_t tiles, int64_t k0, int64_t width, int64_t k, const T* packed,
                               int64_t stride, const BlockGroup& group, T* result, int64_t pitch,
                               bool accumulate, PrefetchStream& stream) {
  constexpr int64_t L = kLanes<T>;
  const int64_t ldr = (group.end - group.begin) * L;
  for (int64_t point = 0; point < points; ++point) {
    for_each_block(group, [&](int64_t v, int nv) {
      const int64_t column = (v - group.begin) * L;
      const T* b = packed + point * stride + column * k + k0 * nv * L;
      for_each_row_tile(tiles, nv, [&](int64_t first, int count) {
        RowsProduct<T> product{
            operand + places.at(point) + first * kPanelPitch, nullptr, 1,      width,      b,
            result + point * pitch + first * ldr + column,    ldr,     nv * L, accumulate, &stream};
        kMicrokernels<T>.rows[nv][count](product);
      });
    });
  }
}

}  // namespace
}  // namespace densenet_fast::cpu
