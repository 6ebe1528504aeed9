// Weight gradients: products whose reduction runs over pixels, split over runs of pixels so that
// there is work for the whole device. Every split writes its own partial result; they are added in
// order.
#pragma once

#include "conv3x3_product.cuh"

namespace densenet_fast::cuda {

template <class E>
constexpr int kStagePixels = sizeof(E) == 8 ? 16 : 32;

// Tile sizes by element: rows of 256 bytes at most.
template <class E, bool kNarrow>
struct PixelTile {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int BI = sizeof(E) == 2 ? (kNarrow ? 64 : 128) : sizeof(E) == 4 ? 64 : 32;
  static constexpr int BJ = sizeof(E) == 2 ? 128 : 64;
  static constexpr int kRowWarps = BI / 32;
  static constexpr int kColumnWarps = kWarps / kRowWarps;
  static constexpr int NT = BJ / kColumnWarps / 8;
};

// `kWidth` channels of one operand's pixels in shared memory, one plane for each raw piece, and
// their coefficients, which are those of all pixels.
template <class P, class Source, int kWidth, int kBlockThreads = kThreads>
struct PixelOperand {
  using E = typename P::Element;
  using A = Accumulator<E>;
  static constexpr int kPitch = kWidth * static_cast<int>(sizeof(E)) + 16;
  static constexpr int kPieces = kWidth / kPieceElements<E>;
  static constexpr int kVectorBytes = Source::kVectors * kWidth * static_cast<int>(sizeof(A));

  static constexpr int kUnroll = Source::kRaw > 2 ? 1 : 4;  // registers

  const Source& source;
  int block_channel;
  unsigned char* vectors;

