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

// Memory handed out piece by piece, again from a mark on. Without any it counts what is needed.
class Arena : public Workspace {
 public:
  explicit Arena(void* memory = nullptr) : memory_(reinterpret_cast<uintptr_t>(memory)) {}
  void* allocate(size_t bytes) override {
    const size_t at = used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    most_ = most_ < used_ ? used_ : most_;
    // Nobody takes a counted piece for one that is not wanted.
    return reinterpret_cast<void*>((memory_ ? memory_ : kAlignment) + at);
  }
  size_t used() const { return used_; }
  size_t most() const { return most_; }
  void release(size_t mark) { used_ = mark; }

 private:
  static constexpr size_t kAlignment = 256;
  uintptr_t memory_;
  size_t used_ = 0, most_ = 0;
};

struct Stream {
  cudaStream_t handle;
  bool counting = false;  // nothing is launched: only the memory is counted
};

// Partial results of a weight gradient: sum over splits of partial[split, i] goes to place(i).
// i = (tap, o, c) goes to (o, c, tap), or (o, tap, c).
struct SplitSums {
  const void* partial;
  int splits;
  int64_t size;
  int taps, channels;
  WeightGradient out;
};

struct Context {
  Dtype dtype;      // of all images
  bool allow_tf32;  // float32 products may use tf32 tensor cores
  Stream stream;
  Workspace* workspace;
  Arena* arena = nullptr;                   // the workspace of several products
  std::vector<SplitSums>* later = nullptr;  // their splits, to be added at once; null: one by one
};

void channel_statistics(const Context&, const ImageArgument& features, const StatisticsResult&);
// out = the sum of split[splits, rows, channels], and its statistics.
void add_row_splits(const Context&, const ImageArgument& out, const void* split, int splits,
                    const StatisticsResult&);
void norm_coefficients(const Context&, const std::vector<NormCoefficients>& norms);
void update_running_statistics(const Context&, const std::vector<RunningUpdate>& updates,
                               const std::vector<int64_t*>& counters);
// The map of `NormBackward`, from sums that are there; null: a frozen norm's.
void norm_grad_coefficients(const Context&, const NormBackward&, const NormGradientResult& sums);
void pack_weights(const Context&, const std::vector<PackRequest>& requests);
void add_splits(const Context&, const std::vector<SplitSums>& sums);

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
                      const NormGradientResult&, const WeightGradient&, bool accumulate);
void transition_forward(const Context&, const ImageArgument& features, const NormArgument& act,
                        const WeightArgument& weight, const ImageArgument& out,
                        const StatisticsResult&);
void transition_backward(const Context&, const ImageArgument& grad_out,
                         const ImageArgument& features, const NormArgument&,
                         const WeightArgument& weight, const ImageArgument& grad_features,
                         const NormGradientResult&, const WeightGradient&);

void dropout(const Context&, const ImageArgument& growth, uint64_t seed, double p, bool channels);
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
