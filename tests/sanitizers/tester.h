// All kernels of one instruction set on one shape, on buffers as small as they may assume.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"

namespace densenet_fast::cpu {

struct Size {
  int64_t d, h, w;  // 1 for dimensions that images have not
};

struct Case {
  int dims;
  int64_t n;  // images
  Size size;
  int64_t channels, out;  // columns read and made
  int64_t gap;            // elements between the rows of channel slices
  bool permuted;          // weights whose input channels are not innermost
  bool optional;          // outputs that may be left out are wanted
};

// The combinations of gradients that a convolution's backward may be asked for.
struct Wanted {
  bool data, affine, weight;
};
constexpr Wanted kWanted[] = {{true, true, true},
                              {true, true, false},
                              {false, true, true},
                              {false, true, false},
                              {false, false, true}};

inline std::string name(const Case& s) {
  return std::to_string(s.dims) + "-d n=" + std::to_string(s.n) + " d=" + std::to_string(s.size.d) +
         " h=" + std::to_string(s.size.h) + " w=" + std::to_string(s.size.w) +
         " channels=" + std::to_string(s.channels) + " out=" + std::to_string(s.out) +
         " gap=" + std::to_string(s.gap) + (s.permuted ? " permuted" : "") +
         (s.optional ? "" : " without optional outputs");
}

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

template <class S>
class Tester {
 public:
  using T = Compute<S>;
  Tester(const Kernels<S>& kernels, const Case& shape) : kernels_(kernels), s_(shape) {}

  // All outputs of all kernels, in a fixed order.
  std::vector<T> run() {
    forward();
    backward();
    pooling();
    stem();
    for (const Owned& o : images_) check_gaps(o);
    for (const Image<S>& i : dense_) keep(i);
    for (const auto& [data, size] : outputs_) result_.insert(result_.end(), data, data + size);
    for (T value : result_) {
      if (!std::isfinite(value)) fail("an output is not finite or was not written");
    }
    return result_;
  }

 private:
  struct Owned {
    std::unique_ptr<S[]> memory;
    Image<S> image;
  };

  // Sixteenths: with the coefficients below, products and sums of the activation are exact and
  // never zero, so that no instruction set rounds a value to the other side of the rectifier.
  T random() { return static_cast<T>(static_cast<int>(random_() % 65) - 32) / 16; }

  Image<S> image(int64_t n, Size to, int64_t c, bool filled) {
    const int64_t pitch = c + s_.gap, rows = n * to.d * to.h * to.w;
    const int64_t size = rows > 0 ? (rows - 1) * pitch + c : 0;
    Owned owned{std::make_unique<S[]>(static_cast<size_t>(size)), {}};
    owned.image = {owned.memory.get(), n, to.d, to.h, to.w, c, pitch, s_.dims};
    std::memset(owned.image.data, 0xFF, static_cast<size_t>(size) * sizeof(S));
    for (int64_t r = 0; filled && r < rows; ++r) {
      for (int64_t j = 0; j < c; ++j) owned.image.data[r * pitch + j] = narrow<S>(random());
    }
    images_.push_back(std::move(owned));
    return images_.back().image;
  }

  Image<const S> input(Size size, int64_t c) { return view(image(s_.n, size, c, true)); }
  Image<S> output(Size size, int64_t c) { return image(s_.n, size, c, false); }
  static Image<const S> view(Image<S> i) {
    return {i.data, i.n, i.d, i.h, i.w, i.c, i.pitch, i.dims};
  }
  // Behind 2-wide pooling, `up` the stem's.
  Size halved(bool up) const {
    const Size& s = s_.size;
    return {s_.dims > 2 ? (s.d + up) / 2 : 1, s_.dims > 1 ? (s.h + up) / 2 : 1, (s.w + up) / 2};
  }
  // A dense run of elements: one pixel.
  S* filled(int64_t size) { return image(1, {1, 1, 1}, size, true).data; }

  T* vector(int64_t size) {
    vectors_.push_back(std::make_unique<T[]>(static_cast<size_t>(size)));
    std::memset(vectors_.back().get(), 0xFF, static_cast<size_t>(size) * sizeof(T));
    return vectors_.back().get();
  }
  T* coefficients(int64_t size, T offset) {
    T* v = vector(size);
    for (int64_t i = 0; i < size; ++i) v[i] = random() + offset;
    return v;
  }
  T* output_vector(int64_t size) {
    T* v = vector(size);
    outputs_.emplace_back(v, size);
    return v;
  }

