// [rows, K] x [K, N]: the 1x1 convolutions and the transition, forward and data gradient. A block
// makes a tile; raw operand pieces, their coefficients and packed weights arrive through a ring of
// asynchronous stages.
#pragma once

#include <iterator>

#include "launch.cuh"
#include "sources.cuh"

namespace densenet_fast::cuda {

// Weights packed for products: [step][tap][columns][kStep elements], steps zero padded.
template <class E>
struct PackedWeight {
  const E* data;
  int steps;
  int columns;
};

template <class P>
constexpr bool kTensor = sizeof(typename P::Element) == 2 || P::kTf32;  // but for sm_75

// What a multiprocessor's registers must leave room for: sixteen warps, and eight of plain
// arithmetic, with several pixels a row, before copies were asynchronous, and of the largest tiles
// of a data gradient.
template <class P, class Source, class Sink, class T>
constexpr int kBlocks = kTensor<P> && Source::kRaw <= 2 && kArchitecture >= 800 &&
                                !(Sink::kGradient && T::kRows * T::kColumns > 128 * 64)
                            ? T::kBlocks
                            : (T::kBlocks + 1) / 2;

// The tiles of a product with this arithmetic.
template <class P, const auto& kTiles>
constexpr const auto& tiles_of() {
  if constexpr (kTensor<P>) {
    return kTiles;
  } else {
    return kPlainTiles;
  }
}

// body(Tile) for the size of `kTiles` that a cut has chosen.
template <const auto& kTiles, size_t i = 0, class Body>
void with_tile(const Cut& cut, const Body& body) {
  if constexpr (i < std::size(kTiles)) {
    if (cut.size == i) return body(Tile<kTiles[i].rows, kTiles[i].columns>{});
    with_tile<kTiles, i + 1>(cut, body);
  }
}

template <class T>
dim3 product_grid(const Cut& cut, int64_t columns) {
  return dim3(static_cast<unsigned>(cut.tiles),
              static_cast<unsigned>(ceil_div(columns, T::kColumns)),
              static_cast<unsigned>(cut.splits));
}

// Sources of many raw pieces make do with one stage where shared memory is short; on sm_75 it is.
template <class Source>
__host__ __device__ constexpr bool may_be_single(bool is_sm_75) {
  return Source::kRaw > (is_sm_75 ? 1 : 2);
}

// The 16-byte pieces of a step that a thread copies: one column of four, every kThreads / 4-th row.
// Of eight lanes the rows have one parity and the pieces make whole sectors: none share a bank.
template <int kThreads>
struct ThreadPieces {
  static constexpr int kRows = kThreads / kStepPieces;
  int row, column;

