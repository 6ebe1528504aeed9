// A dense block's loop over its layers, one for both backends. The unit is the half-layer, at whose
// ends ranks may have to exchange statistics: 2 l is norm1 and the 1x1 convolution of layer l,
// 2 l + 1 norm2 and its 3x3 convolution, of the features themselves in a layer without a
// bottleneck, whose first half-layer is nothing. The definition is
// densenet_fast/operators/reference_block.py.
#pragma once

#include <algorithm>
#include <vector>

#include "operators.h"

namespace densenet_fast {

struct BlockNorm {
  const void* weight = nullptr;  // null: ones
  const void* bias = nullptr;    // null: zeros
  void* mean = nullptr;
  void* var = nullptr;
  double eps = 0;
  bool frozen = false;  // mean and var are running statistics, not the batch's
};

struct BlockLayer {
  int64_t start = 0;  // channels before it
  BlockNorm norm1, norm2;
  WeightArgument conv1, conv2;
  ImageArgument bottleneck;
  StatisticsResult growth;  // null: nobody normalises with them
  double dropout = 0;
  bool drop_channels = false;  // whole ones of an image
  uint64_t seed = 0;
  // Of the backward.
  NormGradientResult grad_norm1, grad_norm2;
  WeightGradient grad_conv1, grad_conv2;

  bool has_bottleneck() const { return conv1.out > 0; }
};

struct Block {
  Dtype dtype;
  std::vector<BlockLayer> layers;
  ImageArgument features;
  void* mean = nullptr;                        // of the features
  std::vector<NormCoefficients> coefficients;  // of the norm of each half-layer
  void* gradient_map = nullptr;                // room for a norm2's, [3, B]
  bool recompute = false;                      // nothing is reduced: the statistics are there
  // Of the backward.
  ImageArgument grad_features;
  void* grad_growth = nullptr;  // scratch for images
  void* grad_norm = nullptr;
  void* sum_grad = nullptr;  // [C]: the deferred sums
  void* sum_grad_x = nullptr;
  void* norm2_sums = nullptr;  // [2, B]: norm2's, where they have been exchanged; else null
  int64_t held = 0;            // last layers whose bottleneck is there
  int64_t lowest = 0;          // layer below which no gradient is wanted; -1: the input's is

