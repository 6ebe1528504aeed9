// How the rows of a product's operand come to be. A Source names the raw pieces to fetch for one
// 16-byte piece of the operand, and turns them into it: once per loaded element, in shared memory,
// by the thread that fetched them, so that no barrier stands between.
#pragma once

#include "epilogue.cuh"

namespace densenet_fast::cuda {

// relu(scale * x + shift).
template <class P>
struct ActivatedSource {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr int kRaw = 1;
  Image<const E> x;
  Activation<A> act;

  __device__ int channels() const { return x.c; }
  __device__ void start(unsigned char* (&to)[1], int64_t row, bool exists, int channel) const {
    const E* from = exists ? x.data + row * x.pitch + channel : x.data;
    start_piece<E>(to[0], from, exists ? x.c - channel : 0, x.alignment);
  }
  __device__ void finish(unsigned char* (&raw)[1], int64_t, bool exists, int channel) const {
    constexpr int V = kPieceElements<E>;
    A scale[V], shift[V];
    load_coefficients(scale, act.scale + channel, x.c - channel);
    load_coefficients(shift, act.shift + channel, x.c - channel);
    auto* piece = reinterpret_cast<Piece<E>*>(raw[0]);
    Piece<E> value = *piece;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // Outside the image there is no pixel to activate: relu(shift) would be wrong.
      value.element[v] =
          exists ? narrow<E>(relu(multiply_add(scale[v], A(widen(value.element[v])), shift[v])))
                 : narrow<E>(0);
    }
    *piece = value;
  }
};

// The mean of the activation over four pixels: row r is a pooled pixel.
template <class P>
struct PooledSource {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr int kRaw = 4;
  Image<const E> x;
  Activation<A> act;

  __device__ int channels() const { return x.c; }
  __device__ void start(unsigned char* (&to)[4], int64_t row, bool exists, int channel) const {
    const int64_t first = exists ? UnpooledGradient<P>::first_of_four(row, x.h, x.w) : 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t pixel = first + corner / 2 * x.w + corner % 2;
      start_piece<E>(to[corner], exists ? x.data + pixel * x.pitch + channel : x.data,
                     exists ? x.c - channel : 0, x.alignment);
    }
  }
  __device__ void finish(unsigned char* (&raw)[4], int64_t, bool exists, int channel) const {
    constexpr int V = kPieceElements<E>;
    A scale[V], shift[V], sum[V] = {};
    load_coefficients(scale, act.scale + channel, x.c - channel);
    load_coefficients(shift, act.shift + channel, x.c - channel);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const auto value = *reinterpret_cast<const Piece<E>*>(raw[corner]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] += relu(multiply_add(scale[v], A(widen(value.element[v])), shift[v]));
      }
    }
    Piece<E> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.element[v] = narrow<E>(exists ? A(0.25) * sum[v] : A(0));
    *reinterpret_cast<Piece<E>*>(raw[0]) = out;
  }
};

// dZ = p * grad_norm + q * Z + s: the second norm's backward as an affine map.
template <class P>
struct NormGradientSource {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr int kRaw = 2;
  Image<const E> grad_norm;
  Image<const E> bottleneck;
  const A* coefficients;  // [3, channels]

  __device__ int channels() const { return bottleneck.c; }
  __device__ void start(unsigned char* (&to)[2], int64_t row, bool exists, int channel) const {
    const int valid = exists ? bottleneck.c - channel : 0;
    start_piece<E>(to[0],
                   exists ? grad_norm.data + row * grad_norm.pitch + channel : grad_norm.data,
                   valid, grad_norm.alignment);
    start_piece<E>(to[1],
                   exists ? bottleneck.data + row * bottleneck.pitch + channel : bottleneck.data,
                   valid, bottleneck.alignment);
  }
  __device__ void finish(unsigned char* (&raw)[2], int64_t, bool exists, int channel) const {
    constexpr int V = kPieceElements<E>;
    const int valid = bottleneck.c - channel;
    A p[V], q[V], s[V];
    load_coefficients(p, coefficients + channel, valid);
    load_coefficients(q, coefficients + bottleneck.c + channel, valid);
    load_coefficients(s, coefficients + 2 * bottleneck.c + channel, valid);
    const auto dn = *reinterpret_cast<const Piece<E>*>(raw[0]);
    const auto z = *reinterpret_cast<const Piece<E>*>(raw[1]);
    Piece<E> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A value = multiply_add(p[v], A(widen(dn.element[v])),
                                   multiply_add(q[v], A(widen(z.element[v])), s[v]));
      out.element[v] = narrow<E>(exists ? value : A(0));
    }
    *reinterpret_cast<Piece<E>*>(raw[0]) = out;
  }
};

// Rows as they are.
template <class P>
struct PlainSource {
  using E = typename P::Element;
  static constexpr int kRaw = 1;
  Image<const E> x;

  __device__ int channels() const { return x.c; }
  __device__ void start(unsigned char* (&to)[1], int64_t row, bool exists, int channel) const {
    start_piece<E>(to[0], exists ? x.data + row * x.pitch + channel : x.data,
                   exists ? x.c - channel : 0, x.alignment);
  }
  __device__ void finish(unsigned char* (&)[1], int64_t, bool, int) const {}
};

}  // namespace densenet_fast::cuda
