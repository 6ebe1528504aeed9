// Element types, what they accumulate in, and 16-byte pieces of rows.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace densenet_fast::cuda {

constexpr int kThreads = 256;  // of a block of kernels without tiles
constexpr int kPieceBytes = 16;

template <class E>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class E>
using Accumulator = typename AccumulatorOf<E>::type;

template <class E>
constexpr int kPieceElements = kPieceBytes / static_cast<int>(sizeof(E));

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

template <class E>
__device__ __forceinline__ E narrow(Accumulator<E> x);
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// Rounded: the compiler makes it part of no multiply_add, where several kernels have to agree.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }

// NaN stays NaN, as in PyTorch's relu.
template <class A>
__device__ __forceinline__ A relu(A x) {
  return x <= A(0) ? A(0) : x;
}

// At a floor, 0 or -infinity, that only a transition has: the compiler makes more of a known one.
template <class A>
__device__ __forceinline__ A relu(A x, A floor) {
  return ptx::maximum(x, floor);
}

// The gradient passes unless x <= floor: PyTorch's threshold_backward, NaN included. Where the
// floor is NaN, it passes everywhere.
template <class A>
__device__ __forceinline__ A where_positive(A x, A gradient, A floor = 0) {
  return x <= floor ? A(0) : gradient;
}

template <class E>
struct alignas(kPieceBytes) Piece {
  E element[kPieceElements<E>];
};

// Numbers moved at once: at most 16 bytes an access.
template <class A, int N>
struct alignas(N * sizeof(A) < 16 ? N * sizeof(A) : 16) Vector {
  A value[N];
};