  // Behind it everyone waits for everyone.
  __device__ void load_coefficients() const {
    for (int i = threadIdx.x; i < Source::kVectors * kWidth; i += kBlockThreads) {
      const int channel = block_channel + i % kWidth;
      reinterpret_cast<A*>(vectors)[i] =
          channel < source.channels() ? source.vector(i / kWidth)[channel] : A(0);
    }
  }
  // A thread has one column of pieces: body(raw, row) for its rows.
  template <int kAtOnce, class Body>
  __device__ __forceinline__ void for_each_piece(unsigned char* tile, int pixels,
                                                 const Body& body) const {
    constexpr int kRows = kBlockThreads / kPieces;
#pragma unroll kAtOnce
    for (int first = 0; first < pixels; first += kRows) {
      const int row = first + threadIdx.x / kPieces;
      if (pixels % kRows != 0 && row >= pixels) break;
      unsigned char* raw[Source::kRaw];
#pragma unroll
      for (int r = 0; r < Source::kRaw; ++r) {
        raw[r] = tile + (r * pixels + row) * kPitch + threadIdx.x % kPieces * kPieceBytes;
      }
      body(raw, row);
    }
  }
  // Fetches the pieces of pixel_of(row), -1 for none.
  template <class PixelOf>
  __device__ __forceinline__ void start(unsigned char* tile, int pixels,
                                        const PixelOf& pixel_of) const {
    const int channel = block_channel + static_cast<int>(threadIdx.x) % kPieces * kPieceElements<E>;
    if (source.whole(block_channel + kWidth)) {
      for_each_piece<kUnroll>(tile, pixels, [&](auto& raw, int row) {
        source.template start<true>(raw, source.place(pixel_of(row)), channel);
      });
    } else {
      for_each_piece<1>(tile, pixels, [&](auto& raw, int row) {
        source.template start<false>(raw, source.place(pixel_of(row)), channel);
      });
    }
  }
  template <class PixelOf>
  __device__ __forceinline__ void finish(unsigned char* tile, int pixels,
                                         const PixelOf& pixel_of) const {
    Coefficients<P, Source::kVectors> coefficients;
    coefficients.load(vectors, kWidth, threadIdx.x % kPieces * kPieceElements<E>);
    for_each_piece<kUnroll>(tile, pixels, [&](auto& raw, int row) {
      if (pixel_of(row) >= 0) source.finish(raw, coefficients);
    });
  }
};

template <class P, class SourceI, class SourceJ, bool kNarrow>
__host__ __device__ constexpr size_t pixel_stage_bytes() {
  using T = PixelTile<typename P::Element, kNarrow>;
  return static_cast<size_t>(kStagePixels<typename P::Element>) *
         (SourceI::kRaw * PixelOperand<P, SourceI, T::BI>::kPitch +
          SourceJ::kRaw * PixelOperand<P, SourceJ, T::BJ>::kPitch);
}

template <class P, class SourceI, class SourceJ, bool kNarrow>
__host__ __device__ constexpr size_t pixel_shared_bytes(int stages) {
  using T = PixelTile<typename P::Element, kNarrow>;
  return stages * pixel_stage_bytes<P, SourceI, SourceJ, kNarrow>() +
         PixelOperand<P, SourceI, T::BI>::kVectorBytes +
         PixelOperand<P, SourceJ, T::BJ>::kVectorBytes;
}

// partial[split, i, j] = sum over the split's rows of I[row, i] * J[row, j].
template <class P, class SourceI, class SourceJ, bool kNarrow>
__global__ void __launch_bounds__(kThreads, kArchitecture < 800 ? 1 : 2)
    pixel_product(SourceI source_i, SourceJ source_j, Accumulator<typename P::Element>* partial,
                  int64_t rows, int64_t rows_per_split, int stages) {
  using E = typename P::Element;
  using T = PixelTile<E, kNarrow>;
  using I = PixelOperand<P, SourceI, T::BI>;
  using J = PixelOperand<P, SourceJ, T::BJ>;
  constexpr int kPixels = kStagePixels<E>;
  constexpr int kPlaneJ = SourceI::kRaw * kPixels * I::kPitch;
  constexpr int kStageBytes = static_cast<int>(pixel_stage_bytes<P, SourceI, SourceJ, kNarrow>());
  DF_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / T::kColumnWarps, warp_column = warp % T::kColumnWarps;
  const I operand_i{source_i, static_cast<int>(blockIdx.x) * T::BI, shared + stages * kStageBytes};
  const J operand_j{source_j, static_cast<int>(blockIdx.y) * T::BJ,
                    operand_i.vectors + I::kVectorBytes};
  const int64_t begin = int64_t{blockIdx.z} * rows_per_split;
  const int64_t end = begin + rows_per_split < rows ? begin + rows_per_split : rows;

  const auto start = [&](unsigned char* stage, int64_t row) {
    const auto pixel_of = [&](int r) { return row + r < end ? row + r : int64_t{-1}; };
    if (row < end) {
      operand_i.start(stage, kPixels, pixel_of);
      operand_j.start(stage + kPlaneJ, kPixels, pixel_of);
    }
    ptx::cp_async_commit();
  };

  WarpTile<P, T::NT> acc;
  clear<P, T::NT>(acc);
  operand_i.load_coefficients();
  operand_j.load_coefficients();
  start(shared, begin);
  __syncthreads();
  unsigned char* stage = shared;
  unsigned char* other = shared + (stages - 1) * kStageBytes;
  for (int64_t row = begin; row < end; row += kPixels) {
    const auto pixel_of = [&](int r) { return row + r < end ? row + r : int64_t{-1}; };
    ptx::cp_async_wait<0>();
    operand_i.finish(stage, kPixels, pixel_of);
    operand_j.finish(stage + kPlaneJ, kPixels, pixel_of);
    __syncthreads();
    if (stages == 2) start(other, row + kPixels);
    const unsigned char* a = stage + warp_row * 32 * sizeof(E);
    const unsigned char* b =
        stage + kPlaneJ + warp_column * T::NT * 8 * static_cast<int>(sizeof(E));
#pragma unroll
    for (int p0 = 0; p0 < kPixels; p0 += kPixelStep) {
      multiply_pixels<P, T::NT>(
          acc, a, [&](int p) { return (p0 + p) * I::kPitch; }, b,
          [&](int p) { return (p0 + p) * J::kPitch; }, lane);
    }
    if (stages == 1) {
      __syncthreads();
      start(stage, row + kPixels);
    }
    unsigned char* const done = stage;
    stage = other;
    other = done;
  }
  ptx::cp_async_wait<0>();

  const int in = source_j.channels(), out = source_i.channels();
  auto* to = partial + int64_t{blockIdx.z} * out * in;
  for_each_pair(acc, lane, [&](int row, int column, auto first, auto second) {
    const int i = operand_i.block_channel + warp_row * 32 + row;
    if (i >= out) return;
    store_pair(to + int64_t{i} * in, operand_j.block_channel + warp_column * T::NT * 8 + column, in,
               first, second);
  });
}

// ---- 3x3: one warp a tap of a slice of the kernel
// ---------------------------------------------------------------------------

constexpr int kWarpTaps = 9;
constexpr int kTapThreads = kWarpTaps * 32;

template <class P>
struct TapTile {
  using E = typename P::Element;
  static constexpr int BI = 32;                                 // output channels
  static constexpr int BJ = 128 / static_cast<int>(sizeof(E));  // input channels
  static constexpr int NT = BJ / 8;
  using I = PixelOperand<P, PlainSource<P>, BI, kTapThreads>;
  using J = PixelOperand<P, ActivatedSource<P>, BJ, kTapThreads>;
};

template <class P>
__host__ __device__ constexpr size_t tap_stage_bytes(const TileGrid& grid) {
  using T = TapTile<P>;
  return static_cast<size_t>(grid.pixels) * T::I::kPitch +
         static_cast<size_t>(grid.halo_pixels) * T::J::kPitch;
}

template <class P>
__host__ __device__ constexpr size_t tap_shared_bytes(const TileGrid& grid, int stages) {
  return stages * tap_stage_bytes<P>(grid) + TapTile<P>::J::kVectorBytes;
}

// partial[split, tap, o, c] = sum over the split's tiles of grad[pixel, o] * act(Z)[pixel + tap,
// c]. Sequences (kLines) have three taps: warps have them three times, each for every third step of
// pixels.
template <class P, bool kLines>
__global__ void __launch_bounds__(kTapThreads)
    tap_product(PlainSource<P> grad, ActivatedSource<P> bottleneck,
                Accumulator<typename P::Element>* partial, TileGrid grid, int tiles,
                int tiles_per_split, int stages) {
  using T = TapTile<P>;
  DF_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pixels = grid.pixels, halo_pixels = grid.halo_pixels;
  const int plane_j = pixels * T::I::kPitch;
  const int stage_bytes = static_cast<int>(tap_stage_bytes<P>(grid));
  const typename T::I operand_i{grad, static_cast<int>(blockIdx.x) * T::BI, nullptr};
  const bool volumes = !kLines && grid.slices == 3;
  const int reach = kLines ? 0 : grid.reach;
  const int slice = volumes ? blockIdx.y % 3 : 0, column = volumes ? blockIdx.y / 3 : blockIdx.y;
  const typename T::J operand_j{bottleneck, column * T::BJ, shared + stages * stage_bytes};
  // Without tiles whose pixels of this slice are outside the image.
  int begin = blockIdx.z * tiles_per_split, end = begin + tiles_per_split;
  begin = larger(begin, slice < reach ? grid.depth_parts : 0);
  end = smaller(end, slice > reach ? tiles - grid.depth_parts : tiles);
  constexpr int kSharing = kLines ? 3 : 1;
  const int tap = kLines ? warp % 3 : warp, share = kLines ? warp / 3 : 0;

  const auto start = [&](unsigned char* stage, int tile) {
    if (tile < end) {
      const TilePlace place(grid, tile);
      operand_i.start(stage, pixels, [&](int r) { return place.output_pixel(r); });
      operand_j.start(stage + plane_j, halo_pixels,
                      [&](int p) { return place.halo_pixel(p, slice - reach); });
    }
    ptx::cp_async_commit();
  };

  WarpTile<P, T::NT> acc;
  clear<P, T::NT>(acc);
  operand_j.load_coefficients();
  start(shared, begin);
  __syncthreads();
  unsigned char* stage = shared;
  unsigned char* other = shared + (stages - 1) * stage_bytes;
  for (int tile = begin; tile < end; ++tile) {
    const TilePlace place(grid, tile);
    ptx::cp_async_wait<0>();
    operand_i.finish(stage, pixels, [&](int r) { return place.output_pixel(r); });
    operand_j.finish(stage + plane_j, halo_pixels, [&](int p) { return place.halo_pixel(p); });
    __syncthreads();
    if (stages == 2) start(other, tile + 1);
    const int offset = place.tap_offset(tap / 3, tap % 3);
    for (int p0 = share * kPixelStep; p0 < pixels; p0 += kSharing * kPixelStep) {
      multiply_pixels<P, T::NT>(
          acc, stage, [&](int p) { return (p0 + p) * T::I::kPitch; }, stage + plane_j,
          [&](int p) { return (place.halo_of_row(p0 + p) + offset) * T::J::kPitch; }, lane);
    }
    if (stages == 1) {
      __syncthreads();
      start(stage, tile + 1);
    }
    unsigned char* const done = stage;
    stage = other;
    other = done;
  }
  ptx::cp_async_wait<0>();

  const int outs = grad.channels(), channels = bottleneck.channels();
  auto* to =
      partial + ((int64_t{blockIdx.z} * grid.slices + slice) * kWarpTaps + warp) * outs * channels;
  for_each_pair(acc, lane, [&](int row, int column, auto first, auto second) {
    const int o = operand_i.block_channel + row;
    if (o >= outs) return;
    store_pair(to + int64_t{o} * channels, operand_j.block_channel + column, channels, first,
               second);
  });
}

}  // namespace densenet_fast::cuda