  Activation<T> activation(int64_t c) { return {coefficients(c, 0), coefficients(c, T(1) / 512)}; }
  Norm<T> norm(int64_t c) {
    return {coefficients(c, 0), coefficients(c, T(1) / 512), coefficients(c, 0),
            coefficients(c, 0)};
  }
  Statistics<T> statistics(int64_t c) {
    if (!s_.optional) return {};
    return {output_vector(c), output_vector(c)};
  }
  NormGradient<T> affine(int64_t c) { return {output_vector(c), output_vector(c)}; }
  // Weights and their gradients have either type, where there are two.
  bool wide_weights() const { return kNarrow<S> && s_.permuted; }

  WeightGradient<S> weight_gradient(int64_t size, bool wanted) {
    if (!wanted) return {};
    if (wide_weights()) return {nullptr, output_vector(size)};
    return {output_image(size), nullptr};
  }

  Weight<S> weight(int64_t out, int64_t in, int64_t kernel) {
    Weight<S> w;
    w.dims = s_.dims;
    int64_t taps = 1;
    for (int i = 0; i < s_.dims; ++i) taps *= kernel;
    if (wide_weights()) {
      w.wide = coefficients(out * in * taps, 0);
    } else {
      w.data = filled(out * in * taps);
    }
    w.out = out;
    w.in = in;
    w.stride_out = s_.permuted ? 1 : in * taps;
    w.stride_in = s_.permuted ? out * taps : taps;
    w.stride_w = s_.permuted ? out : 1;
    w.stride_h = kernel * w.stride_w;
    w.stride_d = kernel * w.stride_h;
    return w;
  }

  // A dense result of the images' type: one pixel.
  S* output_image(int64_t size) {
    dense_.push_back(image(1, {1, 1, 1}, size, false));
    return dense_.back().data;
  }

  void keep(Image<S> i) {
    for (int64_t r = 0; r < i.rows(); ++r) {
      for (int64_t j = 0; j < i.c; ++j) result_.push_back(widen(i.data[r * i.pitch + j]));
    }
  }

  void check_gaps(const Owned& o) const {
    const Image<S>& i = o.image;
    for (int64_t r = 0; r + 1 < i.rows(); ++r) {
      for (int64_t j = i.c; j < i.pitch; ++j) {
        unsigned char bytes[sizeof(S)];
        std::memcpy(bytes, i.data + r * i.pitch + j, sizeof(S));
        for (unsigned char byte : bytes) {
          if (byte != 0xFF) fail("written between the rows of a channel slice");
        }
      }
    }
  }

  // ---- the kernels ------------------------------------------------------------------------------

  // A forward with weights as they are, then packed beforehand: the same bits.
  void with_and_without(auto forward, Image<const S> from, Weight<S> weight, const T* packed,
                        Image<S> to, T floor = 0) {
    Activation<T> act = activation(from.c);
    act.floor = floor;
    forward(from, act, weight, to, statistics(to.c));
    keep(to);
    weight.packed = packed;
    forward(from, act, weight, to, statistics(to.c));
    keep(to);
    const size_t size = static_cast<size_t>(to.rows() * to.c);
    const T* again = result_.data() + result_.size() - size;
    if (std::memcmp(again - size, again, size * sizeof(T)) != 0) {
      fail("packed weights give another result");
    }
  }

  void forward() {
    const Size size = s_.size, half = halved(false);
    const int64_t c = s_.channels, out = s_.out;
    const Image<const S> features = input(size, c);
    kernels_.channel_statistics(features, {output_vector(c), output_vector(c)});

    const Weight<S> w1 = weight(out, c, 1), w3 = weight(out, c, 3);
    T* packed1 = vector(kernels_.packed_conv1x1_size(w1));
    T* packed3 = vector(kernels_.packed_conv3x3_size(size.h, size.w, w3));
    kernels_.pack_conv1x1(w1, packed1);
    kernels_.pack_conv3x3(size.h, size.w, w3, packed3);
    with_and_without(kernels_.conv1x1_forward, features, w1, packed1, output(size, out));
    const Image<S> growth = output(size, out);
    with_and_without(kernels_.conv3x3_forward, features, w3, packed3, growth);
    for (double p : {0.3, 1.0}) {
      kernels_.dropout(growth, 0x123456789abcdefu, p, s_.optional);
      keep(growth);
    }
    if (half.d * half.h * half.w == 0) return;
    for (T floor : {T(0), std::numeric_limits<T>::quiet_NaN()}) {
      with_and_without(kernels_.transition_forward, features, w1, packed1, output(half, out),
                       floor);
    }
  }

