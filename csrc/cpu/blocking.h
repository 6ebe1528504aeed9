// How products are cut: columns into blocks of whole vectors, rows into register tiles, weights
// packed to match.
#pragma once

#include "args.h"
#include "bfloat16.h"
#include "microkernel.h"
#include "parallel.h"

namespace densenet_fast::cpu {
namespace {

DF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DF_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
DF_INLINE int64_t vectors(int64_t columns) {
  return ceil_div(columns, kLanes<T>);
}

template <class T>
DF_INLINE int64_t padded(int64_t columns) {
  return vectors<T>(columns) * kLanes<T>;
}

// `total` cut into about equal parts: `most` of them, or fewer so that each has `least` or more.
// A multiple of 8 parts where there are as many, so that threads finish together.
struct EqualParts {
  int64_t total, size, count;

  EqualParts(int64_t total_, int64_t most, int64_t least) : total(total_) {
    count = larger(1, smaller(most, total / least));
    if (count > 8) count -= count % 8;
    size = larger(1, ceil_div(total, count));
    count = larger(1, ceil_div(total, size));
  }
  int64_t begin(int64_t part) const { return part * size; }
  int64_t end(int64_t part) const { return smaller(total, (part + 1) * size); }
};

// Rows of a tile where `rows` are cut into as few equal tiles as `most` allows, a multiple of 4.
DF_INLINE int64_t equal_tile(int64_t rows, int64_t most) {
  return larger(4, ceil_div(ceil_div(rows, larger(1, ceil_div(rows, most))), 4) * 4);
}

// Vectors in the next column block: `prefer` of them, avoiding a lone last vector, whose tile
// would be bound by loads.
DF_INLINE int block_vectors(int64_t left, int prefer) {
  if (left <= 3) return static_cast<int>(left);
  if (left == 4) return 2;
  return prefer;
}

// Calls body(first, count) for `rows` cut into equal register tiles.
template <class F>
DF_INLINE void for_each_row_tile(int64_t rows, int nv, const F& body) {
  const int64_t tiles = ceil_div(rows, kMaxRows[nv]);
  int64_t first = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t count = (rows - first + (tiles - i) - 1) / (tiles - i);
    body(first, static_cast<int>(count));
    first += count;
  }
}

// Packs a [k, columns] operand, element (i, j) given by `at`, into column blocks: the block that
// starts at vector v begins at element v * lanes * k and holds [k, block width], zero padded.
// kAlongK: elements of one column lie together, so that reading goes down the columns.
template <class T, bool kAlongK = false, class At>
void pack_columns(T* packed, int64_t k, int64_t columns, int prefer, const At& at) {
  constexpr int64_t L = kLanes<T>;
  const int64_t vecs = vectors<T>(columns);
  // One task packs a run of k of all blocks; short runs keep the strided side in cache.
  constexpr int64_t kRun = 64;
  for_each_task(ceil_div(k, kRun), [&](int64_t task) {
    const int64_t begin = task * kRun;
    const int64_t end = smaller(k, begin + kRun);
    for (int64_t v = 0; v < vecs;) {
      const int nv = block_vectors(vecs - v, prefer);
      const int64_t width = nv * L;
      T* block = packed + v * L * k;
      const int64_t valid = smaller(width, columns - v * L);
      if constexpr (kAlongK) {
        for (int64_t j = 0; j < valid; ++j) {
          for (int64_t i = begin; i < end; ++i) block[i * width + j] = at(i, v * L + j);
        }
      }
      for (int64_t i = begin; i < end; ++i) {
        T* row = block + i * width;
        for (int64_t j = 0; j < valid && !kAlongK; ++j) row[j] = at(i, v * L + j);
        for (int64_t j = valid; j < width; ++j) row[j] = T(0);
      }
      v += nv;
    }
  });
}

// The same of a weight as a matrix: element (i, j) at first + i * stride_k + j * stride_column.
template <class S>
void pack_matrix(Compute<S>* packed, int64_t k, int64_t columns, int prefer,
                 const Weight<S>& weight, int64_t first, int64_t stride_k, int64_t stride_column) {
  using T = Compute<S>;
  with_elements(weight, first, [&](const auto& element) {
    if (stride_column == 1) {
      pack_columns<T>(packed, k, columns, prefer,
                      [=](int64_t i, int64_t j) { return element(i * stride_k + j); });
    } else if (stride_k == 1) {
      pack_columns<T, true>(packed, k, columns, prefer,
                            [=](int64_t i, int64_t j) { return element(i + j * stride_column); });
    } else {
      pack_columns<T>(packed, k, columns, prefer, [=](int64_t i, int64_t j) {
        return element(i * stride_k + j * stride_column);
      });
    }
  });
}

// A vector of C coefficients copied to whole vectors, zero padded.
template <class T>
void pad_vector(T* to, const T* from, int64_t columns) {
  const int64_t width = padded<T>(columns);
  for (int64_t i = 0; i < columns; ++i) to[i] = from[i];
  for (int64_t i = columns; i < width; ++i) to[i] = T(0);
}

// relu(scale * x + shift) of channels [c0, c0 + width) of `rows` rows into a scratch panel.
template <class T, class S>
DF_INLINE void activate_panel(const S* x, int64_t pitch, int64_t rows, int64_t c0, int64_t width,
                              const T* scale, const T* shift, T* panel) {
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < width; c += L) {
    const int64_t n = width - c;
    const Vec<T> a = load_upto<T>(scale + c0 + c, n);
    const Vec<T> b = load_upto<T>(shift + c0 + c, n);
    const S* from = x + c0 + c;
    T* to = panel + c;
    if (n >= L) {
      for (int64_t r = 0; r < rows; ++r) {
        store<T>(to + r * kPanelPitch, relu<T>(fma<T>(a, load<T>(from + r * pitch), b)));
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        store<T>(to + r * kPanelPitch, relu<T>(fma<T>(a, load_partial<T>(from + r * pitch, n), b)));
      }
    }
  }
}

