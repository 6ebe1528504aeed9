// out = avgpool2x2(relu(scale * features + shift)) * weight^T. Pooling and the 1x1 convolution are
// both linear and commute: pooled while loading, the product has a quarter of the rows, half of
// them in one dimension and an eighth in three.
#pragma once

#include "conv1x1_forward.h"

namespace densenet_fast::cpu {
namespace {

// Where 2-wide pooling takes its pixels: pooled pixel `row` averages those at first(row) +
// corners[0 .. count), its neighbours pairwise.
struct PooledPixels {
  int64_t d, h, w;                 // of the image
  int64_t step_d, step_h;          // pixels to a window's next slice and row; 1: there is none
  int64_t corners[8] = {}, count;  // of a window

  template <class Any>
  explicit PooledPixels(const Image<Any>& image)
      : d(image.d),
        h(image.h),
        w(image.w),
        step_d(image.dims > 2 ? 2 : 1),
        step_h(image.dims > 1 ? 2 : 1),
        count(2 * step_d * step_h) {
    for (int64_t i = 0; i < count; ++i) corners[i] = (i / 4 * h + i / 2 % 2) * w + i % 2;
  }
  int64_t first(int64_t row) const {
    const int64_t across = w / 2, down = h / step_h, deep = d / step_d;
    const int64_t x = row % across, line = row / across;
    const int64_t y = line % down, slice = line / down;
    return ((slice / deep * d + slice % deep * step_d) * h + y * step_h) * w + 2 * x;
  }
};

// Runs of input rows per run of pooled rows, two of them in an image; exact only within one row.
template <class S>
void prefetch_pooled(const Image<S>& x, const PooledPixels& pixels, int64_t row, int64_t rows,
                     int64_t c, int64_t columns, PrefetchStream& stream, bool for_write) {
  for (int64_t i = 0; i < smaller(4, pixels.count); i += 2) {
    const int64_t first = pixels.first(row) + pixels.corners[i];
    stream.add(x.data + first * x.pitch + c, columns * static_cast<int64_t>(sizeof(S)),
               x.pitch * static_cast<int64_t>(sizeof(S)), smaller(2 * rows, x.rows() - first),
               for_write);
  }
}

template <class S>
void transition_forward(Image<const S> features, Activation<Compute<S>> act, Weight<S> weight,
                        Image<S> out, Statistics<Compute<S>> statistics) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const PooledPixels pixels(features);
  const Vec<T> share = splat<T>(T(1) / static_cast<T>(pixels.count)), floor = splat<T>(act.floor);
  product_forward<S>(
      out.rows(), features.c, weight, out, statistics,
      [&](int64_t row, int64_t rows, int64_t c0, int64_t width, T* panel) {
        for (int64_t r = 0; r < rows; ++r) {
          const S* x = features.data + pixels.first(row + r) * features.pitch + c0;
          T* to = panel + r * kPanelPitch;
          for (int64_t c = 0; c < width; c += L) {
            const int64_t n = width - c;
            const Vec<T> a = load_upto<T>(act.scale + c0 + c, n);
            const Vec<T> b = load_upto<T>(act.shift + c0 + c, n);
            const auto pair = [&](int64_t corner) {
              const S* p = x + pixels.corners[corner] * features.pitch + c;
              return relu<T>(fma<T>(a, load_upto<T>(p, n), b), floor) +
                     relu<T>(fma<T>(a, load_upto<T>(p + features.pitch, n), b), floor);
            };
            Vec<T> sum = pair(0);
            if (pixels.count > 2) sum += pair(2);
            if (pixels.count > 4) sum += pair(4) + pair(6);
            store<T>(to + c, sum * share);
          }
        }
      },
      [&](int64_t row, int64_t rows, PrefetchStream& stream) {
        prefetch_pooled(features, pixels, row, rows, 0, features.c, stream, false);
      });
}

}  // namespace
}  // namespace densenet_fast::cpu