  void backward() {
    const Size size = s_.size, half = halved(false);
    const int64_t c = s_.channels, out = s_.out;
    const Image<const S> features = input(size, c), gradient = input(size, out);
    for (const Wanted wanted : kWanted) {
      const NormGradient<T> to_affine = wanted.affine ? affine(c) : NormGradient<T>{};
      const auto to_weight = [&](int64_t size) { return weight_gradient(size, wanted.weight); };
      {
        const Image<S> to = wanted.data ? image(s_.n, size, c, true) : Image<S>{};  // accumulates
        kernels_.conv1x1_backward(gradient, input(size, out), coefficients(3 * out, 0), features,
                                  norm(c), weight(out, c, 1), to, to_affine, to_weight(out * c));
        keep(to);
      }
      const NormGradient<T> to_affine3 = wanted.affine ? affine(c) : NormGradient<T>{};
      const Weight<S> w3 = weight(out, c, 3);
      const bool accumulate = s_.channels % 2 == 0;  // every other case
      Image<S> to{};
      if (wanted.data) to = accumulate ? image(s_.n, size, c, true) : output(size, c);
      kernels_.conv3x3_backward(gradient, features, norm(c), w3, to, to_affine3,
                                to_weight(out * c * w3.taps()), accumulate);
      keep(to);
    }
    {
      const Image<S> to = output(size, c);
      kernels_.finish_gradient(features, input(size, c), coefficients(c, 0), coefficients(c, 0),
                               coefficients(c, 0), to);
      keep(to);
    }
    if (half.d * half.h * half.w == 0) return;
    for (T floor : {T(0), std::numeric_limits<T>::quiet_NaN()}) {
      const Image<S> to = output(size, c);
      Norm<T> above = norm(c);
      above.floor = floor;
      kernels_.transition_backward(input(half, out), features, above, weight(out, c, 1), to,
                                   affine(c), weight_gradient(out * c, s_.optional));
      keep(to);
    }
  }

  void pooling() {
    const Size size = s_.size, out = halved(true);
    const int64_t c = s_.channels;
    const Image<const S> features = input(size, c);
    kernels_.norm_relu_avgpool_forward(features, activation(c), output_image(s_.n * c));
    const Image<S> to = output(size, c);
    kernels_.norm_relu_avgpool_backward(filled(s_.n * c), features, norm(c), to, affine(c));
    keep(to);

    const Image<S> pooled = output(out, c);
    const int64_t elements = pooled.rows() * c, positions = features.dims == 3 ? 27 : 9;
    const auto argmax = std::make_unique<uint8_t[]>(static_cast<size_t>(elements));
    kernels_.norm_relu_maxpool_forward(features, activation(c), pooled, argmax.get());
    keep(pooled);
    for (int64_t i = 0; i < elements; ++i) {
      if (argmax[static_cast<size_t>(i)] >= positions) fail("argmax is no position in a window");
      result_.push_back(argmax[static_cast<size_t>(i)]);
    }
    for (bool batch_statistics : {false, true}) {
      const Image<S> gradient = output(size, c);
      kernels_.norm_relu_maxpool_backward(input(out, c), argmax.get(), features, norm(c),
                                          batch_statistics, gradient, affine(c));
      keep(gradient);
    }
  }

  void stem() {
    const Size size = s_.size, halves = halved(true);
    const int64_t c = std::min<int64_t>(s_.channels, 2), out = s_.out;
    const Image<const S> images = input(size, c);
    const Weight<S> w = weight(out, c, 7);
    const Image<S> to = output(halves, out);
    kernels_.stem_convolution_forward(images, w, to);
    keep(to);
    int64_t elements = out * c;
    for (int i = 0; i < s_.dims; ++i) elements *= 7;
    kernels_.stem_convolution_backward(input(halves, out), images, w,
                                       weight_gradient(elements, true));
  }

  const Kernels<S>& kernels_;
  Case s_;
  std::mt19937 random_{7};
  std::vector<Owned> images_;
  std::vector<Image<S>> dense_;
  std::vector<std::unique_ptr<T[]>> vectors_;
  std::vector<std::pair<const T*, int64_t>> outputs_;
  std::vector<T> result_;
};

}  // namespace densenet_fast::cpu
