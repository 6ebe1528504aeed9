// The CPU as a Device: the element type picks the kernels, whose arguments are typed.
#pragma once

#include <cmath>
#include <limits>
#include <stdexcept>

#include "dispatch.h"
#include "isa.h"

namespace densenet_fast::cpu {
namespace {

struct Context {
  Dtype dtype;
};

// What a kernel's parameter is made of.

template <class S>
void convert(const ImageArgument& from, Image<S>& to) {
  to = {static_cast<S*>(from.data), from.n, from.d, from.h, from.w, from.c, from.pitch, from.dims};
}

template <class T>
T floor_of(const NormArgument& norm) {
  return norm.linear ? std::numeric_limits<T>::quiet_NaN() : T(0);
}

template <class T>
void convert(const NormArgument& from, Activation<T>& to) {
  to = {static_cast<const T*>(from.scale), static_cast<const T*>(from.shift), floor_of<T>(from)};
}

template <class T>
void convert(const NormArgument& from, Norm<T>& to) {
  to = {static_cast<const T*>(from.scale), static_cast<const T*>(from.shift),
        static_cast<const T*>(from.mean), static_cast<const T*>(from.rstd), floor_of<T>(from)};
}

template <class T>
void convert(const StatisticsResult& from, Statistics<T>& to) {
  to = {static_cast<T*>(from.mean), static_cast<T*>(from.var)};
}

template <class T>
void convert(const NormGradientResult& from, NormGradient<T>& to) {
  to = {static_cast<T*>(from.gamma), static_cast<T*>(from.beta)};
}

template <class S>
void convert(const WeightArgument& from, Weight<S>& to) {
  if (kNarrow<S> && from.is_float32) {
    to.wide = static_cast<const Compute<S>*>(from.data);
  } else {
    to.data = static_cast<const S*>(from.data);
  }
  to.packed = static_cast<const Compute<S>*>(from.packed[0]);
  to.out = from.out;
  to.in = from.in;
  to.stride_out = from.stride_out;
  to.stride_in = from.stride_in;
  to.stride_d = from.stride_d;
  to.stride_h = from.stride_h;
  to.stride_w = from.stride_w;
  to.dims = from.dims;
}

template <class S>
void convert(const densenet_fast::WeightGradient& from, cpu::WeightGradient<S>& to) {
  if (kNarrow<S> && from.is_float32) {
    to.wide = static_cast<Compute<S>*>(from.data);
  } else {
    to.data = static_cast<S*>(from.data);
  }
  to.channels_last = from.channels_last;
}

template <class T>
void convert(const void* from, const T*& to) {
  to = static_cast<const T*>(from);
}

template <class T>
void convert(void* from, T*& to) {
  to = static_cast<T*>(from);
}

template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
void convert(Number from, Number& to) {
  to = from;
}

template <class To, class From>
To converted(const From& from) {
  To to{};
  convert(from, to);
  return to;
}

template <class... To, class... From>
void call(void (*kernel)(To...), const From&... from) {
  kernel(converted<To>(from)...);
}

// body(S{}) with the type of an image.
template <class Body>
void with_element(const Context& context, const Body& body) {
  switch (context.dtype) {
    case Dtype::kBfloat16:
      return body(bfloat16{});
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kFloat64:
      return body(double{});
    default:
      throw std::runtime_error(
          "densenet_fast: the CPU kernels compute in bfloat16, float32 and float64");
  }
}

template <class Body>
void with_vector(const Context& context, const Body& body) {
  with_element(context, [&](auto zero) { body(Compute<decltype(zero)>{}); });
}

// Where the packed weights of a block or transition are in one buffer, each on a cache line.
class PackedWeights {
 public:
  PackedWeights(Dtype dtype, int64_t h, int64_t w) : context_{dtype}, h_(h), w_(w) {}

  // The next weight's place: elements before it.
  int64_t place(const WeightArgument& weight, bool spatial) {
    const int64_t at = size_;
    with_element(context_, [&](auto zero) {
      using S = decltype(zero);
      const auto typed = converted<Weight<S>>(weight);
      size_ += spatial ? kernels<S>().packed_conv3x3_size(h_, w_, typed)
                       : kernels<S>().packed_conv1x1_size(typed);
    });
    size_ += -size_ & (kLine - 1);
    return at;
  }
  void pack(const WeightArgument& weight, bool spatial, void* to) const {
    with_element(context_, [&](auto zero) {
      using S = decltype(zero);
      const auto typed = converted<Weight<S>>(weight);
      const auto packed = converted<Compute<S>*>(to);
      if (spatial) {
        kernels<S>().pack_conv3x3(h_, w_, typed, packed);
      } else {
        kernels<S>().pack_conv1x1(typed, packed);
      }
    });
  }
  int64_t size() const { return size_; }

 private:
  static constexpr int64_t kLine = 16;
  Context context_;
  int64_t h_, w_, size_ = 0;
};

class Device {
 public:
  using Context = cpu::Context;

  Device(const torch::stable::Device&, Dtype dtype, bool) : context_{dtype} {}
  const Context& context() const { return context_; }

