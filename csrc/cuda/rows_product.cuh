// [rows, K] x [K, N]: the 1x1 convolutions and the transition, forward and data gradient. A block
// makes a tile of 128 rows and up to 128 columns; raw operand pieces and packed weights arrive
// through a ring of asynchronous stages.
#pragma once

#include "launch.cuh"
#include "sources.cuh"

namespace densenet_fast::cuda {

// Weights packed for products: [step][tap][columns padded][kStep elements], zero padded, so that
// every tile of them is whole 16-byte pieces.
template <class E>
struct PackedWeight {
  const E* data;
  int steps;
  int columns;  // padded to whole tiles
};

// Columns of a tile at most: what the registers hold.
template <class P>
constexpr int kMaxColumns = sizeof(typename P::Element) == 2 || P::kTf32 ? 128 : 64;

// Blocks that the registers of one multiprocessor must hold: two, but for the widest tiles whose
// epilogue needs many, and for plain arithmetic. One block is eight warps.
template <class P, class Sink, int BN>
constexpr int kBlocksPerMultiprocessor = kMaxColumns<P> == 128 && (BN < 128 || Sink::kLean) ? 2 : 1;

// Sources of many raw pieces make do with one stage where shared memory is short.
template <class Source>
constexpr bool kMayBeSingle = Source::kRaw > 2;

constexpr int kOperandBytes = kTileRows * kRowBytes;

template <class P, int BN>
__host__ __device__ constexpr size_t epilogue_bytes() {
  using E = typename P::Element;
  return kWarps * kSliceBytes<E> + warp_sums_bytes<Accumulator<E>>(BN) + kRowWarps * sizeof(int);
}

template <class P, class Source, int BN>
__host__ __device__ constexpr size_t product_stage_bytes() {
  return static_cast<size_t>(Source::kRaw) * kOperandBytes + BN * kRowBytes;
}

template <class P, class Source, int BN>
__host__ __device__ constexpr size_t product_shared_bytes(int stages) {
  const size_t ring = stages * product_stage_bytes<P, Source, BN>();
  return ring > epilogue_bytes<P, BN>() ? ring : epilogue_bytes<P, BN>();
}

// Copies one step's tile of packed weights, [rows, 64 bytes], to rows of kRowBytes.
template <class E>
__device__ __forceinline__ void start_weights(unsigned char* to, const E* from, int rows) {
  for (int i = threadIdx.x; i < rows * kStepPieces; i += blockDim.x) {
    ptx::cp_async_16(to + i / kStepPieces * kRowBytes + i % kStepPieces * kPieceBytes,
                     reinterpret_cast<const unsigned char*>(from) + int64_t{i} * kPieceBytes, 16);
  }
}

template <class P, class Source, class Sink, int BN>
__global__ void __launch_bounds__(kThreads, (kBlocksPerMultiprocessor<P, Sink, BN>))
    rows_product(Source source, PackedWeight<typename P::Element> weight, Sink sink, int64_t rows,
                 int stages) {
  using E = typename P::Element;
  constexpr int NT = BN / 2 / 8;  // two warps across the columns
  constexpr int kPiecesPerThread = kTileRows * kStepPieces / kThreads;
  constexpr int kStageBytes = static_cast<int>(product_stage_bytes<P, Source, BN>());
  DF_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2, warp_column = warp % 2;
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int block_column = blockIdx.y * BN;

  // This thread's pieces of the operand: one column of pieces, rows 64 apart.
  const int piece_row = threadIdx.x / kStepPieces, piece_column = threadIdx.x % kStepPieces;
  const auto raw_pieces = [&](int stage, int i, unsigned char*(&raw)[Source::kRaw]) {
    unsigned char* at = shared + stage * kStageBytes +
                        (piece_row + i * (kThreads / kStepPieces)) * kRowBytes +
                        piece_column * kPieceBytes;
#pragma unroll
    for (int r = 0; r < Source::kRaw; ++r) raw[r] = at + r * kOperandBytes;
  };
  const auto start_step = [&](int step) {
    if (step < weight.steps) {
      const int stage = step % stages;
      const int channel = step * kStep<E> + piece_column * kPieceElements<E>;
#pragma unroll
      for (int i = 0; i < kPiecesPerThread; ++i) {
        const int64_t row = first_row + piece_row + i * (kThreads / kStepPieces);
        unsigned char* raw[Source::kRaw];
        raw_pieces(stage, i, raw);
        source.start(raw, row, row < rows && channel < source.channels(), channel);
      }
      start_weights(shared + stage * kStageBytes + Source::kRaw * kOperandBytes,
                    weight.data + (int64_t{step} * weight.columns + block_column) * kStep<E>, BN);
    }
    ptx::cp_async_commit();
  };

  int a_row[kRowHandles];
#pragma unroll
  for (int h = 0; h < kRowHandles; ++h) {
    a_row[h] = (warp_row * 32 + row_of_handle<P>(h, lane)) * kRowBytes;
  }
  WarpTile<P, NT> acc;
  clear<P, NT>(acc);

  const bool single = kMayBeSingle<Source> && stages == 1;
  for (int step = 0; step < stages - 1; ++step) start_step(step);
  for (int step = 0; step < weight.steps; ++step) {
    if (single) {
      __syncthreads();  // everyone is done with the only stage
      start_step(step);
    }
    if (stages == 3) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    const int stage = step % stages;
    const int channel = step * kStep<E> + piece_column * kPieceElements<E>;
#pragma unroll
    for (int i = 0; i < kPiecesPerThread; ++i) {
      const int64_t row = first_row + piece_row + i * (kThreads / kStepPieces);
      unsigned char* raw[Source::kRaw];
      raw_pieces(stage, i, raw);
      source.finish(raw, row, row < rows && channel < source.channels(), channel);
    }
    __syncthreads();  // the stage is whole; everyone is done with the one before
    if (!single) start_step(step + stages - 1);
    const unsigned char* operand = shared + stage * kStageBytes;
    multiply_step<P, NT>(
        acc, operand, a_row,
        operand + Source::kRaw * kOperandBytes + warp_column * (BN / 2) * kRowBytes, lane);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring becomes the epilogue's

  using A = Accumulator<E>;
  const WarpSums<A> sums{reinterpret_cast<A*>(shared + kWarps * kSliceBytes<E>), BN};
  sink.template run<NT>(acc, shared + warp * kSliceBytes<E>, sums, blockIdx.x, warp_row,
                        warp_column, block_column, lane, [&](int row) {
                          const int64_t r = first_row + row;
                          return r < rows ? r : int64_t{-1};
                        });
}

// The most stages with which two blocks share a multiprocessor; two where none would, so that a
// lone block loads while it computes.
template <class P, class Source, int BN>
int product_stages(const DeviceLimits& device) {
  const auto two_blocks = [&](int stages) {
    return 2 * (product_shared_bytes<P, Source, BN>(stages) + 1024) <=
           static_cast<size_t>(device.shared_bytes_per_multiprocessor);
  };
  if (two_blocks(3)) return 3;
  if (!kMayBeSingle<Source> || two_blocks(2)) return 2;
  const auto limit = static_cast<size_t>(device.shared_bytes_per_block);
  return two_blocks(1) || product_shared_bytes<P, Source, BN>(2) > limit ? 1 : 2;
}

template <class P, int BN, class Source, class Sink>
void launch_rows_product(const char* name, const Source& source,
                         const PackedWeight<typename P::Element>& weight, const Sink& sink,
                         int64_t rows, int columns, Stream stream) {
  const int stages = product_stages<P, Source, BN>(current_device_limits());
  const dim3 grid(static_cast<unsigned>((rows + kTileRows - 1) / kTileRows),
                  static_cast<unsigned>((columns + BN - 1) / BN));
  launch(
      &rows_product<P, Source, Sink, BN>,
      LaunchConfig{name, grid, dim3(kThreads), product_shared_bytes<P, Source, BN>(stages), stream},
      source, weight, sink, rows, stages);
}

template <class P, class Source, class Sink>
void run_rows_product(const char* name, const Source& source,
                      const PackedWeight<typename P::Element>& weight, const Sink& sink,
                      int64_t rows, int columns, Stream stream) {
  if constexpr (kMaxColumns<P> > 64) {
    if (columns > 64) {
      return launch_rows_product<P, 128>(name, source, weight, sink, rows, columns, stream);
    }
  }
  launch_rows_product<P, 64>(name, source, weight, sink, rows, columns, stream);
}

}  // namespace densenet_fast::cuda
