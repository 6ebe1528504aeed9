// How products are cut: columns into blocks of whole vectors, rows into register tiles.
#pragma once

#include "microkernel.h"
#include "packing.h"

namespace densenet_fast::cpu {
namespace {

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

// One of several groups of the column blocks of `vecs` vectors: vectors [begin, end).
struct BlockGroup {
  int64_t vecs, begin = 0, end = 0;
  int prefer;

  BlockGroup(int64_t vecs_, int prefer_, int64_t group = 0, int64_t groups = 1)
      : vecs(vecs_), prefer(prefer_) {
    // A last block may be wider than the others: there can be fewer than vecs / prefer.
    int64_t blocks = 0, index = 0;
    for_each_block(vecs, prefer, [&](int64_t, int) { ++blocks; });
    const int64_t first = group * blocks / groups, last = (group + 1) * blocks / groups;
    for_each_block(vecs, prefer, [&](int64_t v, int nv) {
      if (index == first) begin = end = v;
      if (index >= first && index < last) end = v + nv;
      ++index;
    });
  }
  // One of its blocks alone.
  BlockGroup block(int64_t v, int nv) const {
    BlockGroup one = *this;
    one.begin = v;
    one.end = v + nv;
    return one;
  }
};

template <class F>
DF_INLINE void for_each_block(const BlockGroup& group, const F& body) {
  for (int64_t v = group.begin; v < group.end;) {
    const int nv = block_vectors(group.vecs - v, group.prefer);
    body(v, nv);
    v += nv;
  }
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

// Panels of about the same width: a narrow last one would mostly load and store its results.
template <class T>
DF_INLINE int64_t panel_width(int64_t k) {
  return padded<T>(ceil_div(k, ceil_div(k, kPanel)));
}

// out[rows, columns] = A * B for a group of column blocks, where build(first, width, panel)
// fills channels [first, first + width) of A into a scratch panel and block(first, width, v, nv)
// gives those rows of a packed block of B.
template <class T, class Build, class Block>
DF_INLINE void product_tile(int64_t rows, int64_t k, int64_t columns, const BlockGroup& group,
                            T* out, int64_t ldo, T* panel, PrefetchStream& stream,
                            const Build& build, const Block& block) {
  constexpr int64_t L = kLanes<T>;
  const int64_t step = panel_width<T>(k);
  for (int64_t k0 = 0; k0 < k; k0 += step) {
    const int64_t width = smaller(step, k - k0);
    build(k0, width, panel);
    for_each_block(group, [&](int64_t v, int nv) {
      const T* b = block(k0, width, v, nv);
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
    });
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
