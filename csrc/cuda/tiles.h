// How products are cut into blocks: pure functions of sizes and of the number of multiprocessors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "operators.h"

namespace densenet_fast::cuda {

constexpr int kUnitRows = 128;  // of the tallest tile

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct TileSize {
  int rows, columns;
};

constexpr int kLeastSteps = 4;  // of a part of a 1x1 convolution's reduction

// The tiles that there are of each kind of product, the cheapest for large images first.
inline constexpr TileSize kRowsTiles[] = {{128, 128}, {128, 64}, {64, 64}, {32, 32}};
inline constexpr TileSize kForwardTiles[] = {{128, 32}, {64, 32}, {32, 32}, {128, 64}, {64, 64}};
// Of pooled pixels. Four raw pieces an operand piece, or four pixels a row of the result: narrow
// tiles leave shared memory and registers for them.
inline constexpr TileSize kPooledTiles[] = {{128, 64}, {64, 64}, {32, 32}};
inline constexpr TileSize kPlainTiles[] = {{128, 64}, {32, 32}};  // without tensor cores

// A device is taken for filled by a block for three quarters of its multiprocessors.
constexpr bool fills(int64_t blocks, int multiprocessors) {
  return 4 * blocks >= 3 * int64_t{multiprocessors};
}

// A product in blocks: of which size they are, how many tiles of rows there are, how many of these
// make 128 rows, and in how many parts the reduction is.
struct Cut {
  size_t size;  // of those there are
  int64_t tiles;
  int parts, splits;
};

// Of the sizes whose blocks fill the device the one that takes the shortest: whole waves of blocks,
// each as long as its products and the loading and finishing of its rows and columns. Where none
// does, the one with the most blocks. tiles(size): of rows.
template <size_t N, class Tiles>
constexpr Cut best_cut(const TileSize (&sizes)[N], const Tiles& tiles, int64_t columns, int splits,
                       int multiprocessors) {
  Cut best{0, 0, 1, splits};
  int64_t best_cost = 0;
  for (size_t i = 0; i < N; ++i) {
    const TileSize size = sizes[i];
    const int64_t blocks = tiles(size) * ceil_div(columns, size.columns) * splits;
    const int64_t length = (size.rows + 32) * (size.columns + 128);
    // Behind all costs of filled devices: those of others, the fewer blocks the later.
    const int64_t cost = fills(blocks, multiprocessors) ? ceil_div(blocks, multiprocessors) * length
                                                        : (int64_t{1} << 62) - blocks;
    if (i == 0 || cost < best_cost) {
      best = {i, tiles(size), kUnitRows / size.rows, splits};
      best_cost = cost;
    }
  }
  return best;
}

// Parts of a reduction of so many steps, `least` of them at least: enough for 128 blocks, which is
// about what devices have multiprocessors. How a sum is split decides its last bits, so that the
// device itself is not asked.
constexpr int reduction_splits(int64_t blocks, int steps, int least) {
  const int64_t wanted = 128 / blocks, most = steps / least;
  const int64_t splits = wanted < most ? wanted : most;
  return splits <= 1 ? 1 : static_cast<int>(ceil_div(steps, ceil_div(steps, splits)));
}

template <size_t N>
constexpr Cut cut_rows(const TileSize (&sizes)[N], int64_t rows, int64_t columns, int splits,
                       int multiprocessors) {
  return best_cut(
      sizes, [&](TileSize size) { return ceil_div(rows, size.rows); }, columns, splits,
      multiprocessors);
}

// The same for a reduction of so many steps, which may be split.
template <size_t N>
constexpr Cut cut_forward(const TileSize (&sizes)[N], int64_t rows, int64_t columns, int steps,
                          int multiprocessors) {
  const int64_t blocks = ceil_div(rows, 64) * ceil_div(columns, 64);
  return cut_rows(sizes, rows, columns, reduction_splits(blocks, steps, kLeastSteps),
                  multiprocessors);
}

// A weight gradient in blocks: its sum over units of pixels in enough parts to fill the device
// twice.
struct PixelCut {
  int64_t across, down;   // tiles
  int64_t units, splits;  // units of a split

  constexpr PixelCut(int64_t all, int64_t across_, int64_t down_, int multiprocessors)
      : across(across_), down(down_), units(0), splits(0) {
    const int64_t wanted = ceil_div(2 * int64_t{multiprocessors}, across * down);
    units = ceil_div(all, wanted < all ? wanted : all);
    splits = ceil_div(all, units);
  }
  constexpr int64_t blocks() const { return across * down * splits; }
};

// Whether a weight gradient takes the wider of its two tiles.
constexpr bool takes_wide(const PixelCut& wide, int64_t out, int multiprocessors) {
  return out > 64 && fills(wide.blocks(), multiprocessors);
}

// The taps of a convolution with three in each dimension of the images.
struct Taps {
  int slices, rows;

