// Weights packed for products: a [k, columns] operand in column blocks of whole vectors. The block
// of vectors [v, v + nv) begins at element v * lanes * k and holds [k, nv * lanes], zero padded.
#pragma once

#include <utility>

#include "bfloat16.h"
#include "parallel.h"

namespace densenet_fast::cpu {
namespace {

DF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Elements of a packed weight, at most, that every thread packs for itself into scratch: what
// another thread has packed would come from that one's cache, which takes longer.
DF_INLINE int64_t most_own_weight() { return (int64_t{1} << 22) / thread_count(); }

// What pack(to) makes of `size` elements, unless this thread has made it before.
template <class T, class Pack>
DF_INLINE const T* own_weight(int64_t size, bool made, const Pack& pack) {
  T* to = scratch<T>(Scratch::kPacked, size);
  if (!made) pack(to);
  return to;
}

template <class T>
DF_INLINE int64_t vectors(int64_t columns) {
  return ceil_div(columns, kLanes<T>);
}

template <class T>
DF_INLINE int64_t padded(int64_t columns) {
  return vectors<T>(columns) * kLanes<T>;
}

// Vectors in the next column block: `prefer` of them, avoiding a lone last vector, whose tile
// would be bound by loads, unless single ones are asked for.
DF_INLINE int block_vectors(int64_t left, int prefer) {
  if (prefer == 1) return 1;
  if (left <= 3) return static_cast<int>(left);
  if (left == 4) return 2;
  return prefer;
}

// Calls body(v, nv) for the column blocks of `vecs` vectors.
template <class F>
DF_INLINE void for_each_block(int64_t vecs, int prefer, const F& body) {
  for (int64_t v = 0; v < vecs;) {
    const int nv = block_vectors(vecs - v, prefer);
    body(v, nv);
    v += nv;
  }
}

template <class T, int kStep, int... I>
DF_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, (I & kStep ? L + I - kStep : I)...);
  b = __builtin_shufflevector(a, b, (I & kStep ? L + I : I + kStep)...);
  a = low;
}

// Transposes a square of L vectors: blocks of kStep swap across its diagonal, then larger ones.
template <class T, int kStep = 1>
DF_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if ((i & kStep) == 0) {
      exchange<T, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, L>());
    }
  }
  if constexpr (2 * kStep < L) transpose<T, 2 * kStep>(rows);
}

// Elements i, i + 1, ... of a weight, at most `n`, as values of S.
template <class S>
DF_INLINE Vec<Compute<S>> weight_vector(const Weight<S>& weight, int64_t i, int64_t n) {
  using T = Compute<S>;
  if constexpr (kNarrow<S>) {
    if (weight.wide) return rounded<S>(load_upto<T>(weight.wide + i, n));
  }
  return load_upto<T>(weight.data + i, n);
}

// A weight seen as a matrix: element (i, j) at first + i * stride_row + j * stride_column.
template <class S>
struct WeightMatrix {
  Weight<S> weight;
  int64_t columns;
  int64_t first, stride_row, stride_column;
};

// Calls store(i, vector) with columns [c, c + L) of row r + i, for `count` of L rows; zero behind
// the last column. Whichever way elements lie together, they are read as vectors.
template <class S, class Store>
DF_INLINE void load_rows(const WeightMatrix<S>& m, int64_t r, int64_t count, int64_t c,
                         const Store& store) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t at = m.first + r * m.stride_row + c * m.stride_column;
  const int64_t valid = smaller(L, m.columns - c);
  Vec<T> rows[L];
  if (m.stride_row == 1 && m.stride_column != 1) {
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) {
      rows[j] = j < valid ? weight_vector(m.weight, at + j * m.stride_column, count) : zero<T>();
    }
    transpose<T>(rows);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i >= count) break;
      const int64_t row = at + i * m.stride_row;
      if (m.stride_column == 1) {
        rows[i] = weight_vector(m.weight, row, valid);
      } else {
        T lanes[L] = {};
        for (int64_t j = 0; j < valid; ++j) {
          lanes[j] = weight_at(m.weight, row + j * m.stride_column);
        }
        rows[i] = load<T>(lanes);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i < count) store(i, rows[i]);
  }
}

// Rows [r, r + count) of the column block of vectors [v, v + nv).
template <class S>
void pack_block(const WeightMatrix<S>& matrix, int64_t r, int64_t count, int64_t v, int nv,
                Compute<S>* to) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  for (int64_t i0 = 0; i0 < count; i0 += L) {
    for (int u = 0; u < nv; ++u) {
      load_rows(matrix, r + i0, smaller(L, count - i0), (v + u) * L,
                [&](int i, Vec<T> row) { store<T>(to + ((i0 + i) * nv + u) * L, row); });
    }
  }
}

