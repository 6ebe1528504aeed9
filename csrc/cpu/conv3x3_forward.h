// growth = conv3x3(relu(scale * bottleneck + shift)), padding 1 after the activation, written into
// its slice of the feature buffer, statistics in the epilogue. Direct: a band of image rows is
// activated into scratch with a border of zeros, and a tile of output pixels stays in registers
// over all nine taps. A slice of a volume is the sum of what the kernels' slices make of it and of
// its neighbours; an image of one dimension is a slice of one row, and so are its kernels.
#pragma once

#include "conv1x1_forward.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kBandRows = 8;
constexpr int64_t kBandColumns = 64;
constexpr int kConv3x3Vectors = 2;

// How one image is cut into bands.
struct Bands {
  int64_t rows, columns;  // of one band, at most
  int64_t down, across;   // bands in an image

  Bands(int64_t n, int64_t h, int64_t w) {
    // Small batches get lower bands, so that there is work for every thread.
    const int64_t wanted = ceil_div(16, n);
    down = larger(ceil_div(h, kBandRows), smaller(wanted, ceil_div(h, 2)));
    rows = ceil_div(h, down);
    down = ceil_div(h, rows);
    across = ceil_div(w, kBandColumns);
    columns = ceil_div(w, across);
    across = ceil_div(w, columns);
  }
  int64_t count(int64_t n) const { return n * down * across; }
};

// The band's place in its image.
struct Band {
  int64_t slice, y, x, rows, columns;

  Band(const Bands& bands, int64_t task, int64_t h, int64_t w) {
    x = task % bands.across * bands.columns;
    y = task / bands.across % bands.down * bands.rows;
    slice = task / bands.across / bands.down;
    rows = smaller(bands.rows, h - y);
    columns = smaller(bands.columns, w - x);
  }
};

// Which slices of a kernel of `depth` find one of the volume around an output's slice: of these, z
// reads slice + z - depth / 2.
struct NeighbourSlices {
  int64_t begin, end;

  template <class Any>
  NeighbourSlices(const Image<Any>& image, int64_t depth, int64_t slice)
      : begin(depth > 1 && slice % image.d == 0),
        end(depth - (depth > 1 && slice % image.d == image.d - 1)) {}
};

// Activates channels [c0, c0 + width) of the band in this slice, and its border of one column and
// `border` rows, into `to`, [rows + 2 * border, columns + 2, kPanelPitch]; outside the image: zero.
template <class T, class S>
void activate_band(const Image<const S>& image, const Band& band, int64_t slice, int64_t border,
                   Activation<T> act, int64_t c0, int64_t width, T* to) {
  const int64_t columns = band.columns + 2;
  const auto clear = [&](T* p, int64_t pixels) {
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t c = 0; c < width; c += kLanes<T>) store<T>(p + i * kPanelPitch + c, zero<T>());
    }
  };
  for (int64_t i = 0; i < band.rows + 2 * border; ++i) {
    T* row = to + i * columns * kPanelPitch;
    const int64_t y = band.y + i - border;
    if (y < 0 || y >= image.h) {
      clear(row, columns);
      continue;
    }
    const int64_t first = larger(0, band.x - 1);
    const int64_t last = smaller(image.w, band.x + band.columns + 1);
    const int64_t left = first - (band.x - 1);
    clear(row, left);
    activate_panel<T>(image.data + ((slice * image.h + y) * image.w + first) * image.pitch,
                      image.pitch, last - first, c0, width, act.scale, act.shift,
                      row + left * kPanelPitch);
    clear(row + (left + last - first) * kPanelPitch, columns - left - (last - first));
  }
}

// Slice by slice and panel by panel of input channels, all taps of one panel together.
template <class S>
void pack_direct(const Weight<S>& weight, Compute<S>* packed) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  constexpr int64_t kRun = kPanel / 4;  // channels of one task
  const int64_t vecs = vectors<T>(weight.out), count = weight.slice_taps();
  const int64_t runs = ceil_div(weight.in, kRun);
  for_each_task(weight.depth() * runs, [&](int64_t task) {
    const Weight<S> kernels = weight.slice(task / runs);
    T* slice = packed + task / runs * count * weight.in * vecs * L;
    const int64_t begin = task % runs * kRun, end = smaller(weight.in, begin + kRun);
    const int64_t c0 = begin / kPanel * kPanel, panel = smaller(kPanel, weight.in - c0);
    for_each_block(vecs, kConv3x3Vectors, [&](int64_t v, int nv) {
      T* block = slice + count * L * (c0 * vecs + v * panel);
      for (int64_t c = begin; c < end; ++c) {
        for (int u = 0; u < nv; ++u) {
          Vec<T> taps[9];
          load_kernels<false>(kernels, (v + u) * L, c, taps);
          for (int t = 0; t < count; ++t)
            store<T>(block + ((t * panel + c - c0) * nv + u) * L, taps[t]);
        }
      }
    });
  });
}

