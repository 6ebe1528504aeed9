// From accumulators to global memory: sixteen columns at a time pass through a few kilobytes of
// shared memory, so that every lane ends up with whole 16-byte pieces of rows, and each channel's
// sums are reduced in a fixed order: lanes, then warps, then tiles.
#pragma once

#include "mma.cuh"
#include "partials.cuh"

namespace densenet_fast::cuda {

// A block's tile. Each of its warps has 32 rows, and sixteen columns or more.
template <int kTileRows, int kTileColumns>
struct Tile {
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  static constexpr int kRowWarps = kRows / kWarpRows;
  static constexpr int kColumnWarps = 8 / kRowWarps < kColumns / 16 ? 8 / kRowWarps : kColumns / 16;
  static constexpr int kWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = 16 / kWarps;  // that should share a multiprocessor
  static constexpr int NT = kColumns / kColumnWarps / 8;
};

// A warp's place in the block's tile.
template <class T>
struct WarpPlace {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int row_warp = warp / T::kColumnWarps;
  int row = row_warp * kWarpRows, column = warp % T::kColumnWarps * T::NT * 8;
};

// body(row, column, first, second) for the pairs of neighbours that a lane holds of a warp's tile.
template <class A, int NT, class Body>
__device__ __forceinline__ void for_each_pair(const A (&acc)[2][NT][4], int lane,
                                              const Body& body) {
#pragma unroll
  for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
    for (int ni = 0; ni < NT; ++ni) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        body(mi * 16 + half * 8 + lane / 4, ni * 8 + lane % 4 * 2, acc[mi][ni][2 * half],
             acc[mi][ni][2 * half + 1]);
      }
    }
  }
}

// Two neighbours of a row of `columns`, `column` even, as far as they exist.
template <class A>
__device__ __forceinline__ void store_pair(A* row, int column, int columns, A first, A second) {
  if (columns % 2 == 0) {
    if (column < columns) *reinterpret_cast<Vector<A, 2>*>(row + column) = {first, second};
  } else {
    if (column < columns) row[column] = first;
    if (column + 1 < columns) row[column + 1] = second;
  }
}

constexpr int kSlice = 16;  // columns handled at a time

// A slice of a warp's tile, lane by lane: lane i has pieces at column `column(i)` of rows
// `row(i, 0 .. kPieces - 1)`.
template <class E>
struct Slice {
  using A = Accumulator<E>;
  static constexpr int V = kPieceElements<E>;
  static constexpr int kPieces = kSlice / V;  // pieces in a row, and rows per lane
  static constexpr int kBytes = kWarpRows * kSlice * static_cast<int>(sizeof(A));
  A value[kPieces][V];

  __host__ __device__ static int column(int lane) { return lane % kPieces * V; }
  __host__ __device__ static int row(int lane, int i) {
    return lane / kPieces + i * (32 / kPieces);
  }
  // In shared memory fours of columns change places in every other pair of rows: neither pairs nor
  // fours of neighbouring lanes meet in a bank.
  __host__ __device__ static int at(int row, int column) {
    return row * kSlice + (column ^ (row >> 1 & 1) * 12);
  }
};

