// 3x3 convolutions with padding 1, forward and data gradient, as implicit products. A block makes
// 128 output pixels; the pixels they need, with a border of one, are brought to shared memory once
// per step of channels, activated there, and used by all nine taps.
#pragma once

#include "rows_product.cuh"

namespace densenet_fast::cuda {

// 128 pixels of a tile: images x rows x columns, powers of two.
struct TileShape {
  int images, rows, columns;
  __host__ __device__ int halo_pixels() const { return images * (rows + 2) * (columns + 2); }
};

constexpr int kMaxHaloPixels = 224;

// The shape that covers N images of h x w with the fewest tiles; ties go to the smaller border.
inline TileShape choose_tile(int n, int h, int w) {
  TileShape best{1, 8, 16};
  int64_t best_cost = -1;
  const TileShape candidates[] = {{1, 8, 16}, {1, 16, 8}, {1, 4, 32}, {2, 8, 8}, {1, 32, 4}};
  for (const TileShape& t : candidates) {
    const auto cover = [](int64_t size, int tile) { return (size + tile - 1) / tile; };
    const int64_t tiles = cover(n, t.images) * cover(h, t.rows) * cover(w, t.columns);
    const int64_t cost = tiles * 1024 + t.halo_pixels();
    if (best_cost < 0 || cost < best_cost) {
      best = t;
      best_cost = cost;
    }
  }
  return best;
}

struct TileGrid {
  TileShape shape;
  int n, h, w;
  int across, down, deep;  // tiles

  TileGrid() = default;
  TileGrid(TileShape s, int n_, int h_, int w_)
      : shape(s),
        n(n_),
        h(h_),
        w(w_),
        across((w_ + s.columns - 1) / s.columns),
        down((h_ + s.rows - 1) / s.rows),
        deep((n_ + s.images - 1) / s.images) {}
  __host__ __device__ int64_t tiles() const { return int64_t{1} * across * down * deep; }
};

// One tile's place, and the pixels around it.
struct TilePlace {
  TileGrid grid;
  int image, y, x;

  __device__ TilePlace(const TileGrid& g, int64_t tile) : grid(g) {
    x = static_cast<int>(tile % g.across) * g.shape.columns;
    y = static_cast<int>(tile / g.across % g.down) * g.shape.rows;
    image = static_cast<int>(tile / g.across / g.down) * g.shape.images;
  }
  __device__ int64_t pixel(int i, int py, int px) const {
    if (i >= grid.n || py < 0 || py >= grid.h || px < 0 || px >= grid.w) return -1;
    return (int64_t{i} * grid.h + py) * grid.w + px;
  }
  // The pixel of row r of the tile, or -1.
  __device__ int64_t output_pixel(int r) const {
    const int per_image = grid.shape.rows * grid.shape.columns;
    return pixel(image + r / per_image, y + r % per_image / grid.shape.columns,
                 x + r % grid.shape.columns);
  }
  __device__ int64_t halo_pixel(int p) const {
    const int columns = grid.shape.columns + 2, per_image = (grid.shape.rows + 2) * columns;
    return pixel(image + p / per_image, y + p % per_image / columns - 1, x + p % columns - 1);
  }
  // Where row r's pixel stands in the halo, for the tap at its top left.
  __device__ int halo_of_row(int r) const {
    const int columns = grid.shape.columns + 2, per_image = grid.shape.rows * grid.shape.columns;
    return r / per_image * (grid.shape.rows + 2) * columns +
           r % per_image / grid.shape.columns * columns + r % grid.shape.columns;
  }
  __device__ int tap_offset(int tap) const { return tap / 3 * (grid.shape.columns + 2) + tap % 3; }
};

// Taps whose weights travel together: narrow tiles take a row of the kernel at a time.
template <int BN>
constexpr int kTapsPerStage = BN <= 32 ? 3 : 1;

constexpr int kTapRing = 3;  // groups of taps in shared memory

template <int BN>
__host__ __device__ constexpr size_t conv3x3_ring_bytes(int halo_pixels) {
  return 2 * static_cast<size_t>(halo_pixels) * kRowBytes +
         kTapRing * static_cast<size_t>(kTapsPerStage<BN>) * BN * kRowBytes;
}

template <class P, int BN>
__host__ __device__ constexpr size_t conv3x3_shared_bytes(int halo_pixels) {
  const size_t ring = conv3x3_ring_bytes<BN>(halo_pixels);
  return ring > epilogue_bytes<P, BN>() ? ring : epilogue_bytes<P, BN>();
}

template <class P, class Source, class Sink, int BN>
__global__ void __launch_bounds__(kThreads, (kBlocksPerMultiprocessor<P, Sink, BN>))
    conv3x3_product(Source source, PackedWeight<typename P::Element> weight, Sink sink,
                    TileGrid grid) {
  using E = typename P::Element;
  static_assert(Source::kRaw == 1, "one raw piece per halo piece");
  constexpr int NT = BN / 2 / 8;
  constexpr int kTaps = kTapsPerStage<BN>, kTapStages = 9 / kTaps;
  constexpr int kWeightBytes = kTaps * BN * kRowBytes;
  DF_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2, warp_column = warp % 2;
  const int block_column = blockIdx.y * BN;
  const TilePlace place(grid, blockIdx.x);
  const int halo_pixels = grid.shape.halo_pixels();
  const int halo_bytes = halo_pixels * kRowBytes;
  unsigned char* weights = shared + 2 * halo_bytes;

  const auto for_each_halo_piece = [&](int step, const auto& body) {
    for (int i = threadIdx.x; i < halo_pixels * kStepPieces; i += kThreads) {
      const int p = i / kStepPieces, piece = i % kStepPieces;
      const int channel = step * kStep<E> + piece * kPieceElements<E>;
      const int64_t pixel = place.halo_pixel(p);
      unsigned char* raw[1] = {shared + step % 2 * halo_bytes + p * kRowBytes +
                               piece * kPieceBytes};
      body(raw, pixel, pixel >= 0 && channel < source.channels(), channel);
    }
  };
  const auto start_halo = [&](int step) {
    for_each_halo_piece(step, [&](unsigned char*(&raw)[1], int64_t pixel, bool exists, int c) {
      source.start(raw, pixel, exists, c);
    });
  };
  // Weights come in groups of taps: group g of the whole loop.
  const int groups = weight.steps * kTapStages;
  const auto start_group = [&](int group) {
    if (group < groups) {
      const int step = group / kTapStages, tap = group % kTapStages * kTaps;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        start_weights(
            weights + group % kTapRing * kWeightBytes + t * BN * kRowBytes,
            weight.data +
                ((int64_t{step} * 9 + tap + t) * weight.columns + block_column) * kStep<E>,
            BN);
      }
      // The next step's pixels: not before everyone is done with the step whose place they take.
      if (group % kTapStages == 2 && step + 1 < weight.steps) start_halo(step + 1);
    }
    ptx::cp_async_commit();
  };

