// What crosses from the operators to the kernels of either backend: plain pointers and sizes, no
// torch types. The torch dispatch and the emulator's tests call the same functions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace densenet_fast {

enum class Dtype { kFloat16, kBfloat16, kFloat32, kFloat64 };

// Bytes of an image's element, and of one of its vectors of statistics and coefficients: these are
// float32, float64 for float64 images.
constexpr int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
constexpr int64_t vector_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

// An image batch of one, two or three dimensions, channels last, or a channel slice of one: rows of
// pixels `pitch` elements apart; sizes of dimensions that it has not are 1. data null: not given.
struct ImageArgument {
  void* data = nullptr;
  int64_t n = 0, d = 0, h = 0, w = 0, c = 0, pitch = 0;
  int dims = 2;

  int64_t rows() const { return n * d * h * w; }
};

// relu(scale * x + shift), and what its backward needs for x-hat = (x - mean) * rstd. A
// transition's may be `linear`, without the ReLU.
struct NormArgument {
  const void* scale = nullptr;
  const void* shift = nullptr;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  bool linear = false;
};

// A norm to be made of mean and variance.
struct NormCoefficients {
  int64_t channels = 0;
  const void* mean = nullptr;
  const void* var = nullptr;
  const void* weight = nullptr;  // null: ones
  const void* bias = nullptr;    // null: zeros
  double eps = 0;
  void* scale = nullptr;
  void* shift = nullptr;
  void* rstd = nullptr;

  NormArgument norm() const { return {scale, shift, mean, rstd}; }
};

struct StatisticsResult {
  void* mean = nullptr;  // null: not wanted
  void* var = nullptr;
  const NormCoefficients* next = nullptr;  // made then; these are its last channels' statistics
};

// What follows from a norm's sums.
struct NormBackward {
  int64_t channels = 0;
  NormArgument norm;
  int64_t count = 0;         // values of a channel; 0: a frozen norm's
  void* map = nullptr;       // [3, channels]: its backward p * grad + q * x + s; null: not wanted
  void* sum_grad = nullptr;  // what it adds to the deferred sums; null: nothing
  void* sum_grad_x = nullptr;
};

struct NormGradientResult {
  void* gamma = nullptr;  // null: no data gradient is wanted
  void* beta = nullptr;
  const NormBackward* next = nullptr;  // done then
};

// Strides in elements. The type is the images' or float32.
struct WeightArgument {
  const void* data = nullptr;
  bool is_float32 = false;
  int64_t out = 0, in = 0;
  int64_t stride_out = 0, stride_in = 0, stride_d = 0, stride_h = 0, stride_w = 0;
  int dims = 2;  // of the images
  // As a device's `pack_weights` has left it, for the forward and for the gradient of the data.
  const void* packed[2] = {nullptr, nullptr};
};

struct PackRequest {
  WeightArgument* weight;
  int kernel;  // 1 or 3
  bool gradient;
};

// A weight gradient, of the weight's type, dense: [out, in, taps], or [out, taps, in]; null: not
// wanted.
struct WeightGradient {
  void* data = nullptr;
  bool is_float32 = false;
  bool channels_last = false;
};

// One norm's share in `update_running_statistics_`.
struct RunningUpdate {
  int64_t channels;
  const void* mean;
  const void* var;
  const void* total;  // [1]: values of a synchronised norm on all ranks; null: `count`
  int64_t count;
  double momentum;
  void* running_mean;
  void* running_var;
};

}  // namespace densenet_fast

// What a Device forwards to its kernels as it comes, DO(name) for each.
#define DENSENET_FAST_KERNELS(DO) \
  DO(channel_statistics)          \
  DO(conv1x1_forward)             \
  DO(conv1x1_backward)            \
  DO(conv3x3_forward)             \
  DO(conv3x3_backward)            \
  DO(dropout)                     \
  DO(finish_gradient)             \
  DO(transition_forward)          \
  DO(transition_backward)         \
  DO(norm_relu_avgpool_forward)   \
  DO(norm_relu_avgpool_backward)  \
  DO(norm_relu_maxpool_forward)   \
  DO(norm_relu_maxpool_backward)
