// Schemas of every operator, and nothing else. The mathematics is in densenet_fast/reference.py.
//
// All activations are NHWC: `[N, H, W, C]`, channels innermost, rows of pixels `pitch >= C` apart,
// so that a channel slice of the feature buffer is an ordinary argument. Operators write into
// tensors their caller owns; they allocate no outputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

STABLE_TORCH_LIBRARY(densenet_fast, m) {
  m.def("channel_statistics(Tensor features, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "norm_coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor(a!) scale, Tensor(b!) shift, Tensor(c!) rstd) -> ()");
  m.def(
      "update_running_statistics(Tensor mean, Tensor var, int count, float momentum, "
      "Tensor(a!) running_mean, Tensor(b!) running_var) -> ()");
  m.def(
      "norm_grad_coefficients(Tensor scale, Tensor mean, Tensor rstd, Tensor grad_gamma, "
      "Tensor grad_beta, int count, Tensor(a!) coefficients) -> ()");

  m.def(
      "conv1x1_forward(Tensor features, Tensor scale, Tensor shift, Tensor weight, "
      "Tensor(a!) bottleneck, Tensor(b!)? mean, Tensor(c!)? var) -> ()");
  m.def(
      "conv1x1_backward(Tensor grad_norm, Tensor bottleneck, Tensor coefficients, Tensor features, "
      "Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensor weight, "
      "Tensor(a!)? grad_features, Tensor(b!)? grad_gamma, Tensor(c!)? grad_beta, "
      "Tensor(d!)? grad_weight) -> ()");

  m.def(
      "conv3x3_forward(Tensor bottleneck, Tensor scale, Tensor shift, Tensor weight, "
      "Tensor(a!) growth, Tensor(b!)? mean, Tensor(c!)? var) -> ()");
  m.def(
      "conv3x3_backward(Tensor grad_growth, Tensor bottleneck, Tensor scale, Tensor shift, "
      "Tensor mean, Tensor rstd, Tensor weight, Tensor(a!)? grad_norm, Tensor(b!)? grad_gamma, "
      "Tensor(c!)? grad_beta, Tensor(d!)? grad_weight) -> ()");
  m.def("dropout_(Tensor(a!) growth, int seed, float p) -> ()");
  m.def(
      "finish_gradient(Tensor features, Tensor grad_features, Tensor mean, Tensor sum_grad, "
      "Tensor sum_grad_x, Tensor(a!) out) -> ()");

  m.def(
      "transition_forward(Tensor features, Tensor scale, Tensor shift, Tensor weight, "
      "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? var) -> ()");
  m.def(
      "transition_backward(Tensor grad_out, Tensor features, Tensor scale, Tensor shift, "
      "Tensor mean, Tensor rstd, Tensor weight, Tensor(a!) grad_features, Tensor(b!) grad_gamma, "
      "Tensor(c!) grad_beta, Tensor(d!)? grad_weight) -> ()");

  m.def(
      "norm_relu_avgpool_forward(Tensor features, Tensor scale, Tensor shift, Tensor(a!) out) -> "
      "()");
  m.def(
      "norm_relu_avgpool_backward(Tensor grad_out, Tensor features, Tensor scale, Tensor shift, "
      "Tensor mean, Tensor rstd, Tensor(a!) grad_features, Tensor(b!) grad_gamma, "
      "Tensor(c!) grad_beta) -> ()");
  m.def(
      "norm_relu_maxpool_forward(Tensor input, Tensor scale, Tensor shift, Tensor(a!) out, "
      "Tensor(b!) argmax) -> ()");
  m.def(
      "norm_relu_maxpool_backward(Tensor grad_out, Tensor argmax, Tensor input, Tensor scale, "
      "Tensor shift, Tensor mean, Tensor rstd, bool batch_statistics, Tensor(a!) grad_input, "
      "Tensor(b!) grad_gamma, Tensor(c!) grad_beta) -> ()");
}
