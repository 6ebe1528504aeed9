// Backward of the pooled transition: the products run at the pooled resolution; the epilogue
// spreads D to the pixels of its window, a quarter to each of four, masks it and writes the block's
// gradient buffer.
#pragma once

#include "product_backward.h"
#include "transition_forward.h"

namespace densenet_fast::cpu {
namespace {

template <class S>
struct PlainSource {
  using T = Compute<S>;
  Image<const S> gradient;

  void build(int64_t row, int64_t rows, int64_t c0, int64_t width, T* panel) const {
    const S* from = gradient.data + row * gradient.pitch + c0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        store<T>(panel + r * kPanelPitch + c,
                 load_upto<T>(from + r * gradient.pitch + c, width - c));
      }
    }
  }

  void prefetch(int64_t row, int64_t rows, PrefetchStream& stream) const {
    stream.add(gradient.data + row * gradient.pitch, gradient.c * sizeof(S),
               gradient.pitch * sizeof(S), rows, false);
  }
};

template <class S>
struct UnpoolSink {
  using T = Compute<S>;
  Image<const S> x;
  const PaddedNorm<T>& norm;
  Image<S> gradient;
  PooledPixels pixels;
  T floor;

  void prefetch(int64_t row, int64_t rows, int64_t c, int64_t columns,
                PrefetchStream& stream) const {
    prefetch_pooled(x, pixels, row, rows, c, columns, stream, false);
    if (gradient.data) prefetch_pooled(gradient, pixels, row, rows, c, columns, stream, true);
  }

  void block(const BackwardBlock<T>& b) const {
    constexpr int L = kLanes<T>;
    int64_t sources[kBackwardTile];  // of all columns: each costs divisions
    for (int64_t r = 0; r < b.rows; ++r) sources[r] = pixels.first(b.row + r);
    const Vec<T> share = splat<T>(T(1) / static_cast<T>(pixels.count)), lowest = splat<T>(floor);
    for (int j = 0; j < b.nv; ++j) {
      const int64_t c = b.column + j * L, n = b.columns - j * L;
      const Vec<T> scale = load<T>(norm.scale() + c), shift = load<T>(norm.shift() + c);
      const Vec<T> mean = load<T>(norm.mean() + c);
      Vec<T> sum = zero<T>(), sum_centred = zero<T>();
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t first = sources[r];
        const Vec<T> d = b.product ? share * load<T>(b.product + r * b.ld + j * L) : zero<T>();
        Vec<T> pooled = zero<T>();
        for (int64_t corner = 0; corner < pixels.count; ++corner) {
          const int64_t pixel = first + pixels.corners[corner];
          const Vec<T> value = load_upto<T>(x.data + pixel * x.pitch + c, n);
          const Vec<T> y = fma<T>(scale, value, shift);
          pooled += relu<T>(y, lowest);
          if (!b.product) continue;
          const Vec<T> dn = where_positive<T>(y, d, lowest);
          sum += dn;
          sum_centred = fma<T>(dn, value - mean, sum_centred);
          if (gradient.data) {
            store_upto<T>(gradient.data + pixel * gradient.pitch + c, scale * dn, n);
          }
        }
        store<T>(b.activated + r * b.ld + j * L, share * pooled);
      }
      if (!b.product) continue;
      store<T>(b.sum + j * L, load<T>(b.sum + j * L) + sum);
      store<T>(b.sum_centred + j * L, load<T>(b.sum_centred + j * L) + sum_centred);
    }
  }
};

// Pixels that pooling cuts off (odd sizes) get no gradient.
template <class S>
void clear_cut_pixels(Image<S> gradient) {
  const int64_t d = gradient.d, h = gradient.h;
  const bool odd_d = gradient.dims > 2 && d % 2 == 1, odd_h = gradient.dims > 1 && h % 2 == 1;
  if (!odd_d && !odd_h && gradient.w % 2 == 0) return;
  for_each_task(gradient.slices() * h, [&](int64_t line) {
    const bool whole = (odd_h && line % h == h - 1) || (odd_d && line / h % d == d - 1);
    const int64_t first = whole ? 0 : gradient.w / 2 * 2;
    for (int64_t x = first; x < gradient.w; ++x) {
      S* p = gradient.data + (line * gradient.w + x) * gradient.pitch;
      for (int64_t c = 0; c < gradient.c; ++c) p[c] = S{};
    }
  });
}

template <class S>
void transition_backward(Image<const S> grad_out, Image<const S> features, Norm<Compute<S>> norm,
                         Weight<S> weight, Image<S> grad_features,
                         NormGradient<Compute<S>> grad_affine, WeightGradient<S> grad_weight) {
  using T = Compute<S>;
  const BackwardShape shape{grad_out.rows(), weight.out, weight.in, kPanel};
  const PaddedNorm<T> padded_norm(norm, features.c);
  if (grad_features.data) clear_cut_pixels(grad_features);
  product_backward<T>(
      shape, grad_affine.beta != nullptr, grad_weight.wanted(),
      MatrixWeight<S>{weight, grad_weight}, norm, grad_affine, PlainSource<S>{grad_out},
      UnpoolSink<S>{features, padded_norm, grad_features, PooledPixels(features), norm.floor});
}

}  // namespace
}  // namespace densenet_fast::cpu
