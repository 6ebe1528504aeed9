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

// A batch of images [N, W, C], [N, H, W, C] or [N, D, H, W, C]: rows of c channels, `pitch`
// elements apart; sizes of dimensions that it has not are 1.
struct Rows {
  int64_t n, d, h, w, c, pitch;
  int dims;
};

inline void check_type(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, "`", name, "` should have type ", type, ", got ",
                  t.scalar_type());
}

inline Rows rows(const Tensor& t, ScalarType type, const char* name) {
  check_type(t, type, name);
  const int64_t channels = t.dim() - 1;
  const int dims = static_cast<int>(channels - 1);
  STD_TORCH_CHECK(1 <= dims && dims <= 3, "`", name,
                  "` should have three to five dimensions, [N, H, W, C] for images, got ", t.dim());
  STD_TORCH_CHECK(t.numel() > 0, "`", name, "` should have at least one element");
  const int64_t c = t.size(channels);
  // The stride of a dimension of size one means nothing; the pitch is the first that does.
  int64_t pitch = c, rows = 1;
  bool known = false, regular = c <= 1 || t.stride(channels) == 1;
  for (int64_t i = channels; i-- > 0;) {
    const int64_t size = t.size(i);
    if (size > 1) {
      if (!known) pitch = t.stride(i);
      known = true;
      regular = regular && t.stride(i) == rows * pitch;
    }
    rows *= size;
  }
  STD_TORCH_CHECK(regular && pitch >= c, "`", name,
                  "` should have its pixels as rows of channels, one pitch apart");
  const auto size = [&](int back) { return back <= dims ? t.size(channels - back) : 1; };
  return {t.size(0), size(3), size(2), size(1), c, pitch, dims};
}

inline void check_vector(const Tensor& t, ScalarType type, int64_t size, const char* name) {
  check_type(t, type, name);
  STD_TORCH_CHECK(t.numel() == size, "`", name, "` should have ", size, " elements, got ",
                  t.numel());
  STD_TORCH_CHECK(t.is_contiguous(), "`", name, "` should be contiguous");
}

inline void check_weight(const Tensor& t, int64_t kernel, int64_t in, int dims) {
  bool fits = t.dim() == 2 + dims || (t.dim() == 2 && kernel == 1);
  STD_TORCH_CHECK(fits && t.size(1) == in, "`weight` should have ", in, " input channels and ",
                  dims, " dimensions behind them");
  for (int64_t i = 2; i < t.dim(); ++i) fits = fits && t.size(i) == kernel;
  STD_TORCH_CHECK(fits, "`weight` should have ", kernel,
                  " elements in every dimension of its kernels");
}

// Dense, and as channels_last weights are: [out, kernel, in].
inline bool is_channels_last(const Tensor& t) {
  int64_t elements = 1;
  bool dense = t.dim() > 2;
  const auto next = [&](int64_t dim) {
    dense = dense && (t.size(dim) == 1 || t.stride(dim) == elements);
    elements *= t.size(dim);
  };
  next(1);
  for (int64_t i = t.dim(); dense && i-- > 2;) next(i);
  next(0);
  return dense;
}

inline void check_weight_gradient(const Tensor& t, const Tensor& weight) {
  check_type(t, weight.scalar_type(), "grad_weight");
  STD_TORCH_CHECK(t.numel() == weight.numel(), "`grad_weight` should have ", weight.numel(),
                  " elements, got ", t.numel());
  STD_TORCH_CHECK(t.is_contiguous() || is_channels_last(t),
                  "`grad_weight` should be contiguous, or channels_last");
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
