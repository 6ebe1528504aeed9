// Winograd's minimal filtering F(2x2, 3x3), Lavin and Gray 2015 (arXiv:1509.09308): 2x2 outputs of
// a 3x3 convolution from 4x4 inputs by 16 multiplications where the direct way needs 36.
//
//   Y  = A' [(G g G') . (B' d B)] A        per tile; the sum over channels is 16 matrix products
//   dg = G' [(A dY A') . (B' d B)] G       its adjoint: weight gradients
//
// Of volumes F(4x4, 3x3) of each slice, and a slice of the output is the sum over the kernels'
// three slices: by 108 multiplications where the direct way needs 432. A transformed slice serves
// three of the output, and the sum is a longer reduction of the products.
//
// Transformed operands are rows at kPanelPitch, points of narrow ones side by side. Tiles are
// counted image by image, row by row, so that runs of them serve images of any size, also many
// small ones at once; what a tile has beyond its image is zero before and dropped behind. A row is
// a tile of a run in one of its slices, slice by slice.
#pragma once

#include "winograd_filter.h"
#include "winograd_tiles.h"

namespace densenet_fast::cpu {
namespace {

// B' d B of a tile, to its points; load_row(i, d) gives row i of d. Of small tiles the two inner
// rows come first, so that few vectors live at once.
template <int M, class T, class LoadRow>
DF_INLINE void store_transformed_input(const LoadRow& load_row, const PointPlaces& places, T* to) {
  constexpr int P = Filter<T, M>::kPoints;
  const auto row = [&](int i, Vec<T>(&f)[P]) {
    Vec<T> d[P];
    load_row(i, d);
    Filter<T, M>::input(d, f);
  };
  if constexpr (M == 2) {
    Vec<T> f1[P], f2[P], outer[P];
    row(1, f1);
    row(2, f2);
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) {
      store<T>(to + places.at(P * j + 1), f1[j] + f2[j]);
      store<T>(to + places.at(P * j + 2), f2[j] - f1[j]);
    }
    row(0, outer);
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) store<T>(to + places.at(P * j), outer[j] - f2[j]);
    row(3, outer);
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) store<T>(to + places.at(P * j + 3), f1[j] - outer[j]);
  } else {
    Vec<T> rows[P][P];
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) row(i, rows[i]);
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) {
      Vec<T> column[P], points[P];
#pragma GCC unroll 6
      for (int i = 0; i < P; ++i) column[i] = rows[i][j];
      Filter<T, M>::input(column, points);
#pragma GCC unroll 6
      for (int i = 0; i < P; ++i) store<T>(to + places.at(P * j + i), points[i]);
    }
  }
}

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

// Transforms channels [c0, c0 + width) of the rows that tiles [begin, end) read: of
// relu(scale * x + shift), or of x itself. Whole vectors are stored, zero behind the last channel,
// and of slices that there are not.
template <int M, bool kActivate, class T, class S>
void transform_inputs(const Image<const S>& x, const WinogradTiles& tiles, int64_t begin,
                      int64_t end, Activation<T> act, int64_t c0, int64_t width,
                      const PointPlaces places, T* to) {
  constexpr int L = kLanes<T>, P = Filter<T, M>::kPoints;
  const int64_t pitch = x.pitch, row_pitch = x.w * pitch;
  T* next = to;
  for_each_row(tiles, begin, end, tiles.border, [&](const WinogradTile& tile, int64_t behind) {
    T* row = next;
    next += kPanelPitch;
    if (!tiles.has_slice(tile, behind)) {
      for (int64_t c = 0; c < width; c += L) {
        for (int p = 0; p < P * P; ++p) store<T>(row + places.at(p) + c, zero<T>());
      }
      return;
    }
    const S* first = x.data + tiles.pixel(tile, behind) * pitch + c0;
    const TileSpan<P> down(tile.y, x.h), across(tile.x, x.w);
    const bool inside = down.whole && across.whole;
    int64_t column[P];  // the second one is always there
    for (int j = 0; j < P; ++j) column[j] = across.has[j] ? (j - 1) * pitch : 0;

    // One vector of channels, `n` of them; kInside: nothing is missing.
    const auto transform = [&]<bool kInside>(int64_t c, int64_t n) {
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
      store_transformed_input<M, T>(
          [&](int i, Vec<T>(&d)[P]) {
#pragma GCC unroll 6
            for (int j = 0; j < P; ++j) d[j] = zero<T>();
            if (!kInside && !down.has[i]) return;
            const S* pixels = first + (i - 1) * row_pitch + c;
#pragma GCC unroll 6
            for (int j = 0; j < P; ++j) {
              const Vec<T> v = get(pixels + (kInside ? (j - 1) * pitch : column[j]));
              d[j] = kActivate ? relu<T>(fma<T>(a[j], v, b[j])) : kInside ? v : a[j] * v;
            }
          },
          places, row + c);
    };
    int64_t c = 0;
    for (; inside && c + L <= width; c += L) transform.template operator()<true>(c, L);
    for (; c < width; c += L) transform.template operator()<false>(c, width - c);
  });
}

