// The deferred BatchNorm correction, and dropout.
#pragma once

#include "blocking.h"

namespace densenet_fast::cpu {
namespace {

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
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t n = channels - c;
      const Vec<T> constant = load_upto<T>(sum_grad + c, n) * splat<T>(inverse);
      const Vec<T> slope = load_upto<T>(sum_grad_x + c, n) * splat<T>(inverse);
      const Vec<T> centre = load_upto<T>(mean + c, n);
      const S* x = features.data + first * features.pitch + c;
      const S* g = grad_features.data + first * grad_features.pitch + c;
      S* to = out.data + first * out.pitch + c;
      for (int64_t r = 0; r < count; ++r) {
        const Vec<T> value = load_upto<T>(x + r * features.pitch, n) - centre;
        const Vec<T> grad = load_upto<T>(g + r * grad_features.pitch, n) - constant;
        store_upto<T>(to + r * out.pitch, grad - value * slope, n);
      }
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
// recomputed block see the same one without storing it.
template <class S>
void dropout(Image<S> growth, uint64_t seed, double p) {
  using T = Compute<S>;
  constexpr int64_t kRows = 256;
  const int64_t rows = growth.rows(), channels = growth.c;
  const uint64_t threshold = static_cast<uint64_t>(p * 4294967296.0);
  const T keep = p < 1.0 ? static_cast<T>(1.0 / (1.0 - p)) : T(0);
  for_each_task(ceil_div(rows, kRows), [&](int64_t task) {
    const int64_t end = smaller(rows, (task + 1) * kRows);
    uint64_t loaded = ~uint64_t{0};
    PhiloxBlock block{};
    for (int64_t r = task * kRows; r < end; ++r) {
      S* row = growth.data + r * growth.pitch;
      for (int64_t c = 0; c < channels; ++c) {
        const uint64_t i = static_cast<uint64_t>(r) * channels + c;
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
