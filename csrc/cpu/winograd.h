// Winograd's minimal filtering F(2x2, 3x3), Lavin and Gray 2015 (arXiv:1509.09308): 2x2 outputs of
// a 3x3 convolution from 4x4 inputs by 16 multiplications where the direct way needs 36.
//
//   Y  = A' [(G g G') . (B' d B)] A        per tile; the sum over channels is 16 matrix products
//   dg = G' [(A dY A') . (B' d B)] G       its adjoint: weight gradients
//
// Of volumes the same in depth around it: 2x2x2 outputs from four slices by 64 multiplications
// where the direct way needs 216. The depth's transform is linear, so that each of its four points
// is an image of one or two slices, and a slice of the output is a sum of three points' products.
//
// Transformed operands are [16 points, tiles, kPanelPitch]. Tiles are counted image by image, row
// by row, so that runs of them serve images of any size, also many small ones at once; what a tile
// has beyond its image is zero before and dropped behind.
#pragma once

#include "blocking.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kPoints = 16;
constexpr int64_t kWinogradTiles = 48;  // of one run, at most
// Where products of all points of the depth are held: in the cache.
constexpr int64_t kVolumeTiles = 28;
constexpr int64_t kPointPitch = kWinogradTiles * kPanelPitch;

// Elements between two points of a result of [16, tiles, width]: a few cache lines more than
// needed, as a transform reads all points of a tile at once and must not find them in one set.
DF_INLINE int64_t result_pitch(int64_t tiles, int64_t width) { return tiles * width + 48; }
// The same of a packed operand [16, k, width], all points of which one kernel is stored to.
DF_INLINE int64_t packed_pitch(int64_t k, int64_t width) { return k * width + 48; }

// A point of the depth's transform: slice `first` behind the tile's, and `sign` times another. The
// last one has the other sign than in the paper, on both sides.
struct DepthPoint {
  int first, second, sign;
};
DF_INLINE int depth_points(int dims) { return dims > 2 ? 4 : 1; }
constexpr DepthPoint kImagePoint = {0, 0, 0};
constexpr DepthPoint kInputPoints[4] = {{-1, 1, -1}, {0, 1, 1}, {1, 0, -1}, {2, 0, -1}};
constexpr DepthPoint kOutputPoints[4] = {{0, 0, 0}, {0, 1, 1}, {0, 1, -1}, {1, 0, 0}};

// What M, the products of these points, make of the two slices of a tile.
template <class Value>
DF_INLINE Value first_slice(Value m0, Value m1, Value m2) {
  return m0 + m1 + m2;
}
template <class Value>
DF_INLINE Value second_slice(Value m1, Value m2, Value m3) {
  return m1 - m2 + m3;
}

struct WinogradTile {
  int64_t image, z, y, x;  // of its first output
};

struct WinogradTiles {
  int64_t n, d, h, w;
  int points;     // of the depth's transform
  int64_t thick;  // slices of a tile
  int64_t deep, down, across;

  template <class Any>
  explicit WinogradTiles(const Image<Any>& image)
      : n(image.n),
        d(image.d),
        h(image.h),
        w(image.w),
        points(depth_points(image.dims)),
        thick(points > 1 ? 2 : 1),
        deep(ceil_div(image.d, thick)),
        down(ceil_div(image.h, 2)),
        across(ceil_div(image.w, 2)) {}
  DepthPoint input_point(int64_t i) const { return points > 1 ? kInputPoints[i] : kImagePoint; }
  DepthPoint output_point(int64_t i) const { return points > 1 ? kOutputPoints[i] : kImagePoint; }

  int64_t count() const { return n * deep * down * across; }
  WinogradTile at(int64_t index) const {
    const int64_t slab = index / (down * across);
    return {slab / deep, slab % deep * thick, index / across % down * 2, index % across * 2};
  }
  // The pixel of a tile's first output, by its row in the image's memory.
  int64_t pixel(const WinogradTile& tile) const {
    return ((tile.image * d + tile.z) * h + tile.y) * w + tile.x;
  }
  // Whether its volume has the slice so many behind a tile's.
  bool has_slice(const WinogradTile& tile, int64_t behind) const {
    return static_cast<uint64_t>(tile.z + behind) < static_cast<uint64_t>(d);
  }
  // What the tiles [begin, end) read, but for their border: whole image rows, and how many pixels
  // there are in them.
  int64_t first_pixel(int64_t begin) const {
    const WinogradTile tile = at(begin);
    return pixel(tile) - tile.x;
  }
  int64_t pixels(int64_t begin, int64_t end) const {
    if (begin >= end) return 0;
    const WinogradTile last = at(end - 1);
    return ((last.image * d + last.z) * h + smaller(last.y + 2, h)) * w - first_pixel(begin);
  }
};