  int a_row[kRowHandles];
#pragma unroll
  for (int h = 0; h < kRowHandles; ++h) {
    a_row[h] = place.halo_of_row(warp_row * 32 + row_of_handle<P>(h, lane)) * kRowBytes;
  }
  WarpTile<P, NT> acc;
  clear<P, NT>(acc);

  start_halo(0);
  start_group(0);
  start_group(1);
  for (int group = 0; group < groups; ++group) {
    const int step = group / kTapStages;
    ptx::cp_async_wait<1>();
    if (group % kTapStages == 0) {
      for_each_halo_piece(step, [&](unsigned char*(&raw)[1], int64_t pixel, bool exists, int c) {
        source.finish(raw, pixel, exists, c);
      });
    }
    __syncthreads();
    start_group(group + 2);
    const unsigned char* halo = shared + step % 2 * halo_bytes;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const int tap = group % kTapStages * kTaps + t;
      multiply_step<P, NT>(
          acc, halo + place.tap_offset(tap) * kRowBytes, a_row,
          weights + group % kTapRing * kWeightBytes + (t * BN + warp_column * (BN / 2)) * kRowBytes,
          lane);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  using A = Accumulator<E>;
  const WarpSums<A> sums{reinterpret_cast<A*>(shared + kWarps * kSliceBytes<E>), BN};
  sink.template run<NT>(acc, shared + warp * kSliceBytes<E>, sums, blockIdx.x, warp_row,
                        warp_column, block_column, lane,
                        [&](int row) { return place.output_pixel(row); });
}

template <class P, int BN, class Source, class Sink>
void launch_conv3x3_product(const char* name, const Source& source,
                            const PackedWeight<typename P::Element>& weight, const Sink& sink,
                            const TileGrid& tiles, int columns, Stream stream) {
  const dim3 grid(static_cast<unsigned>(tiles.tiles()),
                  static_cast<unsigned>((columns + BN - 1) / BN));
  launch(&conv3x3_product<P, Source, Sink, BN>,
         LaunchConfig{name, grid, dim3(kThreads),
                      conv3x3_shared_bytes<P, BN>(tiles.shape.halo_pixels()), stream},
         source, weight, sink, tiles);
}

template <class P, class Source, class Sink>
void run_conv3x3_product(const char* name, const Source& source,
                         const PackedWeight<typename P::Element>& weight, const Sink& sink,
                         const TileGrid& tiles, int columns, Stream stream) {
  if (columns <= 32) {
    return launch_conv3x3_product<P, 32>(name, source, weight, sink, tiles, columns, stream);
  }
  if constexpr (kMaxColumns<P> > 64) {
    if (columns > 64) {
      return launch_conv3x3_product<P, 128>(name, source, weight, sink, tiles, columns, stream);
    }
  }
  launch_conv3x3_product<P, 64>(name, source, weight, sink, tiles, columns, stream);
}

}  // namespace densenet_fast::cuda