template <class S, class Packed>
void conv3x3_forward_direct(Image<const S> bottleneck, Activation<Compute<S>> act,
                            const Weight<S>& weight, const Packed& packed_for, Image<S> growth,
                            Statistics<Compute<S>> statistics) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t channels = bottleneck.c, k = growth.c, vecs = vectors<T>(k), width = padded<T>(k);
  const int64_t h = bottleneck.h, w = bottleneck.w;
  const int64_t depth = weight.depth(), count = weight.slice_taps(), border = weight.lines() / 2;

  const Bands bands(bottleneck.slices(), h, w);
  const int64_t tasks = bands.count(bottleneck.slices());
  TaskStatistics<T> partial(tasks, k);
  for_each_task(tasks, [&](int64_t task, int64_t before) {
    const T* packed = packed_for(before);
    const Band band(bands, task, h, w);
    const int64_t columns = band.columns + 2;
    T* activated =
        scratch<T>(Scratch::kOperand, (bands.rows + 2) * (bands.columns + 2) * kPanelPitch);
    int64_t taps[9];
    for (int64_t t = 0; t < count; ++t) taps[t] = (t / 3 * columns + t % 3) * kPanelPitch;
    S* out = growth.data + ((band.slice * h + band.y) * w + band.x) * growth.pitch;

    // Sums of several panels: in the growth itself, or in scratch until they can be rounded.
    T* sums;
    int64_t pixel_pitch, row_pitch;
    if constexpr (kNarrow<S>) {
      sums = scratch<T>(Scratch::kResult, bands.rows * bands.columns * width);
      pixel_pitch = width;
      row_pitch = band.columns * width;
    } else {
      sums = out;
      pixel_pitch = growth.pitch;
      row_pitch = w * growth.pitch;
    }

    PrefetchStream stream;
    if (task + 1 < tasks) {
      const Band next(bands, task + 1, h, w);
      const S* from = bottleneck.data + ((next.slice * h + next.y) * w + next.x) * bottleneck.pitch;
      stream.add(from, channels * sizeof(S), bottleneck.pitch * sizeof(S), next.rows * w, false);
    }
    const NeighbourSlices neighbours(bottleneck, depth, band.slice);
    stream.start(ceil_div(vecs, kConv3x3Vectors) * band.rows *
                 ceil_div(band.columns, kMaxRows[kConv3x3Vectors]) * count *
                 (neighbours.end - neighbours.begin) * ceil_div(channels, kPrefetchEvery));

    for (int64_t c0 = 0; c0 < channels; c0 += kPanel) {
      const int64_t panel = smaller(kPanel, channels - c0);
      for (int64_t z = neighbours.begin; z < neighbours.end; ++z) {
        const int64_t slice = band.slice + z - depth / 2;
        activate_band<T>(bottleneck, band, slice, border, act, c0, panel, activated);
        const T* kernels = packed + count * width * (z * channels + c0);
        for_each_block(vecs, kConv3x3Vectors, [&](int64_t v, int nv) {
          for (int64_t y = 0; y < band.rows; ++y) {
            for_each_row_tile(band.columns, nv, [&](int64_t x, int rows) {
              RowsProduct<T> product{activated + (y * columns + x) * kPanelPitch,
                                     taps,
                                     count,
                                     panel,
                                     kernels + v * L * count * panel,
                                     sums + y * row_pitch + x * pixel_pitch + v * L,
                                     pixel_pitch,
                                     smaller(nv * L, k - v * L),
                                     c0 > 0 || z > neighbours.begin,
                                     &stream};
              kMicrokernels<T>.rows[nv][rows](product);
            });
          }
        });
      }
    }
    if constexpr (kNarrow<S>) {
      for (int64_t y = 0; y < band.rows; ++y) {
        store_rows<T>(sums + y * row_pitch, width, band.columns, k, out + y * w * growth.pitch,
                      growth.pitch);
      }
    }
    if (statistics.mean) {
      accumulate_statistics<T>(out, growth.pitch, band.columns, band.rows, w * growth.pitch, k,
                               partial.of(task));
    }
  });
  if (statistics.mean) partial.finish(statistics);
}

}  // namespace
}  // namespace densenet_fast::cpu
