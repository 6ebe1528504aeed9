// Convolutions with three taps in each dimension and padding 1, forward and data gradient, as
// implicit products. The pixels that a block's tile needs, with a border of one, are brought to
// shared memory once per step, activated there, and used by all taps of a slice of the kernel. A
// step is one of channels; of volumes those of the kernel's first slice come first, which meets the
// images' slices before the tile's own. Sequences are one slice of one row.
#pragma once

#include "rows_product.cuh"

namespace densenet_fast::cuda {

// Images in tiles of 128 pixels, each of which is some parts: a block's.
struct TileGrid {
  TileShape shape;         // of a part
  int slices, slice_taps;  // of the kernel
  int reach;               // its slices before and behind a pixel's
  int pixels, halo_pixels;
  int n, d, h, w;
  int tile_images, tile_rows, tile_columns;
  int part_rows, part_columns;  // from part to part of an image
  int depth_parts;              // parts of one depth
  int log_columns, log_image;   // of a part's pixels, which are powers of two
  Divisor parts, image_parts, across, down, images;
  Divisor halo_columns, halo_image;

  TileGrid(const TileCount& count, int of, const ImageArgument& x)
      : shape(count.shape.part(of)),
        slices(Taps(x.dims).slices),
        slice_taps(Taps(x.dims).of_slice()),
        reach(slices / 2),
        pixels(shape.pixels()),
        halo_pixels(shape.halo_pixels()),
        n(static_cast<int>(x.n)),
        d(static_cast<int>(x.d)),
        h(static_cast<int>(x.h)),
        w(static_cast<int>(x.w)),
        tile_images(count.shape.images),
        tile_rows(count.shape.rows),
        tile_columns(count.shape.columns),
        part_rows(tile_rows > 1 ? shape.rows : 0),
        part_columns(tile_rows > 1 ? 0 : shape.columns),
        depth_parts(static_cast<int>(count.of_depth() * of)),
        log_columns(0),
        log_image(0),
        parts(of),
        image_parts(of * shape.images / tile_images),
        across(count.across),
        down(count.down),
        images(count.images),
        halo_columns(shape.columns + 2),
        halo_image((shape.rows + 2 * shape.border) * (shape.columns + 2)) {
    while (1 << log_columns < shape.columns) ++log_columns;
    while (1 << log_image < shape.rows * shape.columns) ++log_image;
  }
};

// One part's place, and the pixels around it.
struct TilePlace {
  const TileGrid& grid;
  int image, z, y, x;

