// The minimal filtering of the stem's rows: four outputs of stride 2 from 13 inputs and seven taps.
#pragma once

#include "toom_cook.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kStemKernel = 7, kStemTile = 4;
// Of finite points +-p these make about the smallest errors.
struct EvenPoints {
  static constexpr double kAt[] = {-1.75, -0.875, -0.28125, 0.28125, 0.875, 1.75};
};
struct OddPoints {
  static constexpr double kAt[] = {-1.5, -0.625, 0, 0.625, 1.5};
};
using StemEven = ToomCook<4, 4, EvenPoints>;
using StemOdd = ToomCook<4, 3, OddPoints>;
constexpr int kEvenPoints = StemEven::kPoints, kOddPoints = StemOdd::kPoints;
constexpr int kStemPoints = kEvenPoints + kOddPoints;

// Both as one: inputs and taps are even and odd by turns, points the even ones' and then the
// others.
template <class T>
struct StemFilter {
  using V = Vec<T>;
  static constexpr int kTaps = static_cast<int>(kStemKernel);

  DF_INLINE void input(const V (&d)[kStemPoints], V (&points)[kStemPoints]) {
    V even[kEvenPoints], odd[kOddPoints], of_even[kEvenPoints], of_odd[kOddPoints];
    split(d, even, odd);
    StemEven::template input<T>(even, of_even);
    StemOdd::template input<T>(odd, of_odd);
    join(of_even, of_odd, points);
  }
  DF_INLINE void kernel(const V (&taps)[kTaps], V (&points)[kStemPoints]) {
    V even[4], odd[3], of_even[kEvenPoints], of_odd[kOddPoints];
    split(taps, even, odd);
    StemEven::template kernel<T>(even, of_even);
    StemOdd::template kernel<T>(odd, of_odd);
    join(of_even, of_odd, points);
  }
  DF_INLINE void output(const V (&points)[kStemPoints], V (&y)[kStemTile]) {
    V even[kEvenPoints], odd[kOddPoints], of_odd[kStemTile];
    part(points, even, odd);
    StemEven::template output<T>(even, y);
    StemOdd::template output<T>(odd, of_odd);
    for (int i = 0; i < kStemTile; ++i) y[i] += of_odd[i];
  }
  DF_INLINE void output_adjoint(const V (&y)[kStemTile], V (&points)[kStemPoints]) {
    V of_even[kEvenPoints], of_odd[kOddPoints];
    StemEven::template output_adjoint<T>(y, of_even);
    StemOdd::template output_adjoint<T>(y, of_odd);
    join(of_even, of_odd, points);
  }
  DF_INLINE void kernel_adjoint(const V (&points)[kStemPoints], V (&taps)[kTaps]) {
    V even[kEvenPoints], odd[kOddPoints], of_even[4], of_odd[3];
    part(points, even, odd);
    StemEven::template kernel_adjoint<T>(even, of_even);
    StemOdd::template kernel_adjoint<T>(odd, of_odd);
    for (int t = 0; t < kTaps; ++t) taps[t] = t % 2 ? of_odd[t / 2] : of_even[t / 2];
  }

 private:
  template <int kAll, int kEven, int kOdd>
  DF_INLINE void split(const V (&all)[kAll], V (&even)[kEven], V (&odd)[kOdd]) {
    for (int i = 0; i < kEven; ++i) even[i] = all[2 * i];
    for (int i = 0; i < kOdd; ++i) odd[i] = all[2 * i + 1];
  }
  DF_INLINE void part(const V (&all)[kStemPoints], V (&even)[kEvenPoints], V (&odd)[kOddPoints]) {
    for (int p = 0; p < kEvenPoints; ++p) even[p] = all[p];
    for (int p = 0; p < kOddPoints; ++p) odd[p] = all[kEvenPoints + p];
  }
  DF_INLINE void join(const V (&even)[kEvenPoints], const V (&odd)[kOddPoints],
                      V (&all)[kStemPoints]) {
    for (int p = 0; p < kEvenPoints; ++p) all[p] = even[p];
    for (int p = 0; p < kOddPoints; ++p) all[kEvenPoints + p] = odd[p];
  }
};

}  // namespace
}  // namespace densenet_fast::cpu
