// The same 3x3 convolution for growth rates that fill vectors badly (k = 12 uses 12 of 16 lanes,
// and one vector of outputs leaves the load units as the limit): one product makes all nine taps of
// a pixel, [pixels, 9k], whose columns fill their vectors; then every output pixel adds its nine
// neighbours' taps. Image rows pass through a ring of three.
#pragma once

#include "conv3x3_forward.h"

namespace densenet_fast::cpu {
namespace {

// The rule: less than four fifths of the lanes used, or a single vector.
template <class T>
DF_INLINE bool taps_product_is_faster(int64_t k) {
  return vectors<T>(k) == 1 || 5 * k < 4 * padded<T>(k);
}

// Column (tap, output channel) of row c: [channels, 9k].
template <class S>
void pack_taps(const Weight<S>& weight, Compute<S>* packed) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t k = weight.out, columns = 9 * k;
  const auto pack = [&](int64_t c, int64_t count, int64_t v, int nv, T* block) {
    T* to = block + c * nv * L;
    T* row = scratch<T>(Scratch::kOperand, padded<T>(columns) + L);
    for (int64_t end = c + count; c < end; ++c, to += nv * L) {
      for (int64_t o = 0; o < k; o += L) {
        Vec<T> taps[9];
        load_kernels<false>(weight, o, c, taps);
        for (int t = 0; t < 9; ++t) store_upto<T>(row + t * k + o, taps[t], k - o);
      }
      store<T>(row + columns, zero<T>());
      for (int u = 0; u < nv; ++u) store<T>(to + u * L, load<T>(row + (v + u) * L));
    }
  };
  pack_blocks(weight.in, weight.in, columns, kForwardVectors, packed, pack);
}

template <class S, class Packed>
void conv3x3_forward_taps(Image<const S> bottleneck, Activation<Compute<S>> act,
                          const Packed& packed_for, Image<S> growth,
                          Statistics<Compute<S>> statistics) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  constexpr int64_t kMinBandRows = 16;  // two more rows are computed than a band has
  const int64_t channels = bottleneck.c, k = growth.c, columns = 9 * k;
  const int64_t h = bottleneck.h, w = bottleneck.w;
  const int64_t pitch = padded<T>(columns) + L;  // slack: the last tap is read as whole vectors

  const int64_t wanted = ceil_div(16, bottleneck.n);
  const int64_t down = larger(1, smaller(wanted, h / kMinBandRows));
  const int64_t band_rows = ceil_div(h, down);
  const int64_t tasks = bottleneck.n * ceil_div(h, band_rows);
  TaskStatistics<T> partial(tasks, k);
  for_each_task(tasks, [&](int64_t task, int64_t before) {
    const T* packed = packed_for(before);
    const int64_t bands = ceil_div(h, band_rows);
    const int64_t image = task / bands, begin = task % bands * band_rows;
    const int64_t end = smaller(h, begin + band_rows);
    T* panel = scratch<T>(Scratch::kOperand, kForwardTile * kPanelPitch);
    T* ring = scratch<T>(Scratch::kResult, 3 * w * pitch);
    const int64_t tile_steps = product_steps<T>(kForwardTile, channels, columns, kForwardVectors);

    const auto multiply_row = [&](int64_t y) {
      const S* from = bottleneck.data + (image * h + y) * w * bottleneck.pitch;
      T* to = ring + y % 3 * w * pitch;
      for (int64_t x = 0; x < w; x += kForwardTile) {
        const int64_t rows = smaller(kForwardTile, w - x);
        PrefetchStream stream;
        // The next tile of this image row, or of the next one: they follow in memory.
        const int64_t next = (image * h + y) * w + x + rows;
        stream.add(bottleneck.data + next * bottleneck.pitch, channels * sizeof(S),
                   bottleneck.pitch * sizeof(S), smaller(kForwardTile, bottleneck.rows() - next),
                   false);
        stream.start(tile_steps);
        product_tile<T>(
            rows, channels, columns, BlockGroup(vectors<T>(columns), kForwardVectors),
            to + x * pitch, pitch, panel, stream,
            [&](int64_t c0, int64_t width, T* into) {
              activate_panel<T>(from + x * bottleneck.pitch, bottleneck.pitch, rows, c0, width,
                                act.scale, act.shift, into);
            },
            [&](int64_t c0, int64_t, int64_t v, int nv) {
              return packed + (v * channels + c0 * nv) * L;
            });
      }
    };

    const auto add_taps = [&](int64_t y) {
      S* out = growth.data + (image * h + y) * w * growth.pitch;
      for (int64_t x = 0; x < w; ++x) {
        for (int64_t c = 0; c < k; c += L) {
          Vec<T> sum = zero<T>();
          for (int64_t kh = larger(0, 1 - y); kh < smaller(3, h + 1 - y); ++kh) {
            const T* row = ring + (y + kh - 1) % 3 * w * pitch + kh * 3 * k + c;
            for (int64_t kw = larger(0, 1 - x); kw < smaller(3, w + 1 - x); ++kw) {
              sum += load<T>(row + (x + kw - 1) * pitch + kw * k);
            }
          }
          store_upto<T>(out + x * growth.pitch + c, sum, k - c);
        }
      }
    };

    const int64_t last = smaller(h, end + 1);
    for (int64_t y = larger(0, begin - 1); y < last; ++y) {
      multiply_row(y);
      if (y > begin) add_taps(y - 1);
    }
    if (end == h) add_taps(h - 1);
    if (statistics.mean) {
      accumulate_statistics<T>(growth.data + (image * h + begin) * w * growth.pitch, growth.pitch,
                               w, end - begin, w * growth.pitch, k, partial.of(task));
    }
  });
  if (statistics.mean) partial.finish(statistics);
}

}  // namespace
}  // namespace densenet_fast::cpu
