// The CUDA backend's operators as plain functions: device pointers, sizes and a stream, no torch
// types. The torch dispatch and the emulator's tests call the same functions.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "operators.h"

namespace densenet_fast::cuda {

using namespace densenet_fast;  // the arguments

// Memory for one operator call, given back behind it in stream order.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual void* allocate(size_t bytes) = 0;
};

struct Context {
  Dtype dtype;      // of all images
  bool allow_tf32;  // float32 products may use tf32 tensor cores
  cudaStream_t stream;
  Workspace* workspace;
};

void channel_statistics(const Context&, const ImageArgument& features, const StatisticsResult&);
void norm_coefficients(const Context&, int64_t channels, const void* mean, const void* var,
                       const void* gamma, const void* beta, double eps, void* scale, void* shift,
                       void* rstd);
void update_running_statistics(const Context&, const std::vector<RunningUpdate>& updates,
                               const std::vector<int64_t*>& counters);
// Sums null: a frozen norm's.
void norm_grad_coefficients(const Context&, int64_t channels, const NormArgument&,
                            const NormGradientResult& sums, int64_t count, void* coefficients);
void defer_correction(const Context&, int64_t channels, const NormArgument&,
                      const NormGradientResult& sums, void* sum_grad, void* sum_grad_x);

void conv1x1_forward(const Context&, const ImageArgument& features, const NormArgument& act,
                     const WeightArgument& weight, const ImageArgument& bottleneck,
                     const StatisticsResult&);
void conv1x1_backward(const Context&, const ImageArgument& grad_norm,
                      const ImageArgument& bottleneck, const void* coefficients,
                      const ImageArgument& features, const NormArgument&,
                      const WeightArgument& weight, const ImageArgument& grad_features,
                      const NormGradientResult&, const WeightGradient&);
void conv3x3_forward(const Context&, const ImageArgument& bottleneck, const NormArgument& act,
                     const WeightArgument& weight, const ImageArgument& growth,
                     const StatisticsResult&);
void conv3x3_backward(const Context&, const ImageArgument& grad_growth,
                      const ImageArgument& bottleneck, const NormArgument&,
                      const WeightArgument& weight, const ImageArgument& grad_norm,
                      const NormGradientResult&, const WeightGradient&);
void transition_forward(const Context&, const ImageArgument& features, const NormArgument& act,
                        const WeightArgument& weight, const ImageArgument& out,
                        const StatisticsResult&);
void transition_backward(const Context&, const ImageArgument& grad_out,
                         const ImageArgument& features, const NormArgument&,
                         const WeightArgument& weight, const ImageArgument& grad_features,
                         const NormGradientResult&, const WeightGradient&);

void dropout(const Context&, const ImageArgument& growth, uint64_t seed, double p);
void finish_gradient(const Context&, const ImageArgument& features,
                     const ImageArgument& grad_features, const void* mean, const void* sum_grad,
                     const void* sum_grad_x, const ImageArgument& out);
void norm_relu_avgpool_forward(const Context&, const ImageArgument& features,
                               const NormArgument& act, void* out);
void norm_relu_avgpool_backward(const Context&, const void* grad_out, const ImageArgument& features,
                                const NormArgument&, const ImageArgument& grad_features,
                                const NormGradientResult&);
void norm_relu_maxpool_forward(const Context&, const ImageArgument& input, const NormArgument& act,
                               const ImageArgument& out, uint8_t* argmax);
void norm_relu_maxpool_backward(const Context&, const ImageArgument& grad_out,
                                const uint8_t* argmax, const ImageArgument& input,
                                const NormArgument&, bool batch_statistics,
                                const ImageArgument& grad_input, const NormGradientResult&);

}  // namespace densenet_fast::cuda
