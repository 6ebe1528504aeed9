// The operators of ops.cpp for one backend: tensors become arguments, the Device has the kernels.
#pragma once

#include <torch/csrc/stable/library.h>

#include "block_arguments.h"
#include "call.h"

namespace densenet_fast {

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

  static void conv1x1_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                              const Tensor& w, const Tensor& bottleneck, const OptionalTensor& mean,
                              const OptionalTensor& var, bool allow_tf32) {
    const Call<Device> call(features, allow_tf32);
    const auto x = call.image(features, "features");
    const auto z = call.mutable_image(bottleneck, "bottleneck");
    const auto weight = call.weight(w, 1, x.c);
    check_same_pixels(x, z);
    check_channels(z, weight.out, "bottleneck");
    Device::conv1x1_forward(call.context(), x, call.activation(scale, shift, x.c), weight, z,
                            call.statistics(mean, var, z.c));
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
    const auto z = call.image(bottleneck, "bottleneck");
    const auto g = call.image(grad_norm, "grad_norm");
    const auto weight = call.weight(w, 1, x.c);
    ImageArgument gx;
    if (grad_features) {
      gx = call.mutable_image(*grad_features, "grad_features");
      check_same_shape(gx, x, "grad_features");
    }
    check_same_pixels(x, z);
    check_same_shape(g, z, "grad_norm");
    check_channels(z, weight.out, "bottleneck");
    Device::conv1x1_backward(
        call.context(), g, z, call.vector(coefficients, 3 * z.c, "coefficients"), x,
        call.norm(scale, shift, mean, rstd, x.c), weight, gx,
        call.norm_gradient(grad_gamma, grad_beta, grad_features.has_value(), x.c),
        call.weight_gradient(grad_weight, w));
  }

  static void conv3x3_forward(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                              const Tensor& w, const Tensor& growth, const OptionalTensor& mean,
                              const OptionalTensor& var, bool allow_tf32) {
    const Call<Device> call(bottleneck, allow_tf32);
    const auto z = call.image(bottleneck, "bottleneck");
    const auto y = call.mutable_image(growth, "growth");
    const auto weight = call.weight(w, 3, z.c);
    check_same_pixels(z, y);
    check_channels(y, weight.out, "growth");
    Device::conv3x3_forward(call.context(), z, call.activation(scale, shift, z.c), weight, y,
                            call.statistics(mean, var, y.c));
  }

  static void conv3x3_backward(const Tensor& grad_growth, const Tensor& bottleneck,
                               const Tensor& scale, const Tensor& shift, const Tensor& mean,
                               const Tensor& rstd, const Tensor& w, const OptionalTensor& grad_norm,
                               const OptionalTensor& grad_gamma, const OptionalTensor& grad_beta,
                               const OptionalTensor& grad_weight, bool allow_tf32) {
    const Call<Device> call(bottleneck, allow_tf32);
    const auto g = call.image(grad_growth, "grad_growth");
    const auto z = call.image(bottleneck, "bottleneck");
    const auto weight = call.weight(w, 3, z.c);
    ImageArgument out;
    if (grad_norm) {
      out = call.mutable_image(*grad_norm, "grad_norm");
      check_same_shape(out, z, "grad_norm");
    }
    check_same_pixels(z, g);
    check_channels(g, weight.out, "grad_growth");
    Device::conv3x3_backward(call.context(), g, z, call.norm(scale, shift, mean, rstd, z.c), weight,
                             out,
                             call.norm_gradient(grad_gamma, grad_beta, grad_norm.has_value(), z.c),
                             call.weight_gradient(grad_weight, w));
  }

  static void dropout(const Tensor& growth, int64_t seed, double p) {
    const Call<Device> call(growth);
    Device::dropout(call.context(), call.mutable_image(growth, "growth"),
                    static_cast<uint64_t>(seed), p);
  }

  static void finish_gradient(const Tensor& features, const Tensor& grad_features,
                              const Tensor& mean, const Tensor& sum_grad, const Tensor& sum_grad_x,
                              const Tensor& out) {
    const Call<Device> call(features);
    const auto x = call.image(features, "features");
    const auto g = call.image(grad_features, "grad_features");
    const auto to = call.mutable_image(out, "out");
    check_same_shape(g, x, "grad_features");
    check_same_shape(to, x, "out");
    Device::finish_gradient(call.context(), x, g, call.vector(mean, x.c, "mean"),
                            call.vector(sum_grad, x.c, "sum_grad"),
                            call.vector(sum_grad_x, x.c, "sum_grad_x"), to);
  }

  static void transition_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                                 const Tensor& w, const Tensor& out, const OptionalTensor& mean,
                                 const OptionalTensor& var, bool allow_tf32) {
    const Call<Device> call(features, allow_tf32);
    const auto x = call.image(features, "features");
    const auto to = call.mutable_image(out, "out");
    const auto weight = call.weight(w, 1, x.c);
    check_pooled(x, to);
    check_channels(to, weight.out, "out");
    Device::transition_forward(call.context(), x, call.activation(scale, shift, x.c), weight, to,
                               call.statistics(mean, var, to.c));
  }

  static void transition_backward(const Tensor& grad_out, const Tensor& features,
                                  const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                  const Tensor& rstd, const Tensor& w, const Tensor& grad_features,
                                  const Tensor& grad_gamma, const Tensor& grad_beta,
                                  const OptionalTensor& grad_weight, bool allow_tf32) {
    const Call<Device> call(features, allow_tf32);
    const auto g = call.image(grad_out, "grad_out");
    const auto x = call.image(features, "features");
    const auto gx = call.mutable_image(grad_features, "grad_features");
    const auto weight = call.weight(w, 1, x.c);
    check_pooled(x, g);
    check_same_shape(gx, x, "grad_features");
    check_channels(g, weight.out, "grad_out");
    Device::transition_backward(call.context(), g, x, call.norm(scale, shift, mean, rstd, x.c),
                                weight, gx, call.norm_gradient(grad_gamma, grad_beta, true, x.c),
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
    const auto gx = call.mutable_image(grad_features, "grad_features");
    check_same_shape(gx, x, "grad_features");
    Device::norm_relu_avgpool_backward(call.context(), call.matrix(grad_out, x.n * x.c, "grad_out"),
                                       x, call.norm(scale, shift, mean, rstd, x.c), gx,
                                       call.norm_gradient(grad_gamma, grad_beta, true, x.c));
  }

  static void norm_relu_maxpool_forward(const Tensor& input, const Tensor& scale,
                                        const Tensor& shift, const Tensor& out,
                                        const Tensor& argmax) {
    const Call<Device> call(input);
    const auto x = call.image(input, "input");
    const auto to = call.mutable_image(out, "out");
    check_max_pooled(x, to, argmax);
    call.check_device(argmax, "argmax");
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
    const auto g = call.image(grad_out, "grad_out");
    const auto x = call.image(input, "input");
    const auto gx = call.mutable_image(grad_input, "grad_input");
    check_max_pooled(x, g, argmax);
    check_same_shape(gx, x, "grad_input");
    call.check_device(argmax, "argmax");
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

  template <class Library>
  static void add_to(Library& m) {
    m.impl("channel_statistics", TORCH_BOX(&Operators::channel_statistics));
    m.impl("norm_coefficients", TORCH_BOX(&Operators::norm_coefficients));
    m.impl("conv1x1_forward", TORCH_BOX(&Operators::conv1x1_forward));
    m.impl("conv1x1_backward", TORCH_BOX(&Operators::conv1x1_backward));
    m.impl("conv3x3_forward", TORCH_BOX(&Operators::conv3x3_forward));
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
