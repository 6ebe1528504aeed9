// Tiles of Winograd convolutions: which pixels and slices they are, and where their points lie.
#pragma once

#include "blocking.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kWinogradTiles = 48;  // of one run, at most

// Columns of a tile; all are two rows high, those of volumes two slices thick. In images the errors
// of four columns would be larger than those of direct sums.
constexpr int tile_width(int dims) { return dims > 2 ? 4 : 2; }
// Products of a slice of a tile: point j of a row and i of a column is number 4 * j + i.
constexpr int64_t slice_points(int dims) { return 4 * (tile_width(dims) + 2); }

// Where the points of an operand of so many tiles and channels begin: as many in a row as fit, a
// power of two, so that narrow operands take less of the cache.
class PointPlaces {
 public:
  PointPlaces(int64_t points, int64_t tiles, int64_t width) {
    int64_t slots = 1;
    while (slots < 8 && 2 * slots * width <= kPanelPitch) slots *= 2;
    const int64_t pitch = tiles * kPanelPitch;
    for (int bit = 0; bit < 4; ++bit) {
      const int64_t point = 1 << bit;
      steps_[bit] = point < slots ? point * width : point / slots * pitch;
    }
    size_ = points / slots * pitch;
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

// Elements between two points of a result of [points, tiles, width]: a few cache lines more than
// needed, as a transform reads all points of a tile at once and must not find them in one set.
DF_INLINE int64_t result_pitch(int64_t tiles, int64_t width) { return tiles * width + 48; }
// The same of a packed operand [points, k, width], all points of which one kernel is stored to.
DF_INLINE int64_t packed_pitch(int64_t k, int64_t width) { return k * width + 48; }

// A point of the depth's transform: slice `first` behind the tile's, and `sign` times another. The
// last one has the other sign than in the paper, on both sides.
struct DepthPoint {
  int first, second, sign;
};
DF_INLINE int depth_points(int dims) { return dims > 2 ? 4 : 1; }
constexpr DepthPoint kImagePoint = {0, 0, 0};
constexpr DepthPoint kInputPoints[4] = {{-1, 1, -1}, {0, 1, 1}, {1, 0, -1}, {2, 0, -1}};
constexpr DepthPoint kOutputPoints[4] = {{0, 0, 0}, {0, 1, 1}, {0, 1, -1}, {1, 0, 0}};

struct WinogradTile {
  int64_t image, z, y, x;  // of its first output
};

struct WinogradTiles {
  int64_t n, d, h, w;
  int points;           // of the depth's transform
  int64_t wide, thick;  // columns and slices of a tile
  int64_t deep, down, across;

  template <class Any>
  explicit WinogradTiles(const Image<Any>& image)
      : n(image.n),
        d(image.d),
        h(image.h),
        w(image.w),
        points(depth_points(image.dims)),
        wide(tile_width(image.dims)),
        thick(points > 1 ? 2 : 1),
        deep(ceil_div(image.d, thick)),
        down(ceil_div(image.h, 2)),
        across(ceil_div(image.w, wide)) {}
  DepthPoint input_point(int64_t i) const { return points > 1 ? kInputPoints[i] : kImagePoint; }
  DepthPoint output_point(int64_t i) const { return points > 1 ? kOutputPoints[i] : kImagePoint; }
  // The slice of the output that is whole when the products of point `i` are added; or -1.
  int64_t finished_slice(int64_t i) const { return points > 1 ? i - 2 : 0; }

  int64_t count() const { return n * deep * down * across; }
  WinogradTile at(int64_t index) const {
    const int64_t slab = index / (down * across);
    return {slab / deep, slab % deep * thick, index / across % down * 2, index % across * wide};
  }
  // The pixel of a tile's first output, by its row in the image's memory.
  int64_t pixel(const WinogradTile& tile) const {
    return ((tile.image * d + tile.z) * h + tile.y) * w + tile.x;
  }
  // Whether its volume has the slice so many behind a tile's.
  bool has_slice(const WinogradTile& tile, int64_t behind) const {
    return static_cast<uint64_t>(tile.z + behind) < static_cast<uint64_t>(d);
  }
  // What the tiles [begin, end) read, but for their border: whole image rows, and how many pixels
  // there are in them.
  int64_t first_pixel(int64_t begin) const {
    const WinogradTile tile = at(begin);
    return pixel(tile) - tile.x;
  }
  int64_t pixels(int64_t begin, int64_t end) const {
    if (begin >= end) return 0;
    const WinogradTile last = at(end - 1);
    return ((last.image * d + last.z) * h + smaller(last.y + 2, h)) * w - first_pixel(begin);
  }
};

// The rule, where the user allows it. Products saved must outweigh tiles cut by the border: 16
// multiplications for each tile against 9 for each pixel, of volumes 48 against 27 in each of two
// slices, and what the transforms cost. Where the image has less than three rows or columns the
// direct way adds so few terms that its rounding errors are smaller by more than half.
template <class S>
DF_INLINE bool use_winograd(int64_t h, int64_t w, const Weight<S>& weight) {
  const int64_t k = weight.out, slices = weight.dims > 2 ? 2 : 1;
  const int64_t tiles = ceil_div(h, 2) * ceil_div(w, tile_width(weight.dims));
  const int64_t products = depth_points(weight.dims) * slice_points(weight.dims) / slices;
  return winograd_allowed() && k <= kPanel && h > 2 && w > 2 &&
         tiles * products * (k + 6) < weight.taps() * h * w * k;
}

}  // namespace
}  // namespace densenet_fast::cpu
