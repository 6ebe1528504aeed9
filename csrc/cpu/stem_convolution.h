// The stem's convolution: kernels 7 wide in every dimension, stride 2, padding 3, of images with
// few channels. Along rows by minimal filtering: four outputs read seven even and six odd inputs,
// which are convolutions of their own, F(4, 4) and F(4, 3), with 13 multiplications where the
// direct way needs 28. What remains are 13 products [tiles, lines] * [lines, outputs], where the
// lines are those of the kernel: its channels, slices and rows.
#pragma once

#include "blocking.h"
#include "stem_filter.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kMostStemParts = 16;  // runs of slices
constexpr int64_t kStemProduct = 64;    // tiles in one product, at most

// Slices of outputs one after another: the input slices that they read, transformed along rows, and
// operands made of those.
template <class S>
class StemSlices {
 public:
  using T = Compute<S>;
  const int64_t depth, height, lines;  // of the kernel
  const int64_t tiles;                 // of a row of outputs
  const int64_t rows, run;             // of outputs, and tiles of each, in one product

  StemSlices(const Image<const S>& x, int64_t out_h, int64_t out_w)
      : depth(x.dims > 2 ? kStemKernel : 1),
        height(x.dims > 1 ? kStemKernel : 1),
        lines(x.c * depth * height),
        tiles(ceil_div(out_w, kStemTile)),
        rows(smaller(out_h, kStemProduct)),
        run(smaller(tiles, kStemProduct / rows)),
        x_(x),
        row_pitch_(padded<T>(x.h / 2 + 1) + kMargin + L) {}

  int64_t scratch_size() const { return columns_size() + x_.c * depth * slice_size(); }

  // The memory for all slices, scratch_size().
  void begin(T* memory) {
    columns_ = memory;
    transformed_ = memory + columns_size();
    for (int64_t i = 0; i < scratch_size(); ++i) memory[i] = T(0);
    for (int64_t& slice : held_) slice = -1;
  }

  // Slice `index` of the outputs of all images: transforms what it reads and is not there yet.
  void move_to(int64_t index, int64_t out_d) {
    z_ = index % out_d;
    for (int64_t kd = 0; kd < depth; ++kd) {
      const int64_t slice = slice_of(kd);
      if (slice < 0) continue;
      const int64_t of_all = index / out_d * x_.d + slice;
      if (held_[slice % kStemKernel] == of_all) continue;
      held_[slice % kStemKernel] = of_all;
      for (int64_t c = 0; c < x_.c; ++c) transform_slice(of_all, c, transformed(c, slice));
    }
  }

