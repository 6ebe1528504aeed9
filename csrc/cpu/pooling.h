// Norm - ReLU - pooling at the two ends of the network: the stem's max pooling and the final global
// average. Only the norm's input is read; the activation is made again wherever it is needed.
#pragma once

#include "product_backward.h"

namespace densenet_fast::cpu {
namespace {

// Per-task sums of a norm's two affine gradients, added in task order.
template <class T>
class TaskSums {
 public:
  TaskSums(int64_t tasks, int64_t columns)
      : tasks_(tasks), width_(padded<T>(columns)), memory_(2 * tasks * width_) {
    for (int64_t i = 0; i < 2 * tasks * width_; ++i) memory_.get()[i] = T(0);
  }
  void add(int64_t task, int64_t c, Vec<T> sum, Vec<T> sum_centred) const {
    T* at = memory_.get() + 2 * task * width_ + c;
    store<T>(at, load<T>(at) + sum);
    store<T>(at + width_, load<T>(at + width_) + sum_centred);
  }
  void finish(const T* rstd, int64_t columns, NormGradient<T> out) const {
    for (int64_t c = 0; c < columns; ++c) {
      double beta = 0, gamma = 0;
      for (int64_t i = 0; i < tasks_; ++i) {
        beta += static_cast<double>(memory_.get()[2 * i * width_ + c]);
        gamma += static_cast<double>(memory_.get()[(2 * i + 1) * width_ + c]);
      }
      out.beta[c] = static_cast<T>(beta);
      out.gamma[c] = static_cast<T>(gamma) * rstd[c];
    }
  }

 private:
  int64_t tasks_, width_;
  CallMemory<T> memory_;
};

template <class S>
void norm_relu_avgpool_forward(Image<const S> features, Activation<Compute<S>> act, S* out) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t blocks = vectors<T>(features.c), h = features.h, w = features.w;
  const T inverse = static_cast<T>(1.0 / static_cast<double>(h * w));
  for_each_task(features.n * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, c = task % blocks * L, n = features.c - c;
    const Vec<T> a = load_upto<T>(act.scale + c, n), b = load_upto<T>(act.shift + c, n);
    const S* p = features.data + image * h * w * features.pitch + c;
    Vec<T> total = zero<T>();
    for (int64_t y = 0; y < h; ++y) {  // image row by image row: shorter sums, less rounding
      Vec<T> line = zero<T>();
      for (int64_t x = 0; x < w; ++x, p += features.pitch) {
        line += relu<T>(fma<T>(a, load_upto<T>(p, n), b));
      }
      total += line;
    }
    store_upto<T>(out + image * features.c + c, total * splat<T>(inverse), n);
  });
}

template <class S>
void norm_relu_avgpool_backward(const S* grad_out, Image<const S> features, Norm<Compute<S>> norm,
                                Image<S> grad_features, NormGradient<Compute<S>> grad_affine) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t blocks = vectors<T>(features.c), pixels = features.h * features.w;
  const T inverse = static_cast<T>(1.0 / static_cast<double>(pixels));
  const TaskSums<T> sums(features.n, features.c);
  for_each_task(features.n * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, c = task % blocks * L, n = features.c - c;
    const Vec<T> scale = load_upto<T>(norm.scale + c, n), shift = load_upto<T>(norm.shift + c, n);
    const Vec<T> mean = load_upto<T>(norm.mean + c, n);
    const Vec<T> g = load_upto<T>(grad_out + image * features.c + c, n) * splat<T>(inverse);
    const S* x = features.data + image * pixels * features.pitch + c;
    S* to = grad_features.data + image * pixels * grad_features.pitch + c;
    Vec<T> sum = zero<T>(), sum_centred = zero<T>();
    for (int64_t r = 0; r < pixels; ++r) {
      const Vec<T> value = load_upto<T>(x + r * features.pitch, n);
      const Vec<T> d = where_positive<T>(fma<T>(scale, value, shift), g);
      sum += d;
      sum_centred = fma<T>(d, value - mean, sum_centred);
      store_upto<T>(to + r * grad_features.pitch, scale * d, n);
    }
    sums.add(image, c, sum, sum_centred);
  });
  sums.finish(norm.rstd, features.c, grad_affine);
}

