// The operators on CPU tensors: tensors become argument structs, the element type picks the
// kernels. densenet_fast/ops.py has checked everything with better messages; these checks are the
// second line.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>

#include "isa.h"
#include "tensor_arguments.h"

namespace densenet_fast::cpu {
namespace {

void channel_statistics(const Tensor& features, const Tensor& mean, const Tensor& var) {
  dispatch(features, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto x = image<const S>(features, "features");
    kernels<S>().channel_statistics(x, statistics<T>(mean, var, x.c));
  });
}

void norm_coefficients(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                       const OptionalTensor& beta, double eps, const Tensor& scale,
                       const Tensor& shift, const Tensor& rstd) {
  dispatch_vector(mean, [&](auto zero) {
    using T = decltype(zero);
    const int64_t channels = mean.numel();
    const T* m = vector<T>(mean, channels, "mean");
    const T* v = vector<T>(var, channels, "var");
    const T* g = gamma ? vector<T>(*gamma, channels, "weight") : nullptr;
    const T* b = beta ? vector<T>(*beta, channels, "bias") : nullptr;
    T* a = mutable_vector<T>(scale, channels, "scale");
    T* s = mutable_vector<T>(shift, channels, "shift");
    T* r = mutable_vector<T>(rstd, channels, "rstd");
    for (int64_t c = 0; c < channels; ++c) {
      r[c] = T(1) / std::sqrt(v[c] + static_cast<T>(eps));
      a[c] = g ? g[c] * r[c] : r[c];
      s[c] = (b ? b[c] : T(0)) - m[c] * a[c];
    }
  });
}

void update_running_statistics(const Tensor& mean, const Tensor& var, int64_t count,
                               double momentum, const Tensor& running_mean,
                               const Tensor& running_var) {
  dispatch_vector(mean, [&](auto zero) {
    using T = decltype(zero);
    const int64_t channels = mean.numel();
    check_count(count);
    const T* m = vector<T>(mean, channels, "mean");
    const T* v = vector<T>(var, channels, "var");
    T* rm = mutable_vector<T>(running_mean, channels, "running_mean");
    T* rv = mutable_vector<T>(running_var, channels, "running_var");
    const T unbiased = static_cast<T>(static_cast<double>(count) / static_cast<double>(count - 1));
    const T keep = static_cast<T>(1.0 - momentum), take = static_cast<T>(momentum);
    for (int64_t c = 0; c < channels; ++c) {
      rm[c] = keep * rm[c] + take * m[c];
      rv[c] = keep * rv[c] + take * (v[c] * unbiased);
    }
  });
}

void norm_grad_coefficients(const Tensor& scale, const Tensor& mean, const Tensor& rstd,
                            const Tensor& grad_gamma, const Tensor& grad_beta, int64_t count,
                            const Tensor& coefficients) {
  dispatch_vector(scale, [&](auto zero) {
    using T = decltype(zero);
    const int64_t channels = scale.numel();
    const T* a = vector<T>(scale, channels, "scale");
    const T* m = vector<T>(mean, channels, "mean");
    const T* r = vector<T>(rstd, channels, "rstd");
    const T* gamma = vector<T>(grad_gamma, channels, "grad_gamma");
    const T* beta = vector<T>(grad_beta, channels, "grad_beta");
    T* out = mutable_vector<T>(coefficients, 3 * channels, "coefficients");
    const T inverse = static_cast<T>(1.0 / static_cast<double>(count));
    for (int64_t c = 0; c < channels; ++c) {
      const T q = -a[c] * r[c] * gamma[c] * inverse;
      out[c] = a[c];
      out[channels + c] = q;
      out[2 * channels + c] = -a[c] * beta[c] * inverse - q * m[c];
    }
  });
}

void conv1x1_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                     const Tensor& w, const Tensor& bottleneck, const OptionalTensor& mean,
                     const OptionalTensor& var) {
  dispatch(features, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto x = image<const S>(features, "features");
    const auto z = image<S>(bottleneck, "bottleneck");
    const auto weights = weight<S>(w, 2, x.c);
    check_same_pixels(x, z);
    check_channels(z, weights.out, "bottleneck");
    kernels<S>().conv1x1_forward(x, activation<T>(scale, shift, x.c), weights, z,
                                 statistics<T>(mean, var, z.c));
  });
}

