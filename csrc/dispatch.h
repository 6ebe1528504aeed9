// The operators of ops.cpp for one backend: tensors become arguments, the Device has the kernels.
#pragma once

#include <torch/csrc/stable/library.h>

#include "block_arguments.h"
#include "call.h"

namespace densenet_fast {

// Pixels behind a transition's pooling, and behind the stem's.
inline ImageArgument halved(ImageArgument x, bool up = false) {
  if (x.dims > 2) x.d = (x.d + up) / 2;
  if (x.dims > 1) x.h = (x.h + up) / 2;
  x.w = (x.w + up) / 2;
  return x;
}
inline ImageArgument max_pooled(const ImageArgument& x) { return halved(x, true); }

template <class Device>
struct Operators {
  static void channel_statistics(const Tensor& features, const Tensor& mean, const Tensor& var) {
    const Call<Device> call(features);
    const auto x = call.image(features, "features");
    Device::channel_statistics(call.context(), x, call.statistics(mean, var, x.c));
  }

  static void norm_coefficients(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                                const OptionalTensor& beta, double eps, const Tensor& scale,
                                const Tensor& shift, const Tensor& rstd) {
    const Call<Device> call(mean);
    const int64_t channels = mean.numel();
    const std::vector<NormCoefficients> norms{
        {channels, call.vector(mean, channels, "mean"), call.vector(var, channels, "var"),
         call.vector(gamma, channels, "weight"), call.vector(beta, channels, "bias"), eps,
         call.mutable_vector(scale, channels, "scale"),
         call.mutable_vector(shift, channels, "shift"),
         call.mutable_vector(rstd, channels, "rstd")}};
    Device::norm_coefficients(call.context(), norms);
  }

  static void conv1x1_backward(const Tensor& grad_norm, const Tensor& bottleneck,
                               const Tensor& coefficients, const Tensor& features,
                               const Tensor& scale, const Tensor& shift, const Tensor& mean,
                               const Tensor& rstd, const Tensor& w,
                               const OptionalTensor& grad_features,
                               const OptionalTensor& grad_gamma, const OptionalTensor& grad_beta,
                               const OptionalTensor& grad_weight, bool allow_tf32) {
    const Call<Device> call(features, allow_tf32);
    const auto x = call.image(features, "features");
    const auto weight = call.weight(w, 1, x.c, x.dims);
    const auto z = call.image(bottleneck, "bottleneck", x, weight.out);
    const auto g = call.image(grad_norm, "grad_norm", z, z.c);
    const auto gx = call.mutable_image(grad_features, "grad_features", x);
    Device::conv1x1_backward(
        call.context(), g, z, call.vector(coefficients, 3 * z.c, "coefficients"), x,
        call.norm(scale, shift, mean, rstd, x.c), weight, gx,
        call.norm_gradient(grad_gamma, grad_beta, grad_features.has_value(), x.c),
        call.weight_gradient(grad_weight, w));
  }

  // 1: of features, to a bottleneck; 3: of a bottleneck, to a growth.
  template <int kernel>
  static void conv_forward(const Tensor& input, const Tensor& scale, const Tensor& shift,
                           const Tensor& w, const Tensor& output, const OptionalTensor& mean,
                           const OptionalTensor& var, bool allow_tf32) {
    constexpr bool pointwise = kernel == 1;
    const Call<Device> call(input, allow_tf32);
    const auto x = call.image(input, pointwise ? "features" : "bottleneck");
    const auto weight = call.weight(w, kernel, x.c, x.dims);
    const auto y = call.mutable_image(output, pointwise ? "bottleneck" : "growth", x, weight.out);
    const auto norm = call.activation(scale, shift, x.c);
    const auto statistics = call.statistics(mean, var, weight.out);
    if constexpr (pointwise) {
      Device::conv1x1_forward(call.context(), x, norm, weight, y, statistics);
    } else {
      Device::conv3x3_forward(call.context(), x, norm, weight, y, statistics);
    }
  }

  static void conv3x3_backward(const Tensor& grad_growth, const Tensor& bottleneck,
                               const Tensor& scale, const Tensor& shift, const Tensor& mean,
                               const Tensor& rstd, const Tensor& w, const OptionalTensor& grad_norm,
                               const OptionalTensor& grad_gamma, const OptionalTensor& grad_beta,
                               const OptionalTensor& grad_weight, bool accumulate,
                               bool allow_tf32) {
    const Call<Device> call(bottleneck, allow_tf32);
    const auto z = call.image(bottleneck, "bottleneck");
    const auto weight = call.weight(w, 3, z.c, z.dims);
    const auto g = call.image(grad_growth, "grad_growth", z, weight.out);
    const auto out = call.mutable_image(grad_norm, "grad_norm", z);
    Device::conv3x3_backward(call.context(), g, z, call.norm(scale, shift, mean, rstd, z.c), weight,
                             out,
                             call.norm_gradient(grad_gamma, grad_beta, grad_norm.has_value(), z.c),
                             call.weight_gradient(grad_weight, w), accumulate);
  }