  static void check_image(const Rows&, const char*) {}
  static void check_weight(int64_t, int64_t) {}
  static const void* packed_weight(const Call<Device>& call, const Tensor& packed,
                                   const WeightArgument& weight) {
    PackedWeights places(call.dtype(), 0, 0);
    places.place(weight, false);
    return call.vector(packed, places.size(), "packed");
  }

#define DF_KERNEL(name)                                                                            \
  template <class... Arguments>                                                                    \
  static void name(const Context& context, const Arguments&... arguments) {                        \
    with_element(context, [&](auto zero) { call(kernels<decltype(zero)>().name, arguments...); }); \
    (follow(context, arguments), ...);                                                             \
  }
  DENSENET_FAST_KERNELS(DF_KERNEL)
  DF_KERNEL(stem_convolution_forward)
  DF_KERNEL(stem_convolution_backward)
#undef DF_KERNEL

  // Vectors: a few KiB each, and compiled without contraction: as in PyTorch, each operation
  // rounds.

  static void norm_coefficients(const Context& context,
                                const std::vector<NormCoefficients>& norms) {
    with_vector(context, [&](auto zero) {
      using T = decltype(zero);
      for (const NormCoefficients& n : norms) {
        const T *m = converted<const T*>(n.mean), *v = converted<const T*>(n.var);
        const T *g = converted<const T*>(n.weight), *b = converted<const T*>(n.bias);
        T *a = converted<T*>(n.scale), *s = converted<T*>(n.shift), *r = converted<T*>(n.rstd);
        for (int64_t c = 0; c < n.channels; ++c) {
          r[c] = T(1) / std::sqrt(v[c] + static_cast<T>(n.eps));
          a[c] = g ? g[c] * r[c] : r[c];
          s[c] = (b ? b[c] : T(0)) - m[c] * a[c];
        }
      }
    });
  }

  static void norm_grad_coefficients(const Context& context, const NormBackward& next,
                                     const NormGradientResult& sums) {
    with_vector(context, [&](auto zero) {
      using T = decltype(zero);
      const auto n = converted<Norm<T>>(next.norm);
      const auto g = converted<NormGradient<T>>(sums);
      T *p = converted<T*>(next.map), *q = p + next.channels, *s = q + next.channels;
      const T inverse = static_cast<T>(1.0 / static_cast<double>(next.count));
      for (int64_t c = 0; c < next.channels; ++c) {
        p[c] = n.scale[c];
        q[c] = next.count ? -n.scale[c] * n.rstd[c] * g.gamma[c] * inverse : T(0);
        s[c] = next.count ? -n.scale[c] * g.beta[c] * inverse - q[c] * n.mean[c] : T(0);
      }
    });
  }

  // Nothing is gained by these for many layers at once.
  static void pack_weights(const Context&, const std::vector<PackRequest>&) {}
  static void add_weight_gradients(const Context&) {}
  template <class Body>
  static void in_one_piece(const Context& context, const Body& body) {
    body(context);
  }
  struct Scope {
    explicit Scope(const Context&) {}
    ~Scope() {}
  };

  static void update_running_statistics(const Context& context,
                                        const std::vector<RunningUpdate>& updates,
                                        const std::vector<int64_t*>& counters) {
    with_vector(context, [&](auto zero) {
      using T = decltype(zero);
      for (const RunningUpdate& update : updates) {
        const double count = static_cast<double>(update.count);
        const T total = update.total ? *converted<const T*>(update.total) : T(0);
        const T unbiased =
            update.total ? total / (total - T(1)) : static_cast<T>(count / (count - 1));
        const T keep = static_cast<T>(1.0 - update.momentum);
        const T take = static_cast<T>(update.momentum);
        const T *m = converted<const T*>(update.mean), *v = converted<const T*>(update.var);
        T *rm = converted<T*>(update.running_mean), *rv = converted<T*>(update.running_var);
        for (int64_t c = 0; c < update.channels; ++c) {
          rm[c] = keep * rm[c] + take * m[c];
          rv[c] = keep * rv[c] + take * (v[c] * unbiased);
        }
      }
    });
    for (int64_t* counter : counters) ++*counter;
  }

 private:
  // What is to be done behind a kernel with a result of it.
  template <class Argument>
  static void follow(const Context&, const Argument&) {}

  static void follow(const Context& context, const StatisticsResult& found) {
    if (found.next) norm_coefficients(context, {*found.next});
  }

  static void follow(const Context& context, const NormGradientResult& sums) {
    if (!sums.next) return;
    const NormBackward& next = *sums.next;
    if (next.map) norm_grad_coefficients(context, next, sums);
    if (!next.sum_grad) return;
    with_vector(context, [&](auto zero) {
      using T = decltype(zero);
      const auto n = converted<Norm<T>>(next.norm);
      const auto g = converted<NormGradient<T>>(sums);
      T *constant = converted<T*>(next.sum_grad), *slope = converted<T*>(next.sum_grad_x);
      for (int64_t c = 0; c < next.channels; ++c) {
        constant[c] += n.scale[c] * g.beta[c];
        slope[c] += n.scale[c] * n.rstd[c] * g.gamma[c];
      }
    });
  }

  Context context_;
};

}  // namespace
}  // namespace densenet_fast::cpu
