// Winograd's minimal filtering of one dimension, and its adjoints.
#pragma once

#include "simd.h"

namespace densenet_fast::cpu {
namespace {

// Minimal filtering of one dimension: what F(kOutputs, 3) makes of inputs, kernels and products,
// and the adjoints of the last two. Of any values that add and are multiplied.
template <class T, int kOutputs>
struct Filter;

template <class T>
struct Filter<T, 2> {
  using V = Vec<T>;
  static constexpr int kPoints = 4;

  DF_INLINE void input(const V (&d)[4], V (&f)[4]) {
    f[0] = d[0] - d[2];
    f[1] = d[1] + d[2];
    f[2] = d[2] - d[1];
    f[3] = d[1] - d[3];
  }
  DF_INLINE void kernel(const V (&g)[3], V (&e)[4]) {
    const V half = splat<T>(T(0.5)), outer = half * (g[0] + g[2]), inner = half * g[1];
    e[0] = g[0];
    e[1] = outer + inner;
    e[2] = outer - inner;
    e[3] = g[2];
  }
  DF_INLINE void output(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  DF_INLINE void output_adjoint(const V (&y)[2], V (&m)[4]) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
  }
  DF_INLINE void kernel_adjoint(const V (&e)[4], V (&g)[3]) {
    const V half = splat<T>(T(0.5)), even = half * (e[1] + e[2]);
    g[0] = e[0] + even;
    g[1] = half * (e[1] - e[2]);
    g[2] = even + e[3];
  }
};

// At the points 0, -a, a, -b, b and infinity: these two make about the smallest errors, two thirds
// of what 1 and 2, Lavin and Gray's, make.
template <class T>
struct Filter<T, 4> {
  using V = Vec<T>;
  static constexpr int kPoints = 6;
  static constexpr T a = T(0.625), b = T(1.5), aa = a * a, bb = b * b;
  static constexpr T of_a = 1 / (2 * aa * (aa - bb)), of_b = 1 / (2 * bb * (bb - aa));

  DF_INLINE void input(const V (&d)[6], V (&f)[6]) {
    const V a_even = d[4] - bb * d[2], a_odd = d[3] - bb * d[1];
    const V b_even = d[4] - aa * d[2], b_odd = d[3] - aa * d[1];
    f[0] = b_even - bb * (d[2] - aa * d[0]);
    f[1] = a_even + a * a_odd;
    f[2] = a_even - a * a_odd;
    f[3] = b_even + b * b_odd;
    f[4] = b_even - b * b_odd;
    f[5] = d[5] - aa * d[3] - bb * b_odd;
  }
  DF_INLINE void kernel(const V (&g)[3], V (&e)[6]) {
    const V a_even = of_a * g[0] + of_a * aa * g[2], a_odd = of_a * a * g[1];
    const V b_even = of_b * g[0] + of_b * bb * g[2], b_odd = of_b * b * g[1];
    e[0] = 1 / (aa * bb) * g[0];
    e[1] = a_even + a_odd;
    e[2] = a_even - a_odd;
    e[3] = b_even + b_odd;
    e[4] = b_even - b_odd;
    e[5] = g[2];
  }
  DF_INLINE void output(const V (&m)[6], V (&y)[4]) {
    const V a_even = m[1] + m[2], a_odd = a * (m[1] - m[2]);
    const V b_even = m[3] + m[4], b_odd = b * (m[3] - m[4]);
    y[0] = m[0] + a_even + b_even;
    y[1] = a_odd + b_odd;
    y[2] = aa * a_even + bb * b_even;
    y[3] = aa * a_odd + bb * b_odd + m[5];
  }
  DF_INLINE void output_adjoint(const V (&y)[4], V (&m)[6]) {
    const V a_even = y[0] + aa * y[2], a_odd = a * (y[1] + aa * y[3]);
    const V b_even = y[0] + bb * y[2], b_odd = b * (y[1] + bb * y[3]);
    m[0] = y[0];
    m[1] = a_even + a_odd;
    m[2] = a_even - a_odd;
    m[3] = b_even + b_odd;
    m[4] = b_even - b_odd;
    m[5] = y[3];
  }
  DF_INLINE void kernel_adjoint(const V (&e)[6], V (&g)[3]) {
    const V a_even = of_a * (e[1] + e[2]), a_odd = of_a * a * (e[1] - e[2]);
    const V b_even = of_b * (e[3] + e[4]), b_odd = of_b * b * (e[3] - e[4]);
    g[0] = 1 / (aa * bb) * e[0] + a_even + b_even;
    g[1] = a_odd + b_odd;
    g[2] = aa * a_even + bb * b_even + e[5];
  }
};

}  // namespace
}  // namespace densenet_fast::cpu
