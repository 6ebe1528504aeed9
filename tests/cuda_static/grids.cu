// How the products of 16-bit types are cut into blocks. Reads lines "kind n h w out in
// multiprocessors", n x h x w being the pixels of the result; answers each by rows and columns of
// a tile, blocks, splits, and the blocks that the smallest tile and the most splits would make.
#include <algorithm>
#include <iostream>
#include <string>

#include "cuda/pixel_product.cuh"

using namespace densenet_fast::cuda;

struct Answer {
  int rows, columns;
  int64_t blocks, splits, most;
};

template <const auto& kTiles, class Tiles>
Answer answer(const Cut& cut, const Tiles& tiles, int64_t columns, int most_splits) {
  const TileSize size = kTiles[cut.size];
  int64_t most = 0;
  for (const TileSize& t : kTiles) {
    most = std::max(most, tiles(t) * ceil_div(columns, t.columns) * std::max(most_splits, 1));
  }
  return {size.rows, size.columns, cut.tiles * ceil_div(columns, size.columns) * cut.splits,
          cut.splits, most};
}

Answer pixels(int64_t rows, int64_t out, int64_t in, int multiprocessors) {
  using E = HalfPolicy::Element;
  using Wide = PixelTile<E, false>;
  using Narrow = PixelTile<E, true>;
  const int64_t units = ceil_div(rows, kStagePixels<E>);
  const PixelCut wide(units, ceil_div(out, Wide::BI), ceil_div(in, Wide::BJ), multiprocessors);
  const PixelCut narrow(units, ceil_div(out, Narrow::BI), ceil_div(in, Narrow::BJ),
                        multiprocessors);
  const bool takes = takes_wide(wide, out, multiprocessors);
  const PixelCut& cut = takes ? wide : narrow;
  return {takes ? Wide::BI : Narrow::BI, Wide::BJ, cut.blocks(), cut.splits,
          narrow.across * narrow.down * units};
}

Answer taps(const TileCount& count, int64_t out, int64_t in, int multiprocessors) {
  using T = TapTile<HalfPolicy>;
  const int64_t across = ceil_div(out, T::BI), down = ceil_div(in, T::BJ);
  const int parts = count.gradient_parts(across, down, multiprocessors);
  const PixelCut cut(count.tiles() * parts, across, down, multiprocessors);
  return {T::BI, T::BJ, cut.blocks(), cut.splits, across * down * count.tiles() * 4};
}

int main() {
  std::string kind;
  int64_t n, h, w, out, in;
  int multiprocessors;
  while (std::cin >> kind >> n >> h >> w >> out >> in >> multiprocessors) {
    const int64_t rows = n * h * w;
    const TileCount count = best_shape({nullptr, n, 1, h, w, 1, 1, 2});
    const int steps = static_cast<int>(ceil_div(in, kStep<HalfPolicy::Element>));
    const auto rows_tiles = [&](TileSize t) { return ceil_div(rows, t.rows); };
    const auto image_tiles = [&](TileSize t) { return count.tiles() * (kUnitRows / t.rows); };
    Answer a{};
    if (kind == "conv1x1_forward") {
      const Cut cut = cut_forward(kRowsTiles, rows, out, steps, multiprocessors);
      a = answer<kRowsTiles>(cut, rows_tiles, out, steps / kLeastSteps);
    } else if (kind == "conv1x1_dgrad") {
      a = answer<kRowsTiles>(cut_rows(kRowsTiles, rows, in, 1, multiprocessors), rows_tiles, in, 1);
    } else if (kind == "transition_forward") {
      const Cut cut = cut_rows(kPooledTiles, rows, out, 1, multiprocessors);
      a = answer<kPooledTiles>(cut, rows_tiles, out, 1);
    } else if (kind == "transition_dgrad") {
      a = answer<kPooledTiles>(cut_rows(kPooledTiles, rows, in, 1, multiprocessors), rows_tiles, in,
                               1);
    } else if (kind == "conv3x3_forward") {
      const Cut cut = count.cut_forward(kForwardTiles, out, steps, multiprocessors);
      a = answer<kForwardTiles>(cut, image_tiles, out, steps);
    } else if (kind == "conv3x3_dgrad") {
      const Cut cut = count.cut(kRowsTiles, in, 1, multiprocessors);
      a = answer<kRowsTiles>(cut, image_tiles, in, 1);
    } else if (kind == "conv3x3_wgrad") {
      a = taps(count, out, in, multiprocessors);
    } else if (kind == "conv1x1_wgrad" || kind == "transition_wgrad") {
      a = pixels(rows, out, in, multiprocessors);
    } else {
      return 1;
    }
    std::cout << a.rows << ' ' << a.columns << ' ' << a.blocks << ' ' << a.splits << ' ' << a.most
              << '\n';
  }
}
