// The tensors and numbers of the block operators as a `Block`. Per layer there are
//   parameters  norm1's weight and bias, conv1's weight, norm2's weight and bias, conv2's weight;
//   frozen      mean and variance of norm1 and of norm2, or nothing at all if no norm is frozen;
//   gradients   in the parameters' order;
//   numbers     eps of norm1 and of norm2, probability of dropout, 1 if it drops whole channels.
// A tensor without elements stands for one that is not there; a layer without conv1's weight has no
// bottleneck, and norm2 is over the features.
#pragma once

#include "block.h"
#include "call.h"

namespace densenet_fast {

template <class Device>
Block described_block(const Call<Device>& call, const ImageArgument& features,
                      const Tensor& statistics, const std::vector<Tensor>& bottlenecks,
                      const Tensor& vectors, const std::vector<Tensor>& parameters,
                      const std::vector<Tensor>& frozen, const std::vector<double>& numbers,
                      const std::vector<int64_t>& seeds, int64_t reduced) {
  const size_t count = seeds.size();
  STD_TORCH_CHECK(parameters.size() == 6 * count && bottlenecks.size() == count &&
                      numbers.size() == 4 * count && (frozen.empty() || frozen.size() == 4 * count),
                  "the lists of a block must describe ", count, " layers, as the seeds do");
  const auto given = [&](const Tensor& t, int64_t channels, const char* name) {
    return t.numel() ? call.vector(t, channels, name) : nullptr;
  };
  Block block;
  block.dtype = call.dtype();
  block.features = features;
  block.layers.resize(count);
  int64_t widths = 0, growths = 0;
  for (size_t i = 0; i < count; ++i) {
    widths += parameters[6 * i + 2].size(0);
    growths += parameters[6 * i + 5].size(0);
  }
  // Means of the features, their variances, then both of each bottleneck; what follows is Python's.
  const int64_t size = 2 * (features.c + widths);
  STD_TORCH_CHECK(statistics.numel() >= size, "statistics must have ", size, " elements at least");
  block.mean = call.mutable_vector(statistics, statistics.numel(), "statistics");
  void* var = block.vector(block.mean, features.c);
  void* of_bottleneck = block.vector(var, features.c);
  int64_t start = features.c - growths;
  for (size_t i = 0; i < count; ++i) {
    BlockLayer& layer = block.layers[i];
    const Tensor* own = &parameters[6 * i];
    layer.start = start;
    if (own[2].numel()) layer.conv1 = call.weight(own[2], 1, start, features.dims);
    const int64_t width = layer.conv1.out, read = layer.has_bottleneck() ? width : start;
    layer.conv2 = call.weight(own[5], 3, read, features.dims);
    layer.norm1 = {given(own[0], start, "norm1.weight"), given(own[1], start, "norm1.bias"),
                   block.mean, var, numbers[4 * i]};
    layer.norm2 = {given(own[3], read, "norm2.weight"), given(own[4], read, "norm2.bias"),
                   block.mean, var, numbers[4 * i + 1]};
    if (layer.has_bottleneck()) {
      layer.norm2.mean = of_bottleneck;
      layer.norm2.var = block.vector(of_bottleneck, width);
      layer.bottleneck = call.mutable_image(bottlenecks[i], "bottleneck", features, width);
    }
    const auto freeze = [&](BlockNorm& norm, size_t at, int64_t channels) {
      if (frozen.empty() || !frozen[at].numel()) return;
      norm.mean = call.mutable_vector(frozen[at], channels, "running_mean");
      norm.var = call.mutable_vector(frozen[at + 1], channels, "running_var");
      norm.frozen = true;
    };
    freeze(layer.norm1, 4 * i, start);
    freeze(layer.norm2, 4 * i + 2, read);
    if (static_cast<int64_t>(i) + 1 < reduced) {
      layer.growth = {block.vector(block.mean, start), block.vector(var, start)};
    }
    layer.dropout = numbers[4 * i + 2];
    layer.drop_channels = numbers[4 * i + 3] != 0;
    layer.seed = static_cast<uint64_t>(seeds[i]);
    start += layer.conv2.out;
    of_bottleneck = block.vector(of_bottleneck, 2 * width);
  }
  // Scale, shift and rstd of every norm, then a norm2's backward.
  void* room = call.mutable_vector(vectors, vectors.numel(), "vectors");
  int64_t used = 0;
  const auto take = [&](int64_t elements) {
    used += elements;
    return block.vector(room, used - elements);
  };
  for (size_t half = 0; half < 2 * count; ++half) {
    const BlockNorm& norm = block.norm(half);
    const BlockLayer& layer = block.layers[half / 2];
    const int64_t channels = half % 2 ? layer.conv2.in : layer.conv1.in;
    block.coefficients.push_back({channels, norm.mean, norm.var, norm.weight, norm.bias, norm.eps,
                                  take(channels), take(channels), take(channels)});
  }
  block.gradient_map = take(3 * block.widest());
  STD_TORCH_CHECK(vectors.numel() >= used, "there is no room for the norms' coefficients");
  return block;
}

template <class Device>
void describe_gradients(const Call<Device>& call, Block& block, const Tensor& grad_features,
                        const Tensor& sums, const Tensor& grad_growth, const Tensor& grad_norm,
                        const std::vector<Tensor>& parameters,
                        const std::vector<Tensor>& gradients) {
  STD_TORCH_CHECK(gradients.size() == parameters.size(),
                  "every parameter has a slot for its gradient");
  const int64_t count = static_cast<int64_t>(block.layers.size());
  STD_TORCH_CHECK(
      0 <= block.held && block.held <= count && -1 <= block.lowest && block.lowest <= count,
      "bottlenecks held: ", block.held, ", lowest layer: ", block.lowest, ", of ", count,
      " layers");
  block.grad_features =
      call.mutable_image(grad_features, "grad_features", block.features, block.features.c);
  const int64_t channels = block.features.c, rows = block.rows();
  int64_t thickest = 0;
  for (size_t i = 0; i < block.layers.size(); ++i) {
    BlockLayer& layer = block.layers[i];
    const Tensor* own = &gradients[6 * i];
    const auto vector = [&](const Tensor& t, int64_t size, const char* name) {
      return t.numel() ? call.mutable_vector(t, size, name) : nullptr;
    };
    const auto affine = [&](const Tensor* pair, int64_t size, const char* name) {
      const NormGradientResult found{vector(pair[0], size, name), vector(pair[1], size, name)};
      STD_TORCH_CHECK(!found.gamma == !found.beta, name, " has one gradient of two");
      return found;
    };
    const auto weight = [&](size_t at) {
      return own[at].numel() ? call.weight_gradient(own[at], parameters[6 * i + at])
                             : WeightGradient{};
    };
    layer.grad_norm1 = affine(own, layer.start, "norm1");
    layer.grad_conv1 = weight(2);
    layer.grad_norm2 = affine(own + 3, layer.conv2.in, "norm2");
    layer.grad_conv2 = weight(5);
    const bool features_needed = block.lowest < static_cast<int64_t>(i);
    STD_TORCH_CHECK(static_cast<int64_t>(i) < block.lowest ||
                        ((layer.grad_norm1.beta || !features_needed || !layer.has_bottleneck()) &&
                         (layer.grad_norm2.beta ||
                          !(features_needed || layer.grad_norm1.beta || layer.grad_conv1.data))),
                    "a norm's sums are wanted with every gradient of the data");
    thickest = std::max(thickest, layer.conv2.out);
  }
  block.grad_growth = call.mutable_matrix(grad_growth, rows * thickest, "grad_growth");
  block.grad_norm = call.mutable_matrix(grad_norm, rows * block.widest(), "grad_norm");
  block.sum_grad = call.mutable_vector(sums, sums.numel(), "sums");
  const int64_t exchanged = 2 * block.widest();
  STD_TORCH_CHECK(sums.numel() == 2 * channels || sums.numel() == 2 * channels + exchanged,
                  "sums must have 2 elements a channel");
  block.sum_grad_x = block.vector(block.sum_grad, channels);
  if (sums.numel() > 2 * channels) block.norm2_sums = block.vector(block.sum_grad, 2 * channels);
}

inline void check_halves(const Block& block, int64_t first, int64_t last) {
  const int64_t halves = 2 * static_cast<int64_t>(block.layers.size());
  STD_TORCH_CHECK(0 <= first && first <= last && last <= halves, "half-layers [", first, ", ", last,
                  ") of ", halves);
}

// `places` are four for each norm: where its mean, variance and total (-1: none) are, and channels.
template <class Device>
std::vector<RunningUpdate> described_updates(const Call<Device>& call, const Tensor& statistics,
                                             const std::vector<Tensor>& running,
                                             const std::vector<int64_t>& places,
                                             const std::vector<double>& momenta, int64_t count) {
  STD_TORCH_CHECK(places.size() == 4 * momenta.size() && running.size() == 2 * momenta.size(),
                  "the lists must describe ", momenta.size(), " norms, as the momenta do");
  const int64_t size = statistics.numel();
  const char* base = static_cast<const char*>(call.vector(statistics, size, "statistics"));
  const auto at = [&](int64_t place, int64_t channels) -> const void* {
    STD_TORCH_CHECK(0 <= place && 0 <= channels && place + channels <= size,
                    "statistics end before a norm's");
    return base + place * vector_bytes(call.dtype());
  };
  std::vector<RunningUpdate> updates;
  for (size_t i = 0; i < momenta.size(); ++i) {
    const int64_t* place = &places[4 * i];
    const int64_t channels = place[3];
    if (place[2] < 0) check_count(count);
    updates.push_back({channels, at(place[0], channels), at(place[1], channels),
                       place[2] < 0 ? nullptr : at(place[2], 1), count, momenta[i],
                       call.mutable_vector(running[2 * i], channels, "running_mean"),
                       call.mutable_vector(running[2 * i + 1], channels, "running_var")});
  }
  return updates;
}

}  // namespace densenet_fast
