// The deferred BatchNorm correction, and dropout.
#pragma once

#include "blocking.h"

namespace densenet_fast::cpu {
namespace {

// What finish_gradient does to `count` rows of V vectors of channels, of which the last has `last`:
// neighbouring cache lines of a row together, not in one pass over the rows for each.
template <int V, class S>
DF_INLINE void correct_rows(Image<const S> x, Image<const S> grad, Image<S> out, int64_t count,
                            int64_t last, const Compute<S>* mean, const Compute<S>* sum_grad,
                            const Compute<S>* sum_grad_x, Compute<S> inverse) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  Vec<T> constant[V], slope[V], centre[V];
  for (int v = 0; v < V; ++v) {
    const int64_t n = v < V - 1 ? L : last;
    constant[v] = load_upto<T>(sum_grad + v * L, n) * splat<T>(inverse);
    slope[v] = load_upto<T>(sum_grad_x + v * L, n) * splat<T>(inverse);
    centre[v] = load_upto<T>(mean + v * L, n);
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int v = 0; v < V; ++v) {
      const int64_t n = v < V - 1 ? L : last;
      const Vec<T> value = load_upto<T>(x.data + v * L, n) - centre[v];
      const Vec<T> g = load_upto<T>(grad.data + v * L, n) - constant[v];
      store_upto<T>(out.data + v * L, g - value * slope[v], n);
    }
    x.data += x.pitch;
    grad.data += grad.pitch;
    out.data += out.pitch;
  }
}

// out = grad - sum_grad / M - (x - mean) * sum_grad_x / M: the part of every consumer's BatchNorm
// backward that depends on batch sums, once for all consumers of a channel.
template <class S>
void finish_gradient(Image<const S> features, Image<const S> grad_features, const Compute<S>* mean,
                     const Compute<S>* sum_grad, const Compute<S>* sum_grad_x, Image<S> out) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  constexpr int64_t kRows = 512;
  const int64_t rows = features.rows(), channels = features.c;
  const T inverse = static_cast<T>(1.0 / static_cast<double>(rows));
  for_each_task(ceil_div(rows, kRows), [&](int64_t task) {
    const int64_t first = task * kRows, count = smaller(kRows, rows - first);
    const auto from = [first](auto image, int64_t c) {
      image.data += first * image.pitch + c;
      return image;
    };
    int64_t c = 0;
    for (; channels - c >= 2 * L; c += 2 * L) {
      correct_rows<2, S>(from(features, c), from(grad_features, c), from(out, c), count, L,
                         mean + c, sum_grad + c, sum_grad_x + c, inverse);
    }
    for (; c < channels; c += L) {
      correct_rows<1, S>(from(features, c), from(grad_features, c), from(out, c), count,
                         smaller(L, channels - c), mean + c, sum_grad + c, sum_grad_x + c, inverse);
    }
  });
}

struct PhiloxBlock {
  uint32_t word[4];
};

// Philox-4x32-10 (Salmon et al., SC 2011): block `index` of the stream `seed`.
DF_INLINE PhiloxBlock philox(uint64_t seed, uint64_t index) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  PhiloxBlock c{{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c.word[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c.word[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

// x *= keep / (1 - p). The mask is a function of (seed, logical index), so that the backward and a
// recomputed block see the same one without storing it; all pixels of an image have one index where
// whole channels are dropped.
template <class S>
void dropout(Image<S> growth, uint64_t seed, double p, bool whole_channels) {
  using T = Compute<S>;
  constexpr int64_t kRows = 256;
  const int64_t rows = growth.rows(), channels = growth.c;
  const uint64_t threshold = static_cast<uint64_t>(p * 4294967296.0);
  const T keep = p < 1.0 ? static_cast<T>(1.0 / (1.0 - p)) : T(0);
  const int64_t pixels = whole_channels ? rows / growth.n : 1;
  for_each_task(ceil_div(rows, kRows), [&](int64_t task) {
    const int64_t end = smaller(rows, (task + 1) * kRows);
    uint64_t loaded = ~uint64_t{0};
    PhiloxBlock block{};
    for (int64_t r = task * kRows; r < end; ++r) {
      S* row = growth.data + r * growth.pitch;
      const uint64_t first = static_cast<uint64_t>(r / pixels) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        const uint64_t i = first + c;
        if (i / 4 != loaded) {
          loaded = i / 4;
          block = philox(seed, loaded);
        }
        row[c] = narrow<S>(block.word[i % 4] >= threshold ? widen<S>(row[c]) * keep : T(0));
      }
    }
  });
}

}  // namespace
}  // namespace densenet_fast::cpu
