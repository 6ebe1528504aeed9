// The operators on CPU tensors.
#include <torch/csrc/stable/ops.h>

#include "device.h"

namespace densenet_fast::cpu {
namespace {

void stem_convolution_forward(const Tensor& images, const Tensor& w, const Tensor& out) {
  const Call<Device> call(images);
  const auto x = call.image(images, "images");
  const auto weight = call.weight(w, 7, x.c, x.dims);
  const auto y = call.mutable_image(out, "out", halved(x, true), weight.out);
  Device::stem_convolution_forward(call.context(), x, weight, y);
}

void stem_convolution_backward(const Tensor& grad_out, const Tensor& images, const Tensor& w,
                               const Tensor& grad_weight) {
  const Call<Device> call(grad_out);
  const auto x = call.image(images, "images");
  const auto weight = call.weight(w, 7, x.c, x.dims);
  const auto g = call.image(grad_out, "grad_out", halved(x, true), weight.out);
  Device::stem_convolution_backward(call.context(), g, x, weight,
                                    call.weight_gradient(grad_weight, w));
}

// Weights [out, in, 1, 1] and [out, in, 3, 3], or those of one or three dimensions, packed for
// images of this size, one behind another.
Tensor packed_weights(const Tensor& like, const std::vector<Tensor>& weights,
                      const std::vector<int64_t>& size) {
  const Call<Device> call(like);
  const int dims = static_cast<int>(size.size());
  STD_TORCH_CHECK(1 <= dims && dims <= 3, "`size` should be of one to three dimensions, got ",
                  dims);
  PackedWeights places(call.dtype(), dims > 1 ? size[dims - 2] : 1, size[dims - 1]);
  std::vector<WeightArgument> arguments;
  std::vector<int64_t> at;
  const auto spatial = [&](const Tensor& weight) {
    return weight.dim() == 2 + dims && weight.size(2) == 3;
  };
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() >= 2, "weight must be [out, in, 1, 1] or [out, in, 3, 3]");
    arguments.push_back(call.weight(weight, spatial(weight) ? 3 : 1, weight.size(1), dims));
    at.push_back(places.place(arguments.back(), spatial(weight)));
  }
  const int64_t elements[] = {places.size()};
  const auto type = call.dtype() == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor packed = torch::stable::empty({elements, 1}, type, std::nullopt, like.device());
  char* data = static_cast<char*>(packed.mutable_data_ptr());
  for (size_t i = 0; i < weights.size(); ++i) {
    places.pack(arguments[i], spatial(weights[i]), data + at[i] * vector_bytes(call.dtype()));
  }
  return packed;
}

// sizes: the input's channels, then width (0: no bottleneck) and growth of every layer;
// coefficients: scale and shift of norm1 and of norm2 of every layer, one behind another.
void dense_block_inference(const Tensor& features, const Tensor& bottleneck,
                           const Tensor& coefficients, const Tensor& packed,
                           const std::vector<int64_t>& sizes) {
  const Call<Device> call(features);
  Block block;
  block.dtype = call.dtype();
  block.features = call.mutable_image(features, "features");
  PackedWeights places(block.dtype, block.features.h, block.features.w);
  STD_TORCH_CHECK(sizes.size() % 2 == 1, "sizes must be those of an input and of layers");
  const void* weights = call.vector(packed, packed.numel(), "packed");
  const void* vectors = call.vector(coefficients, coefficients.numel(), "coefficients");
  std::vector<InferenceLayer> layers(sizes.size() / 2);
  int64_t channels = sizes[0], at = 0, widest = 0;
  const auto norm = [&](int64_t count) {
    NormArgument n;
    n.scale = block.vector(const_cast<void*>(vectors), at);
    n.shift = block.vector(const_cast<void*>(vectors), at + count);
    at += 2 * count;
    return n;
  };
  const auto weight = [&](int64_t out, int64_t in, bool spatial) {
    WeightArgument found;
    found.out = out;
    found.in = in;
    found.dims = block.features.dims;
    found.packed[0] = block.vector(const_cast<void*>(weights), places.place(found, spatial));
    return found;
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    const int64_t width = sizes[2 * i + 1], growth = sizes[2 * i + 2];
    STD_TORCH_CHECK(channels > 0 && width >= 0 && growth > 0, "a layer has channels");
    layers[i].conv1.in = channels;
    if (width > 0) {
      layers[i].norm1 = norm(channels);
      layers[i].conv1 = weight(width, channels, false);
    }
    layers[i].norm2 = norm(width > 0 ? width : channels);
    layers[i].conv2 = weight(growth, width > 0 ? width : channels, true);
    channels += growth;
    widest = std::max(widest, width);
  }
  STD_TORCH_CHECK(
      channels == block.features.c && at == coefficients.numel() && places.size() == packed.numel(),
      "coefficients and packed weights are those of other layers, or of another size");
  block_inference<Device>(call.context(), block,
                          call.mutable_matrix(bottleneck, block.rows() * widest, "bottleneck"),
                          layers);
}

}  // namespace
}  // namespace densenet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  densenet_fast::Operators<densenet_fast::cpu::Device>::add_to(m);
  m.impl("stem_convolution_forward", TORCH_BOX(&densenet_fast::cpu::stem_convolution_forward));
  m.impl("stem_convolution_backward", TORCH_BOX(&densenet_fast::cpu::stem_convolution_backward));
  m.impl("packed_weights", TORCH_BOX(&densenet_fast::cpu::packed_weights));
  m.impl("dense_block_inference_", TORCH_BOX(&densenet_fast::cpu::dense_block_inference));
}