// The rule, where the user allows it. Products saved must outweigh tiles cut by the border: 16
// multiplications for each tile against 9 for each pixel, in two slices of a volume 64 against 27,
// and what the transforms cost. Where the image has less than three rows or columns the direct way
// adds so few terms that its rounding errors are smaller by more than half.
template <class S>
DF_INLINE bool use_winograd(int64_t h, int64_t w, const Weight<S>& weight) {
  const int64_t tiles = ceil_div(h, 2) * ceil_div(w, 2), k = weight.out;
  const int64_t products = weight.dims > 2 ? 32 : 16, direct = weight.dims > 2 ? 27 : 9;
  return winograd_allowed() && k <= kPanel && h > 2 && w > 2 &&
         tiles * products * (k + 6) < direct * h * w * k;
}

// B' d B of a tile, to 16 points; load_at(i, j) is element (i, j) of d. Rows are transformed as
// they are loaded, the two inner ones first, so that no more than 12 vectors live at once.
template <class T, class Load>
DF_INLINE void store_transformed_input(const Load& load_at, T* to) {
  const auto row = [&](int i, Vec<T>(&f)[4]) {
    const Vec<T> d0 = load_at(i, 0), d1 = load_at(i, 1), d2 = load_at(i, 2), d3 = load_at(i, 3);
    f[0] = d0 - d2;
    f[1] = d1 + d2;
    f[2] = d2 - d1;
    f[3] = d1 - d3;
  };
  Vec<T> f1[4], f2[4], outer[4];
  row(1, f1);
  row(2, f2);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store<T>(to + (4 + j) * kPointPitch, f1[j] + f2[j]);
    store<T>(to + (8 + j) * kPointPitch, f2[j] - f1[j]);
  }
  row(0, outer);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) store<T>(to + j * kPointPitch, outer[j] - f2[j]);
  row(3, outer);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) store<T>(to + (12 + j) * kPointPitch, f1[j] - outer[j]);
}

// Transforms channels [c0, c0 + width) of tiles [begin, end) at a point of the depth: of
// relu(scale * x + shift), or of x itself. Whole vectors are stored, zero behind the last channel.
template <bool kActivate, class T, class S>
void transform_inputs(const Image<const S>& x, const WinogradTiles& tiles, int64_t begin,
                      int64_t end, DepthPoint point, Activation<T> act, int64_t c0, int64_t width,
                      T* to) {
  constexpr int L = kLanes<T>;
  const int64_t pitch = x.pitch, row = x.w * pitch, slice = x.h * row;
  for (int64_t index = begin; index < end; ++index, to += kPanelPitch) {
    const WinogradTile tile = tiles.at(index);
    const S* corner = x.data + (tiles.pixel(tile) - x.w - 1) * pitch + c0;
    const S* first = corner + point.first * slice;
    const S* second = corner + point.second * slice;
    const bool has_first = tiles.has_slice(tile, point.first);
    const bool has_second = point.sign && tiles.has_slice(tile, point.second);
    const Vec<T> sign = splat<T>(static_cast<T>(point.sign));
    const bool whole = has_first && (has_second || !point.sign);
    const bool inside =
        whole && tile.y > 0 && tile.x > 0 && tile.y + 2 < x.h && tile.x + 2 < x.w && width % L == 0;
    const auto activated = [&](Vec<T> value, Vec<T> a, Vec<T> b) {
      return kActivate ? relu<T>(fma<T>(a, value, b)) : value;
    };
    if (inside) {
      for (int64_t c = 0; c < width; c += L) {
        const Vec<T> a = kActivate ? load<T>(act.scale + c0 + c) : zero<T>();
        const Vec<T> b = kActivate ? load<T>(act.shift + c0 + c) : zero<T>();
        const auto at = [&](const S* from, int i, int j) {
          return activated(load<T>(from + i * row + j * pitch + c), a, b);
        };
        if (point.sign) {
          store_transformed_input<T>(
              [&](int i, int j) { return fma<T>(sign, at(second, i, j), at(first, i, j)); },
              to + c);
        } else {
          store_transformed_input<T>([&](int i, int j) { return at(first, i, j); }, to + c);
        }
      }
      continue;
    }
    for (int64_t c = 0; c < width; c += L) {
      const int64_t n = width - c;
      const Vec<T> a = kActivate ? load_upto<T>(act.scale + c0 + c, n) : zero<T>();
      const Vec<T> b = kActivate ? load_upto<T>(act.shift + c0 + c, n) : zero<T>();
      const auto at = [&](const S* from, int i, int j) {
        return activated(load_upto<T>(from + i * row + j * pitch + c, n), a, b);
      };
      store_transformed_input<T>(
          [&](int i, int j) {
            const bool exists =
                static_cast<uint64_t>(tile.y + i - 1) < static_cast<uint64_t>(x.h) &&
                static_cast<uint64_t>(tile.x + j - 1) < static_cast<uint64_t>(x.w);
            Vec<T> value = exists && has_first ? at(first, i, j) : zero<T>();
            if (exists && has_second) value = fma<T>(sign, at(second, i, j), value);
            return value;
          },
          to + c);
    }
  }
}

