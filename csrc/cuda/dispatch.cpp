// The operators on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "call.h"

namespace densenet_fast::cuda {
namespace {

void channel_statistics_op(const Tensor& features, const Tensor& mean, const Tensor& var) {
  const Call call(features);
  const auto x = call.image(features, "features");
  channel_statistics(call.context(), x, call.statistics(mean, var, x.c));
}

void norm_coefficients_op(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                          const OptionalTensor& beta, double eps, const Tensor& scale,
                          const Tensor& shift, const Tensor& rstd) {
  const Call call(mean);
  const int64_t channels = mean.numel();
  norm_coefficients(
      call.context(), channels, call.vector(mean, channels, "mean"),
      call.vector(var, channels, "var"), call.vector(gamma, channels, "weight"),
      call.vector(beta, channels, "bias"), eps, call.mutable_vector(scale, channels, "scale"),
      call.mutable_vector(shift, channels, "shift"), call.mutable_vector(rstd, channels, "rstd"));
}

void update_running_statistics_op(const Tensor& mean, const Tensor& var, int64_t count,
                                  double momentum, const Tensor& running_mean,
                                  const Tensor& running_var) {
  const Call call(mean);
  const int64_t channels = mean.numel();
  check_count(count);
  update_running_statistics(call.context(), channels, call.vector(mean, channels, "mean"),
                            call.vector(var, channels, "var"), count, momentum,
                            call.mutable_vector(running_mean, channels, "running_mean"),
                            call.mutable_vector(running_var, channels, "running_var"));
}

void norm_grad_coefficients_op(const Tensor& scale, const Tensor& mean, const Tensor& rstd,
                               const Tensor& grad_gamma, const Tensor& grad_beta, int64_t count,
                               const Tensor& coefficients) {
  const Call call(scale);
  const int64_t channels = scale.numel();
  NormArgument norm;
  norm.scale = call.vector(scale, channels, "scale");
  norm.mean = call.vector(mean, channels, "mean");
  norm.rstd = call.vector(rstd, channels, "rstd");
  // Read here, and written by nobody.
  const NormGradientResult sums{const_cast<void*>(call.vector(grad_gamma, channels, "grad_gamma")),
                                const_cast<void*>(call.vector(grad_beta, channels, "grad_beta"))};
  norm_grad_coefficients(call.context(), channels, norm, sums, count,
                         call.mutable_vector(coefficients, 3 * channels, "coefficients"));
}

void conv1x1_forward_op(const Tensor& features, const Tensor& scale, const Tensor& shift,
                        const Tensor& w, const Tensor& bottleneck, const OptionalTensor& mean,
                        const OptionalTensor& var) {
  const Call call(features);
  const auto x = call.image(features, "features");
  const auto z = call.mutable_image(bottleneck, "bottleneck");
  const auto weight = call.weight(w, 2, x.c);
  check_same_pixels(x, z);
  check_channels(z, weight.out, "bottleneck");
  conv1x1_forward(call.context(), x, call.activation(scale, shift, x.c), weight, z,
                  call.statistics(mean, var, z.c));
}

void conv1x1_backward_op(const Tensor& grad_norm, const Tensor& bottleneck,
                         const Tensor& coefficients, const Tensor& features, const Tensor& scale,
                         const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                         const Tensor& w, const OptionalTensor& grad_features,
                         const OptionalTensor& grad_gamma, const OptionalTensor& grad_beta,
                         const OptionalTensor& grad_weight) {
  const Call call(features);
  const auto x = call.image(features, "features");
  const auto z = call.image(bottleneck, "bottleneck");
  const auto g = call.image(grad_norm, "grad_norm");
  const auto weight = call.weight(w, 2, x.c);
  ImageArgument gx;
  if (grad_features) {
    gx = call.mutable_image(*grad_features, "grad_features");
    check_same_shape(gx, x, "grad_features");
  }
  check_same_pixels(x, z);
  check_same_shape(g, z, "grad_norm");
  check_channels(z, weight.out, "bottleneck");
  conv1x1_backward(call.context(), g, z, call.vector(coefficients, 3 * z.c, "coefficients"), x,
                   call.norm(scale, shift, mean, rstd, x.c), weight, gx,
                   call.norm_gradient(grad_gamma, grad_beta, grad_features.has_value(), x.c),
                   call.weight_gradient(grad_weight, w));
}

void conv3x3_forward_op(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                        const Tensor& w, const Tensor& growth, const OptionalTensor& mean,
                        const OptionalTensor& var) {
  const Call call(bottleneck);
  const auto z = call.image(bottleneck, "bottleneck");
  const auto y = call.mutable_image(growth, "growth");
  const auto weight = call.weight(w, 4, z.c);
  check_same_pixels(z, y);
  check_channels(y, weight.out, "growth");
  conv3x3_forward(call.context(), z, call.activation(scale, shift, z.c), weight, y,
                  call.statistics(mean, var, y.c));
}

void conv3x3_backward_op(const Tensor& grad_growth, const Tensor& bottleneck, const Tensor& scale,
                         const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                         const Tensor& w, const OptionalTensor& grad_norm,
                         const OptionalTensor& grad_gamma, const OptionalTensor& grad_beta,
                         const OptionalTensor& grad_weight) {
  const Call call(bottleneck);
  const auto g = call.image(grad_growth, "grad_growth");
  const auto z = call.image(bottleneck, "bottleneck");
  const auto weight = call.weight(w, 4, z.c);
  ImageArgument out;
  if (grad_norm) {
    out = call.mutable_image(*grad_norm, "grad_norm");
    check_same_shape(out, z, "grad_norm");
  }
  check_same_pixels(z, g);
  check_channels(g, weight.out, "grad_growth");
  conv3x3_backward(call.context(), g, z, call.norm(scale, shift, mean, rstd, z.c), weight, out,
                   call.norm_gradient(grad_gamma, grad_beta, grad_norm.has_value(), z.c),
                   call.weight_gradient(grad_weight, w));
}

void dropout_op(const Tensor& growth, int64_t seed, double p) {
  const Call call(growth);
  dropout(call.context(), call.mutable_image(growth, "growth"), static_cast<uint64_t>(seed), p);
}

void finish_gradient_op(const Tensor& features, const Tensor& grad_features, const Tensor& mean,
                        const Tensor& sum_grad, const Tensor& sum_grad_x, const Tensor& out) {
  const Call call(features);
  const auto x = call.image(features, "features");
  const auto g = call.image(grad_features, "grad_features");
  const auto to = call.mutable_image(out, "out");
  check_same_shape(g, x, "grad_features");
  check_same_shape(to, x, "out");
  finish_gradient(call.context(), x, g, call.vector(mean, x.c, "mean"),
                  call.vector(sum_grad, x.c, "sum_grad"),
                  call.vector(sum_grad_x, x.c, "sum_grad_x"), to);
}

void transition_forward_op(const Tensor& features, const Tensor& scale, const Tensor& shift,
                           const Tensor& w, const Tensor& out, const OptionalTensor& mean,
                           const OptionalTensor& var) {
  const Call call(features);
  const auto x = call.image(features, "features");
  const auto to = call.mutable_image(out, "out");
  const auto weight = call.weight(w, 2, x.c);
  check_pooled(x, to);
  check_channels(to, weight.out, "out");
  transition_forward(call.context(), x, call.activation(scale, shift, x.c), weight, to,
                     call.statistics(mean, var, to.c));
}

void transition_backward_op(const Tensor& grad_out, const Tensor& features, const Tensor& scale,
                            const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                            const Tensor& w, const Tensor& grad_features, const Tensor& grad_gamma,
                            const Tensor& grad_beta, const OptionalTensor& grad_weight) {
  const Call call(features);
  const auto g = call.image(grad_out, "grad_out");
  const auto x = call.image(features, "features");
  const auto gx = call.mutable_image(grad_features, "grad_features");
  const auto weight = call.weight(w, 2, x.c);
  check_pooled(x, g);
  check_same_shape(gx, x, "grad_features");
  check_channels(g, weight.out, "grad_out");
  transition_backward(call.context(), g, x, call.norm(scale, shift, mean, rstd, x.c), weight, gx,
                      call.norm_gradient(grad_gamma, grad_beta, true, x.c),
                      call.weight_gradient(grad_weight, w));
}

void norm_relu_avgpool_forward_op(const Tensor& features, const Tensor& scale, const Tensor& shift,
                                  const Tensor& out) {
  const Call call(features);
  const auto x = call.image(features, "features");
  norm_relu_avgpool_forward(call.context(), x, call.activation(scale, shift, x.c),
                            call.mutable_matrix(out, x.n * x.c, "out"));
}

void norm_relu_avgpool_backward_op(const Tensor& grad_out, const Tensor& features,
                                   const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                   const Tensor& rstd, const Tensor& grad_features,
                                   const Tensor& grad_gamma, const Tensor& grad_beta) {
  const Call call(features);
  const auto x = call.image(features, "features");
  const auto gx = call.mutable_image(grad_features, "grad_features");
  check_same_shape(gx, x, "grad_features");
  norm_relu_avgpool_backward(call.context(), call.matrix(grad_out, x.n * x.c, "grad_out"), x,
                             call.norm(scale, shift, mean, rstd, x.c), gx,
                             call.norm_gradient(grad_gamma, grad_beta, true, x.c));
}

void norm_relu_maxpool_forward_op(const Tensor& input, const Tensor& scale, const Tensor& shift,
                                  const Tensor& out, const Tensor& argmax) {
  const Call call(input);
  const auto x = call.image(input, "input");
  const auto to = call.mutable_image(out, "out");
  check_max_pooled(x, to, argmax);
  call.check_device(argmax, "argmax");
  norm_relu_maxpool_forward(call.context(), x, call.activation(scale, shift, x.c), to,
                            argmax.mutable_data_ptr<uint8_t>());
}

void norm_relu_maxpool_backward_op(const Tensor& grad_out, const Tensor& argmax,
                                   const Tensor& input, const Tensor& scale, const Tensor& shift,
                                   const Tensor& mean, const Tensor& rstd, bool batch_statistics,
                                   const Tensor& grad_input, const Tensor& grad_gamma,
                                   const Tensor& grad_beta) {
  const Call call(input);
  const auto g = call.image(grad_out, "grad_out");
  const auto x = call.image(input, "input");
  const auto gx = call.mutable_image(grad_input, "grad_input");
  check_max_pooled(x, g, argmax);
  check_same_shape(gx, x, "grad_input");
  call.check_device(argmax, "argmax");
  norm_relu_maxpool_backward(call.context(), g, argmax.const_data_ptr<uint8_t>(), x,
                             call.norm(scale, shift, mean, rstd, x.c), batch_statistics, gx,
                             call.norm_gradient(grad_gamma, grad_beta, true, x.c));
}

thread_local bool tf32_allowed = false;
thread_local std::string failed_allocation;

}  // namespace

bool allow_tf32() { return tf32_allowed; }
void set_allow_tf32(bool allow) { tf32_allowed = allow; }
void set_failed_allocation(std::string what) { failed_allocation = std::move(what); }
std::string take_failed_allocation() { return std::exchange(failed_allocation, std::string()); }

}  // namespace densenet_fast::cuda