  static void dropout(const Tensor& growth, int64_t seed, double p, bool channels) {
    const Call<Device> call(growth);
    STD_TORCH_CHECK(0 <= p && p <= 1, "`p` should be between 0 and 1, got ", p);
    Device::dropout(call.context(), call.mutable_image(growth, "growth"),
                    static_cast<uint64_t>(seed), p, channels);
  }

  static void finish_gradient(const Tensor& features, const Tensor& grad_features,
                              const Tensor& mean, const Tensor& sum_grad, const Tensor& sum_grad_x,
                              const Tensor& out) {
    const Call<Device> call(features);
    const auto x = call.image(features, "features");
    const auto g = call.image(grad_features, "grad_features", x, x.c);
    const auto to = call.mutable_image(out, "out", x, x.c);
    Device::finish_gradient(call.context(), x, g, call.vector(mean, x.c, "mean"),
                            call.vector(sum_grad, x.c, "sum_grad"),
                            call.vector(sum_grad_x, x.c, "sum_grad_x"), to);
  }

  static void transition_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                                 const Tensor& w, const Tensor& out, const OptionalTensor& mean,
                                 const OptionalTensor& var, bool linear,
                                 const OptionalTensor& packed, bool allow_tf32) {
    const Call<Device> call(features, allow_tf32);
    const auto x = call.image(features, "features");
    auto act = call.activation(scale, shift, x.c);
    act.linear = linear;
    auto weight = call.weight(w, 1, x.c, x.dims);
    if (packed) weight.packed[0] = Device::packed_weight(call, *packed, weight);
    const auto to = call.mutable_image(out, "out", halved(x), weight.out);
    Device::transition_forward(call.context(), x, act, weight, to,
                               call.statistics(mean, var, to.c));
  }

  static void transition_backward(const Tensor& grad_out, const Tensor& features,
                                  const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                  const Tensor& rstd, const Tensor& w, const Tensor& grad_features,
                                  const Tensor& grad_gamma, const Tensor& grad_beta,
                                  const OptionalTensor& grad_weight, bool linear, bool allow_tf32) {
    const Call<Device> call(features, allow_tf32);
    const auto x = call.image(features, "features");
    auto norm = call.norm(scale, shift, mean, rstd, x.c);
    norm.linear = linear;
    const auto weight = call.weight(w, 1, x.c, x.dims);
    const auto g = call.image(grad_out, "grad_out", halved(x), weight.out);
    const auto gx = call.mutable_image(grad_features, "grad_features", x, x.c);
    Device::transition_backward(call.context(), g, x, norm, weight, gx,
                                call.norm_gradient(grad_gamma, grad_beta, true, x.c),
                                call.weight_gradient(grad_weight, w));
  }

  static void norm_relu_avgpool_forward(const Tensor& features, const Tensor& scale,
                                        const Tensor& shift, const Tensor& out) {
    const Call<Device> call(features);
    const auto x = call.image(features, "features");
    Device::norm_relu_avgpool_forward(call.context(), x, call.activation(scale, shift, x.c),
                                      call.mutable_matrix(out, x.n * x.c, "out"));
  }

  static void norm_relu_avgpool_backward(const Tensor& grad_out, const Tensor& features,
                                         const Tensor& scale, const Tensor& shift,
                                         const Tensor& mean, const Tensor& rstd,
                                         const Tensor& grad_features, const Tensor& grad_gamma,
                                         const Tensor& grad_beta) {
    const Call<Device> call(features);
    const auto x = call.image(features, "features");
    const auto gx = call.mutable_image(grad_features, "grad_features", x, x.c);
    Device::norm_relu_avgpool_backward(call.context(), call.matrix(grad_out, x.n * x.c, "grad_out"),
                                       x, call.norm(scale, shift, mean, rstd, x.c), gx,
                                       call.norm_gradient(grad_gamma, grad_beta, true, x.c));
  }

  static void norm_relu_maxpool_forward(const Tensor& input, const Tensor& scale,
                                        const Tensor& shift, const Tensor& out,
                                        const Tensor& argmax) {
    const Call<Device> call(input);
    const auto x = call.image(input, "input");
    const auto to = call.mutable_image(out, "out", max_pooled(x), x.c);
    check_argmax(call, argmax, to);
    Device::norm_relu_maxpool_forward(call.context(), x, call.activation(scale, shift, x.c), to,
                                      argmax.mutable_data_ptr<uint8_t>());
  }

  static void norm_relu_maxpool_backward(const Tensor& grad_out, const Tensor& argmax,
                                         const Tensor& input, const Tensor& scale,
                                         const Tensor& shift, const Tensor& mean,
                                         const Tensor& rstd, bool batch_statistics,
                                         const Tensor& grad_input, const Tensor& grad_gamma,
                                         const Tensor& grad_beta) {
    const Call<Device> call(input);
    const auto x = call.image(input, "input");
    const auto g = call.image(grad_out, "grad_out", max_pooled(x), x.c);
    const auto gx = call.mutable_image(grad_input, "grad_input", x, x.c);
    check_argmax(call, argmax, g);
    Device::norm_relu_maxpool_backward(call.context(), g, argmax.const_data_ptr<uint8_t>(), x,
                                       call.norm(scale, shift, mean, rstd, x.c), batch_statistics,
                                       gx, call.norm_gradient(grad_gamma, grad_beta, true, x.c));
  }