// As many bytes or 32-bit integers as a vector of T has lanes.
template <class T>
struct LaneIntegers;

template <>
struct LaneIntegers<float> {
  typedef uint8_t bytes __attribute__((vector_size(DF_VECTOR_BYTES / 4)));
  typedef int32_t words __attribute__((vector_size(DF_VECTOR_BYTES)));
};

template <>
struct LaneIntegers<double> {
  typedef uint8_t bytes __attribute__((vector_size(DF_VECTOR_BYTES / 8)));
  typedef int32_t words __attribute__((vector_size(DF_VECTOR_BYTES / 2)));
};

// One vector of window positions, as numbers of type T.
template <class T>
DF_INLINE Vec<T> load_codes(const uint8_t* p, int64_t n) {
  using Codes = typename LaneIntegers<T>::bytes;
  Codes codes = {};
  if (n >= kLanes<T>) {
    std::memcpy(&codes, p, sizeof(codes));
  } else {
    for (int64_t i = 0; i < n; ++i) codes[i] = p[i];
  }
  return __builtin_convertvector(codes, Vec<T>);
}

template <class T>
DF_INLINE void store_codes(uint8_t* p, Vec<T> v, int64_t n) {
  using Codes = typename LaneIntegers<T>::bytes;
  using Integers = typename LaneIntegers<T>::words;
  const Codes codes = __builtin_convertvector(__builtin_convertvector(v, Integers), Codes);
  if (n >= kLanes<T>) {
    std::memcpy(p, &codes, sizeof(codes));
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = codes[i];
  }
}

// Max pooling 3x3, stride 2, padding 1 of the activation; the position of the maximum in its window
// (0..8) by PyTorch's rule: the first of equal ones, the last NaN.
template <class S>
void norm_relu_maxpool_forward(Image<const S> input, Activation<Compute<S>> act, Image<S> out,
                               uint8_t* argmax) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  for_each_task(out.n * out.h, [&](int64_t line) {
    const int64_t image = line / out.h, oy = line % out.h;
    for (int64_t ox = 0; ox < out.w; ++ox) {
      const int64_t pixel = line * out.w + ox;
      for (int64_t c = 0; c < input.c; c += L) {
        const int64_t n = input.c - c;
        const Vec<T> a = load_upto<T>(act.scale + c, n), b = load_upto<T>(act.shift + c, n);
        Vec<T> best = splat<T>(-static_cast<T>(__builtin_inf())), code = zero<T>();
        for (int64_t kh = 0; kh < 3; ++kh) {
          const int64_t y = 2 * oy + kh - 1;
          if (y < 0 || y >= input.h) continue;
          for (int64_t kw = 0; kw < 3; ++kw) {
            const int64_t x = 2 * ox + kw - 1;
            if (x < 0 || x >= input.w) continue;
            const S* p = input.data + ((image * input.h + y) * input.w + x) * input.pitch + c;
            // Rounded: the maximum of the values that PyTorch would compare.
            const Vec<T> v = rounded<S>(relu<T>(fma<T>(a, load_upto<T>(p, n), b)));
            const auto wins = (v > best) | (v != v);
            best = wins ? v : best;
            code = wins ? splat<T>(static_cast<T>(kh * 3 + kw)) : code;
          }
        }
        store_upto<T>(out.data + pixel * out.pitch + c, best, n);
        store_codes<T>(argmax + pixel * input.c + c, code, n);
      }
    }
  });
}

