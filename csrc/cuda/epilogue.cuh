// From accumulators to global memory: sixteen columns at a time pass through a few kilobytes of
// shared memory, so that every lane ends up with whole 16-byte pieces of rows, and each channel's
// sums are reduced in a fixed order: lanes, then warps, then tiles.
#pragma once

#include "mma.cuh"

namespace densenet_fast::cuda {

constexpr int kTileRows = 128;  // of a block: four warps of 32
constexpr int kSlice = 16;      // columns handled at a time
constexpr int kSlicePitch = kSlice + 4;
constexpr int kRowWarps = kTileRows / 32;

// A slice of a warp's tile, lane by lane: lane i has pieces at column piece_column(i) of rows
// piece_row(i, 0 .. kPieces - 1).
template <class E>
struct Slice {
  using A = Accumulator<E>;
  static constexpr int V = kPieceElements<E>;
  static constexpr int kPieces = kSlice / V;  // pieces in a row, and rows per lane
  A value[kPieces][V];

  __device__ static int column(int lane) { return lane % kPieces * V; }
  __device__ static int row(int lane, int i) { return lane / kPieces + i * (32 / kPieces); }
};

template <class E>
constexpr int kSliceBytes = 32 * kSlicePitch * static_cast<int>(sizeof(Accumulator<E>));

// Calls body(first column of the slice, slice) for all slices of a warp's tile. `scratch` is this
// warp's own, kSliceBytes<E>.
template <class P, int NT, class Body>
__device__ __forceinline__ void for_each_slice(const WarpTile<P, NT>& acc, unsigned char* scratch,
                                               int lane, const Body& body) {
  using E = typename P::Element;
  using A = Accumulator<E>;
  A* tile = reinterpret_cast<A*>(scratch);
#pragma unroll
  for (int s = 0; s < NT / 2; ++s) {
    __syncwarp();
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
      for (int ni = 0; ni < 2; ++ni) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = mi * 16 + i / 2 * 8 + lane / 4;
          const int column = ni * 8 + lane % 4 * 2 + i % 2;
          tile[row * kSlicePitch + column] = acc[mi][2 * s + ni][i];
        }
      }
    }
    __syncwarp();
    Slice<E> slice;
#pragma unroll
    for (int i = 0; i < Slice<E>::kPieces; ++i) {
      const A* from = tile + Slice<E>::row(lane, i) * kSlicePitch + Slice<E>::column(lane);
#pragma unroll
      for (int v = 0; v < Slice<E>::V; ++v) slice.value[i][v] = from[v];
    }
    body(s * kSlice, slice);
  }
}

// The sum over all rows of the warp for this lane's columns.
template <class E, class A>
__device__ __forceinline__ A sum_over_rows(A x) {
#pragma unroll
  for (int lanes = Slice<E>::kPieces; lanes < 32; lanes *= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, lanes);
  }
  return x;
}

// Two numbers per column of a block's tile from each of its four rows of warps, in shared memory.
template <class A>
struct WarpSums {
  A* data;  // [kRowWarps, columns, 2]
  int columns;
  __device__ A& at(int warp_row, int column, int which) const {
    return data[(warp_row * columns + column) * 2 + which];
  }
};

template <class A>
__host__ __device__ constexpr size_t warp_sums_bytes(int columns) {
  return sizeof(A) * kRowWarps * columns * 2;
}

// ---- Sinks
// -----------------------------------------------------------------------------------------

// Per-tile statistics: count, mean and M2 of every column. [tiles, columns]; counts [tiles].
template <class A>
struct TileStatistics {
  A* mean = nullptr;  // null: not wanted
  A* m2 = nullptr;
  int* count = nullptr;
};

// Stores the rounded result and reduces its statistics.
template <class P>
struct StoreStatistics {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr bool kLean = true;  // registers
  Image<E> out;
  TileStatistics<A> statistics;