  const BlockNorm& norm(int64_t half) const {
    return half % 2 ? layers[half / 2].norm2 : layers[half / 2].norm1;
  }
  // Whether a half-layer is nothing, and the next one behind another that is something.
  bool empty(int64_t half) const { return half % 2 == 0 && !layers[half / 2].has_bottleneck(); }
  int64_t behind(int64_t half) const {
    const int64_t next = half + 1;
    return next < 2 * static_cast<int64_t>(layers.size()) && empty(next) ? next + 1 : next;
  }
  int64_t rows() const { return features.rows(); }
  int64_t widest() const {
    int64_t width = 0;
    for (const BlockLayer& layer : layers) width = std::max(width, layer.conv1.out);
    return width;
  }
  void* vector(void* base, int64_t elements) const {
    return static_cast<char*>(base) + elements * vector_bytes(dtype);
  }
  ImageArgument slice(ImageArgument image, int64_t start, int64_t channels) const {
    image.data = static_cast<char*>(image.data) + start * element_bytes(dtype);
    image.c = channels;
    return image;
  }
  // What a layer's 3x3 convolution reads.
  ImageArgument input(const BlockLayer& layer) const {
    return layer.has_bottleneck() ? layer.bottleneck : slice(features, 0, layer.start);
  }
  // Scratch as an image of the features' pixels.
  ImageArgument image(void* data, int64_t channels) const {
    ImageArgument image = features;
    image.data = data;
    image.c = image.pitch = channels;
    return image;
  }
};

// Statistics of a layer's bottleneck or growth (`half` even or odd) with what is made behind them:
// the next half-layer's norm, if that belongs to the same call.
inline StatisticsResult behind(const Block& block, StatisticsResult found, int64_t half,
                               int64_t last) {
  const int64_t next = block.behind(half);
  if (found.mean && next < last && !block.norm(next).frozen) found.next = &block.coefficients[next];
  return found;
}

// Half-layers [first, last), upwards.
template <class Device>
void block_forward(const typename Device::Context& context, Block& block, int64_t first,
                   int64_t last) {
  std::vector<NormCoefficients> known;  // norms whose statistics are there
  std::vector<PackRequest> weights;
  if (first < last && block.empty(first)) ++first;
  if (first >= last) return;
  for (int64_t half = first; half < last; half = block.behind(half)) {
    BlockLayer& layer = block.layers[half / 2];
    if (half == first || block.recompute || block.norm(half).frozen)
      known.push_back(block.coefficients[half]);
    weights.push_back(half % 2 ? PackRequest{&layer.conv2, 3, false}
                               : PackRequest{&layer.conv1, 1, false});
  }
  Device::norm_coefficients(context, known);
  Device::pack_weights(context, weights);
  for (int64_t half = first; half < last; half = block.behind(half)) {
    const typename Device::Scope scope(context);
    const BlockLayer& layer = block.layers[half / 2];
    const NormArgument norm = block.coefficients[half].norm();
    if (half % 2 == 0) {
      const bool reduce = !block.recompute && !layer.norm2.frozen;
      const StatisticsResult found{layer.norm2.mean, layer.norm2.var};
      Device::conv1x1_forward(context, block.slice(block.features, 0, layer.start), norm,
                              layer.conv1, layer.bottleneck,
                              behind(block, reduce ? found : StatisticsResult{}, half, last));
      continue;
    }
    const ImageArgument growth = block.slice(block.features, layer.start, layer.conv2.out);
    const StatisticsResult found =
        behind(block, block.recompute ? StatisticsResult{} : layer.growth, half, last);
    Device::conv3x3_forward(context, block.input(layer), norm, layer.conv2, growth,
                            layer.dropout > 0 ? StatisticsResult{} : found);
    if (layer.dropout > 0) {
      Device::dropout(context, growth, layer.seed, layer.dropout, layer.drop_channels);
      if (found.mean) Device::channel_statistics(context, growth, found);
    }
  }
}

// The gradient of a layer's output: corrected for the batch's statistics, and through the dropout.
template <class Device>
ImageArgument growth_gradient(const typename Device::Context& context, const Block& block,
                              const BlockLayer& layer) {
  const int64_t channels = layer.conv2.out;
  ImageArgument gradient = block.slice(block.grad_features, layer.start, channels);
  // Where nobody has normalised it, the buffer's own channels can be worked on in place.
  if (layer.growth.mean) {
    const ImageArgument out = block.image(block.grad_growth, channels);
    Device::finish_gradient(context, block.slice(block.features, layer.start, channels), gradient,
                            block.vector(block.mean, layer.start),
                            block.vector(block.sum_grad, layer.start),
                            block.vector(block.sum_grad_x, layer.start), out);
    gradient = out;
  }
  if (layer.dropout > 0)
    Device::dropout(context, gradient, layer.seed, layer.dropout, layer.drop_channels);
  return gradient;
}

// What the backward of a layer's norm over the features does with their gradients: adds to them,
// and to the deferred sums, where they are needed.
struct FeaturesBackward {
  ImageArgument gradient;
  NormGradientResult sums;
  NormBackward deferred;