// The gradient of one line of activations, [w, c]: every pixel asks the (at most four) windows that
// hold it whether it was their maximum, so that no two threads write the same place.
template <class T, class S>
void unpool_line(const Image<const S>& grad_out, const uint8_t* argmax, int64_t channels,
                 int64_t image, int64_t y, int64_t w, int64_t c, int64_t n, T* line) {
  constexpr int L = kLanes<T>;
  for (int64_t x = 0; x < w; ++x) store<T>(line + x * L, zero<T>());
  for (int64_t oy = y / 2; oy <= smaller((y + 1) / 2, grad_out.h - 1); ++oy) {
    const int64_t kh = y + 1 - 2 * oy;
    const int64_t first = (image * grad_out.h + oy) * grad_out.w;
    for (int64_t ox = 0; ox < grad_out.w; ++ox) {
      const Vec<T> won = load_codes<T>(argmax + (first + ox) * channels + c, n);
      const Vec<T> dy = load_upto<T>(grad_out.data + (first + ox) * grad_out.pitch + c, n);
      for (int64_t kw = larger(0, 1 - 2 * ox); kw < smaller(3, w + 1 - 2 * ox); ++kw) {
        T* to = line + (2 * ox + kw - 1) * L;
        const Vec<T> code = splat<T>(static_cast<T>(kh * 3 + kw));
        store<T>(to, load<T>(to) + (won == code ? dy : zero<T>()));
      }
    }
  }
}

template <class S>
void norm_relu_maxpool_backward(Image<const S> grad_out, const uint8_t* argmax,
                                Image<const S> input, Norm<Compute<S>> norm, bool batch_statistics,
                                Image<S> grad_input, NormGradient<Compute<S>> grad_affine) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t h = input.h, w = input.w, channels = input.c;
  const int64_t lines_per_task = ceil_div(input.n * h, 64);
  const int64_t lines = input.n * h, tasks = ceil_div(lines, lines_per_task);
  const TaskSums<T> sums(tasks, channels);
  for_each_task(tasks, [&](int64_t task) {
    T* gradient = scratch<T>(Scratch::kResult, w * L);
    const int64_t end = smaller(lines, (task + 1) * lines_per_task);
    for (int64_t line = task * lines_per_task; line < end; ++line) {
      for (int64_t c = 0; c < channels; c += L) {
        const int64_t n = channels - c;
        const Vec<T> scale = load_upto<T>(norm.scale + c, n);
        const Vec<T> shift = load_upto<T>(norm.shift + c, n);
        const Vec<T> mean = load_upto<T>(norm.mean + c, n);
        unpool_line<T>(grad_out, argmax, channels, line / h, line % h, w, c, n, gradient);
        Vec<T> sum = zero<T>(), sum_centred = zero<T>();
        const S* from = input.data + line * w * input.pitch + c;
        S* to = grad_input.data + line * w * grad_input.pitch + c;
        for (int64_t x = 0; x < w; ++x) {
          const Vec<T> value = load_upto<T>(from + x * input.pitch, n);
          const Vec<T> d =
              where_positive<T>(fma<T>(scale, value, shift), load<T>(gradient + x * L));
          sum += d;
          sum_centred = fma<T>(d, value - mean, sum_centred);
          store_upto<T>(to + x * grad_input.pitch, d, n);
        }
        sums.add(task, c, sum, sum_centred);
      }
    }
  });
  sums.finish(norm.rstd, channels, grad_affine);

  // gradient = scale * (d - beta / M - xhat * gamma / M)
  const T inverse = batch_statistics ? static_cast<T>(1.0 / static_cast<double>(input.rows())) : 0;
  for_each_task(tasks, [&](int64_t task) {
    const int64_t first = task * lines_per_task * w;
    const int64_t end = smaller(lines, (task + 1) * lines_per_task) * w;
    for (int64_t r = first; r < end; ++r) {
      for (int64_t c = 0; c < channels; c += L) {
        const int64_t n = channels - c;
        const Vec<T> scale = load_upto<T>(norm.scale + c, n);
        const Vec<T> mean = load_upto<T>(norm.mean + c, n);
        const Vec<T> constant = load_upto<T>(grad_affine.beta + c, n) * splat<T>(inverse);
        const Vec<T> slope = load_upto<T>(grad_affine.gamma + c, n) * splat<T>(inverse) *
                             load_upto<T>(norm.rstd + c, n);
        S* p = grad_input.data + r * grad_input.pitch + c;
        const Vec<T> value = load_upto<T>(input.data + r * input.pitch + c, n);
        const Vec<T> d = load_upto<T>(p, n) - constant - (value - mean) * slope;
        store_upto<T>(p, scale * d, n);
      }
    }
  });
}

}  // namespace
}  // namespace densenet_fast::cpu
