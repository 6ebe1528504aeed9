// How the rows of a product's operand come to be. A Source names the raw pieces to fetch for one
// 16-byte piece of the operand, and turns them into it: once per loaded element, in shared memory,
// by the thread that fetched them, so that no barrier stands between. Where a row's pieces are is
// found once, as a Place (where pieces are not `whole` every time); `kVectors` coefficients of each
// channel are handed to `finish`, which is for rows that exist: the others' pieces are zeros.
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

// The place of a row that does not exist: negative, and no reason for an address to be unaligned.
constexpr int64_t kNowhere = -16;

// Starts the copy of the piece at `channel` of the row `shift` elements behind the one that begins
// at element `place`, or of zeros. kWhole: pieces are there or they are not, and aligned.
template <bool kWhole, class E>
__device__ __forceinline__ void start_piece(unsigned char* to, const Image<const E>& x,
                                            int64_t place, int channel, int64_t shift = 0) {
  const bool exists = place >= 0 && channel < x.c;
  const E* from = exists || kWhole ? x.data + place + (channel + shift) : x.data;
  if constexpr (kWhole) {
    ptx::cp_async<16>(to, from, exists ? 16 : 0);
  } else {
    start_parts(to, from, exists ? x.c - channel : 0, x.alignment);
  }
}

// Whether the pieces of channels up to `end` are whole and aligned.
template <class E>
__device__ __forceinline__ bool whole_pieces(const Image<const E>& x, int end) {
  return x.alignment == 16 && (end <= x.c || x.c % kPieceElements<E> == 0);
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
  __device__ bool whole(int end) const { return whole_pieces(x, end); }
  __device__ const A* vector(int i) const { return i ? act.shift : act.scale; }
  __device__ Place place(int64_t row) const { return row < 0 ? kNowhere : row * x.pitch; }
  __device__ static bool exists(Place place) { return place >= 0; }
  template <bool kWhole>
  __device__ void start(unsigned char* (&to)[1], Place place, int channel,
                        int64_t shift = 0) const {
    start_piece<kWhole>(to[0], x, place, channel, shift);
  }
  __device__ void finish(unsigned char* (&raw)[1], const Coefficients<P, 2>& c) const {
    auto* piece = reinterpret_cast<Piece<E>*>(raw[0]);
    Piece<E> value = *piece;
#pragma unroll
    for (int v = 0; v < kPieceElements<E>; ++v) {
      value.element[v] = operand<P>(
          relu(multiply_add(c.of[0].value[v], A(widen(value.element[v])), c.of[1].value[v])));
    }
    *piece = value;
  }
};

// The mean of the activation over four pixels: row r is a pooled pixel. Of sequences it is that
// over two, each taken twice.
template <class P>
struct PooledSource {
  using E = typename P::Element;
  using A = Accumulator<E>;
  using Place = int64_t;
  static constexpr int kRaw = 4, kVectors = 2;
  Image<const E> x;
  Activation<A> act;
  PooledPixels pooled;
  int64_t line;  // to the second two, in elements

  __device__ int channels() const { return x.c; }
  __device__ bool whole(int end) const { return whole_pieces(x, end); }
  __device__ const A* vector(int i) const { return i ? act.shift : act.scale; }
  __device__ Place place(int64_t row) const {
    return row < 0 ? kNowhere : pooled.first_corner(row) * x.pitch;
  }
  __device__ static bool exists(Place place) { return place >= 0; }
  template <bool kWhole>
  __device__ void start(unsigned char* (&to)[4], Place place, int channel) const {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t from = place + corner / 2 * line + corner % 2 * x.pitch;
      start_piece<kWhole>(to[corner], x, place < 0 ? kNowhere : from, channel);
    }
  }
  __device__ void finish(unsigned char* (&raw)[4], const Coefficients<P, 2>& c) const {
    constexpr int V = kPieceElements<E>;
    A sum[V] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const auto value = *reinterpret_cast<const Piece<E>*>(raw[corner]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] += relu(multiply_add(c.of[0].value[v], A(widen(value.element[v])), c.of[1].value[v]),
                       act.floor);
      }
    }
    Piece<E> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.element[v] = operand<P>(A(0.25) * sum[v]);
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
  __device__ bool whole(int end) const {
    return whole_pieces(grad_norm, end) && whole_pieces(bottleneck, end);
  }
  __device__ const A* vector(int i) const { return coefficients + int64_t{i} * bottleneck.c; }
  __device__ Place place(int64_t row) const {
    if (row < 0) return {kNowhere, kNowhere};
    return {row * grad_norm.pitch, row * bottleneck.pitch};
  }
  __device__ static bool exists(const Place& place) { return place.grad >= 0; }
  template <bool kWhole>
  __device__ void start(unsigned char* (&to)[2], const Place& place, int channel) const {
    start_piece<kWhole>(to[0], grad_norm, place.grad, channel);
    start_piece<kWhole>(to[1], bottleneck, place.z, channel);
  }
  __device__ void finish(unsigned char* (&raw)[2], const Coefficients<P, 3>& c) const {
    const auto dn = *reinterpret_cast<const Piece<E>*>(raw[0]);
    const auto z = *reinterpret_cast<const Piece<E>*>(raw[1]);
    Piece<E> out;
#pragma unroll
    for (int v = 0; v < kPieceElements<E>; ++v) {
      const A value =
          multiply_add(c.of[0].value[v], A(widen(dn.element[v])),
                       multiply_add(c.of[1].value[v], A(widen(z.element[v])), c.of[2].value[v]));
      out.element[v] = operand<P>(value);
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
  __device__ bool whole(int end) const { return whole_pieces(x, end); }
  __device__ const A* vector(int) const { return nullptr; }
  __device__ Place place(int64_t row) const { return row < 0 ? kNowhere : row * x.pitch; }
  __device__ static bool exists(Place place) { return place >= 0; }
  template <bool kWhole>
  __device__ void start(unsigned char* (&to)[1], Place place, int channel,
                        int64_t shift = 0) const {
    start_piece<kWhole>(to[0], x, place, channel, shift);
  }
  __device__ void finish(unsigned char* (&raw)[1], const Coefficients<P, 0>&) const {
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
