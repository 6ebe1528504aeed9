// The two register-tiled products everything else is made of.
//
//   rows_product:      C[i, j] (+)= sum_k A[i, k] * B[k, j]    A row-major in scratch, B packed
//   transposed_product: C[i, j] (+)= sum_r A[r, i] * B[r, j]     both row-major: weight gradients
//
// MR x NV vectors of accumulators stay in registers; one broadcast of A is reused over NV vectors.
#pragma once

#include "prefetch.h"
#include "simd.h"

namespace densenet_fast::cpu {
namespace {

// Scratch operands hold panels of at most kPanel channels at a compile-time pitch, so that the row
// offsets of a tile are constants in the address arithmetic; the odd pitch spreads cache sets.
constexpr int kPanel = 128;
constexpr int kPanelPitch = kPanel + 16;
constexpr int kPrefetchEvery = 8;  // steps of k between two prefetch groups

template <class T>
struct RowsProduct {
  const T* a;                  // [MR, taps x K] at kPanelPitch
  const int64_t* tap_offsets;  // element offset of every tap in a (nullptr: one tap at 0)
  int64_t taps;
  int64_t k;   // steps per tap
  const T* b;  // [taps x K, NV * lanes]
  T* c;
  int64_t ldc;
  int64_t columns;  // valid columns of C, at most NV * lanes
  bool accumulate;  // start from C instead of zero
  PrefetchStream* prefetch;
};

template <class T, int MR, int NV>
void rows_product(const RowsProduct<T>& p) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NV];
  const bool full = p.columns == NV * L;
  const int64_t last = p.columns - (NV - 1) * L;
  if (p.accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const T* c = p.c + i * p.ldc + j * L;
        acc[i][j] = (j < NV - 1 || full) ? load<T>(c) : load_partial<T>(c, last);
      }
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = zero<T>();
    }
  }
  const T* b = p.b;
  PrefetchStream& stream = *p.prefetch;
  for (int64_t tap = 0; tap < p.taps; ++tap) {
    const T* a = p.a + (p.tap_offsets ? p.tap_offsets[tap] : 0);
    for (int64_t k0 = 0; k0 < p.k; k0 += kPrefetchEvery) {
      stream.issue();
      const int64_t steps = p.k - k0 < kPrefetchEvery ? p.k - k0 : kPrefetchEvery;
#pragma GCC unroll 2
      for (int64_t k = 0; k < steps; ++k) {
        Vec<T> w[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) w[j] = load<T>(b + j * L);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const Vec<T> x = splat<T>(a[i * kPanelPitch]);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) acc[i][j] = fma<T>(x, w[j], acc[i][j]);
        }
        b += NV * L;
        ++a;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* c = p.c + i * p.ldc + j * L;
      if (j < NV - 1 || full) {
        store<T>(c, acc[i][j]);
      } else {
        store_partial<T>(c, acc[i][j], last);
      }
    }
  }
}

template <class T>
struct TransposedProduct {
  const T* a;  // [rows, >= MR] at kPanelPitch
  const T* b;  // [rows, NV * lanes] at ldb
  int64_t ldb;
  int64_t rows;
  T* c;  // [MR, NV * lanes] at ldc, padded to whole vectors
  int64_t ldc;
  bool accumulate;  // start from C instead of zero
  PrefetchStream* prefetch;
};

template <class T, int MR, int NV>
void transposed_product(const TransposedProduct<T>& p) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = p.accumulate ? load<T>(p.c + i * p.ldc + j * L) : zero<T>();
    }
  }
  const T* a = p.a;
  const T* b = p.b;
  PrefetchStream& stream = *p.prefetch;
  for (int64_t r0 = 0; r0 < p.rows; r0 += kPrefetchEvery) {
    stream.issue();
    const int64_t steps = p.rows - r0 < kPrefetchEvery ? p.rows - r0 : kPrefetchEvery;
#pragma GCC unroll 2
    for (int64_t r = 0; r < steps; ++r) {
      Vec<T> x[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[j] = load<T>(b + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Vec<T> g = splat<T>(a[i]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = fma<T>(g, x[j], acc[i][j]);
      }
      a += kPanelPitch;
      b += p.ldb;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store<T>(p.c + i * p.ldc + j * L, acc[i][j]);
  }
}

// Function tables indexed by [NV][MR].
constexpr int kTableRows = 15;

template <class T>
struct Microkernels {
  using Rows = void (*)(const RowsProduct<T>&);
  using Transposed = void (*)(const TransposedProduct<T>&);
  Rows rows[kMaxVectors + 1][kTableRows] = {};
  Transposed transposed[kMaxVectors + 1][kTableRows] = {};
};

template <class T, int NV, int MR>
constexpr void fill_microkernels(Microkernels<T>& table) {
  if constexpr (MR >= 1) {
    table.rows[NV][MR] = &rows_product<T, MR, NV>;
    table.transposed[NV][MR] = &transposed_product<T, MR, NV>;
    fill_microkernels<T, NV, MR - 1>(table);
  }
}

template <class T>
constexpr Microkernels<T> make_microkernels() {
  Microkernels<T> table;
  fill_microkernels<T, 1, kMaxRows[1]>(table);
  fill_microkernels<T, 2, kMaxRows[2]>(table);
  fill_microkernels<T, 3, kMaxRows[3]>(table);
  return table;
}

template <class T>
constexpr Microkernels<T> kMicrokernels = make_microkernels<T>();

}  // namespace
}  // namespace densenet_fast::cpu
