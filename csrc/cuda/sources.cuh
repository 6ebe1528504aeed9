// How the rows of a product's operand come to be. A Source names the raw pieces to fetch for one
// 16-byte piece of the operand, and turns them into it: once per loaded element, in shared memory,
// by the thread that fetched them, so that no barrier stands between. Where a row's pieces are is
// found once, as a Place; `kVectors` coefficients of each channel are handed to `finish`.
#pragma once

#include "epilogue.cuh"

namespace densenet_fast::cuda {

// Coefficients of one piece's channels.
template <class P, int kVectors>
struct Coefficients {
  using A = Accumulator<typename P::Element>;
  using OfPiece = Vector<A, kPieceElements<typename P::Element>>;
  OfPiece of[kVectors ? kVectors : 1];

  // From vectors in shared memory, `pitch` apart.
  __device__ __forceinline__ void load(const unsigned char* shared, int pitch, int channel) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const A* from = reinterpret_cast<const A*>(shared) + i * pitch + channel;
      of[i] = *reinterpret_cast<const OfPiece*>(from);
    }
  }
};

// Starts the copy of the piece at `channel` of the row that begins at element `place`; -1: zeros.
template <class E>
__device__ __forceinline__ void start_piece(unsigned char* to, const Image<const E>& x,
                                            int64_t place, int channel) {
  const bool exists = place >= 0;
  start_piece<E>(to, exists ? x.data + place + channel : x.data, exists ? x.c - channel : 0,
                 x.alignment);
}

// relu(scale * x + shift).
template <class P>
struct ActivatedSource {
  using E = typename P::Element;
  using A = Accumulator<E>;
  using Place = int64_t;
  static constexpr int kRaw = 1, kVectors = 2;
  Image<const E> x;
  Activation<A> act;

  __device__ int channels() const { return x.c; }
  __device__ const A* vector(int i) const { return i ? act.shift : act.scale; }
  __device__ Place place(int64_t row) const { return row < 0 ? -1 : row * x.pitch; }
  __device__ static bool exists(Place place) { return place >= 0; }
  __device__ void start(unsigned char* (&to)[1], Place place, int channel) const {
    start_piece<E>(to[0], x, place, channel);
  }
  __device__ void finish(unsigned char* (&raw)[1], const Coefficients<P, 2>& c,
                         bool exists) const {
    auto* piece = reinterpret_cast<Piece<E>*>(raw[0]);
    Piece<E> value = *piece;
#pragma unroll
    for (int v = 0; v < kPieceElements<E>; ++v) {
      const A activated =
          relu(multiply_add(c.of[0].value[v], A(widen(value.element[v])), c.of[1].value[v]));
      // Outside the image there is no pixel to activate: relu(shift) would be wrong.
      value.element[v] = operand<P>(exists ? activated : A(0));
    }
    *piece = value;
  }
};

// The mean of the activation over four pixels: row r is a pooled pixel.
template <class P>
struct PooledSource {
  using E = typename P::Element;
  using A = Accumulator<E>;
  using Place = int64_t;
  static constexpr int kRaw = 4, kVectors = 2;
  Image<const E> x;
  Activation<A> act;
  PooledPixels pooled;

  __device__ int channels() const { return x.c; }
  __device__ const A* vector(int i) const { return i ? act.shift : act.scale; }
  __device__ Place place(int64_t row) const {
    return row < 0 ? -1 : pooled.first_of_four(row) * x.pitch;
  }
  __device__ static bool exists(Place place) { return place >= 0; }
  __device__ void start(unsigned char* (&to)[4], Place place, int channel) const {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t from = place + (corner / 2 * x.w + corner % 2) * x.pitch;
      start_piece<E>(to[corner], x, place < 0 ? -1 : from, channel);
    }
  }
  __device__ void finish(unsigned char* (&raw)[4], const Coefficients<P, 2>& c,
                         bool exists) const {
    constexpr int V = kPieceElements<E>;
    A sum[V] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const auto value = *reinterpret_cast<const Piece<E>*>(raw[corner]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] +=
            relu(multiply_add(c.of[0].value[v], A(widen(value.element[v])), c.of[1].value[v]));
      }
    }
    Piece<E> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.element[v] = operand<P>(exists ? A(0.25) * sum[v] : A(0));
    *reinterpret_cast<Piece<E>*>(raw[0]) = out;
  }
};

// dZ = p * grad_norm + q * Z + s: the second norm's backward as an affine map.
template <class P>
struct NormGradientSource {
  using E = typename P::Element;
  using A = Accumulator<E>;
  struct Place {
    int64_t grad, z;
  };
  static constexpr int kRaw = 2, kVectors = 3;
  Image<const E> grad_norm;
  Image<const E> bottleneck;
  const A* coefficients;  // [3, channels]

  __device__ int channels() const { return bottleneck.c; }
  __device__ const A* vector(int i) const { return coefficients + int64_t{i} * bottleneck.c; }
  __device__ Place place(int64_t row) const {
    if (row < 0) return {-1, -1};
    return {row * grad_norm.pitch, row * bottleneck.pitch};
  }
  __device__ static bool exists(const Place& place) { return place.grad >= 0; }
  __device__ void start(unsigned char* (&to)[2], const Place& place, int channel) const {
    start_piece<E>(to[0], grad_norm, place.grad, channel);
    start_piece<E>(to[1], bottleneck, place.z, channel);
  }
  __device__ void finish(unsigned char* (&raw)[2], const Coefficients<P, 3>& c,
                         bool exists) const {
    const auto dn = *reinterpret_cast<const Piece<E>*>(raw[0]);
    const auto z = *reinterpret_cast<const Piece<E>*>(raw[1]);
    Piece<E> out;
#pragma unroll
    for (int v = 0; v < kPieceElements<E>; ++v) {
      const A value = multiply_add(
          c.of[0].value[v], A(widen(dn.element[v])),
          multiply_add(c.of[1].value[v], A(widen(z.element[v])), c.of[2].value[v]));
      out.element[v] = operand<P>(exists ? value : A(0));
    }
    *reinterpret_cast<Piece<E>*>(raw[0]) = out;
  }
};

// Rows as they are.
template <class P>
struct PlainSource {
  using E = typename P::Element;
  using A = Accumulator<E>;
  using Place = int64_t;
  static constexpr int kRaw = 1, kVectors = 0;
  Image<const E> x;

  __device__ int channels() const { return x.c; }
  __device__ const A* vector(int) const { return nullptr; }
  __device__ Place place(int64_t row) const { return row < 0 ? -1 : row * x.pitch; }
  __device__ static bool exists(Place place) { return place >= 0; }
  __device__ void start(unsigned char* (&to)[1], Place place, int channel) const {
    start_piece<E>(to[0], x, place, channel);
  }
  __device__ void finish(unsigned char* (&raw)[1], const Coefficients<P, 0>&, bool) const {
    if constexpr (P::kTf32) {
      auto* piece = reinterpret_cast<Piece<E>*>(raw[0]);
#pragma unroll
      for (int v = 0; v < kPieceElements<E>; ++v) {
        piece->element[v] = operand<P>(piece->element[v]);
      }
    }
  }
};

}  // namespace densenet_fast::cuda