// A' M A of one tile and vector: y[row][column], of load(point).
template <class T, class Load>
DF_INLINE void transform_output(const Load& load, Vec<T> (&y)[2][2]) {
  Vec<T> s[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec<T> m0 = load(j), m1 = load(4 + j), m2 = load(8 + j), m3 = load(12 + j);
    s[0][j] = m0 + m1 + m2;
    s[1][j] = m1 - m2 - m3;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    y[i][0] = s[i][0] + s[i][1] + s[i][2];
    y[i][1] = s[i][1] - s[i][2] - s[i][3];
  }
}

// The same of slice `z` of a tile, whose products `m` has, points of a slice `stride` apart and
// those of the depth `deep`.
template <class T>
DF_INLINE void transform_slice(const T* m, int64_t stride, int64_t deep, const WinogradTiles& tiles,
                               int64_t z, Vec<T> (&y)[2][2]) {
  const auto at = [&](int64_t i, int point) { return load<T>(m + i * deep + point * stride); };
  if (tiles.points == 1) {
    transform_output<T>([&](int p) { return at(0, p); }, y);
  } else if (z == 0) {
    transform_output<T>([&](int p) { return first_slice(at(0, p), at(1, p), at(2, p)); }, y);
  } else {
    transform_output<T>([&](int p) { return second_slice(at(1, p), at(2, p), at(3, p)); }, y);
  }
}

// G g G' of L kernels at once, turned around where kFlipped, to points `stride` apart.
template <bool kFlipped, class T>
DF_INLINE void store_transformed_weight(const Vec<T> (&taps)[9], T* to, int64_t stride) {
  Vec<T> e[4][3];
  const Vec<T> half = splat<T>(T(0.5));
  for (int j = 0; j < 3; ++j) {
    const auto tap = [&](int i) { return taps[kFlipped ? 8 - 3 * i - j : 3 * i + j]; };
    const Vec<T> g0 = tap(0), g1 = tap(1), g2 = tap(2);
    const Vec<T> outer = half * (g0 + g2), inner = half * g1;
    e[0][j] = g0;
    e[1][j] = outer + inner;
    e[2][j] = outer - inner;
    e[3][j] = g2;
  }
  for (int i = 0; i < 4; ++i) {
    const Vec<T> outer = half * (e[i][0] + e[i][2]), inner = half * e[i][1];
    store<T>(to + (4 * i + 0) * stride, e[i][0]);
    store<T>(to + (4 * i + 1) * stride, outer + inner);
    store<T>(to + (4 * i + 2) * stride, outer - inner);
    store<T>(to + (4 * i + 3) * stride, e[i][2]);
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
template <bool kBackward, class S>
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
        store_transformed_weight<kBackward, T>(points[z], block + z * deep + (r * nv + u) * L,
                                               stride);
      }
    }
  }
}

// For every point: result[point] (+)= operand[point] * packed[point], [k0, k0 + width) of the
// reduction's k, for a group of column blocks. The result is [16, tiles, vectors of the group],
// points `pitch` apart; those of `packed` are `stride` apart, from the group's first on.
template <class T>
DF_INLINE void multiply_points(const T* operand, int64_t tiles, int64_t k0, int64_t width,
                               int64_t k, const T* packed, int64_t stride, const BlockGroup& group,
                               T* result, int64_t pitch, bool accumulate, PrefetchStream& stream) {
  constexpr int64_t L = kLanes<T>;
  const int64_t ldr = (group.end - group.begin) * L;
  for (int64_t point = 0; point < kPoints; ++point) {
    for_each_block(group, [&](int64_t v, int nv) {
      const int64_t column = (v - group.begin) * L;
      const T* b = packed + point * stride + column * k + k0 * nv * L;
      for_each_row_tile(tiles, nv, [&](int64_t first, int count) {
        RowsProduct<T> product{operand + point * kPointPitch + first * kPanelPitch,
                               nullptr,
                               1,
                               width,
                               b,
                               result + point * pitch + first * ldr + column,
                               ldr,
                               nv * L,
                               accumulate,
                               &stream};
        kMicrokernels<T>.rows[nv][count](product);
      });
    });
  }
}

}  // namespace
}  // namespace densenet_fast::cpu