  __host__ __device__ explicit ThreadPieces(int thread)
      : row(thread / 32 * 8 + (thread >> 1 & 3) * 2 + (thread >> 3 & 1)),
        column((thread & 1) + (thread >> 4 & 1) * 2) {}
};

// One step's tile of packed weights, [kColumns, 64 bytes], to rows of kRowBytes.
template <int kColumns, int kThreads, class E>
__device__ __forceinline__ void start_weights(unsigned char* to, const E* from, int columns) {
  using Pieces = ThreadPieces<kThreads>;
  const Pieces own(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kColumns; i += Pieces::kRows) {
    const int column = own.row + i;
    if (kColumns < Pieces::kRows && column >= kColumns) continue;
    const bool exists = column < columns;
    ptx::cp_async<16>(to + column * kRowBytes + own.column * kPieceBytes,
                      from + (exists ? column : 0) * kStep<E> + own.column * kPieceElements<E>,
                      exists ? 16 : 0);
  }
}

// A step's coefficients, for this warp alone.
template <class E, class Source>
constexpr int kVectorBytes = Source::kVectors * kStep<E> * static_cast<int>(sizeof(Accumulator<E>));

template <class E, class Source>
__device__ __forceinline__ void start_coefficients(unsigned char* to, const Source& source,
                                                   int first, int lane) {
  constexpr int kWords = sizeof(Accumulator<E>) / 4, kVector = kStep<E> * kWords;
#pragma unroll
  for (int i = 0; i < Source::kVectors * kVector; i += 32) {
    const int word = i + lane;
    if (Source::kVectors * kVector % 32 && word >= Source::kVectors * kVector) continue;
    const int channel = first + word % kVector / kWords;
    const bool exists = channel < source.channels();
    const auto* from = reinterpret_cast<const uint32_t*>(source.vector(word / kVector));
    ptx::cp_async<4>(to + word * 4, from + (exists ? channel * kWords + word % kWords : 0),
                     exists ? 4 : 0);
  }
}

template <class P, class T, class Source>
__host__ __device__ constexpr size_t product_stage_bytes() {
  return (Source::kRaw * T::kRows + T::kColumns) * kRowBytes +
         T::kWarps * kVectorBytes<typename P::Element, Source>;
}

template <class P, class T, class Source>
__host__ __device__ constexpr size_t product_shared_bytes(int stages) {
  const size_t ring = stages * product_stage_bytes<P, T, Source>();
  const size_t epilogue = epilogue_bytes<typename P::Element, T>();
  return ring > epilogue ? ring : epilogue;
}

template <class P, class Source, class Sink, int kRows, int kColumns>
__global__ void __launch_bounds__((Tile<kRows, kColumns>::kThreads),
                                  (kBlocks<P, Source, Sink, Tile<kRows, kColumns>>))
    rows_product(Source source, PackedWeight<typename P::Element> weight, Sink sink, int64_t rows,
                 int split_steps, int stages) {
  using E = typename P::Element;
  using T = Tile<kRows, kColumns>;
  using Pieces = ThreadPieces<T::kThreads>;
  constexpr int kOperandBytes = kRows * kRowBytes;
  constexpr int kVectorsAt = Source::kRaw * kOperandBytes + kColumns * kRowBytes;
  constexpr int kStageBytes = static_cast<int>(product_stage_bytes<P, T, Source>());
  DF_DYNAMIC_SHARED(shared);
  const WarpPlace<T> place;
  const Pieces own(threadIdx.x);
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int block_column = blockIdx.y * kColumns;
  const int first = blockIdx.z * split_steps;
  const int last = first + split_steps < weight.steps ? first + split_steps : weight.steps;

  constexpr int kPieces = kRows / Pieces::kRows;  // of a thread
  const auto place_of = [&](int i) {
    const int64_t row = first_row + own.row + i * Pieces::kRows;
    return source.place(row < rows ? row : int64_t{-1});
  };
  typename Source::Place places[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) places[i] = place_of(i);
  // Calls body(raw) with where piece i is in shared memory.
  const auto at_piece = [&](unsigned char* stage, int i, const auto& body) {
    unsigned char* raw[Source::kRaw];
#pragma unroll
    for (int r = 0; r < Source::kRaw; ++r) {
      raw[r] = stage + r * kOperandBytes + (own.row + i * Pieces::kRows) * kRowBytes +
               own.column * kPieceBytes;
    }
    body(raw);
  };
  const auto next = [&](int stage) {
    return stage + kStageBytes == stages * kStageBytes ? 0 : stage + kStageBytes;
  };
  int filled = 0;  // the stage that the step `started` goes to
  int started = first;
  const E* weights = weight.data + (int64_t{first} * weight.columns + block_column) * kStep<E>;
  const auto start_step = [&] {
    if (started < last) {
      unsigned char* stage = shared + filled;
      const int channel = started * kStep<E> + own.column * kPieceElements<E>;
      start_coefficients<E>(stage + kVectorsAt + place.warp * kVectorBytes<E, Source>, source,
                            started * kStep<E>, place.lane);
      if (source.whole((started + 1) * kStep<E>)) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          at_piece(stage, i,
                   [&](auto& raw) { source.template start<true>(raw, places[i], channel); });
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < kPieces; ++i) {
          at_piece(stage, i,
                   [&](auto& raw) { source.template start<false>(raw, place_of(i), channel); });
        }
      }
      start_weights<kColumns, T::kThreads>(stage + Source::kRaw * kOperandBytes, weights,
                                           weight.columns - block_column);
      weights += int64_t{weight.columns} * kStep<E>;
      ++started;
    }
    filled = next(filled);
    ptx::cp_async_commit();
  };

  int a_row[kRowHandles];
