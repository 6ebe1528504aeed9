// Schemas of every operator, and nothing else. The mathematics is in
// densenet_fast/operators/reference.py.
//
// All activations have their channels innermost, `[N, H, W, C]`, or `[N, W, C]` and `[N, D, H, W,
// C]`, rows of pixels `pitch >= C` apart, so that a channel slice of the feature buffer is an
// ordinary argument. Operators write into tensors their caller owns; they allocate no outputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

STABLE_TORCH_LIBRARY(densenet_fast, m) {
  m.def("channel_statistics(Tensor features, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "norm_coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor(a!) scale, Tensor(b!) shift, Tensor(c!) rstd) -> ()");
  m.def(
      "update_running_statistics_(Tensor statistics, Tensor(a!)[] running, Tensor(b!)[] counters, "
      "int[] places, float[] momenta, int count) -> ()");

  m.def(
      "conv1x1_forward(Tensor features, Tensor scale, Tensor shift, Tensor weight, "
      "Tensor(a!) bottleneck, Tensor(b!)? mean, Tensor(c!)? var, bool allow_tf32=False) -> ()");
  m.def(
      "conv1x1_backward(Tensor grad_norm, Tensor bottleneck, Tensor coefficients, Tensor features, "
      "Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensor weight, "
      "Tensor(a!)? grad_features, Tensor(b!)? grad_gamma, Tensor(c!)? grad_beta, "
      "Tensor(d!)? grad_weight, bool allow_tf32=False) -> ()");

  m.def(
      "conv3x3_forward(Tensor bottleneck, Tensor scale, Tensor shift, Tensor weight, "
      "Tensor(a!) growth, Tensor(b!)? mean, Tensor(c!)? var, bool allow_tf32=False) -> ()");
  m.def(
      "conv3x3_backward(Tensor grad_growth, Tensor bottleneck, Tensor scale, Tensor shift, "
      "Tensor mean, Tensor rstd, Tensor weight, Tensor(a!)? grad_norm, Tensor(b!)? grad_gamma, "
      "Tensor(c!)? grad_beta, Tensor(d!)? grad_weight, bool accumulate=False, "
      "bool allow_tf32=False) -> ()");
  m.def("dropout_(Tensor(a!) growth, int seed, float p, bool channels=False) -> ()");
  m.def(
      "finish_gradient(Tensor features, Tensor grad_features, Tensor mean, Tensor sum_grad, "
      "Tensor sum_grad_x, Tensor(a!) out) -> ()");

  m.def(
      "transition_forward(Tensor features, Tensor scale, Tensor shift, Tensor weight, "
      "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? var, bool linear=False, "
      "Tensor? packed=None, bool allow_tf32=False) -> ()");
  m.def(
      "transition_backward(Tensor grad_out, Tensor features, Tensor scale, Tensor shift, "
      "Tensor mean, Tensor rstd, Tensor weight, Tensor(a!) grad_features, Tensor(b!) grad_gamma, "
      "Tensor(c!) grad_beta, Tensor(d!)? grad_weight, bool linear=False, "
      "bool allow_tf32=False) -> ()");

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

  // The stem's convolution, 7 wide in every dimension, of stride 2 and padding 3: the CPU's.
  m.def("stem_convolution_forward(Tensor images, Tensor weight, Tensor(a!) out) -> ()");
  m.def(
      "stem_convolution_backward(Tensor grad_out, Tensor images, Tensor weight, "
      "Tensor(a!) grad_weight) -> ()");

  // A whole dense block: half-layers [first, last) of it, as csrc/block.h has them. The lists are
  // described in csrc/block_arguments.h.
  m.def(
      "dense_block_forward_(Tensor(a!) features, Tensor(b!) statistics, Tensor(c!)[] bottlenecks, "
      "Tensor(d!) vectors, Tensor[] parameters, Tensor[] frozen, float[] numbers, int[] seeds, "
      "int reduced, bool recompute, int first, int last, bool allow_tf32=False) -> ()");
  m.def(
      "dense_block_backward_(Tensor features, Tensor(a!) grad_features, Tensor statistics, "
      "Tensor(b!) sums, Tensor(c!)[] bottlenecks, Tensor(d!) grad_growth, Tensor(e!) grad_norm, "
      "Tensor(f!) vectors, Tensor[] parameters, Tensor[] frozen, Tensor(g!)[] gradients, "
      "float[] numbers, int[] seeds, int reduced, int held, int lowest, int first, int last, "
      "bool allow_tf32=False) -> ()");

  // The CPU's way through a block whose weights are packed and whose norms are coefficients.
  m.def("packed_weights(Tensor like, Tensor[] weights, int[] size) -> Tensor");
  m.def(
      "dense_block_inference_(Tensor(a!) features, Tensor(b!) bottleneck, Tensor coefficients, "
      "Tensor packed, int[] sizes) -> ()");
}