#ifndef DENSENET_FAST_CUDA_KEY
#define DENSENET_FAST_CUDA_KEY CUDA  // the emulator's tests run the same dispatch on CPU tensors
#endif

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, DENSENET_FAST_CUDA_KEY, m) {
  namespace cuda = densenet_fast::cuda;
  m.impl("channel_statistics", TORCH_BOX(&cuda::channel_statistics_op));
  m.impl("norm_coefficients", TORCH_BOX(&cuda::norm_coefficients_op));
  m.impl("update_running_statistics", TORCH_BOX(&cuda::update_running_statistics_op));
  m.impl("norm_grad_coefficients", TORCH_BOX(&cuda::norm_grad_coefficients_op));
  m.impl("conv1x1_forward", TORCH_BOX(&cuda::conv1x1_forward_op));
  m.impl("conv1x1_backward", TORCH_BOX(&cuda::conv1x1_backward_op));
  m.impl("conv3x3_forward", TORCH_BOX(&cuda::conv3x3_forward_op));
  m.impl("conv3x3_backward", TORCH_BOX(&cuda::conv3x3_backward_op));
  m.impl("dropout_", TORCH_BOX(&cuda::dropout_op));
  m.impl("finish_gradient", TORCH_BOX(&cuda::finish_gradient_op));
  m.impl("transition_forward", TORCH_BOX(&cuda::transition_forward_op));
  m.impl("transition_backward", TORCH_BOX(&cuda::transition_backward_op));
  m.impl("norm_relu_avgpool_forward", TORCH_BOX(&cuda::norm_relu_avgpool_forward_op));
  m.impl("norm_relu_avgpool_backward", TORCH_BOX(&cuda::norm_relu_avgpool_backward_op));
  m.impl("norm_relu_maxpool_forward", TORCH_BOX(&cuda::norm_relu_maxpool_forward_op));
  m.impl("norm_relu_maxpool_backward", TORCH_BOX(&cuda::norm_relu_maxpool_backward_op));
}