#pragma unroll
  for (int h = 0; h < kRowHandles; ++h) {
    a_row[h] = (place.row + row_of_handle<P>(h, place.lane)) * kRowBytes;
  }
  WarpTile<P, T::NT> acc;
  clear<P, T::NT>(acc);

  const bool single = may_be_single<Source>(kArchitecture < 800) && stages == 1;
  for (int step = 0; step < stages - 1; ++step) start_step();
  int stage = 0;
  for (int step = first; step < last; ++step) {
    if (single) {
      __syncthreads();  // everyone is done with the only stage
      start_step();
    }
    if (stages == 3) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    Coefficients<P, Source::kVectors> coefficients;
    if constexpr (Source::kVectors > 0) {
      __syncwarp();  // the coefficients are those that its lanes have copied
      coefficients.load(shared + stage + kVectorsAt + place.warp * kVectorBytes<E, Source>,
                        kStep<E>, own.column * kPieceElements<E>);
    }
    // Rows and channels outside are zeros with weights or coefficients of zero: nobody sees them.
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      at_piece(shared + stage, i, [&](auto& raw) { source.finish(raw, coefficients); });
    }
    __syncthreads();  // the stage is whole; everyone is done with the one before
    if (!single) start_step();
    const unsigned char* operand = shared + stage;
    multiply_step<P, T::NT>(acc, operand, a_row,
                            operand + Source::kRaw * kOperandBytes + place.column * kRowBytes,
                            place.lane);
    stage = next(stage);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring becomes the epilogue's

  sink.template run<T>(acc, shared, blockIdx.x, block_column, [&](int row) {
    const int64_t r = first_row + row;
    return r < rows ? r : int64_t{-1};
  });
}

// The most stages with which sixteen warps share a multiprocessor; two where none would, so that a
// lone block loads while it computes.
template <class P, class T, class Source>
int product_stages(const DeviceLimits& device) {
  const auto resident = [&](int stages) {
    return T::kBlocks * (product_shared_bytes<P, T, Source>(stages) + 1024) <=
           static_cast<size_t>(device.shared_bytes_per_multiprocessor);
  };
  if (resident(3)) return 3;
  if (!may_be_single<Source>(device.major < 8) || resident(2)) return 2;
  const auto limit = static_cast<size_t>(device.shared_bytes_per_block);
  return resident(1) || product_shared_bytes<P, T, Source>(2) > limit ? 1 : 2;
}

template <class P, const auto& kTiles = kRowsTiles, class Source, class Sink>
void run_rows_product(const char* name, const Source& source,
                      const PackedWeight<typename P::Element>& weight, const Sink& sink,
                      int64_t rows, const Cut& cut, Stream stream) {
  with_tile<tiles_of<P, kTiles>()>(cut, [&](auto tile) {
    using T = decltype(tile);
    const int stages = product_stages<P, T, Source>(current_device_limits());
    launch(&rows_product<P, Source, Sink, T::kRows, T::kColumns>,
           LaunchConfig{name, product_grid<T>(cut, weight.columns), dim3(T::kThreads),
                        product_shared_bytes<P, T, Source>(stages), stream},
           source, weight, sink, rows, static_cast<int>(ceil_div(weight.steps, cut.splits)),
           stages);
  });
}

}  // namespace densenet_fast::cuda
