// out = avgpool2x2(relu(scale * features + shift)) * weight^T. Pooling and the 1x1 convolution are
// both linear and commute: pooled while loading, the product has a quarter of the rows.
#pragma once

#include "conv1x1_forward.h"

namespace densenet_fast::cpu {
namespace {

// First of the four input rows that pooled pixel `row` averages; the others follow at
// +1, +w and +w + 1.
template <class S>
DF_INLINE int64_t pooled_source(const Image<const S>& features, int64_t row) {
  const int64_t w = features.w / 2, h = features.h / 2;
  const int64_t x = row % w, y = (row / w) % h, n = row / (w * h);
  return (n * features.h + 2 * y) * features.w + 2 * x;
}

template <class S>
void transition_forward(Image<const S> features, Activation<Compute<S>> act, Weight<S> weight,
                        Image<S> out, Statistics<Compute<S>> statistics) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  product_forward<S>(
      out.rows(), features.c, weight, out, statistics,
      [&](int64_t row, int64_t rows, int64_t c0, int64_t width, T* panel) {
        for (int64_t r = 0; r < rows; ++r) {
          const S* x = features.data + pooled_source(features, row + r) * features.pitch + c0;
          const int64_t down = features.w * features.pitch;
          T* to = panel + r * kPanelPitch;
          for (int64_t c = 0; c < width; c += L) {
            const int64_t n = width - c;
            const Vec<T> a = load_upto<T>(act.scale + c0 + c, n);
            const Vec<T> b = load_upto<T>(act.shift + c0 + c, n);
            const auto value = [&](const S* p) {
              return relu<T>(fma<T>(a, load_upto<T>(p + c, n), b));
            };
            const Vec<T> sum = (value(x) + value(x + features.pitch)) +
                               (value(x + down) + value(x + down + features.pitch));
            store<T>(to + c, sum * splat<T>(T(0.25)));
          }
        }
      },
      [&](int64_t row, int64_t rows, PrefetchStream& stream) {
        // Two runs of input rows per run of pooled rows; exact only within one image row.
        const int64_t first = pooled_source(features, row);
        const int64_t last = smaller(first + 2 * rows, features.rows() - features.w);
        const int64_t bytes = features.c * static_cast<int64_t>(sizeof(S));
        const int64_t pitch = features.pitch * static_cast<int64_t>(sizeof(S));
        stream.add(features.data + first * features.pitch, bytes, pitch, last - first, false);
        stream.add(features.data + (first + features.w) * features.pitch, bytes, pitch,
                   last - first, false);
      });
}

}  // namespace
}  // namespace densenet_fast::cpu