  template <int NT, class PixelOf>
  __device__ void run(const WarpTile<P, NT>& acc, unsigned char* scratch, WarpSums<A> sums,
                      int tile, int warp_row, int warp_column, int block_column, int lane,
                      const PixelOf& pixel_of) const {
    constexpr int V = kPieceElements<E>;
    const uint32_t rows = __ballot_sync(0xffffffffu, pixel_of(warp_row * 32 + lane) >= 0);
    const int count = __popc(rows);
    const A inverse = count ? A(1) / static_cast<A>(count) : A(0);
    for_each_slice<P, NT>(acc, scratch, lane, [&](int first, Slice<E>& slice) {
      const int local = warp_column * NT * 8 + first + Slice<E>::column(lane);
      const int column = block_column + local;
      const int valid = out.c - column;
      A sum[V] = {};
#pragma unroll
      for (int i = 0; i < Slice<E>::kPieces; ++i) {
        const int64_t pixel = pixel_of(warp_row * 32 + Slice<E>::row(lane, i));
        Piece<E> piece;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          piece.element[v] = narrow<E>(slice.value[i][v]);
          slice.value[i][v] = widen(piece.element[v]);  // statistics of what the backward reloads
          if (pixel >= 0) sum[v] += slice.value[i][v];
        }
        if (pixel >= 0 && valid > 0) {
          store_piece<E>(out.data + pixel * out.pitch + column, piece, valid, out.alignment);
        }
      }
      if (statistics.mean == nullptr) return;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A mean = sum_over_rows<E>(sum[v]) * inverse;
        A m2 = 0;
#pragma unroll
        for (int i = 0; i < Slice<E>::kPieces; ++i) {
          const A d = slice.value[i][v] - mean;
          if (rows >> Slice<E>::row(lane, i) & 1) m2 = multiply_add(d, d, m2);
        }
        m2 = sum_over_rows<E>(m2);
        if (lane < Slice<E>::kPieces) {
          sums.at(warp_row, local + v, 0) = mean;
          sums.at(warp_row, local + v, 1) = m2;
        }
      }
    });
    if (statistics.mean == nullptr) return;
    // Each warp row's count, for the merge.
    int* counts = reinterpret_cast<int*>(sums.data + kRowWarps * sums.columns * 2);
    if (warp_column == 0 && lane == 0) counts[warp_row] = count;
    __syncthreads();
    for (int c = threadIdx.x; c < sums.columns; c += kThreads) {
      if (block_column + c >= out.c) break;
      A mean = 0, m2 = 0;
      int total = 0;
      for (int r = 0; r < kRowWarps; ++r) {  // Chan, Golub, LeVeque, in warp order
        const int added = counts[r];
        if (added == 0) continue;
        const A share = static_cast<A>(added) / static_cast<A>(total + added);
        const A delta = sums.at(r, c, 0) - mean;
        mean += delta * share;
        m2 += sums.at(r, c, 1) + delta * delta * share * static_cast<A>(total);
        total += added;
      }
      const int64_t at = int64_t{tile} * out.c + block_column + c;
      statistics.mean[at] = mean;
      statistics.m2[at] = m2;
      if (block_column + c == 0) statistics.count[tile] = total;
    }
  }
};

// Per-tile sums of D and of D * (x - mean). [tiles, columns] each.
template <class A>
struct TileSums {
  A* sum = nullptr;
  A* sum_centred = nullptr;
};

// Writes a tile's column sums: warps in order.
template <class A>
__device__ __forceinline__ void finish_tile_sums(WarpSums<A> sums, TileSums<A> out, int tile,
                                                 int block_column, int channels) {
  __syncthreads();
  for (int c = threadIdx.x; c < sums.columns; c += kThreads) {
    if (block_column + c >= channels) break;
    A sum = 0, centred = 0;
    for (int r = 0; r < kRowWarps; ++r) {
      sum += sums.at(r, c, 0);
      centred += sums.at(r, c, 1);
    }
    const int64_t at = int64_t{tile} * channels + block_column + c;
    out.sum[at] = sum;
    out.sum_centred[at] = centred;
  }
}

// The backward of norm and ReLU behind a data gradient D: masks it by the activation of x, reduces
// the two sums, and either adds scale * D to the gradient buffer (kAccumulate) or stores D.
// `kCorners` is 4 for the transition, where a quarter of D goes to each of four pixels and scale *
// D is stored.
enum class Into { kGradientBuffer, kNormGradient };

template <class P, Into kInto>
struct MaskedGradient {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr bool kLean = false;  // registers
  Image<const E> x;
  Norm<A> norm;
  Image<E> gradient;  // data null: only the sums
  TileSums<A> partial;