  explicit constexpr Taps(int dims) : slices(dims > 2 ? 3 : 1), rows(dims > 1 ? 3 : 1) {}
  constexpr int of_slice() const { return 3 * rows; }
  constexpr int all() const { return slices * of_slice(); }
};

// Pixels of such a convolution's tile: images x rows x columns, powers of two, of one depth; rows
// above and below that its taps reach.
struct TileShape {
  int images, rows, columns, border = 1;

  constexpr int pixels() const { return images * rows * columns; }
  constexpr int halo_pixels() const { return images * (rows + 2 * border) * (columns + 2); }
  // One of `parts` equal ones in order.
  constexpr TileShape part(int parts) const {
    const int of_images = images < parts ? images : parts;
    parts /= of_images;
    const int of_rows = rows < parts ? rows : parts;
    return {images / of_images, rows / of_rows, columns / (parts / of_rows), border};
  }
};

inline constexpr TileShape kTileShapes[] = {
    {1, 8, 16}, {1, 16, 8}, {1, 4, 32}, {2, 8, 8}, {1, 32, 4}};
inline constexpr TileShape kLineShapes[] = {
    // of sequences
    {1, 1, 128, 0}, {2, 1, 64, 0}, {4, 1, 32, 0}, {8, 1, 16, 0}, {16, 1, 8, 0}, {32, 1, 4, 0}};

// The most pixels of a tile of so many rows with its border.
constexpr int most_halo_pixels(int rows) {
  int most = 0;
  const auto look = [&](const auto& shapes) {
    for (const TileShape& t : shapes) {
      const int pixels = t.part(t.pixels() / rows).halo_pixels();
      most = most < pixels ? pixels : most;
    }
  };
  look(kTileShapes);
  look(kLineShapes);
  return most;
}

template <int kRows>
inline constexpr int kMostHaloPixels = most_halo_pixels(kRows);

// Images of d x h x w in tiles of 128 pixels, and those in parts. Tiles of one depth follow each
// other: a slice of the kernel reaches a run of them.
struct TileCount {
  TileShape shape;
  int64_t across, down, images, depths;

  constexpr TileCount(const TileShape& s, const ImageArgument& x)
      : shape(s),
        across(ceil_div(x.w, s.columns)),
        down(ceil_div(x.h, s.rows)),
        images(ceil_div(x.n, s.images)),
        depths(x.d) {}
  constexpr int64_t of_depth() const { return across * down * images; }
  constexpr int64_t tiles() const { return of_depth() * depths; }

  template <size_t N>
  constexpr Cut cut(const TileSize (&sizes)[N], int64_t columns, int splits,
                    int multiprocessors) const {
    return best_cut(
        sizes, [&](TileSize size) { return tiles() * (kUnitRows / size.rows); }, columns, splits,
        multiprocessors);
  }
  // The same for a reduction of so many steps, which may be split.
  template <size_t N>
  constexpr Cut cut_forward(const TileSize (&sizes)[N], int64_t columns, int steps,
                            int multiprocessors) const {
    const int64_t blocks = 2 * tiles() * ceil_div(columns, 64);
    return cut(sizes, columns, reduction_splits(blocks, steps, 1), multiprocessors);
  }
  // A weight gradient takes whole tiles where there are enough of them, and quarters otherwise.
  constexpr int gradient_parts(int64_t across_, int64_t down_, int multiprocessors) const {
    const PixelCut whole(tiles(), across_, down_, multiprocessors);
    return fills(whole.blocks(), multiprocessors) ? 1 : 4;
  }
};

// Tiles of the shape that covers the images with the fewest; ties go to the smaller border.
constexpr TileCount best_shape(const ImageArgument& x) {
  const auto cost = [](const TileCount& c) { return c.of_depth() * 1024 + c.shape.halo_pixels(); };
  const auto best_of = [&](const auto& shapes) {
    TileCount best(shapes[0], x);
    for (const TileShape& shape : shapes) {
      const TileCount count(shape, x);
      if (cost(count) < cost(best)) best = count;
    }
    return best;
  };
  return x.dims > 1 ? best_of(kTileShapes) : best_of(kLineShapes);
}

}  // namespace densenet_fast::cuda