  __device__ TilePlace(const TileGrid& g, int block) : grid(g) {
    const int tile = g.parts.quotient(block), part = g.parts.remainder(block, tile);
    const int row = g.across.quotient(tile), deep = g.down.quotient(row);
    const int of_images = g.image_parts.quotient(part);
    const int of_image = g.image_parts.remainder(part, of_images);
    z = g.images.quotient(deep);
    image = g.images.remainder(deep, z) * g.tile_images + of_images * g.shape.images;
    y = g.down.remainder(row, deep) * g.tile_rows + of_image * g.part_rows;
    x = g.across.remainder(tile, row) * g.tile_columns + of_image * g.part_columns;
  }
  __device__ int64_t pixel(int i, int pz, int py, int px) const {
    if (i >= grid.n || py < 0 || py >= grid.h || px < 0 || px >= grid.w) return -1;
    return ((i * grid.d + pz) * grid.h + py) * grid.w + px;
  }
  // The kernel's slices that meet the image: the others meet the zeros before and behind it.
  __device__ int first_slice() const { return z > 0 ? 0 : grid.reach; }
  __device__ int last_slice() const {
    return z + 1 < grid.d ? grid.slices : grid.slices - grid.reach;
  }
  __device__ int column_of(int r) const { return r & (grid.shape.columns - 1); }
  __device__ int row_of(int r) const { return (r >> grid.log_columns) & (grid.shape.rows - 1); }
  // The pixel of row r of the part, or -1.
  __device__ int64_t output_pixel(int r) const {
    return pixel(image + (r >> grid.log_image), z, y + row_of(r), x + column_of(r));
  }
  // The pixel of its place p in shared memory, border and all, or -1; so many slices behind it.
  __device__ int64_t halo_pixel(int p, int slices = 0) const {
    const int i = grid.halo_image.quotient(p), rest = grid.halo_image.remainder(p, i);
    const int row = grid.halo_columns.quotient(rest);
    return pixel(image + i, z + slices, y + row - grid.shape.border,
                 x + grid.halo_columns.remainder(rest, row) - 1);
  }
  // Where row r's pixel stands in the halo, for the tap at its top left.
  __device__ int halo_of_row(int r) const {
    return (r >> grid.log_image) * static_cast<int>(grid.halo_image.by) +
           row_of(r) * (grid.shape.columns + 2) + column_of(r);
  }
  __device__ int tap_offset(int row, int column) const {
    return row * (grid.shape.columns + 2) + column;
  }
};

// Taps whose weights travel together: narrow tiles take a row of the kernel at a time, of which
// sequences (kLines) have one.
template <class T>
constexpr int kTapsPerStage = T::kColumns <= 32 ? 3 : 1;

constexpr int kTapRing = 3;  // groups of taps in shared memory

template <class P, class T, class Source>
__host__ __device__ constexpr size_t halo_bytes(int halo_pixels) {
  return halo_pixels * kRowBytes + T::kWarps * kVectorBytes<typename P::Element, Source>;
}

template <class P, class T, class Source>
__host__ __device__ constexpr size_t conv3x3_shared_bytes(int halo_pixels) {
  const size_t ring = 2 * halo_bytes<P, T, Source>(halo_pixels) +
                      kTapRing * kTapsPerStage<T> * T::kColumns * kRowBytes;
  const size_t epilogue = epilogue_bytes<typename P::Element, T>();
  return ring > epilogue ? ring : epilogue;
}

template <class P, class Source, class Sink, int kRows, int kColumns, bool kLines>
__global__ void __launch_bounds__((Tile<kRows, kColumns>::kThreads),
                                  (kBlocks<P, Source, Sink, Tile<kRows, kColumns>>))
    conv3x3_product(Source source, PackedWeight<typename P::Element> weight, Sink sink,
                    TileGrid grid, int64_t slice_elements, int split_steps) {
  using E = typename P::Element;
  using T = Tile<kRows, kColumns>;
  using Pieces = ThreadPieces<T::kThreads>;
  static_assert(Source::kRaw == 1, "one raw piece per halo piece");
  constexpr int kTaps = kTapsPerStage<T>, kGroups = 3 / kTaps;  // of a row of the kernel
  constexpr int kWeightBytes = kTaps * kColumns * kRowBytes;
  // Unrolled, a turn of the ring has constant places, where there are registers for it.
  constexpr bool kUnrolled = arithmetic<P>() != Arithmetic::kPlain;
  constexpr int kRowsAtOnce = kUnrolled && kGroups == 1 && !kLines ? 3 : 1;
  constexpr int kGroupsAtOnce = kUnrolled && !(P::kTf32 && Sink::kGradient) ? kGroups : 1;
  constexpr int kPieces = (kMostHaloPixels<kRows> + Pieces::kRows - 1) / Pieces::kRows;
  DF_DYNAMIC_SHARED(shared);
  const WarpPlace<T> warp;
  const Pieces own(threadIdx.x);
  const int block_column = blockIdx.y * kColumns;
  const TilePlace place(grid, blockIdx.x);
  const int halo_pixels = grid.halo_pixels;
  const int half = static_cast<int>(halo_bytes<P, T, Source>(halo_pixels));  // of two halos
  const int vectors_at = halo_pixels * kRowBytes + warp.warp * kVectorBytes<E, Source>;
  const int kernel_rows = kGroups > 1 ? grid.slice_taps / 3 : kLines ? 1 : 3;
  // The steps of this split, without those of slices outside the image.
  int first = blockIdx.z * split_steps, last = first + split_steps;
  first = larger(first, place.first_slice() * weight.steps);
  last = smaller(last, place.last_slice() * weight.steps);
  ptx::keep(first);
  ptx::keep(last);

  const auto place_of = [&](int i) {
    const int p = own.row + i * Pieces::kRows;
    return source.place(p < halo_pixels ? place.halo_pixel(p) : -1);
  };
  typename Source::Place places[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) places[i] = place_of(i);
  // Calls body(raw) with where piece i is in shared memory, if there is one.
  const auto at_piece = [&](unsigned char* halo, int i, const auto& body) {
    const int p = own.row + i * Pieces::kRows;
    unsigned char* raw[1] = {halo + p * kRowBytes + own.column * kPieceBytes};
    if (p < halo_pixels) body(raw);
  };
  int channel_step = first, slice = -grid.reach;  // of the halo that comes next
  for (; channel_step >= weight.steps; channel_step -= weight.steps) ++slice;
  int64_t shift = slice * slice_elements;  // to its pixels
  const auto start_halo = [&](int step) {
    unsigned char* halo = shared + (step - first) % 2 * half;
    const int channel = channel_step * kStep<E> + own.column * kPieceElements<E>;
    start_coefficients<E>(halo + vectors_at, source, channel_step * kStep<E>, warp.lane);
    if (source.whole((channel_step + 1) * kStep<E>)) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        at_piece(halo, i,
                 [&](auto& raw) { source.template start<true>(raw, places[i], channel, shift); });
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPieces; ++i) {
        at_piece(halo, i, [&](auto& raw) {
          source.template start<false>(raw, place_of(i), channel, shift);
        });
      }
    }
    if (++channel_step == weight.steps) {
      channel_step = 0;
      shift += slice_elements;
    }
  };
  // Weights come in groups of taps, which lie one behind the other for all steps.
  unsigned char* const ring = shared + 2 * half;
  int left = (last - first) * kernel_rows * kGroups;
  const E* weights =
      weight.data + (int64_t{first} * grid.slice_taps * weight.columns + block_column) * kStep<E>;
  const auto next = [](int group) {
    return group == (kTapRing - 1) * kWeightBytes ? 0 : group + kWeightBytes;
  };
  const auto start_group = [&](int group) {
    if (left > 0) {
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        start_weights<kColumns, T::kThreads>(ring + group + t * kColumns * kRowBytes, weights,
                                             weight.columns - block_column);
        weights += int64_t{weight.columns} * kStep<E>;
      }
      --left;
    }
    ptx::cp_async_commit();
  };

  int a_row[kRowHandles];
