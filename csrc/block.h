// A dense block's loop over its layers, one for both backends. The unit is the half-layer, at whose
// ends ranks may have to exchange statistics: 2 l is norm1 and the 1x1 convolution of layer l,
// 2 l + 1 norm2 and its 3x3 convolution. The definition is densenet_fast/reference_block.py.
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
  uint64_t seed = 0;
  // Of the backward.
  NormGradientResult grad_norm1, grad_norm2;
  WeightGradient grad_conv1, grad_conv2;
};

struct Block {
  Dtype dtype;
  std::vector<BlockLayer> layers;
  ImageArgument features;
  void* mean = nullptr;     // of the features
  void* vectors = nullptr;  // room for coefficients: see `Coefficients`
  bool recompute = false;   // nothing is reduced: the statistics are there
  // Of the backward.
  ImageArgument grad_features;
  void* grad_growth = nullptr;  // scratch for images
  void* grad_norm = nullptr;
  void* sum_grad = nullptr;  // [C]: the deferred sums
  void* sum_grad_x = nullptr;
  void* norm2_sums = nullptr;  // [2, B]: norm2's, where they have been exchanged; else null
  int64_t held = 0;            // last layers whose bottleneck is there
  int64_t lowest = 0;          // layer below which no gradient is wanted; -1: the input's is

  int64_t rows() const { return features.n * features.h * features.w; }
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
  // Scratch as an image of the features' pixels.
  ImageArgument image(void* data, int64_t channels) const {
    return {data, features.n, features.h, features.w, channels, channels};
  }
};

// Elements of `Block::vectors`.
inline int64_t vectors_needed(int64_t channels, int64_t widest) {
  return 3 * channels + 6 * widest;
}

// The norms of the layer at work as the kernels read them, each made once.
template <class Device>
class Coefficients {
 public:
  Coefficients(const typename Device::Context& context, const Block& block)
      : context_(context), block_(block) {}

  NormArgument norm1(const BlockLayer& layer) {
    return get(norm1_, layer, layer.norm1, block_.vectors, layer.start);
  }
  NormArgument norm2(const BlockLayer& layer) {
    return get(norm2_, layer, layer.norm2, at_norm2(), layer.conv1.out);
  }
  // Room for norm2's gradient as an affine map, [3, B].
  void* gradient() const { return block_.vector(at_norm2(), 3 * block_.widest()); }

 private:
  struct Made {
    const BlockLayer* layer = nullptr;
    NormArgument norm;
  };

  void* at_norm2() const { return block_.vector(block_.vectors, 3 * block_.features.c); }

  NormArgument get(Made& made, const BlockLayer& layer, const BlockNorm& norm, void* room,
                   int64_t channels) {
    if (made.layer != &layer) {
      void* shift = block_.vector(room, channels);
      void* rstd = block_.vector(room, 2 * channels);
      Device::norm_coefficients(context_, channels, norm.mean, norm.var, norm.weight, norm.bias,
                                norm.eps, room, shift, rstd);
      made = {&layer, {room, shift, norm.mean, rstd}};
    }
    return made.norm;
  }

  const typename Device::Context& context_;
  const Block& block_;
  Made norm1_, norm2_;
};

// Half-layers [first, last), upwards.
template <class Device>
void block_forward(const typename Device::Context& context, const Block& block, int64_t first,
                   int64_t last) {
  Coefficients<Device> coefficients(context, block);
  for (int64_t half = first; half < last; ++half) {
    const BlockLayer& layer = block.layers[half / 2];
    if (half % 2 == 0) {
      const bool reduce = !block.recompute && !layer.norm2.frozen;
      Device::conv1x1_forward(
          context, block.slice(block.features, 0, layer.start), coefficients.norm1(layer),
          layer.conv1, layer.bottleneck,
          reduce ? StatisticsResult{layer.norm2.mean, layer.norm2.var} : StatisticsResult{});
      continue;
    }
    const ImageArgument growth = block.slice(block.features, layer.start, layer.conv2.out);
    const StatisticsResult wanted = block.recompute ? StatisticsResult{} : layer.growth;
    Device::conv3x3_forward(context, layer.bottleneck, coefficients.norm2(layer), layer.conv2,
                            growth, layer.dropout > 0 ? StatisticsResult{} : wanted);
    if (layer.dropout > 0) {
      Device::dropout(context, growth, layer.seed, layer.dropout);
      if (wanted.mean) Device::channel_statistics(context, growth, wanted);
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
  if (layer.dropout > 0) Device::dropout(context, gradient, layer.seed, layer.dropout);
  return gradient;
}

// Half-layers [first, last), downwards. Below `Block::lowest` there is nothing to do.
template <class Device>
void block_backward(const typename Device::Context& context, const Block& block, int64_t first,
                    int64_t last) {
  Coefficients<Device> coefficients(context, block);
  const int64_t count = static_cast<int64_t>(block.layers.size());
  for (int64_t half = last; half-- > std::max(first, 2 * block.lowest);) {
    const int64_t index = half / 2;
    const BlockLayer& layer = block.layers[index];
    const bool features_needed = block.lowest < index;
    const bool conv1_needed = features_needed || layer.grad_norm1.beta || layer.grad_conv1.data;
    const ImageArgument prefix = block.slice(block.features, 0, layer.start);
    const ImageArgument grad_norm = block.image(block.grad_norm, layer.conv1.out);
    if (half % 2 == 1) {
      if (index < count - block.held) {
        Device::conv1x1_forward(context, prefix, coefficients.norm1(layer), layer.conv1,
                                layer.bottleneck, StatisticsResult{});
      }
      Device::conv3x3_backward(context, growth_gradient<Device>(context, block, layer),
                               layer.bottleneck, coefficients.norm2(layer), layer.conv2,
                               conv1_needed ? grad_norm : ImageArgument{}, layer.grad_norm2,
                               layer.grad_conv2);
      continue;
    }
    if (!conv1_needed) continue;
    NormGradientResult sums = layer.grad_norm2;
    if (block.norm2_sums)
      sums = {block.norm2_sums, block.vector(block.norm2_sums, layer.conv1.out)};
    if (layer.norm2.frozen) sums = {};
    const NormArgument norm1 = coefficients.norm1(layer);
    Device::norm_grad_coefficients(context, layer.conv1.out, coefficients.norm2(layer), sums,
                                   block.rows(), coefficients.gradient());
    Device::conv1x1_backward(
        context, grad_norm, layer.bottleneck, coefficients.gradient(), prefix, norm1, layer.conv1,
        features_needed ? block.slice(block.grad_features, 0, layer.start) : ImageArgument{},
        layer.grad_norm1, layer.grad_conv1);
    if (features_needed && !layer.norm1.frozen) {
      Device::defer_correction(context, layer.start, norm1, layer.grad_norm1, block.sum_grad,
                               block.sum_grad_x);
    }
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
    const ImageArgument narrow = block.image(bottleneck, layer.conv1.out);
    Device::conv1x1_forward(context, block.slice(block.features, 0, layer.conv1.in), layer.norm1,
                            layer.conv1, narrow, StatisticsResult{});
    Device::conv3x3_forward(context, narrow, layer.norm2, layer.conv2,
                            block.slice(block.features, layer.conv1.in, layer.conv2.out),
                            StatisticsResult{});
  }
}

}  // namespace densenet_fast