void conv1x1_backward(const Tensor& grad_norm, const Tensor& bottleneck, const Tensor& coefficients,
                      const Tensor& features, const Tensor& scale, const Tensor& shift,
                      const Tensor& mean, const Tensor& rstd, const Tensor& w,
                      const OptionalTensor& grad_features, const OptionalTensor& grad_gamma,
                      const OptionalTensor& grad_beta, const OptionalTensor& grad_weight) {
  dispatch(features, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto x = image<const S>(features, "features");
    const auto z = image<const S>(bottleneck, "bottleneck");
    const auto g = image<const S>(grad_norm, "grad_norm");
    const auto weights = weight<S>(w, 2, x.c);
    Image<S> gx;
    if (grad_features) {
      gx = image<S>(*grad_features, "grad_features");
      check_same_shape(gx, x, "grad_features");
    }
    check_same_pixels(x, z);
    check_same_shape(g, z, "grad_norm");
    check_channels(z, weights.out, "bottleneck");
    kernels<S>().conv1x1_backward(
        g, z, vector<T>(coefficients, 3 * z.c, "coefficients"), x,
        norm<T>(scale, shift, mean, rstd, x.c), weights, gx,
        norm_gradient<T>(grad_gamma, grad_beta, grad_features.has_value(), x.c),
        weight_gradient<S>(grad_weight, w));
  });
}

void conv3x3_forward(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                     const Tensor& w, const Tensor& growth, const OptionalTensor& mean,
                     const OptionalTensor& var) {
  dispatch(bottleneck, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto z = image<const S>(bottleneck, "bottleneck");
    const auto y = image<S>(growth, "growth");
    const auto weights = weight<S>(w, 4, z.c);
    check_same_pixels(z, y);
    check_channels(y, weights.out, "growth");
    kernels<S>().conv3x3_forward(z, activation<T>(scale, shift, z.c), weights, y,
                                 statistics<T>(mean, var, y.c));
  });
}

void conv3x3_backward(const Tensor& grad_growth, const Tensor& bottleneck, const Tensor& scale,
                      const Tensor& shift, const Tensor& mean, const Tensor& rstd, const Tensor& w,
                      const OptionalTensor& grad_norm, const OptionalTensor& grad_gamma,
                      const OptionalTensor& grad_beta, const OptionalTensor& grad_weight) {
  dispatch(bottleneck, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto g = image<const S>(grad_growth, "grad_growth");
    const auto z = image<const S>(bottleneck, "bottleneck");
    const auto weights = weight<S>(w, 4, z.c);
    Image<S> out;
    if (grad_norm) {
      out = image<S>(*grad_norm, "grad_norm");
      check_same_shape(out, z, "grad_norm");
    }
    check_same_pixels(z, g);
    check_channels(g, weights.out, "grad_growth");
    kernels<S>().conv3x3_backward(
        g, z, norm<T>(scale, shift, mean, rstd, z.c), weights, out,
        norm_gradient<T>(grad_gamma, grad_beta, grad_norm.has_value(), z.c),
        weight_gradient<S>(grad_weight, w));
  });
}

void dropout(const Tensor& growth, int64_t seed, double p) {
  dispatch(growth, [&](auto zero) {
    using S = decltype(zero);
    kernels<S>().dropout(image<S>(growth, "growth"), static_cast<uint64_t>(seed), p);
  });
}

void finish_gradient(const Tensor& features, const Tensor& grad_features, const Tensor& mean,
                     const Tensor& sum_grad, const Tensor& sum_grad_x, const Tensor& out) {
  dispatch(features, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto x = image<const S>(features, "features");
    const auto g = image<const S>(grad_features, "grad_features");
    const auto to = image<S>(out, "out");
    check_same_shape(g, x, "grad_features");
    check_same_shape(to, x, "out");
    kernels<S>().finish_gradient(x, g, vector<T>(mean, x.c, "mean"),
                                 vector<T>(sum_grad, x.c, "sum_grad"),
                                 vector<T>(sum_grad_x, x.c, "sum_grad_x"), to);
  });
}

void transition_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                        const Tensor& w, const Tensor& out, const OptionalTensor& mean,
                        const OptionalTensor& var) {
  dispatch(features, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto x = image<const S>(features, "features");
    const auto to = image<S>(out, "out");
    const auto weights = weight<S>(w, 2, x.c);
    check_pooled(x, to);
    check_channels(to, weights.out, "out");
    kernels<S>().transition_forward(x, activation<T>(scale, shift, x.c), weights, to,
                                    statistics<T>(mean, var, to.c));
  });
}

