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
  static constexpr int BI = sizeof(E) == 2 ? (kNarrow ? 64 : 128) : sizeof(E) == 4 ? 64 : 32;
  static constexpr int BJ = sizeof(E) == 2 ? 128 : 64;
  static constexpr int kRowWarps = BI / 32;
  static constexpr int kColumnWarps = kWarps / kRowWarps;
  static constexpr int NT = BJ / kColumnWarps / 8;
  static constexpr int kPitchI = BI * static_cast<int>(sizeof(E)) + 16;
  static constexpr int kPitchJ = BJ * static_cast<int>(sizeof(E)) + 16;
};

template <class E, class SourceI, class SourceJ, bool kNarrow>
__host__ __device__ constexpr size_t pixel_stage_bytes() {
  using T = PixelTile<E, kNarrow>;
  return static_cast<size_t>(kStagePixels<E>) *
         (SourceI::kRaw * T::kPitchI + SourceJ::kRaw * T::kPitchJ);
}

// A tile of `kWidth` channels of `kPixels` pixels in shared memory, fetched and finished piece by
// piece; pixel_of maps a tile row to a source row or -1.
template <class E, class Source, int kWidth, int kPitch, class PixelOf, class Body>
__device__ __forceinline__ void for_each_tile_piece(unsigned char* tile, int pixels,
                                                    int plane_bytes, int block_channel,
                                                    const Source& source, const PixelOf& pixel_of,
                                                    const Body& body) {
  constexpr int kPieces = kWidth / kPieceElements<E>;
  for (int i = threadIdx.x; i < pixels * kPieces; i += blockDim.x) {
    const int row = i / kPieces, piece = i % kPieces;
    const int channel = block_channel + piece * kPieceElements<E>;
    const int64_t pixel = pixel_of(row);
    unsigned char* raw[Source::kRaw];
#pragma unroll
    for (int r = 0; r < Source::kRaw; ++r) {
      raw[r] = tile + r * plane_bytes + row * kPitch + piece * kPieceBytes;
    }
    body(raw, pixel, pixel >= 0 && channel < source.channels(), channel);
  }
}

// partial[split, i, j] = sum over the split's rows of I[row, i] * J[row, j].
template <class P, class SourceI, class SourceJ, bool kNarrow>
__global__ void __launch_bounds__(kThreads)
    pixel_product(SourceI source_i, SourceJ source_j, Accumulator<typename P::Element>* partial,
                  int64_t rows, int64_t rows_per_split, int stages) {
  using E = typename P::Element;
  using T = PixelTile<E, kNarrow>;
  constexpr int NT = T::NT;
  constexpr int kPixels = kStagePixels<E>;
  constexpr int kPlaneI = kPixels * T::kPitchI, kPlaneJ = kPixels * T::kPitchJ;
  constexpr int kStageBytes = static_cast<int>(pixel_stage_bytes<E, SourceI, SourceJ, kNarrow>());
  DF_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / T::kColumnWarps, warp_column = warp % T::kColumnWarps;
  const int first_i = blockIdx.x * T::BI, first_j = blockIdx.y * T::BJ;
  const int64_t begin = int64_t{blockIdx.z} * rows_per_split;
  const int64_t end = begin + rows_per_split < rows ? begin + rows_per_split : rows;

  const auto for_each_piece = [&](int64_t row, const auto& body_i, const auto& body_j) {
    unsigned char* stage = shared + (row - begin) / kPixels % stages * kStageBytes;
    const auto pixel_of = [&](int r) { return row + r < end ? row + r : int64_t{-1}; };
    for_each_tile_piece<E, SourceI, T::BI, T::kPitchI>(stage, kPixels, kPlaneI, first_i, source_i,
                                                       pixel_of, body_i);
    for_each_tile_piece<E, SourceJ, T::BJ, T::kPitchJ>(
        stage + SourceI::kRaw * kPlaneI, kPixels, kPlaneJ, first_j, source_j, pixel_of, body_j);
  };
  const auto start = [&](int64_t row) {
    if (row < end) {
      for_each_piece(
          row, [&](auto& raw, int64_t p, bool exists, int c) { source_i.start(raw, p, exists, c); },
          [&](auto& raw, int64_t p, bool exists, int c) { source_j.start(raw, p, exists, c); });
    }
    ptx::cp_async_commit();
  };

  WarpTile<P, NT> acc;
  clear<P, NT>(acc);
  start(begin);
  for (int64_t row = begin; row < end; row += kPixels) {
    ptx::cp_async_wait<0>();
    for_each_piece(
        row, [&](auto& raw, int64_t p, bool exists, int c) { source_i.finish(raw, p, exists, c); },
        [&](auto& raw, int64_t p, bool exists, int c) { source_j.finish(raw, p, exists, c); });
    __syncthreads();
    if (stages == 2) start(row + kPixels);
    const unsigned char* stage = shared + (row - begin) / kPixels % stages * kStageBytes;
    const unsigned char* a = stage + warp_row * 32 * sizeof(E);
    const unsigned char* b =
        stage + SourceI::kRaw * kPlaneI + warp_column * NT * 8 * static_cast<int>(sizeof(E));
#pragma unroll
    for (int p0 = 0; p0 < kPixels; p0 += kPixelStep) {
      multiply_pixels<P, NT>(
          acc, a, [&](int p) { return (p0 + p) * T::kPitchI; }, b,
          [&](int p) { return (p0 + p) * T::kPitchJ; }, lane);
    }
    if (stages == 1) {
      __syncthreads();
      start(row + kPixels);
    }
  }
  ptx::cp_async_wait<0>();

  const int ni_total = source_i.channels(), nj_total = source_j.channels();
  auto* out = partial + int64_t{blockIdx.z} * ni_total * nj_total;
#pragma unroll
  for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
    for (int ni = 0; ni < NT; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first_i + warp_row * 32 + mi * 16 + e / 2 * 8 + lane / 4;
        const int j = first_j + warp_column * NT * 8 + ni * 8 + lane % 4 * 2 + e % 2;
        if (i < ni_total && j < nj_total) out[int64_t{i} * nj_total + j] = acc[mi][ni][e];
      }
    }
  }
}

