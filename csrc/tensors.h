// What both backends check of their tensors, whatever they make of them afterwards. It is all that
// an operator called by itself is checked for: nodes have checked what users gave them.
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
  STD_TORCH_CHECK(t.scalar_type() == type, "`", name, "` should have type ", type, ", got ",
                  t.scalar_type());
}

inline Rows rows(const Tensor& t, ScalarType type, const char* name) {
  check_type(t, type, name);
  STD_TORCH_CHECK(t.dim() == 4, "`", name, "` should have four dimensions [N, H, W, C], got ",
                  t.dim());
  const int64_t n = t.size(0), h = t.size(1), w = t.size(2), c = t.size(3);
  STD_TORCH_CHECK(t.numel() > 0, "`", name, "` should have at least one element");
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
                  "`", name, "` should have its pixels as rows of channels, one pitch apart");
  return {n, h, w, c, pitch};
}

inline void check_vector(const Tensor& t, ScalarType type, int64_t size, const char* name) {
  check_type(t, type, name);
  STD_TORCH_CHECK(t.numel() == size, "`", name, "` should have ", size, " elements, got ",
                  t.numel());
  STD_TORCH_CHECK(t.is_contiguous(), "`", name, "` should be contiguous");
}

inline void check_weight(const Tensor& t, int64_t kernel, int64_t in) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK((dims == 4 || (dims == 2 && kernel == 1)) && t.size(1) == in,
                  "`weight` should have ", in, " input channels");
  STD_TORCH_CHECK(dims == 2 || (t.size(2) == kernel && t.size(3) == kernel),
                  "`weight` should have shape [out, in, ", kernel, ", ", kernel, "]");
}

inline void check_statistics(const OptionalTensor& mean, const OptionalTensor& var) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value(),
                  "`mean` and `var` should both be tensors or both be None");
}

// Absent together: no data gradient is wanted.
inline void check_norm_gradient(const OptionalTensor& gamma, const OptionalTensor& beta,
                                bool needed) {
  STD_TORCH_CHECK(gamma.has_value() == beta.has_value() && (gamma.has_value() || !needed),
                  "`grad_gamma` and `grad_beta` should both be tensors, or both be None where no "
                  "gradient of the data is wanted either");
}

inline void check_count(int64_t count) {
  STD_TORCH_CHECK(count > 1, "an unbiased variance needs more than one value per channel");
}

}  // namespace densenet_fast