  template <int NT, class PixelOf>
  __device__ void run(const WarpTile<P, NT>& acc, unsigned char* scratch, WarpSums<A> sums,
                      int tile, int warp_row, int warp_column, int block_column, int lane,
                      const PixelOf& pixel_of) const {
    constexpr int V = kPieceElements<E>;
    for_each_slice<P, NT>(acc, scratch, lane, [&](int first, Slice<E>& slice) {
      const int local = warp_column * NT * 8 + first + Slice<E>::column(lane);
      const int column = block_column + local;
      const int valid = x.c - column;
      A scale[V], shift[V], mean[V], sum[V] = {}, centred[V] = {};
      load_coefficients(scale, norm.scale + column, valid);
      load_coefficients(shift, norm.shift + column, valid);
      load_coefficients(mean, norm.mean + column, valid);
#pragma unroll
      for (int i = 0; i < Slice<E>::kPieces; ++i) {
        const int64_t pixel = pixel_of(warp_row * 32 + Slice<E>::row(lane, i));
        if (pixel < 0 || valid <= 0) continue;
        const Piece<E> value = load_piece<E>(x.data + pixel * x.pitch + column, valid, x.alignment);
        E* to = gradient.data ? gradient.data + pixel * gradient.pitch + column : nullptr;
        Piece<E> out;
        if (kInto == Into::kGradientBuffer && to) {
          out = load_piece<E>(to, valid, gradient.alignment);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A xv = widen(value.element[v]);
          const A d = where_positive(multiply_add(scale[v], xv, shift[v]), slice.value[i][v]);
          if (v < valid) {
            sum[v] += d;
            centred[v] = multiply_add(d, xv - mean[v], centred[v]);
          }
          if (kInto == Into::kGradientBuffer) {
            if (to) out.element[v] = narrow<E>(multiply_add(scale[v], d, A(widen(out.element[v]))));
          } else {
            out.element[v] = narrow<E>(d);
          }
        }
        if (to) store_piece<E>(to, out, valid, gradient.alignment);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A s = sum_over_rows<E>(sum[v]), c = sum_over_rows<E>(centred[v]);
        if (lane < Slice<E>::kPieces) {
          sums.at(warp_row, local + v, 0) = s;
          sums.at(warp_row, local + v, 1) = c;
        }
      }
    });
    finish_tile_sums(sums, partial, tile, block_column, x.c);
  }
};

// The same behind the transition: row r is a pooled pixel, a quarter of D goes to each of its four.
template <class P>
struct UnpooledGradient {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr bool kLean = false;  // registers
  Image<const E> x;
  Norm<A> norm;
  Image<E> gradient;
  TileSums<A> partial;

  template <int NT, class PixelOf>
  __device__ void run(const WarpTile<P, NT>& acc, unsigned char* scratch, WarpSums<A> sums,
                      int tile, int warp_row, int warp_column, int block_column, int lane,
                      const PixelOf& pixel_of) const {
    constexpr int V = kPieceElements<E>;
    for_each_slice<P, NT>(acc, scratch, lane, [&](int first, Slice<E>& slice) {
      const int local = warp_column * NT * 8 + first + Slice<E>::column(lane);
      const int column = block_column + local;
      const int valid = x.c - column;
      A scale[V], shift[V], mean[V], sum[V] = {}, centred[V] = {};
      load_coefficients(scale, norm.scale + column, valid);
      load_coefficients(shift, norm.shift + column, valid);
      load_coefficients(mean, norm.mean + column, valid);
#pragma unroll
      for (int i = 0; i < Slice<E>::kPieces; ++i) {
        const int64_t pooled = pixel_of(warp_row * 32 + Slice<E>::row(lane, i));
        if (pooled < 0 || valid <= 0) continue;
        const int64_t pixel = first_of_four(pooled, x.h, x.w);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t at = pixel + corner / 2 * x.w + corner % 2;
          const Piece<E> value = load_piece<E>(x.data + at * x.pitch + column, valid, x.alignment);
          Piece<E> out;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A xv = widen(value.element[v]);
            const A d =
                where_positive(multiply_add(scale[v], xv, shift[v]), A(0.25) * slice.value[i][v]);
            if (v < valid) {
              sum[v] += d;
              centred[v] = multiply_add(d, xv - mean[v], centred[v]);
            }
            out.element[v] = narrow<E>(scale[v] * d);
          }
          store_piece<E>(gradient.data + at * gradient.pitch + column, out, valid,
                         gradient.alignment);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A s = sum_over_rows<E>(sum[v]), c = sum_over_rows<E>(centred[v]);
        if (lane < Slice<E>::kPieces) {
          sums.at(warp_row, local + v, 0) = s;
          sums.at(warp_row, local + v, 1) = c;
        }
      }
    });
    finish_tile_sums(sums, partial, tile, block_column, x.c);
  }

  // The top left of the four pixels that pooled pixel `pooled` averages, [N, h / 2, w / 2] to [N,
  // h, w].
  __device__ static int64_t first_of_four(int64_t pooled, int h, int w) {
    const int64_t ow = w / 2, oh = h / 2;
    const int64_t x = pooled % ow, y = pooled / ow % oh, n = pooled / (ow * oh);
    return (n * h + 2 * y) * w + 2 * x;
  }
};

}  // namespace densenet_fast::cuda
