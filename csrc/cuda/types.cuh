// Element types, what they accumulate in, and 16-byte pieces of rows.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace densenet_fast::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
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

// The gradient passes unless x <= 0: PyTorch's threshold_backward, NaN included.
template <class A>
__device__ __forceinline__ A where_positive(A x, A gradient) {
  return x <= A(0) ? A(0) : gradient;
}

template <class E>
struct alignas(kPieceBytes) Piece {
  E element[kPieceElements<E>];
};

// The widest access that every row start of an operand allows: 16 bytes, 4 bytes, or one element.
template <class E>
__host__ __device__ inline int row_alignment(const void* data, int64_t pitch) {
  const uint64_t bits = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(pitch * sizeof(E));
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
}

// Starts the copy of one piece, of which `valid` elements exist; the others become zero. With no
// alignment to speak of the copy is done at once.
template <class E>
__device__ __forceinline__ void start_piece(unsigned char* to, const E* from, int valid,
                                            int alignment) {
  constexpr int V = kPieceElements<E>;
  valid = valid < 0 ? 0 : valid > V ? V : valid;
  const int bytes = valid * static_cast<int>(sizeof(E));
  if (alignment == 16) {
    ptx::cp_async_16(to, from, bytes);
  } else if (alignment == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int left = bytes - 4 * i;
      const int part = left < 0 ? 0 : left > 4 ? 4 : left;
      ptx::cp_async_4(to + 4 * i,
                      part ? reinterpret_cast<const unsigned char*>(from) + 4 * i
                           : reinterpret_cast<const unsigned char*>(from),
                      part);
    }
  } else {
    E* element = reinterpret_cast<E*>(to);
#pragma unroll
    for (int i = 0; i < V; ++i) element[i] = i < valid ? from[i] : narrow<E>(0);
  }
}

// One piece from global memory, `valid` elements of it; the others read as zero.
template <class E>
__device__ __forceinline__ Piece<E> load_piece(const E* from, int valid, int alignment) {
  Piece<E> piece;
  if (alignment == 16 && valid >= kPieceElements<E>) {
    piece = *reinterpret_cast<const Piece<E>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kPieceElements<E>; ++i)
      piece.element[i] = i < valid ? from[i] : narrow<E>(0);
  }
  return piece;
}

template <class E>
__device__ __forceinline__ void store_piece(E* to, const Piece<E>& piece, int valid,
                                            int alignment) {
  if (alignment == 16 && valid >= kPieceElements<E>) {
    *reinterpret_cast<Piece<E>*>(to) = piece;
  } else {
#pragma unroll
    for (int i = 0; i < kPieceElements<E>; ++i) {
      if (i < valid) to[i] = piece.element[i];
    }
  }
}

// `valid` of the coefficients at `from`; the others are zero.
template <class A, int V>
__device__ __forceinline__ void load_coefficients(A (&to)[V], const A* from, int valid) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = i < valid ? from[i] : A(0);
}

// An NHWC image batch or a channel slice of one.
template <class E>
struct Image {
  E* data = nullptr;
  int64_t pitch = 0;
  int n = 0, h = 0, w = 0, c = 0;
  int alignment = 1;
  __host__ __device__ int64_t rows() const { return int64_t{1} * n * h * w; }
};

template <class A>
struct Activation {
  const A* scale;
  const A* shift;
};

template <class A>
struct Norm {
  const A* scale;
  const A* shift;
  const A* mean;
  const A* rstd;
};

}  // namespace densenet_fast::cuda