  // [lines, kPanelPitch] at one point: rows [y, y + count) of tiles [first, first + width), a
  // tile's behind another's. Whole vectors are written: the next tile, or the panel's slack, is
  // behind.
  void operand(int point, int64_t y, int64_t count, int64_t first, int64_t width, T* to) const {
    for (int64_t c = 0; c < x_.c; ++c) {
      for (int64_t kd = 0; kd < depth; ++kd) {
        const int64_t slice = slice_of(kd);
        const T* of_slice =
            transformed(c, larger(slice, 0)) + (point * tiles + first) * tile_size();
        for (int64_t kh = 0; kh < height; ++kh, to += kPanelPitch) {
          const T* from = of_slice + row_place(kh) + y;
          for (int64_t t = 0; t < width; ++t, from += tile_size()) {
            for (int64_t r = 0; r < count; r += L) {
              store<T>(to + t * count + r, slice < 0 ? zero<T>() : load<T>(from + r));
            }
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t L = kLanes<T>, kMargin = 2;

  // The input's slice that one of the kernel reads, or -1.
  int64_t slice_of(int64_t kd) const {
    const int64_t slice = depth > 1 ? 2 * z_ + kd - kStemKernel / 2 : 0;
    return slice < x_.d ? slice : -1;
  }
  // Rows of a tile are apart by whether they are even, so that those that one row of the kernel
  // reads follow each other: the first of them, for the first row of outputs.
  int64_t row_place(int64_t kh) const {
    if (height == 1) return kMargin;
    return kh % 2 ? kMargin + (kh - 3) / 2 : row_pitch_ + kMargin + kh / 2 - 2;
  }
  int64_t tile_size() const { return 2 * row_pitch_; }
  int64_t slice_size() const { return kStemPoints * tiles * tile_size(); }
  int64_t columns_size() const { return larger(x_.w + 3, 8 * tiles + 5) * L + L * L; }
  T* transformed(int64_t c, int64_t slice) const {
    return transformed_ + (c * depth + slice % (depth > 1 ? kStemKernel : 1)) * slice_size();
  }

  void transform_slice(int64_t slice, int64_t c, T* to) const {
    for (int64_t even = 0; even < 2; ++even) {
      for (int64_t q = 0; 2 * q + even < x_.h; q += L) {
        load_columns(slice, c, 2 * q + even);
        transform_rows(to + even * row_pitch_ + kMargin + q);
      }
    }
  }

  // Every second of 2 * L rows from y on: a vector for each of their pixels, three zeros in front.
  void load_columns(int64_t slice, int64_t c, int64_t y) const {
    const int64_t row = x_.w * x_.pitch;
    const S* from = x_.data + (slice * x_.h + y) * row + c;
    for (int64_t x = 0; x < x_.w; x += L) {
      Vec<T> square[L];
      for (int64_t i = 0; i < L; ++i) {
        square[i] = zero<T>();
        if (y + 2 * i >= x_.h) continue;
        const S* pixels = from + 2 * i * row + x * x_.pitch;
        if (x_.pitch == 1) {
          square[i] = load_upto<T>(pixels, x_.w - x);
        } else {
          for (int64_t j = 0; j < smaller(L, x_.w - x); ++j) {
            square[i][j] = widen<S>(pixels[j * x_.pitch]);
          }
        }
      }
      transpose<T>(square);
      for (int64_t j = 0; j < L; ++j) store<T>(columns_ + (x + j + 3) * L, square[j]);
    }
  }

  // L rows of all tiles: tile i reads 13 pixels from 8 * i on.
  void transform_rows(T* to) const {
    for (int64_t i = 0; i < tiles; ++i) {
      Vec<T> pixels[kStemPoints], points[kStemPoints];
      for (int j = 0; j < kStemPoints; ++j) pixels[j] = load<T>(columns_ + (8 * i + j) * L);
      StemFilter<T>::input(pixels, points);
      for (int p = 0; p < kStemPoints; ++p) {
        store<T>(to + (p * tiles + i) * tile_size(), points[p]);
      }
    }
  }

  const Image<const S> x_;
  const int64_t row_pitch_;
  int64_t z_ = 0;
  int64_t held_[kStemKernel];
  T *columns_ = nullptr, *transformed_ = nullptr;
};

// A line of the kernel.
template <class S>
struct StemLine {
  int64_t channel, slice, row;
  int64_t tap;  // its first one's place in the kernel

  StemLine(const Weight<S>& weight, int64_t line) {
    const int64_t height = weight.dims > 1 ? kStemKernel : 1;
    const int64_t depth = weight.dims > 2 ? kStemKernel : 1;
    channel = line / height / depth;
    slice = line / height % depth;
    row = line % height;
    tap = line % (height * depth) * kStemKernel;
  }
};

// [points, lines, outputs], zero behind the last output.
template <class S>
void pack_stem(const Weight<S>& weight, int64_t lines, Compute<S>* packed) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t width = padded<T>(weight.out);
  for_each_task(lines, [&](int64_t line) {
    const StemLine<S> at(weight, line);
    const int64_t first =
        at.channel * weight.stride_in + at.slice * weight.stride_d + at.row * weight.stride_h;
    for (int64_t o = 0; o < width; o += L) {
      alignas(kCacheLine) T taps[kStemKernel][L] = {};
      for (int64_t i = 0; i < smaller(L, weight.out - o); ++i) {
        for (int64_t t = 0; t < kStemKernel; ++t) {
          taps[t][i] = weight_at(weight, (o + i) * weight.stride_out + first + t * weight.stride_w);
        }
      }
      Vec<T> kernel[kStemKernel], points[kStemPoints];
      for (int t = 0; t < kStemKernel; ++t) kernel[t] = load<T>(taps[t]);
      StemFilter<T>::kernel(kernel, points);
      for (int p = 0; p < kStemPoints; ++p) {
        store<T>(packed + (p * lines + line) * width + o, points[p]);
      }
    }
  });
}

// Calls body(y, rows, first tile, tiles) for a slice of outputs cut into products.
template <class S, class Body>
DF_INLINE void for_each_product(const StemSlices<S>& slices, int64_t out_h, const Body& body) {
  for (int64_t y = 0; y < out_h; y += slices.rows) {
    for (int64_t first = 0; first < slices.tiles; first += slices.run) {
      body(y, smaller(slices.rows, out_h - y), first, smaller(slices.run, slices.tiles - first));
    }
  }
}

template <class S>
void stem_convolution_forward(Image<const S> images, Weight<S> weight, Image<S> out) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const StemSlices<S> shape(images, out.h, out.w);
  const int64_t lines = shape.lines, width = padded<T>(out.c), vecs = vectors<T>(out.c);
  const CallMemory<T> packed(kStemPoints * lines * width);
  pack_stem(weight, lines, packed.get());
  const EqualParts parts(out.slices(), kMostStemParts, 1);
  for_each_task(parts.count, [&](int64_t part) {
    StemSlices<S> slices = shape;
    slices.begin(scratch<T>(Scratch::kWeight, slices.scratch_size()));
    T* panel = scratch<T>(Scratch::kOperand, lines * kPanelPitch);
    T* result = scratch<T>(Scratch::kResult, kStemPoints * slices.rows * slices.run * width);
    PrefetchStream stream;
    for (int64_t z = parts.begin(part); z < parts.end(part); ++z) {
      slices.move_to(z, out.d);
      for_each_product(slices, out.h, [&](int64_t y, int64_t rows, int64_t first, int64_t tiles) {
        const int64_t count = rows * tiles;
        for (int p = 0; p < kStemPoints; ++p) {
          slices.operand(p, y, rows, first, tiles, panel);
          for_each_block(vecs, 2, [&](int64_t v, int nv) {
            for_each_row_tile(count, nv, [&](int64_t column, int columns) {
              TransposedProduct<T> product{panel + column,
                                           packed.get() + p * lines * width + v * L,
                                           width,
                                           lines,
                                           result + (p * count + column) * width + v * L,
                                           width,
                                           false,
                                           &stream};
              kMicrokernels<T>.transposed[nv][columns](product);
            });
          });
        }
        for (int64_t i = 0; i < count; ++i) {
          const int64_t x = (first + i / rows) * kStemTile, wide = smaller(kStemTile, out.w - x);
          S* to = out.data + ((z * out.h + y + i % rows) * out.w + x) * out.pitch;
          for (int64_t c = 0; c < out.c; c += L) {
            Vec<T> m[kStemPoints], values[kStemTile];
            for (int p = 0; p < kStemPoints; ++p) {
              m[p] = load<T>(result + (p * count + i) * width + c);
            }
            StemFilter<T>::output(m, values);
            for (int64_t j = 0; j < wide; ++j) {
              store_upto<T>(to + j * out.pitch + c, values[j], out.c - c);
            }
          }
        }
      });
    }
  });
}

// The gradients of rows [y, y + rows) and tiles [first, first + tiles) of a slice of outputs at all
// points, [points, blocks of vectors, tiles].
template <class S>
void transform_stem_gradients(const Image<const S>& grad, int64_t slice, int64_t y, int64_t rows,
                              int64_t first, int64_t tiles, Compute<S>* to) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t count = rows * tiles, width = padded<T>(grad.c);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t x = (first + i / rows) * kStemTile;
    const S* from = grad.data + ((slice * grad.h + y + i % rows) * grad.w + x) * grad.pitch;
    for_each_block(vectors<T>(grad.c), 2, [&](int64_t v, int nv) {
      for (int u = 0; u < nv; ++u) {
        const int64_t c = (v + u) * L;
        Vec<T> values[kStemTile] = {}, points[kStemPoints];
        for (int64_t j = 0; j < smaller(kStemTile, grad.w - x); ++j) {
          values[j] = load_upto<T>(from + j * grad.pitch + c, grad.c - c);
        }
        StemFilter<T>::output_adjoint(values, points);
        T* at = to + v * L * count + (i * nv + u) * L;
        for (int p = 0; p < kStemPoints; ++p) store<T>(at + p * count * width, points[p]);
      }
    });
  }
}

template <class S>
void stem_convolution_backward(Image<const S> grad, Image<const S> images, Weight<S> weight,
                               WeightGradient<S> grad_weight) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const StemSlices<S> shape(images, grad.h, grad.w);
  const int64_t lines = shape.lines, width = padded<T>(grad.c), vecs = vectors<T>(grad.c);
  const int64_t size = kStemPoints * lines * width;
  // Each part with a gradient of its own.
  const EqualParts parts(grad.slices(), kMostStemParts / 2, 1);
  const CallMemory<T> partial(parts.count * size);
  for_each_task(parts.count, [&](int64_t part) {
    T* sums = partial.get() + part * size;
    StemSlices<S> slices = shape;
    slices.begin(scratch<T>(Scratch::kWeight, slices.scratch_size()));
    T* panel = scratch<T>(Scratch::kOperand, lines * kPanelPitch);
    T* gradients = scratch<T>(Scratch::kResult, kStemPoints * slices.rows * slices.run * width);
    bool added = false;
    PrefetchStream stream;
    for (int64_t z = parts.begin(part); z < parts.end(part); ++z) {
      slices.move_to(z, grad.d);
      for_each_product(slices, grad.h, [&](int64_t y, int64_t rows, int64_t first, int64_t tiles) {
        const int64_t count = rows * tiles;
        transform_stem_gradients(grad, z, y, rows, first, tiles, gradients);
        for (int p = 0; p < kStemPoints; ++p) {
          slices.operand(p, y, rows, first, tiles, panel);
          for_each_block(vecs, 2, [&](int64_t v, int nv) {
            for_each_row_tile(lines, nv, [&](int64_t line, int count_of_lines) {
              RowsProduct<T> product{panel + line * kPanelPitch,
                                     nullptr,
                                     1,
                                     count,
                                     gradients + p * count * width + v * L * count,
                                     sums + (p * lines + line) * width + v * L,
                                     width,
                                     nv * L,
                                     added,
                                     &stream};
              kMicrokernels<T>.rows[nv][count_of_lines](product);
            });
          });
        }
        added = true;
      });
    }
  });
  // The parts in order, and taps of them.
  const int64_t taps = lines / images.c * kStemKernel;
  for_each_task(lines, [&](int64_t line) {
    const StemLine<S> at(weight, line);
    for (int64_t o = 0; o < grad.c; o += L) {
      Vec<T> points[kStemPoints] = {}, kernel[kStemKernel];
      for (int64_t part = 0; part < parts.count; ++part) {
        const T* from = partial.get() + part * size + line * width + o;
        for (int p = 0; p < kStemPoints; ++p) points[p] += load<T>(from + p * lines * width);
      }
      StemFilter<T>::kernel_adjoint(points, kernel);
      for (int64_t t = 0; t < kStemKernel; ++t) {
        for (int64_t i = 0; i < smaller(L, grad.c - o); ++i) {
          const int64_t tap = at.tap + t;
          const int64_t to = grad_weight.channels_last
                                 ? ((o + i) * taps + tap) * weight.in + at.channel
                                 : ((o + i) * weight.in + at.channel) * taps + tap;
          store_gradient(grad_weight, to, splat<T>(kernel[t][i]), 1);
        }
      }
    }
  });
}

}  // namespace
}  // namespace densenet_fast::cpu