// Calls body(first column of the slice, slice) for all slices of a warp's tile. `scratch` is this
// warp's own.
template <class P, int NT, class Body>
__device__ __forceinline__ void for_each_slice(const WarpTile<P, NT>& acc, unsigned char* scratch,
                                               int lane, const Body& body) {
  using E = typename P::Element;
  using A = Accumulator<E>;
  constexpr int kFour = Slice<E>::V < 4 ? Slice<E>::V : 4;
  A* tile = reinterpret_cast<A*>(scratch);
#pragma unroll
  for (int s = 0; s < NT / 2; ++s) {
    __syncwarp();
    A pairs[2][2][4];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      pairs[i / 8][i / 4 % 2][i % 4] = acc[i / 8][2 * s + i / 4 % 2][i % 4];
    for_each_pair(pairs, lane, [&](int row, int column, A first, A second) {
      *reinterpret_cast<Vector<A, 2>*>(tile + Slice<E>::at(row, column)) = {first, second};
    });
    __syncwarp();
    Slice<E> slice;
#pragma unroll
    for (int i = 0; i < Slice<E>::kPieces; ++i) {
#pragma unroll
      for (int v = 0; v < Slice<E>::V; v += kFour) {
        const int at = Slice<E>::at(Slice<E>::row(lane, i), Slice<E>::column(lane) + v);
        const auto four = *reinterpret_cast<const Vector<A, kFour>*>(tile + at);
#pragma unroll
        for (int f = 0; f < kFour; ++f) slice.value[i][v + f] = four.value[f];
      }
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

// Behind the slices' scratch, what each row of warps has of each column.
template <class T, class E, class M>
struct WarpPartials {
  M* data;  // [row warps, columns]

  __device__ explicit WarpPartials(unsigned char* shared)
      : data(reinterpret_cast<M*>(shared + T::kWarps * Slice<E>::kBytes)) {}
  __device__ M& at(int row_warp, int column) const { return data[row_warp * T::kColumns + column]; }
  // The tile's, to where tiles leave theirs.
  template <class Partial>
  __device__ void finish(const Partial& out, int tile, int block_column, int columns) const {
    __syncthreads();
    for (int c = threadIdx.x; c < T::kColumns && block_column + c < columns; c += T::kThreads) {
      M warps[T::kRowWarps];
#pragma unroll
      for (int r = 0; r < T::kRowWarps; ++r) warps[r] = at(r, c);
      out.store(tile, block_column + c, columns, merged(warps));
    }
  }
};

// Slices, partial results of three numbers, and three coefficients of a column.
template <class E, class T>
__host__ __device__ constexpr size_t epilogue_bytes() {
  return T::kWarps * Slice<E>::kBytes +
         sizeof(Accumulator<E>) * 3 * T::kColumns * (T::kRowWarps + 1);
}

// ---- Sinks
// -----------------------------------------------------------------------------------------

// Stores the rounded result and reduces its statistics; or, of a reduction that is split, leaves
// this split's part.
template <class P>
struct StoreStatistics {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr bool kGradient = false;
  Image<E> out;
  TileStatistics<A> statistics;
  A* split = nullptr;  // [splits, rows, columns]

  template <class T, class PixelOf>
  __device__ void run(const WarpTile<P, T::NT>& acc, unsigned char* shared, int tile,
                      int block_column, const PixelOf& pixel_of) const {
    constexpr int V = kPieceElements<E>;
    const WarpPlace<T> place;
    if (split) {
      A* part = split + blockIdx.z * out.rows() * out.c;
      for_each_pair(acc, place.lane, [&](int row, int column, A first, A second) {
        const int64_t pixel = pixel_of(place.row + row);
        if (pixel < 0) return;
        store_pair(part + pixel * out.c, block_column + place.column + column, out.c, first,
                   second);
      });
      return;
    }
    const WarpPartials<T, E, Moments<A>> partials(shared);
    const uint32_t rows = __ballot_sync(0xffffffffu, pixel_of(place.row + place.lane) >= 0);
    const int count = __popc(rows);
    const A inverse = count ? A(1) / static_cast<A>(count) : A(0);
    unsigned char* scratch = shared + place.warp * Slice<E>::kBytes;
    for_each_slice<P, T::NT>(acc, scratch, place.lane, [&](int first, Slice<E>& slice) {
      const int local = place.column + first + Slice<E>::column(place.lane);
      const int column = block_column + local;
      const int valid = out.c - column;
      A sum[V] = {};
#pragma unroll
      for (int i = 0; i < Slice<E>::kPieces; ++i) {
        const int64_t pixel = pixel_of(place.row + Slice<E>::row(place.lane, i));
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
          if (rows >> Slice<E>::row(place.lane, i) & 1) m2 = multiply_add(d, d, m2);
        }
        m2 = sum_over_rows<E>(m2);
        if (place.lane < Slice<E>::kPieces) {
          partials.at(place.row_warp, local + v) = {static_cast<A>(count), mean, m2};
        }
      }
    });
    if (statistics.mean) partials.finish(statistics, tile, block_column, out.c);
  }
};

// Where the backward of norm and ReLU behind a data gradient D goes. Into the gradient buffer:
// scale * D is added. As the norm's gradient: D itself, or the same as into the buffer. Unpooled:
// rows are pooled pixels, an equal share of D goes to each of a row's two, four or eight, times
// scale.
enum class Into { kGradientBuffer, kNormGradient, kUnpooled };

// Masks D by the activation of x, stores it, and reduces its two sums.
template <class P, Into kInto>
struct MaskedGradient {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr bool kGradient = true;
  static constexpr bool kUnpools = kInto == Into::kUnpooled;
  Image<const E> x;
  Norm<A> norm;
  Image<E> gradient;  // data null: only the sums
  TileSums<A> partial;
  PooledPixels pooled{};    // of kUnpooled
  bool accumulate = false;  // of kNormGradient

  __device__ bool adds() const {
    return kInto == Into::kGradientBuffer || (kInto == Into::kNormGradient && accumulate);
  }

  template <class T, class PixelOf>
  __device__ void run(const WarpTile<P, T::NT>& acc, unsigned char* shared, int tile,
                      int block_column, const PixelOf& pixel_of) const {
    constexpr int V = kPieceElements<E>;
    const WarpPlace<T> place;
    const WarpPartials<T, E, Sums<A>> partials(shared);
    A* coefficients = reinterpret_cast<A*>(&partials.at(T::kRowWarps, 0));  // [3, columns]
    for (int c = threadIdx.x; c < T::kColumns; c += T::kThreads) {
      const bool exists = block_column + c < x.c;
      const A* const vectors[] = {norm.scale, norm.shift, norm.mean};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        coefficients[i * T::kColumns + c] = exists ? vectors[i][block_column + c] : A(0);
      }
    }
    __syncthreads();
    unsigned char* scratch = shared + place.warp * Slice<E>::kBytes;
    for_each_slice<P, T::NT>(acc, scratch, place.lane, [&](int first, Slice<E>& slice) {
      const int local = place.column + first + Slice<E>::column(place.lane);
      const int column = block_column + local;
      const int valid = x.c - column;
      const auto coefficient = [&](int i) {
        return *reinterpret_cast<const Vector<A, V>*>(coefficients + i * T::kColumns + local);
      };
      const Vector<A, V> scale = coefficient(0), shift = coefficient(1), mean = coefficient(2);
      A sum[V] = {}, centred[V] = {};
#pragma unroll
      for (int i = 0; i < Slice<E>::kPieces; ++i) {
        const int64_t row = pixel_of(place.row + Slice<E>::row(place.lane, i));
        if (row < 0 || valid <= 0) continue;
        const auto mask = [&](int64_t at) {
          const Piece<E> value = load_piece<E>(x.data + at * x.pitch + column, valid, x.alignment);
          E* to = gradient.data ? gradient.data + at * gradient.pitch + column : nullptr;
          Piece<E> out;
          if (adds() && to) {
            out = load_piece<E>(to, valid, gradient.alignment);
          }
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A xv = widen(value.element[v]);
            const A share = kUnpools ? A(pooled.share) * slice.value[i][v] : slice.value[i][v];
            const A y = multiply_add(scale.value[v], xv, shift.value[v]);
            const A d = where_positive(y, share, kUnpools ? norm.floor : A(0));
            sum[v] += d;
            centred[v] = multiply_add(d, xv - mean.value[v], centred[v]);
            if (adds()) {
              if (to)
                out.element[v] =
                    narrow<E>(multiply_add(scale.value[v], d, A(widen(out.element[v]))));
            } else {
              out.element[v] = narrow<E>(kUnpools ? scale.value[v] * d : d);
            }
          }
          if (to) store_piece<E>(to, out, valid, gradient.alignment);
        };
        if constexpr (kUnpools) {
          pooled.for_each_corner(row, mask);
        } else {
          mask(row);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Sums<A> s{sum_over_rows<E>(sum[v]), sum_over_rows<E>(centred[v])};
        if (place.lane < Slice<E>::kPieces) partials.at(place.row_warp, local + v) = s;
      }
    });
    partials.finish(partial, tile, block_column, x.c);
  }
};

}  // namespace densenet_fast::cuda
