// Minimal filtering F(kOutputs, kTaps) of one dimension at any points and infinity, by its
// matrices: Y = A' [(G g) . (B' d)]. Barabasz et al. 2020 (arXiv:1803.10986) on the choice of
// points.
#pragma once

#include "simd.h"

namespace densenet_fast::cpu {
namespace {

template <int kOutputs, int kTaps, class Finite>
struct ToomCook {
  static constexpr int kPoints = kOutputs + kTaps - 1, kFinite = kPoints - 1;
  static_assert(sizeof(Finite::kAt) == kFinite * sizeof(double));

  struct Matrices {
    double a[kPoints][kOutputs] = {}, g[kPoints][kTaps] = {}, b[kPoints][kPoints] = {};

    constexpr Matrices() {
      constexpr auto& points = Finite::kAt;
      for (int i = 0; i < kFinite; ++i) {
        // Rows of b are the coefficients of the product of x - p of all other points.
        double scale = 1;
        b[i][0] = 1;
        int degree = 0;
        for (int j = 0; j < kFinite; ++j) {
          if (j == i) continue;
          scale *= points[i] - points[j];
          times(b[i], degree++, points[j]);
        }
        double power = 1;
        for (int k = 0; k < kPoints; ++k, power *= points[i]) {
          if (k < kOutputs) a[i][k] = power;
          if (k < kTaps) g[i][k] = power / scale;
        }
      }
      a[kFinite][kOutputs - 1] = g[kFinite][kTaps - 1] = b[kFinite][0] = 1;
      for (int j = 0; j < kFinite; ++j) times(b[kFinite], j, points[j]);
    }
    // Multiplies a polynomial by x - p.
    static constexpr void times(double (&polynomial)[kPoints], int degree, double p) {
      for (int k = degree + 1; k-- > 0;) {
        polynomial[k + 1] += polynomial[k];
        polynomial[k] *= -p;
      }
    }
  };
  static constexpr Matrices kMatrices{};

  // B' d, G g, A' m, and the adjoints of the last two.
  template <class T>
  DF_INLINE void input(const Vec<T> (&d)[kPoints], Vec<T> (&out)[kPoints]) {
    multiply<T, false>(kMatrices.b, d, out);
  }
  template <class T>
  DF_INLINE void kernel(const Vec<T> (&g)[kTaps], Vec<T> (&out)[kPoints]) {
    multiply<T, false>(kMatrices.g, g, out);
  }
  template <class T>
  DF_INLINE void output(const Vec<T> (&m)[kPoints], Vec<T> (&out)[kOutputs]) {
    multiply<T, true>(kMatrices.a, m, out);
  }
  template <class T>
  DF_INLINE void output_adjoint(const Vec<T> (&y)[kOutputs], Vec<T> (&out)[kPoints]) {
    multiply<T, false>(kMatrices.a, y, out);
  }
  template <class T>
  DF_INLINE void kernel_adjoint(const Vec<T> (&e)[kPoints], Vec<T> (&out)[kTaps]) {
    multiply<T, true>(kMatrices.g, e, out);
  }

 private:
  template <class T, bool kTransposed, int kRows, int kColumns, int kIn, int kOut>
  DF_INLINE void multiply(const double (&matrix)[kRows][kColumns], const Vec<T> (&in)[kIn],
                          Vec<T> (&out)[kOut]) {
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) {
      out[i] = zero<T>();
#pragma GCC unroll 8
      for (int j = 0; j < kIn; ++j) {
        const double factor = kTransposed ? matrix[j][i] : matrix[i][j];
        if (factor != 0) out[i] = fma<T>(splat<T>(static_cast<T>(factor)), in[j], out[i]);
      }
    }
  }
};

}  // namespace
}  // namespace densenet_fast::cpu