// A' M A of one tile and vector: y[row][column], of load(point).
template <int M, class T, class Load>
DF_INLINE void transform_output(const Load& load, Vec<T> (&y)[M][M]) {
  constexpr int P = Filter<T, M>::kPoints;
  Vec<T> s[M][P];
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) {
    Vec<T> m[P], rows[M];
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) m[i] = load(P * j + i);
    Filter<T, M>::output(m, rows);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) s[i][j] = rows[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) Filter<T, M>::output(s[i], y[i]);
}

// G g G' of L kernels at once, turned around where kFlipped, to points `stride` apart.
template <int M, bool kFlipped, class T>
DF_INLINE void store_transformed_weight(const Vec<T> (&taps)[9], T* to, int64_t stride) {
  constexpr int P = Filter<T, M>::kPoints;
  Vec<T> e[P][3];
  for (int j = 0; j < 3; ++j) {
    const auto tap = [&](int i) { return taps[kFlipped ? 8 - 3 * i - j : 3 * i + j]; };
    const Vec<T> g[3] = {tap(0), tap(1), tap(2)};
    Vec<T> of_column[P];
    Filter<T, M>::kernel(g, of_column);
    for (int i = 0; i < P; ++i) e[i][j] = of_column[i];
  }
  for (int i = 0; i < P; ++i) {
    Vec<T> points[P];
    Filter<T, M>::kernel(e[i], points);
    for (int j = 0; j < P; ++j) store<T>(to + (P * j + i) * stride, points[j]);
  }
}

// Transforms rows [i, i + count) of a column block: of the forward's operands [in, out], or with
// flipped kernels of the data gradient's, [out, in] from channel `in` on. Points are `stride`
// apart; a point has the kernels' slices one after the other for each panel of its rows.
template <int M, bool kBackward, class S>
void pack_points(const Weight<S>& weight, int64_t in, int64_t i, int64_t count, int64_t v, int nv,
                 Compute<S>* block, int64_t stride) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t rows = kBackward ? weight.out : weight.in, depth = weight.depth();
  for (int64_t r = i; r < i + count; ++r) {
    const int64_t c0 = r / kPanel * kPanel, panel = smaller(kPanel, rows - c0);
    for (int64_t z = 0; z < depth; ++z) {
      const Weight<S> kernels = weight.slice(kBackward ? depth - 1 - z : z);
      const int64_t place = c0 * depth + z * panel + r - c0;
      for (int u = 0; u < nv; ++u) {
        const int64_t column = (v + u) * L;
        Vec<T> taps[9];
        load_kernels<kBackward>(kernels, kBackward ? r : column, kBackward ? in + column : r, taps);
        store_transformed_weight<M, kBackward, T>(taps, block + (place * nv + u) * L, stride);
      }
    }
  }
}

// Where the operand's rows begin that the kernels' slices read, in a run of so many tiles.
struct SliceOffsets {
  int64_t count, at[3];
  SliceOffsets(const WinogradTiles& tiles, int64_t run) : count(2 * tiles.border + 1) {
    for (int64_t z = 0; z < 3; ++z) at[z] = z * run * kPanelPitch;
  }
};

// For each point: result[point] (+)= the sum over the kernels' slices of operand[point], so many
// rows behind, * packed[point], for a panel [c0, c0 + width) of the operand's `channels` and a
// group of column blocks. The result is [points, rows, vectors of the group], points `pitch` apart;
// those of `packed` are `stride` apart, from the group's first on.
template <class T>
struct PointProducts {
  int64_t points, rows, channels;
  SliceOffsets slices;
  int64_t stride, pitch;
  BlockGroup group;

  void run(const T* operand, const PointPlaces& places, int64_t c0, int64_t width, const T* packed,
           T* result, PrefetchStream& stream) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t ldr = (group.end - group.begin) * L;
    for (int64_t point = 0; point < points; ++point) {
      for_each_block(group, [&](int64_t v, int nv) {
        const int64_t column = (v - group.begin) * L;
        const T* b = packed + point * stride + (column * channels + c0 * nv * L) * slices.count;
        for_each_row_tile(rows, nv, [&](int64_t first, int count) {
          RowsProduct<T> product{operand + places.at(point) + first * kPanelPitch,
                                 slices.at,
                                 slices.count,
                                 width,
                                 b,
                                 result + point * pitch + first * ldr + column,
                                 ldr,
                                 nv * L,
                                 c0 > 0,
                                 &stream};
          kMicrokernels<T>.rows[nv][count](product);
        });
      });
    }
  }
};

}  // namespace
}  // namespace densenet_fast::cpu