// out[rows, columns] = A * packed, where build(first, width, panel) fills channels
// [first, first + width) of A into a scratch panel.
template <class T, class Build>
DF_INLINE void product_tile(int64_t rows, int64_t k, int64_t columns, int prefer, const T* packed,
                            T* out, int64_t ldo, T* panel, PrefetchStream& stream,
                            const Build& build) {
  constexpr int64_t L = kLanes<T>;
  const int64_t vecs = vectors<T>(columns);
  // Panels of about the same width: a narrow last one would mostly load and store its results.
  const int64_t panel_width = ceil_div(ceil_div(k, ceil_div(k, kPanel)), L) * L;
  for (int64_t k0 = 0; k0 < k; k0 += panel_width) {
    const int64_t width = smaller(panel_width, k - k0);
    build(k0, width, panel);
    for (int64_t v = 0; v < vecs;) {
      const int nv = block_vectors(vecs - v, prefer);
      const T* b = packed + v * L * k + k0 * nv * L;
      for_each_row_tile(rows, nv, [&](int64_t first, int count) {
        RowsProduct<T> product{panel + first * kPanelPitch,
                               nullptr,
                               1,
                               width,
                               b,
                               out + first * ldo + v * L,
                               ldo,
                               smaller(nv * L, columns - v * L),
                               k0 > 0,
                               &stream};
        kMicrokernels<T>.rows[nv][count](product);
      });
      v += nv;
    }
  }
}

// [rows, columns] of sums in scratch, rounded to where they are stored.
template <class T, class S>
DF_INLINE void store_rows(const T* from, int64_t ldf, int64_t rows, int64_t columns, S* to,
                          int64_t ldt) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      store_upto<T>(to + r * ldt + c, load<T>(from + r * ldf + c), columns - c);
    }
  }
}

// Microkernel prefetch steps that product_tile will make.
template <class T>
DF_INLINE int64_t product_steps(int64_t rows, int64_t k, int64_t columns, int prefer) {
  const int64_t blocks = ceil_div(vectors<T>(columns), prefer);
  return blocks * ceil_div(rows, kMaxRows[prefer]) * ceil_div(k, kPrefetchEvery);
}

}  // namespace
}  // namespace densenet_fast::cpu
