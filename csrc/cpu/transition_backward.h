// Backward of the pooled transition: the products run at the pooled resolution; the epilogue
// spreads a quarter of D to each of the four pixels, masks it and writes the block's gradient
// buffer.
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

  void prefetch(int64_t row, int64_t rows, int64_t c, int64_t columns,
                PrefetchStream& stream) const {
    const int64_t first = pooled_source(x, row);
    const int64_t run = smaller(2 * rows, x.rows() - x.w - first);
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(S));
    stream.add(x.data + first * x.pitch + c, bytes, x.pitch * sizeof(S), run, false);
    stream.add(x.data + (first + x.w) * x.pitch + c, bytes, x.pitch * sizeof(S), run, false);
    if (!gradient.data) return;
    const int64_t pitch = gradient.pitch * static_cast<int64_t>(sizeof(S));
    stream.add(gradient.data + first * gradient.pitch + c, bytes, pitch, run, true);
    stream.add(gradient.data + (first + x.w) * gradient.pitch + c, bytes, pitch, run, true);
  }

  void block(const BackwardBlock<T>& b) const {
    constexpr int L = kLanes<T>;
    int64_t sources[kBackwardTile];  // of all columns: each costs divisions
    for (int64_t r = 0; r < b.rows; ++r) sources[r] = pooled_source(x, b.row + r);
    for (int j = 0; j < b.nv; ++j) {
      const int64_t c = b.column + j * L, n = b.columns - j * L;
      const Vec<T> scale = load<T>(norm.scale() + c), shift = load<T>(norm.shift() + c);
      const Vec<T> mean = load<T>(norm.mean() + c), quarter = splat<T>(T(0.25));
      Vec<T> sum = zero<T>(), sum_centred = zero<T>();
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t first = sources[r];
        const Vec<T> d = b.product ? quarter * load<T>(b.product + r * b.ld + j * L) : zero<T>();
        Vec<T> pooled = zero<T>();
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t pixel = first + corner / 2 * x.w + corner % 2;
          const Vec<T> value = load_upto<T>(x.data + pixel * x.pitch + c, n);
          const Vec<T> y = fma<T>(scale, value, shift);
          pooled += relu<T>(y);
          if (!b.product) continue;
          const Vec<T> dn = where_positive<T>(y, d);
          sum += dn;
          sum_centred = fma<T>(dn, value - mean, sum_centred);
          if (gradient.data) {
            store_upto<T>(gradient.data + pixel * gradient.pitch + c, scale * dn, n);
          }
        }
        store<T>(b.activated + r * b.ld + j * L, quarter * pooled);
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
  if (gradient.h % 2 == 0 && gradient.w % 2 == 0) return;
  for_each_task(gradient.n * gradient.h, [&](int64_t line) {
    const int64_t y = line % gradient.h;
    const bool whole = y == gradient.h - 1 && gradient.h % 2 == 1;
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
  product_backward<T>(shape, grad_affine.beta != nullptr, grad_weight.wanted(),
                      MatrixWeight<S>{weight, grad_weight}, norm, grad_affine,
                      PlainSource<S>{grad_out},
                      UnpoolSink<S>{features, padded_norm, grad_features});
}

}  // namespace
}  // namespace densenet_fast::cpu