#pragma unroll
  for (int h = 0; h < kRowHandles; ++h) {
    a_row[h] = place.halo_of_row(warp.row + row_of_handle<P>(h, warp.lane)) * kRowBytes;
    ptx::keep(a_row[h]);
  }
  WarpTile<P, T::NT> acc;
  clear<P, T::NT>(acc);

  if (first < last) start_halo(first);
  int group = 0;
  start_group(group);
  start_group(next(group));
  for (int step = first; step < last; ++step) {
    unsigned char* halo = shared + (step - first) % 2 * half;
#pragma unroll kRowsAtOnce
    for (int row = 0; row < kernel_rows; ++row) {
#pragma unroll kGroupsAtOnce
      for (int g = 0; g < kGroups; ++g) {
        const bool is_first = row == 0 && g == 0;
        if (g == 0 && (kGroups > 1 || (row == 0 && !kLines))) group = 0;  // the ring has gone round
        ptx::cp_async_wait<kLines ? 0 : 1>();  // pixels come with the step's first group
        if (is_first) {
          Coefficients<P, Source::kVectors> coefficients;
          if constexpr (Source::kVectors > 0) {
            __syncwarp();  // the coefficients are those that its lanes have copied
            coefficients.load(halo + vectors_at, kStep<E>, own.column * kPieceElements<E>);
          }
#pragma unroll
          for (int i = 0; i < kPieces; ++i) {
            // Outside the image there is no pixel to activate: relu(shift) would be wrong.
            if (!Source::exists(places[i])) continue;
            at_piece(halo, i, [&](auto& raw) { source.finish(raw, coefficients); });
          }
        }
        __syncthreads();
        // The next step's pixels: not before everyone is done with those whose place they take.
        if (is_first && step + 1 < last) start_halo(step + 1);
        start_group(next(next(group)));
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          multiply_step<P, T::NT>(acc, halo + place.tap_offset(row, g + t) * kRowBytes, a_row,
                                  ring + group + (t * kColumns + warp.column) * kRowBytes,
                                  warp.lane);
        }
        group = next(group);
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  sink.template run<T>(acc, shared, blockIdx.x, block_column,
                       [&](int row) { return place.output_pixel(row); });
}

template <const auto& kTiles, class P, class Source, class Sink>
void run_conv3x3_product(const char* name, const Source& source,
                         const PackedWeight<typename P::Element>& weight, const Sink& sink,
                         const TileCount& count, const ImageArgument& x, const Cut& cut,
                         Stream stream) {
  with_tile<tiles_of<P, kTiles>()>(cut, [&](auto tile) {
    using T = decltype(tile);
    const TileGrid grid(count, cut.parts, x);
    auto* product = &conv3x3_product<P, Source, Sink, T::kRows, T::kColumns, false>;
    if constexpr (kTapsPerStage<T> > 1) {
      if (x.dims == 1) product = &conv3x3_product<P, Source, Sink, T::kRows, T::kColumns, true>;
    }
    launch(product,
           LaunchConfig{name, product_grid<T>(cut, weight.columns), dim3(T::kThreads),
                        conv3x3_shared_bytes<P, T, Source>(grid.halo_pixels), stream},
           source, weight, sink, grid, x.h * x.w * source.x.pitch,
           static_cast<int>(ceil_div(weight.steps * grid.slices, cut.splits)));
  });
}

}  // namespace densenet_fast::cuda
