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
  const int64_t blocks = vectors<T>(features.c), lines = features.d * features.h, w = features.w;
  const T inverse = static_cast<T>(1.0 / static_cast<double>(lines * w));
  for_each_task(features.n * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, c = task % blocks * L, n = features.c - c;
    const Vec<T> a = load_upto<T>(act.scale + c, n), b = load_upto<T>(act.shift + c, n);
    const S* p = features.data + image * lines * w * features.pitch + c;
    Vec<T> total = zero<T>();
    for (int64_t y = 0; y < lines; ++y) {  // image row by image row: shorter sums, less rounding
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
  const int64_t blocks = vectors<T>(features.c), pixels = features.rows() / features.n;
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

// Positions of a window along a dimension of the image: [begin, end) of 2 * out - 1 + position that
// are inside, or the only one of a dimension that it has not.
struct WindowRange {
  int64_t first, begin, end;

  WindowRange(bool pooled, int64_t out, int64_t size)
      : first(pooled ? 2 * out - 1 : 0),
        begin(first < 0),
        end(pooled ? smaller(3, size - first) : 1) {}
};

// Max pooling 3x3, stride 2, padding 1 of the activation; the position of the maximum in its window
// (0..8, or as many digits of base 3 as there are dimensions) by PyTorch's rule: the first of equal
// ones, the last NaN.
template <class S>
void norm_relu_maxpool_forward(Image<const S> input, Activation<Compute<S>> act, Image<S> out,
                               uint8_t* argmax) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  for_each_task(out.slices() * out.h, [&](int64_t line) {
    const int64_t slice = line / out.h, image = slice / out.d;
    const WindowRange deep(out.dims > 2, slice % out.d, input.d);
    const WindowRange down(out.dims > 1, line % out.h, input.h);
    for (int64_t ox = 0; ox < out.w; ++ox) {
      const int64_t pixel = line * out.w + ox;
      const WindowRange across(true, ox, input.w);
      for (int64_t c = 0; c < input.c; c += L) {
        const int64_t n = input.c - c;
        const Vec<T> a = load_upto<T>(act.scale + c, n), b = load_upto<T>(act.shift + c, n);
        Vec<T> best = splat<T>(-static_cast<T>(__builtin_inf())), code = zero<T>();
        for (int64_t kd = deep.begin; kd < deep.end; ++kd) {
          const int64_t z = image * input.d + deep.first + kd;
          for (int64_t kh = down.begin; kh < down.end; ++kh) {
            const int64_t row = (z * input.h + down.first + kh) * input.w + across.first;
            for (int64_t kw = across.begin; kw < across.end; ++kw) {
              const S* p = input.data + (row + kw) * input.pitch + c;
              // Rounded: the maximum of the values that PyTorch would compare.
              const Vec<T> v = rounded<S>(relu<T>(fma<T>(a, load_upto<T>(p, n), b)));
              const auto wins = (v > best) | (v != v);
              best = wins ? v : best;
              code = wins ? splat<T>(static_cast<T>((kd * 3 + kh) * 3 + kw)) : code;
            }
          }
        }
        store_upto<T>(out.data + pixel * out.pitch + c, best, n);
        store_codes<T>(argmax + pixel * input.c + c, code, n);
      }
    }
  });
}

// The windows that hold a place of a dimension, and its position in each: an even place is the
// middle of one window, an odd one the last of one and the first of the next.
struct HoldingWindows {
  int64_t first, count, position;  // of the place in the first window

  HoldingWindows(bool pooled, int64_t place, int64_t windows)
      : first(pooled ? place / 2 : 0),
        count(pooled && place % 2 == 1 && first + 1 < windows ? 2 : 1),
        position(!pooled          ? 0
                 : place % 2 == 1 ? 2
                                  : 1) {}
};

// Calls each(x, gradient) for the activations of one line of the images and a vector of channels.
// Every pixel asks the windows that hold it, at most two in a dimension, whether it was their
// maximum, so that no two threads write the same place.
template <class T, class S, class Each>
DF_INLINE void unpool_line(const Image<const S>& grad_out, const uint8_t* argmax,
                           const Image<const S>& input, int64_t line, int64_t c, int64_t n,
                           const Each& each) {
  const int64_t slice = line / input.h, channels = input.c, w = input.w;
  const HoldingWindows deep(input.dims > 2, slice % input.d, grad_out.d);
  const HoldingWindows down(input.dims > 1, line % input.h, grad_out.h);
  struct Row {
    int64_t pixel;  // first of the row of windows
    Vec<T> code;    // of the line's first position in these
  } rows[4];
  int64_t count = 0;
  for (int64_t i = 0; i < deep.count; ++i) {
    const int64_t z = slice / input.d * grad_out.d + deep.first + i;
    for (int64_t j = 0; j < down.count; ++j) {
      const int64_t code = 3 * (i ? 0 : deep.position) + (j ? 0 : down.position);
      rows[count++] = {(z * grad_out.h + down.first + j) * grad_out.w,
                       splat<T>(static_cast<T>(3 * code))};
    }
  }
  const auto gradient_of = [&](Vec<T> won, Vec<T> dy, Vec<T> position) {
    return won == position ? dy : zero<T>();
  };
  Vec<T> right = zero<T>();  // from the last window to the pixel between it and the next
  for (int64_t ox = 0; ox < grad_out.w; ++ox) {
    const auto at = [&](int64_t pixel, Vec<T> first, Vec<T>(&columns)[3]) {
      const Vec<T> won = load_codes<T>(argmax + pixel * channels + c, n);
      const Vec<T> dy = load_upto<T>(grad_out.data + pixel * grad_out.pitch + c, n);
      for (int kw = 0; kw < 3; ++kw) {
        columns[kw] += gradient_of(won, dy, first + splat<T>(static_cast<T>(kw)));
      }
    };
    Vec<T> columns[3] = {right, zero<T>(), zero<T>()};
    for (int64_t i = 0; i < count; ++i) at(rows[i].pixel + ox, rows[i].code, columns);
    if (ox > 0) each(2 * ox - 1, columns[0]);
    each(2 * ox, columns[1]);
    right = columns[2];
  }
  if (2 * grad_out.w - 1 < w) each(w - 1, right);
}

// Both passes make D, the gradient behind the mask, anew: storing it would cost more.
template <class S>
void norm_relu_maxpool_backward(Image<const S> grad_out, const uint8_t* argmax,
                                Image<const S> input, Norm<Compute<S>> norm, bool batch_statistics,
                                Image<S> grad_input, NormGradient<Compute<S>> grad_affine) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const int64_t channels = input.c;
  const EqualParts lines(input.slices() * input.h, 64, 1);
  const auto masked_line = [&](int64_t line, int64_t c, int64_t n, const auto& each) {
    const Vec<T> scale = load_upto<T>(norm.scale + c, n), shift = load_upto<T>(norm.shift + c, n);
    const S* from = input.data + line * input.w * input.pitch + c;
    unpool_line<T>(grad_out, argmax, input, line, c, n, [&](int64_t x, Vec<T> gradient) {
      const Vec<T> value = load_upto<T>(from + x * input.pitch, n);
      each(x, value, where_positive<T>(fma<T>(scale, value, shift), gradient));
    });
  };

  const TaskSums<T> sums(lines.count, channels);
  for_each_task(lines.count, [&](int64_t task) {
    for (int64_t line = lines.begin(task); line < lines.end(task); ++line) {
      for (int64_t c = 0; c < channels; c += L) {
        const int64_t n = channels - c;
        const Vec<T> mean = load_upto<T>(norm.mean + c, n);
        Vec<T> sum = zero<T>(), sum_centred = zero<T>();
        masked_line(line, c, n, [&](int64_t, Vec<T> value, Vec<T> d) {
          sum += d;
          sum_centred = fma<T>(d, value - mean, sum_centred);
        });
        sums.add(task, c, sum, sum_centred);
      }
    }
  });
  sums.finish(norm.rstd, channels, grad_affine);

  // gradient = scale * (D - beta / M - xhat * gamma / M)
  const T inverse = batch_statistics ? static_cast<T>(1.0 / static_cast<double>(input.rows())) : 0;
  for_each_task(lines.count, [&](int64_t task) {
    for (int64_t line = lines.begin(task); line < lines.end(task); ++line) {
      for (int64_t c = 0; c < channels; c += L) {
        const int64_t n = channels - c;
        const Vec<T> scale = load_upto<T>(norm.scale + c, n);
        const Vec<T> mean = load_upto<T>(norm.mean + c, n);
        const Vec<T> constant = load_upto<T>(grad_affine.beta + c, n) * splat<T>(inverse);
        const Vec<T> slope = load_upto<T>(grad_affine.gamma + c, n) * splat<T>(inverse) *
                             load_upto<T>(norm.rstd + c, n);
        S* to = grad_input.data + line * input.w * grad_input.pitch + c;
        masked_line(line, c, n, [&](int64_t x, Vec<T> value, Vec<T> d) {
          const Vec<T> gradient = scale * (d - constant - (value - mean) * slope);
          store_upto<T>(to + x * grad_input.pitch, gradient, n);
        });
      }
    }
  });
}

}  // namespace
}  // namespace densenet_fast::cpu
