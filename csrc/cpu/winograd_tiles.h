// Tiles of Winograd convolutions: which pixels and slices they are, and where their points lie.
#pragma once

#include "blocking.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kWinogradRows = 48;  // of one run, at most: tiles in each of its slices
constexpr int64_t kMostSlices = 16;    // of a run

// Rows and columns of a tile. Four of either make 1.2 times the errors of sums in order already; in
// volumes, which take the longest, that is what four of both make, as slices are summed directly.
constexpr int tile_size(int dims) { return dims > 2 ? 4 : 2; }
// Products of a tile: point j of a row and i of a column is number j * (size + 2) + i.
constexpr int64_t tile_points(int size) { return (size + 2) * (size + 2); }

// Where the points of an operand of so many rows and channels begin: as many in a row as fit, a
// power of two, so that narrow operands take less of the cache.
class PointPlaces {
 public:
  PointPlaces(int64_t points, int64_t rows, int64_t width) {
    int64_t slots = 1;
    while (slots < 8 && 2 * slots * width <= kPanelPitch) slots *= 2;
    const int64_t pitch = rows * kPanelPitch;
    for (int bit = 0; bit < 4; ++bit) {
      const int64_t point = 1 << bit;
      steps_[bit] = point < slots ? point * width : point / slots * pitch;
    }
    size_ = ceil_div(points, slots) * pitch;
  }
  int64_t at(int64_t point) const {
    return (point & 1) * steps_[0] + (point >> 1 & 1) * steps_[1] + (point >> 2 & 1) * steps_[2] +
           (point >> 3) * steps_[3];
  }
  int64_t size() const { return size_; }

 private:
  int64_t steps_[4];
  int64_t size_;
};

// Elements between two points of a result of [points, rows, width]: a few cache lines more than
// needed, as a transform reads all points of a tile at once and must not find them in one set.
DF_INLINE int64_t result_pitch(int64_t rows, int64_t width) { return rows * width + 48; }
// The same of a packed operand [points, k, width], all points of which one kernel is stored to.
DF_INLINE int64_t packed_pitch(int64_t k, int64_t width) { return k * width + 48; }

struct WinogradTile {
  int64_t image, z, y, x;  // of its first output
};

// Tiles side by side, image by image, row by row; in volumes each stands for those of `thick`
// slices, one behind the other.
struct WinogradTiles {
  int64_t n, d, h, w;
  int64_t size, border;  // of a tile; slices that one of outputs reads before and behind it
  int64_t thick, deep, down, across;

  template <class Any>
  explicit WinogradTiles(const Image<Any>& image)
      : n(image.n),
        d(image.d),
        h(image.h),
        w(image.w),
        size(tile_size(image.dims)),
        border(image.dims > 2),
        thick(ceil_div(image.d, ceil_div(image.d, kMostSlices))),
        deep(ceil_div(image.d, thick)),
        down(ceil_div(image.h, size)),
        across(ceil_div(image.w, size)) {}

  int64_t count() const { return n * deep * down * across; }
  // Slices that a run reads.
  int64_t read() const { return thick + 2 * border; }
  // Tiles of a run of so many rows at most, where a part has so many.
  int64_t run(int64_t part, int64_t rows = kWinogradRows) const {
    if (!border) return equal_tile(part, rows);
    return ceil_div(part, ceil_div(part, larger(1, rows / thick)));
  }
  WinogradTile at(int64_t index) const {
    const int64_t slab = index / (down * across);
    return {slab / deep, slab % deep * thick, index / across % down * size, index % across * size};
  }
  // The pixel of a tile's first output, by its row in the image's memory, so many slices behind.
  int64_t pixel(const WinogradTile& tile, int64_t behind = 0) const {
    return ((tile.image * d + tile.z + behind) * h + tile.y) * w + tile.x;
  }
  // Whether its volume has the slice so many behind a tile's.
  bool has_slice(const WinogradTile& tile, int64_t behind) const {
    return static_cast<uint64_t>(tile.z + behind) < static_cast<uint64_t>(d);
  }
  // What the tiles [begin, end) read of a slice, but for their border: whole rows, and how many
  // pixels there are in them. Of volumes those of the first one.
  int64_t first_pixel(int64_t begin) const {
    const WinogradTile tile = at(begin);
    return pixel(tile) - tile.x;
  }
  int64_t pixels(int64_t begin, int64_t end) const {
    if (begin >= end) return 0;
    const int64_t slab = down * across;
    const WinogradTile last = at(smaller(end, border ? (begin / slab + 1) * slab : end) - 1);
    return pixel(last) - last.x + smaller(size, h - last.y) * w - first_pixel(begin);
  }
};

// Calls body(tile, behind) for each row of a run: its tiles in the slices so many behind theirs,
// one slice after the other, from `border` before the first on.
template <class Body>
DF_INLINE void for_each_row(const WinogradTiles& tiles, int64_t begin, int64_t end, int64_t border,
                            const Body& body) {
  for (int64_t behind = -border; behind < tiles.thick + border; ++behind) {
    for (int64_t index = begin; index < end; ++index) body(tiles.at(index), behind);
  }
}

// The rule, where the user allows it. Products saved must outweigh tiles cut by the border: 16
// multiplications for each tile against 9 for each pixel, of volumes 36, and what the transforms
// cost. Where the image has less than three rows or columns the direct way adds so few terms that
// its rounding errors are smaller by more than half.
template <class S>
DF_INLINE bool use_winograd(int64_t h, int64_t w, const Weight<S>& weight) {
  const int64_t k = weight.out, size = tile_size(weight.dims);
  const int64_t products = ceil_div(h, size) * ceil_div(w, size) * tile_points(size);
  return winograd_allowed() && k <= kPanel && h > 2 && w > 2 &&
         products * (k + 6) < weight.slice_taps() * h * w * k;
}

}  // namespace
}  // namespace densenet_fast::cpu