// Bytes of the widest access that every row start of an operand allows: 16, 8, 4 or, for elements
// of two bytes, 2.
template <class E>
__host__ __device__ inline int row_alignment(const void* data, int64_t pitch) {
  const uint64_t bits = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(pitch * sizeof(E));
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

// Starts the copy of one piece, of which `valid` elements exist; the others become zero. It comes
// in parts, at once where these are single elements.
template <class E>
__device__ __forceinline__ void start_parts(unsigned char* to, const E* from, int valid,
                                            int alignment) {
  const int width = alignment == 16 ? 8 : alignment;
#pragma unroll 1
  for (int at = 0, left = valid * int{sizeof(E)}; at < kPieceBytes; at += width, left -= width) {
    const auto* part = reinterpret_cast<const unsigned char*>(from) + (left > 0 ? at : 0);
    const int bytes = left < 0 ? 0 : left > width ? width : left;
    if (width == 8) {
      ptx::cp_async<8>(to + at, part, bytes);
    } else if (width == 4) {
      ptx::cp_async<4>(to + at, part, bytes);
    } else if constexpr (sizeof(E) == 2) {
      *reinterpret_cast<E*>(to + at) = bytes > 0 ? *reinterpret_cast<const E*>(part) : narrow<E>(0);
    }
  }
}

// body(part) for the 8-byte parts of a piece that exist and are aligned, element(i) for the other
// elements that exist.
template <class E, class Body, class Element>
__device__ __forceinline__ void for_each_part(int valid, int alignment, const Body& body,
                                              const Element& element) {
  constexpr int kPart = 8 / static_cast<int>(sizeof(E));
#pragma unroll
  for (int i = 0; i < kPieceElements<E>; i += kPart) {
    if (alignment >= 8 && i + kPart <= valid) {
      body(i);
    } else {
#pragma unroll
      for (int e = i; e < i + kPart; ++e) {
        if (e < valid) element(e);
      }
    }
  }
}

// One piece from global memory, `valid` elements of it; the others read as zero.
template <class E>
__device__ __forceinline__ Piece<E> load_piece(const E* from, int valid, int alignment) {
  if (alignment == 16 && valid >= kPieceElements<E>)
    return *reinterpret_cast<const Piece<E>*>(from);
  using Part = Vector<E, 8 / sizeof(E)>;
  Piece<E> piece{};
  for_each_part<E>(
      valid, alignment,
      [&](int i) {
        const Part part = *reinterpret_cast<const Part*>(from + i);
#pragma unroll
        for (int e = 0; e < int{8 / sizeof(E)}; ++e) piece.element[i + e] = part.value[e];
      },
      [&](int e) { piece.element[e] = from[e]; });
  return piece;
}

template <class E>
__device__ __forceinline__ void store_piece(E* to, const Piece<E>& piece, int valid,
                                            int alignment) {
  if (alignment == 16 && valid >= kPieceElements<E>) {
    *reinterpret_cast<Piece<E>*>(to) = piece;
    return;
  }
  using Part = Vector<E, 8 / sizeof(E)>;
  for_each_part<E>(
      valid, alignment,
      [&](int i) {
        Part part;
#pragma unroll
        for (int e = 0; e < int{8 / sizeof(E)}; ++e) part.value[e] = piece.element[i + e];
        *reinterpret_cast<Part*>(to + i) = part;
      },
      [&](int e) { to[e] = piece.element[e]; });
}

__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Division of numbers below 2^31 by one that is known before: a multiplication and a shift.
struct Divisor {
  uint32_t by = 1, factor = 0, shift = 0;  // factor 0: by 1

  Divisor() = default;
  explicit Divisor(int64_t divisor) : by(static_cast<uint32_t>(divisor)) {
    if (by == 1) return;
    while (uint64_t{2} << shift < by) ++shift;
    factor = static_cast<uint32_t>((uint64_t{1} << (32 + shift)) / by + 1);
  }
  __host__ __device__ int quotient(int n) const {
    const uint64_t product = uint64_t{static_cast<uint32_t>(n)} * factor;
    return factor ? static_cast<int>(static_cast<uint32_t>(product >> 32) >> shift) : n;
  }
  __host__ __device__ int remainder(int n, int quotient) const {
    return n - quotient * static_cast<int>(by);
  }
};

// A batch of images of one to three dimensions, channels last, or a channel slice of one: sizes of
// dimensions that it has not are 1.
template <class E>
struct Image {
  E* data = nullptr;
  int64_t pitch = 0;
  int n = 0, d = 0, h = 0, w = 0, c = 0;
  int alignment = 1;
  __host__ __device__ int64_t rows() const { return int64_t{1} * n * d * h * w; }
};

// Which slice (of all images), row and column a pixel of [N, d, h, w] has, and which image and
// depth a slice.
struct PixelPlaces {
  struct Place {
    int slice, y, x;
  };
  Divisor slices, rows, columns;

  PixelPlaces() = default;
  PixelPlaces(int d, int h, int w) : slices(d), rows(h), columns(w) {}
  __device__ Place of(int64_t pixel) const {
    const int p = static_cast<int>(pixel), row = columns.quotient(p), slice = rows.quotient(row);
    return {slice, rows.remainder(row, slice), columns.remainder(p, row)};
  }
};

// Where pooling of two pixels in each dimension takes them.
struct PooledPixels {
  PixelPlaces pooled;
  int h = 0, w = 0;
  int slices = 1, corners = 1;  // of a window, and of one of these
  float share = 1;              // of a corner
  int cut = 0;                  // slices of an image that are in no window

  PooledPixels() = default;
  PooledPixels(int dims, int d, int h_, int w_)
      : pooled(dims > 2 ? d / 2 : 1, dims > 1 ? h_ / 2 : 1, w_ / 2),
        h(h_),
        w(w_),
        slices(dims > 2 ? 2 : 1),
        corners(dims > 1 ? 4 : 2),
        share(1.0f / static_cast<float>(slices * corners)),
        cut(dims > 2 ? d % 2 : 0) {}
  // The first corner of the window that `pixel` is made of.
  __device__ int64_t first_corner(int64_t pixel) const {
    const auto [slice, y, x] = pooled.of(pixel);
    const int first = slices * slice + cut * pooled.slices.quotient(slice);
    return (int64_t{first} * h + 2 * y) * w + 2 * x;
  }
  // body(pixel) for all pixels of a window.
  template <class Body>
  __device__ __forceinline__ void for_each_corner(int64_t window, const Body& body) const {
    const int64_t first = first_corner(window);
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (corner == corners) break;
        body(first + (int64_t{slice} * h + corner / 2) * w + corner % 2);
      }
    }
  }
};

// Rectified at `floor`: 0, or -infinity.
template <class A>
struct Activation {
  const A* scale;
  const A* shift;
  A floor = 0;
};

template <class A>
struct Norm {
  const A* scale;
  const A* shift;
  const A* mean;
  const A* rstd;
  A floor = 0;  // of `where_positive`: 0, or NaN
};

}  // namespace densenet_fast::cuda
