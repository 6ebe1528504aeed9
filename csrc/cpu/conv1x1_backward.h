// Backward of norm - ReLU - 1x1 convolution. The gradient of the bottleneck is never stored: the
// second norm's backward, an affine map of (grad_norm, bottleneck), is the operand load.
#pragma once

#include "product_backward.h"

namespace densenet_fast::cpu {
namespace {

template <class S>
struct BottleneckGradientSource {
  using T = Compute<S>;
  Image<const S> grad_norm, bottleneck;
  const T* coefficients;  // [3, B]: p, q, s of dZ = p * grad_norm + q * Z + s

  void build(int64_t row, int64_t rows, int64_t c0, int64_t width, T* panel) const {
    constexpr int L = kLanes<T>;
    const int64_t channels = bottleneck.c;
    const S* g = grad_norm.data + row * grad_norm.pitch + c0;
    const S* z = bottleneck.data + row * bottleneck.pitch + c0;
    for (int64_t c = 0; c < width; c += L) {
      const int64_t n = width - c;
      const T* at = coefficients + c0 + c;
      const Vec<T> p = load_upto<T>(at, n);
      const Vec<T> q = load_upto<T>(at + channels, n);
      const Vec<T> s = load_upto<T>(at + 2 * channels, n);
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<T> dn = load_upto<T>(g + r * grad_norm.pitch + c, n);
        const Vec<T> value = load_upto<T>(z + r * bottleneck.pitch + c, n);
        store<T>(panel + r * kPanelPitch + c, fma<T>(p, dn, fma<T>(q, value, s)));
      }
    }
  }

  void prefetch(int64_t row, int64_t rows, PrefetchStream& stream) const {
    const int64_t bytes = bottleneck.c * static_cast<int64_t>(sizeof(S));
    stream.add(grad_norm.data + row * grad_norm.pitch, bytes, grad_norm.pitch * sizeof(S), rows,
               false);
    stream.add(bottleneck.data + row * bottleneck.pitch, bytes, bottleneck.pitch * sizeof(S), rows,
               false);
  }
};

template <class S>
void conv1x1_backward(Image<const S> grad_norm, Image<const S> bottleneck,
                      const Compute<S>* coefficients, Image<const S> features,
                      Norm<Compute<S>> norm, Weight<S> weight, Image<S> grad_features,
                      NormGradient<Compute<S>> grad_affine, WeightGradient<S> grad_weight) {
  using T = Compute<S>;
  const BackwardShape shape{features.rows(), weight.out, weight.in, kPanel};
  const PaddedNorm<T> padded_norm(norm, features.c);
  product_backward<T>(shape, grad_affine.beta != nullptr, grad_weight.wanted(),
                      MatrixWeight<S>{weight, grad_weight}, norm, grad_affine,
                      BottleneckGradientSource<S>{grad_norm, bottleneck, coefficients},
                      PixelSink<S, true>{features, padded_norm, grad_features});
}

}  // namespace
}  // namespace densenet_fast::cpu