// A 1x1 weight as the operand [in, out] of the forward, or [out, in] of the backward.
template <class S>
DF_INLINE WeightMatrix<S> forward_matrix(const Weight<S>& w) {
  return {w, w.out, 0, w.stride_in, w.stride_out};
}
template <class S>
DF_INLINE WeightMatrix<S> backward_matrix(const Weight<S>& w) {
  return {w, w.in, 0, w.stride_out, w.stride_in};
}

// Packs [k, columns] with all threads: pack(i, count, v, nv, block) makes what the block of vectors
// [v, v + nv) holds of `units` parts of the weight, rows or kernels.
template <class T, class Pack>
void pack_blocks(int64_t units, int64_t k, int64_t columns, int prefer, T* packed,
                 const Pack& pack) {
  constexpr int64_t kRun = 32;  // units of one task
  const int64_t vecs = vectors<T>(columns), runs = ceil_div(units, kRun);
  for_each_task(runs * ceil_div(vecs, prefer), [&](int64_t task) {
    int64_t index = 0;
    for_each_block(vecs, prefer, [&](int64_t v, int nv) {
      if (index++ != task / runs) return;
      const int64_t i = task % runs * kRun;
      pack(i, smaller(kRun, units - i), v, nv, packed + v * k * kLanes<T>);
    });
  });
}

// The taps of L kernels of a slice of a 3x3 weight, nine or those of one line: those of (out, in),
// (out, in + 1), ... where kAlongIn, else of (out, in), (out + 1, in), ...
template <bool kAlongIn, class S>
DF_INLINE void load_kernels(const Weight<S>& w, int64_t out, int64_t in,
                            Vec<Compute<S>> (&taps)[9]) {
  constexpr int L = kLanes<Compute<S>>;
  const int64_t at = out * w.stride_out + in * w.stride_in;
  const int64_t step = kAlongIn ? w.stride_in : w.stride_out;
  const int64_t left = kAlongIn ? w.in - in : w.out - out;
  if (w.data) {  // streams that the processor does not follow: many, or short ones
    const S* ahead = w.data + at + (kAlongIn ? w.stride_out : 96);
    for (int64_t j = 0; j < smaller(L, left); ++j) {
      prefetch_read(reinterpret_cast<const char*>(ahead + j * step));
    }
  }
  const auto load_run = [&](int64_t first, int t0, int run) {
    const WeightMatrix<S> kernels{w, left, first, w.stride_w, step};
#pragma GCC unroll 9
    for (int t = 0; t < run; t += L) {
      load_rows(kernels, t, smaller(L, run - t), 0,
                [&](int i, Vec<Compute<S>> row) { taps[t0 + t + i] = row; });
    }
  };
  if (w.lines() == 1) {
    load_run(at, 0, 3);
    for (int t = 3; t < 9; ++t) taps[t] = zero<Compute<S>>();
  } else if (w.stride_h == 3 * w.stride_w) {
    load_run(at, 0, 9);  // kernel rows lie one after the other
  } else {
    for (int i = 0; i < 3; ++i) load_run(at + i * w.stride_h, 3 * i, 3);
  }
}

// Elements i, i + 1, ... of a weight's gradient, at most `n`.
template <class S>
DF_INLINE void store_gradient(const WeightGradient<S>& out, int64_t i, Vec<Compute<S>> value,
                              int64_t n) {
  using T = Compute<S>;
  if (out.wide) {
    store_upto<T>(out.wide + i, value, n);
  } else {
    store_upto<T>(out.data + i, value, n);
  }
}

// The gradients of slice z of at most `n` of L kernels that follow each other from (o, c) on.
template <class S>
DF_INLINE void store_kernel_gradients(const Weight<S>& w, const WeightGradient<S>& out, int64_t o,
                                      int64_t c, int64_t z, const Vec<Compute<S>> (&taps)[9],
                                      int64_t n) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t count = w.slice_taps(), step = w.taps();
  if (out.channels_last) {
    const int64_t first = (o * step + z * count) * w.in + c;
    for (int t = 0; t < count; ++t) store_gradient(out, first + t * w.in, taps[t], n);
    return;
  }
  const int64_t first = (o * w.in + c) * step + z * count;
#pragma GCC unroll 9
  for (int t0 = 0; t0 < 9; t0 += L) {
    if (t0 >= count) break;
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int t = 0; t < L; ++t) square[t] = t0 + t < 9 ? taps[t0 + t < 9 ? t0 + t : 0] : zero<T>();
    transpose<T>(square);
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) {
      if (j < n) store_gradient(out, first + j * step + t0, square[j], count - t0);
    }
  }
}

}  // namespace
}  // namespace densenet_fast::cpu