void transition_backward(const Tensor& grad_out, const Tensor& features, const Tensor& scale,
                         const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                         const Tensor& w, const Tensor& grad_features, const Tensor& grad_gamma,
                         const Tensor& grad_beta, const OptionalTensor& grad_weight) {
  dispatch(features, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto g = image<const S>(grad_out, "grad_out");
    const auto x = image<const S>(features, "features");
    const auto gx = image<S>(grad_features, "grad_features");
    const auto weights = weight<S>(w, 2, x.c);
    check_pooled(x, g);
    check_same_shape(gx, x, "grad_features");
    check_channels(g, weights.out, "grad_out");
    kernels<S>().transition_backward(g, x, norm<T>(scale, shift, mean, rstd, x.c), weights, gx,
                                     norm_gradient<T>(grad_gamma, grad_beta, x.c),
                                     weight_gradient<S>(grad_weight, w));
  });
}

void norm_relu_avgpool_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                               const Tensor& out) {
  dispatch(features, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto x = image<const S>(features, "features");
    kernels<S>().norm_relu_avgpool_forward(x, activation<T>(scale, shift, x.c),
                                           mutable_vector<S>(out, x.n * x.c, "out"));
  });
}

void norm_relu_avgpool_backward(const Tensor& grad_out, const Tensor& features, const Tensor& scale,
                                const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                                const Tensor& grad_features, const Tensor& grad_gamma,
                                const Tensor& grad_beta) {
  dispatch(features, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto x = image<const S>(features, "features");
    const auto gx = image<S>(grad_features, "grad_features");
    check_same_shape(gx, x, "grad_features");
    kernels<S>().norm_relu_avgpool_backward(vector<S>(grad_out, x.n * x.c, "grad_out"), x,
                                            norm<T>(scale, shift, mean, rstd, x.c), gx,
                                            norm_gradient<T>(grad_gamma, grad_beta, x.c));
  });
}

void norm_relu_maxpool_forward(const Tensor& input, const Tensor& scale, const Tensor& shift,
                               const Tensor& out, const Tensor& argmax) {
  dispatch(input, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto x = image<const S>(input, "input");
    const auto to = image<S>(out, "out");
    check_max_pooled(x, to, argmax);
    kernels<S>().norm_relu_maxpool_forward(x, activation<T>(scale, shift, x.c), to,
                                           argmax.mutable_data_ptr<uint8_t>());
  });
}

void norm_relu_maxpool_backward(const Tensor& grad_out, const Tensor& argmax, const Tensor& input,
                                const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                const Tensor& rstd, bool batch_statistics, const Tensor& grad_input,
                                const Tensor& grad_gamma, const Tensor& grad_beta) {
  dispatch(input, [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    const auto g = image<const S>(grad_out, "grad_out");
    const auto x = image<const S>(input, "input");
    const auto gx = image<S>(grad_input, "grad_input");
    check_max_pooled(x, g, argmax);
    check_same_shape(gx, x, "grad_input");
    kernels<S>().norm_relu_maxpool_backward(
        g, argmax.const_data_ptr<uint8_t>(), x, norm<T>(scale, shift, mean, rstd, x.c),
        batch_statistics, gx, norm_gradient<T>(grad_gamma, grad_beta, x.c));
  });
}

}  // namespace
}  // namespace densenet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  namespace cpu = densenet_fast::cpu;
  m.impl("channel_statistics", TORCH_BOX(&cpu::channel_statistics));
  m.impl("norm_coefficients", TORCH_BOX(&cpu::norm_coefficients));
  m.impl("update_running_statistics", TORCH_BOX(&cpu::update_running_statistics));
  m.impl("norm_grad_coefficients", TORCH_BOX(&cpu::norm_grad_coefficients));
  m.impl("conv1x1_forward", TORCH_BOX(&cpu::conv1x1_forward));
  m.impl("conv1x1_backward", TORCH_BOX(&cpu::conv1x1_backward));
  m.impl("conv3x3_forward", TORCH_BOX(&cpu::conv3x3_forward));
  m.impl("conv3x3_backward", TORCH_BOX(&cpu::conv3x3_backward));
  m.impl("dropout_", TORCH_BOX(&cpu::dropout));
  m.impl("finish_gradient", TORCH_BOX(&cpu::finish_gradient));
  m.impl("transition_forward", TORCH_BOX(&cpu::transition_forward));
  m.impl("transition_backward", TORCH_BOX(&cpu::transition_backward));
  m.impl("norm_relu_avgpool_forward", TORCH_BOX(&cpu::norm_relu_avgpool_forward));
  m.impl("norm_relu_avgpool_backward", TORCH_BOX(&cpu::norm_relu_avgpool_backward));
  m.impl("norm_relu_maxpool_forward", TORCH_BOX(&cpu::norm_relu_maxpool_forward));
  m.impl("norm_relu_maxpool_backward", TORCH_BOX(&cpu::norm_relu_maxpool_backward));
}
