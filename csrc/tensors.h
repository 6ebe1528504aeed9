// What both backends check of their tensors, whatever they make of them afterwards.
// densenet_fast/operators/ has checked everything with better messages; this is the second line.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace densenet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An NHWC image batch: n * h * w rows of c channels, `pitch` elements apart.
struct Rows {
  int64_t n, h, w, c, pitch;
};

inline void check_type(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another dtype than the features");
}

inline Rows rows(const Tensor& t, ScalarType type, const char* name) {
  check_type(t, type, name);
  STD_TORCH_CHECK(t.dim() == 4, name, " must be [N, H, W, C], got ", t.dim(), " dimensions");
  const int64_t n = t.size(0), h = t.size(1), w = t.size(2), c = t.size(3);
  STD_TORCH_CHECK(t.numel() > 0, name, " must have at least one element");
  // The stride of a dimension of size one means nothing; the pitch is the first that does.
  int64_t pitch = c;
  if (w > 1) {
    pitch = t.stride(2);
  } else if (h > 1) {
    pitch = t.stride(1);
  } else if (n > 1) {
    pitch = t.stride(0);
  }
  STD_TORCH_CHECK((c <= 1 || t.stride(3) == 1) && pitch >= c &&
                      (h <= 1 || t.stride(1) == w * pitch) &&
                      (n <= 1 || t.stride(0) == h * w * pitch),
                  name, " must have its channels innermost and evenly spaced rows of pixels");
  return {n, h, w, c, pitch};
}

inline void check_vector(const Tensor& t, ScalarType type, int64_t size, const char* name) {
  check_type(t, type, name);
  STD_TORCH_CHECK(t.numel() == size && t.is_contiguous(), name, " must be contiguous with ", size,
                  " elements, got ", t.numel());
}

inline void check_weight(const Tensor& t, int64_t kernel, int64_t in) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK((dims == 4 || (dims == 2 && kernel == 1)) && t.size(1) == in,
                  "weight does not fit ", in, " channels");
  STD_TORCH_CHECK(dims == 2 || (t.size(2) == kernel && t.size(3) == kernel),
                  "weight must be [out, in, ", kernel, ", ", kernel, "]");
}

inline void check_statistics(const OptionalTensor& mean, const OptionalTensor& var) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var are given together or not");
}

// Absent together: no data gradient is wanted.
inline void check_norm_gradient(const OptionalTensor& gamma, const OptionalTensor& beta,
                                bool needed) {
  STD_TORCH_CHECK(gamma.has_value() == beta.has_value() && (gamma.has_value() || !needed),
                  "grad_gamma and grad_beta are given together, and with every data gradient");
}

inline void check_count(int64_t count) {
  STD_TORCH_CHECK(count > 1, "an unbiased variance needs more than one value per channel");
}

// The sizes of images, of whatever type that has n, h, w and c.

template <class A, class B>
void check_same_pixels(const A& a, const B& b) {
  STD_TORCH_CHECK(a.n == b.n && a.h == b.h && a.w == b.w,
                  "images of one operator differ in batch or size");
}

template <class A, class B>
void check_same_shape(const A& a, const B& b, const char* name) {
  check_same_pixels(a, b);
  STD_TORCH_CHECK(a.c == b.c, name, " has another number of channels");
}

template <class A>
void check_channels(const A& a, int64_t channels, const char* name) {
  STD_TORCH_CHECK(a.c == channels, name, " and weight differ in channels");
}

template <class A, class B>
void check_pooled(const A& x, const B& pooled) {
  STD_TORCH_CHECK(pooled.n == x.n && pooled.h == x.h / 2 && pooled.w == x.w / 2,
                  "the transition halves both sides of the image");
}

template <class A, class B>
void check_max_pooled(const A& x, const B& pooled, const Tensor& argmax) {
  STD_TORCH_CHECK(
      pooled.n == x.n && pooled.h == (x.h + 1) / 2 && pooled.w == (x.w + 1) / 2 && pooled.c == x.c,
      "the stem's pooling halves both sides of the image, rounding up");
  STD_TORCH_CHECK(argmax.scalar_type() == ScalarType::Byte && argmax.is_contiguous() &&
                      argmax.numel() == pooled.n * pooled.h * pooled.w * pooled.c,
                  "argmax must be contiguous uint8 of the pooled shape");
}

}  // namespace densenet_fast
