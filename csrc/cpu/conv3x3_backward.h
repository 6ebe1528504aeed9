// Backward of norm - ReLU - 3x3 convolution with padding 1. For every bottleneck pixel the nine
// output gradients that it reached, three in one dimension and 27 in three, are gathered into one
// row of 9k values; then both gradients are products with it, whatever the image's size.
#pragma once

#include "product_backward.h"

namespace densenet_fast::cpu {
namespace {

// Row p holds, tap by tap, the gradient of output pixel p - (tap offset), or zero outside.
template <class S>
struct GatheredTapsSource {
  using T = Compute<S>;
  Image<const S> grad_growth;
  int64_t depth, lines;  // of the kernel

  void build(int64_t row, int64_t rows, int64_t first, int64_t width, T* panel) const {
    const int64_t k = grad_growth.c;
    // The panel's columns are runs of channels of one tap each.
    for (int64_t e = 0; e < width;) {
      const int64_t tap = (first + e) / k, o = (first + e) % k;
      const int64_t run = smaller(k - o, width - e);
      const int64_t line = tap / 3;
      gather(row, rows, depth / 2 - line / lines, lines / 2 - line % lines, 1 - tap % 3, o, run,
             panel + e);
      e += run;
    }
  }

  void prefetch(int64_t row, int64_t rows, PrefetchStream& stream) const {
    stream.add(grad_growth.data + row * grad_growth.pitch, grad_growth.c * sizeof(S),
               grad_growth.pitch * sizeof(S), rows, false);
  }

 private:
  // Channels [o, o + run) of the pixels (behind, down, right) of rows `row` on. Whole vectors are
  // stored: what lies behind the run is the next run's place or the panel's slack.
  void gather(int64_t row, int64_t rows, int64_t behind, int64_t down, int64_t right, int64_t o,
              int64_t run, T* to) const {
    constexpr int L = kLanes<T>;
    const int64_t d = grad_growth.d, h = grad_growth.h, w = grad_growth.w;
    const int64_t pitch = grad_growth.pitch;
    const S* from = grad_growth.data + (row + (behind * h + down) * w + right) * pitch + o;
    int64_t x = row % w, y = (row / w) % h, z = row / w / h % d;
    for (int64_t r = 0; r < rows; ++r, from += pitch, to += kPanelPitch) {
      const bool inside = static_cast<uint64_t>(z + behind) < static_cast<uint64_t>(d) &&
                          static_cast<uint64_t>(y + down) < static_cast<uint64_t>(h) &&
                          static_cast<uint64_t>(x + right) < static_cast<uint64_t>(w);
      for (int64_t c = 0; c < run; c += L) {
        store<T>(to + c, inside ? load_upto<T>(from + c, run - c) : zero<T>());
      }
      if (++x == w) {
        x = 0;
        if (++y == h) {
          y = 0;
          if (++z == d) z = 0;
        }
      }
    }
  }
};

// A 3x3 weight as the operand of rows (tap, output), and its gradient.
template <class S>
struct TapsWeight {
  using T = Compute<S>;
  Weight<S> weight;
  WeightGradient<S> gradient;

  using Element = S;
  int64_t taps() const { return weight.taps(); }
  void pack(int64_t out, int64_t count, int64_t v, int nv, T* block) const {
    constexpr int64_t L = kLanes<T>;
    for (int64_t z = 0; z < weight.depth(); ++z) {
      const Weight<S> kernels = weight.slice(z);
      T* slice = block + z * weight.slice_taps() * weight.out * nv * L;
      for (int64_t o = out; o < out + count; ++o) {
        for (int u = 0; u < nv; ++u) {
          Vec<T> taps[9];
          load_kernels<true>(kernels, o, (v + u) * L, taps);
          for (int t = 0; t < weight.slice_taps(); ++t) {
            cpu::store<T>(slice + ((t * weight.out + o) * nv + u) * L, taps[t]);
          }
        }
      }
    }
  }
  void store(int64_t out, int64_t c, int64_t columns, const T* from, int64_t ld) const {
    const int64_t count = weight.slice_taps();
    for (int64_t z = 0; z < weight.depth(); ++z) {
      const T* slice = from + (z * count * weight.out + out) * ld;
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        Vec<T> taps[9] = {};
        for (int t = 0; t < count; ++t) taps[t] = load<T>(slice + t * weight.out * ld + j);
        store_kernel_gradients(weight, gradient, out, c + j, z, taps, columns - j);
      }
    }
  }
};

template <class S, bool kAccumulate>
void conv3x3_backward_direct(Image<const S> grad_growth, Image<const S> bottleneck,
                             Norm<Compute<S>> norm, Weight<S> weight, Image<S> grad_norm,
                             NormGradient<Compute<S>> grad_affine, WeightGradient<S> grad_weight) {
  using T = Compute<S>;
  const int64_t k = weight.out, channels = weight.in;
  // Whole taps a panel where they fit.
  const int64_t panel_width = k <= kPanel ? kPanel / k * k : kPanel;
  const int64_t columns = weight.taps() * k;
  const BackwardShape shape{bottleneck.rows(), columns, channels, smaller(panel_width, columns)};
  const PaddedNorm<T> padded_norm(norm, channels);
  product_backward<T>(shape, grad_affine.beta != nullptr, grad_weight.wanted(),
                      TapsWeight<S>{weight, grad_weight}, norm, grad_affine,
                      GatheredTapsSource<S>{grad_growth, weight.depth(), weight.lines()},
                      PixelSink<S, kAccumulate>{bottleneck, padded_norm, grad_norm});
}

}  // namespace
}  // namespace densenet_fast::cpu