// Rows of one split: whole stages, enough splits to fill the device twice, none below 256 rows.
inline int64_t rows_per_split(int64_t rows, int64_t tiles, int multiprocessors, int stage) {
  const int64_t wanted = (2 * multiprocessors + tiles - 1) / tiles;
  const int64_t most = rows / 256 > 1 ? rows / 256 : 1;
  const int64_t splits = wanted < most ? wanted : most;
  const int64_t per_split = (rows + splits - 1) / splits;
  return (per_split + stage - 1) / stage * stage;
}

// ---- 3x3: one warp a tap
// ---------------------------------------------------------------------------

constexpr int kTapThreads = 9 * 32;

template <class E>
struct TapTile {
  static constexpr int BI = 32;                                 // output channels
  static constexpr int BJ = 128 / static_cast<int>(sizeof(E));  // input channels
  static constexpr int NT = BJ / 8;
  static constexpr int kPitchI = BI * static_cast<int>(sizeof(E)) + 16;
  static constexpr int kPitchJ = 128 + 16;
};

template <class E>
__host__ __device__ constexpr size_t tap_stage_bytes(int halo_pixels) {
  return static_cast<size_t>(kTileRows) * TapTile<E>::kPitchI +
         static_cast<size_t>(halo_pixels) * TapTile<E>::kPitchJ;
}

// partial[split, tap, o, c] = sum over the split's tiles of grad[pixel, o] * act(Z)[pixel + tap,
// c].
template <class P>
__global__ void __launch_bounds__(kTapThreads)
    tap_product(PlainSource<P> grad, ActivatedSource<P> bottleneck,
                Accumulator<typename P::Element>* partial, TileGrid grid, int64_t tiles_per_split,
                int stages) {
  using E = typename P::Element;
  using T = TapTile<E>;
  constexpr int NT = T::NT;
  DF_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, tap = threadIdx.x / 32;
  const int first_o = blockIdx.x * T::BI, first_c = blockIdx.y * T::BJ;
  const int halo_pixels = grid.shape.halo_pixels();
  const int stage_bytes = static_cast<int>(tap_stage_bytes<E>(halo_pixels));
  const int64_t begin = int64_t{blockIdx.z} * tiles_per_split;
  const int64_t end =
      begin + tiles_per_split < grid.tiles() ? begin + tiles_per_split : grid.tiles();

  const auto for_each_piece = [&](int64_t tile, const auto& body_i, const auto& body_j) {
    const TilePlace place(grid, tile);
    unsigned char* stage = shared + (tile - begin) % stages * stage_bytes;
    for_each_tile_piece<E, PlainSource<P>, T::BI, T::kPitchI>(
        stage, kTileRows, 0, first_o, grad, [&](int r) { return place.output_pixel(r); }, body_i);
    for_each_tile_piece<E, ActivatedSource<P>, T::BJ, T::kPitchJ>(
        stage + kTileRows * T::kPitchI, halo_pixels, 0, first_c, bottleneck,
        [&](int p) { return place.halo_pixel(p); }, body_j);
  };
  const auto start = [&](int64_t tile) {
    if (tile < end) {
      for_each_piece(
          tile, [&](auto& raw, int64_t p, bool exists, int c) { grad.start(raw, p, exists, c); },
          [&](auto& raw, int64_t p, bool exists, int c) { bottleneck.start(raw, p, exists, c); });
    }
    ptx::cp_async_commit();
  };

  WarpTile<P, NT> acc;
  clear<P, NT>(acc);
  start(begin);
  for (int64_t tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<0>();
    for_each_piece(
        tile, [&](auto& raw, int64_t p, bool exists, int c) { grad.finish(raw, p, exists, c); },
        [&](auto& raw, int64_t p, bool exists, int c) { bottleneck.finish(raw, p, exists, c); });
    __syncthreads();
    if (stages == 2) start(tile + 1);
    const TilePlace place(grid, tile);
    const unsigned char* stage = shared + (tile - begin) % stages * stage_bytes;
    const int offset = place.tap_offset(tap);
    for (int p0 = 0; p0 < kTileRows; p0 += kPixelStep) {
      multiply_pixels<P, NT>(
          acc, stage, [&](int p) { return (p0 + p) * T::kPitchI; }, stage + kTileRows * T::kPitchI,
          [&](int p) { return (place.halo_of_row(p0 + p) + offset) * T::kPitchJ; }, lane);
    }
    if (stages == 1) {
      __syncthreads();
      start(tile + 1);
    }
  }
  ptx::cp_async_wait<0>();

  const int outs = grad.channels(), channels = bottleneck.channels();
  auto* out = partial + (int64_t{blockIdx.z} * 9 + tap) * outs * channels;
#pragma unroll
  for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
    for (int ni = 0; ni < NT; ++ni) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int o = first_o + mi * 16 + e / 2 * 8 + lane / 4;
        const int c = first_c + ni * 8 + lane % 4 * 2 + e % 2;
        if (o < outs && c < channels) out[int64_t{o} * channels + c] = acc[mi][ni][e];
      }
    }
  }
}

}  // namespace densenet_fast::cuda