  static void dense_block_forward(const Tensor& features, const Tensor& statistics,
                                  const std::vector<Tensor>& bottlenecks, const Tensor& vectors,
                                  const std::vector<Tensor>& parameters,
                                  const std::vector<Tensor>& frozen,
                                  const std::vector<double>& numbers,
                                  const std::vector<int64_t>& seeds, int64_t reduced,
                                  bool recompute, int64_t first, int64_t last, bool allow_tf32) {
    const Call<Device> call(features, allow_tf32);
    Block block =
        described_block(call, call.mutable_image(features, "features"), statistics, bottlenecks,
                        vectors, parameters, frozen, numbers, seeds, reduced);
    block.recompute = recompute;
    check_halves(block, first, last);
    Device::in_one_piece(call.context(), [&](const auto& context) {
      block_forward<Device>(context, block, first, last);
    });
  }

  static void dense_block_backward(
      const Tensor& features, const Tensor& grad_features, const Tensor& statistics,
      const Tensor& sums, const std::vector<Tensor>& bottlenecks, const Tensor& grad_growth,
      const Tensor& grad_norm, const Tensor& vectors, const std::vector<Tensor>& parameters,
      const std::vector<Tensor>& frozen, const std::vector<Tensor>& gradients,
      const std::vector<double>& numbers, const std::vector<int64_t>& seeds, int64_t reduced,
      int64_t held, int64_t lowest, int64_t first, int64_t last, bool allow_tf32) {
    const Call<Device> call(features, allow_tf32);
    Block block = described_block(call, call.image(features, "features"), statistics, bottlenecks,
                                  vectors, parameters, frozen, numbers, seeds, reduced);
    block.held = held;
    block.lowest = lowest;
    describe_gradients(call, block, grad_features, sums, grad_growth, grad_norm, parameters,
                       gradients);
    check_halves(block, first, last);
    Device::in_one_piece(call.context(), [&](const auto& context) {
      block_backward<Device>(context, block, first, last);
    });
  }

  // Checks everything before it writes anything.
  static void update_running_statistics(const Tensor& statistics,
                                        const std::vector<Tensor>& running,
                                        const std::vector<Tensor>& counters,
                                        const std::vector<int64_t>& places,
                                        const std::vector<double>& momenta, int64_t count) {
    const Call<Device> call(statistics);
    const auto updates = described_updates(call, statistics, running, places, momenta, count);
    std::vector<int64_t*> counts;
    for (const Tensor& counter : counters) {
      STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long && counter.numel() == 1,
                      "a counter must be one int64");
      call.check_device(counter, "a counter");
      counts.push_back(static_cast<int64_t*>(counter.mutable_data_ptr()));
    }
    Device::update_running_statistics(call.context(), updates, counts);
  }

  static void check_argmax(const Call<Device>& call, const Tensor& t, const ImageArgument& pooled) {
    check_vector(t, ScalarType::Byte, pooled.rows() * pooled.c, "argmax");
    call.check_device(t, "argmax");
  }

  template <class Library>
  static void add_to(Library& m) {
    m.impl("channel_statistics", TORCH_BOX(&Operators::channel_statistics));
    m.impl("norm_coefficients", TORCH_BOX(&Operators::norm_coefficients));
    m.impl("conv1x1_forward", TORCH_BOX(&Operators::template conv_forward<1>));
    m.impl("conv1x1_backward", TORCH_BOX(&Operators::conv1x1_backward));
    m.impl("conv3x3_forward", TORCH_BOX(&Operators::template conv_forward<3>));
    m.impl("conv3x3_backward", TORCH_BOX(&Operators::conv3x3_backward));
    m.impl("dropout_", TORCH_BOX(&Operators::dropout));
    m.impl("finish_gradient", TORCH_BOX(&Operators::finish_gradient));
    m.impl("transition_forward", TORCH_BOX(&Operators::transition_forward));
    m.impl("transition_backward", TORCH_BOX(&Operators::transition_backward));
    m.impl("norm_relu_avgpool_forward", TORCH_BOX(&Operators::norm_relu_avgpool_forward));
    m.impl("norm_relu_avgpool_backward", TORCH_BOX(&Operators::norm_relu_avgpool_backward));
    m.impl("norm_relu_maxpool_forward", TORCH_BOX(&Operators::norm_relu_maxpool_forward));
    m.impl("norm_relu_maxpool_backward", TORCH_BOX(&Operators::norm_relu_maxpool_backward));
    m.impl("dense_block_forward_", TORCH_BOX(&Operators::dense_block_forward));
    m.impl("dense_block_backward_", TORCH_BOX(&Operators::dense_block_backward));
    m.impl("update_running_statistics_", TORCH_BOX(&Operators::update_running_statistics));
  }
};

}  // namespace densenet_fast