  FeaturesBackward(const Block& block, const BlockLayer& layer, bool needed, bool frozen,
                   const NormArgument& norm, const NormGradientResult& found)
      : sums(found), deferred{layer.start, norm} {
    if (!needed) return;
    gradient = block.slice(block.grad_features, 0, layer.start);
    deferred.sum_grad = block.sum_grad;
    deferred.sum_grad_x = block.sum_grad_x;
    if (!frozen) sums.next = &deferred;
  }
  FeaturesBackward(const FeaturesBackward&) = delete;  // `sums` points into it
  FeaturesBackward& operator=(const FeaturesBackward&) = delete;
};

// Half-layers [first, last), downwards. Below `Block::lowest` there is nothing to do.
template <class Device>
void block_backward(const typename Device::Context& context, Block& block, int64_t first,
                    int64_t last) {
  first = std::max(first, 2 * block.lowest);
  const int64_t made = static_cast<int64_t>(block.layers.size()) - block.held;
  std::vector<NormCoefficients> known;
  std::vector<PackRequest> weights;
  for (int64_t index = first / 2; 2 * index < last; ++index) {
    BlockLayer& layer = block.layers[index];
    const auto at = block.coefficients.begin() + 2 * index;
    if (layer.has_bottleneck()) known.push_back(at[0]);
    known.push_back(at[1]);
    if (first <= 2 * index + 1 && 2 * index + 1 < last) {
      if (layer.has_bottleneck() && index < made) weights.push_back({&layer.conv1, 1, false});
      if (layer.grad_norm2.beta) weights.push_back({&layer.conv2, 3, true});
    }
    if (first <= 2 * index && layer.grad_norm1.beta) weights.push_back({&layer.conv1, 1, true});
  }
  Device::norm_coefficients(context, known);
  Device::pack_weights(context, weights);
  for (int64_t index = (last + 1) / 2; index-- > first / 2;) {
    const typename Device::Scope scope(context);
    const BlockLayer& layer = block.layers[index];
    const bool upper = first <= 2 * index + 1 && 2 * index + 1 < last, lower = first <= 2 * index;
    const bool features_needed = block.lowest < index;
    const NormArgument norm2 = block.coefficients[2 * index + 1].norm();
    if (!layer.has_bottleneck()) {
      if (upper) {
        const FeaturesBackward features(block, layer, features_needed, layer.norm2.frozen, norm2,
                                        layer.grad_norm2);
        Device::conv3x3_backward(context, growth_gradient<Device>(context, block, layer),
                                 block.input(layer), norm2, layer.conv2, features.gradient,
                                 features.sums, layer.grad_conv2, true);
      }
      Device::add_weight_gradients(context);
      continue;
    }
    const bool conv1_needed = features_needed || layer.grad_norm1.beta || layer.grad_conv1.data;
    const ImageArgument prefix = block.slice(block.features, 0, layer.start);
    const ImageArgument grad_norm = block.image(block.grad_norm, layer.conv1.out);
    const NormArgument norm1 = block.coefficients[2 * index].norm();
    // Where ranks exchange norm2's sums, they do so between the half-layers.
    const bool at_once = upper && !block.norm2_sums;
    NormBackward backward2{layer.conv1.out, norm2, layer.norm2.frozen ? 0 : block.rows()};
    backward2.map = block.gradient_map;
    if (upper) {
      if (index < made) {
        Device::conv1x1_forward(context, prefix, norm1, layer.conv1, layer.bottleneck,
                                StatisticsResult{});
      }
      NormGradientResult sums = layer.grad_norm2;
      if (conv1_needed && at_once) sums.next = &backward2;
      Device::conv3x3_backward(
          context, growth_gradient<Device>(context, block, layer), layer.bottleneck, norm2,
          layer.conv2, conv1_needed ? grad_norm : ImageArgument{}, sums, layer.grad_conv2, false);
    }
    if (lower && conv1_needed) {
      if (!at_once) {
        NormGradientResult sums = layer.grad_norm2;
        if (block.norm2_sums)
          sums = {block.norm2_sums, block.vector(block.norm2_sums, layer.conv1.out)};
        Device::norm_grad_coefficients(context, backward2, sums);
      }
      const FeaturesBackward features(block, layer, features_needed, layer.norm1.frozen, norm1,
                                      layer.grad_norm1);
      Device::conv1x1_backward(context, grad_norm, layer.bottleneck, block.gradient_map, prefix,
                               norm1, layer.conv1, features.gradient, features.sums,
                               layer.grad_conv1);
    }
    Device::add_weight_gradients(context);
  }
}

// A block of known coefficients and packed weights: nothing is made but the features.
struct InferenceLayer {
  WeightArgument conv1, conv2;  // their sizes and `packed` alone
  NormArgument norm1, norm2;    // scale and shift alone
};

template <class Device>
void block_inference(const typename Device::Context& context, const Block& block, void* bottleneck,
                     const std::vector<InferenceLayer>& layers) {
  for (const InferenceLayer& layer : layers) {
    const ImageArgument features = block.slice(block.features, 0, layer.conv1.in);
    ImageArgument input = features;
    if (layer.conv1.out) {
      input = block.image(bottleneck, layer.conv1.out);
      Device::conv1x1_forward(context, features, layer.norm1, layer.conv1, input,
                              StatisticsResult{});
    }
    Device::conv3x3_forward(context, input, layer.norm2, layer.conv2,
                            block.slice(block.features, layer.conv1.in, layer.conv2.out),
                            StatisticsResult{});
  }
}

}  // namespace densenet_fast
