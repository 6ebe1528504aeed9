// Second stage of every reduction: per-tile partial results, merged in a fixed order. No atomics,
// so results are bitwise repeatable.
#pragma once

#include "arguments.cuh"
#include "launch.cuh"

namespace densenet_fast::cuda {

constexpr int kReduceColumns = 32;  // channels of a block
constexpr int kReduceRuns = 8;      // runs of tiles merged side by side

// Chan's merge of (count, mean, M2) over tiles: eight interleaved runs, then the runs in order.
template <class A>
__global__ void __launch_bounds__(kReduceColumns* kReduceRuns)
    finish_statistics(TileStatistics<A> partial, int tiles, int channels, A* mean, A* var) {
  DF_DYNAMIC_SHARED(shared);
  A* means = reinterpret_cast<A*>(shared);
  A* m2s = means + kReduceColumns * kReduceRuns;
  A* counts = m2s + kReduceColumns * kReduceRuns;
  const int c = blockIdx.x * kReduceColumns + threadIdx.x, run = threadIdx.y;
  const int slot = run * kReduceColumns + threadIdx.x;
  const auto merge = [](A& count, A& mean, A& m2, A added, A other_mean, A other_m2) {
    if (added == A(0)) return;
    const A total = count + added, delta = other_mean - mean, share = added / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * share * count;
    count = total;
  };
  A count = 0, m = 0, m2 = 0;
  if (c < channels) {
    for (int tile = run; tile < tiles; tile += kReduceRuns) {
      const int64_t at = int64_t{tile} * channels + c;
      merge(count, m, m2, static_cast<A>(partial.count[tile]), partial.mean[at], partial.m2[at]);
    }
  }
  means[slot] = m;
  m2s[slot] = m2;
  counts[slot] = count;
  __syncthreads();
  if (run != 0 || c >= channels) return;
  for (int r = 1; r < kReduceRuns; ++r) {
    const int other = r * kReduceColumns + threadIdx.x;
    merge(count, m, m2, counts[other], means[other], m2s[other]);
  }
  mean[c] = m;
  var[c] = m2 / count;
}

// grad_beta = sum, grad_gamma = rstd * sum of the centred products, over tiles.
template <class A>
__global__ void __launch_bounds__(kReduceColumns* kReduceRuns)
    finish_sums(TileSums<A> partial, int tiles, int channels, const A* rstd, A* grad_gamma,
                A* grad_beta) {
  DF_DYNAMIC_SHARED(shared);
  A* sums = reinterpret_cast<A*>(shared);
  A* centred = sums + kReduceColumns * kReduceRuns;
  const int c = blockIdx.x * kReduceColumns + threadIdx.x, run = threadIdx.y;
  const int slot = run * kReduceColumns + threadIdx.x;
  A sum = 0, sum_centred = 0;
  if (c < channels) {
    for (int tile = run; tile < tiles; tile += kReduceRuns) {
      const int64_t at = int64_t{tile} * channels + c;
      sum += partial.sum[at];
      sum_centred += partial.sum_centred[at];
    }
  }
  sums[slot] = sum;
  centred[slot] = sum_centred;
  __syncthreads();
  if (run != 0 || c >= channels) return;
  for (int r = 1; r < kReduceRuns; ++r) {
    sum += sums[r * kReduceColumns + threadIdx.x];
    sum_centred += centred[r * kReduceColumns + threadIdx.x];
  }
  grad_beta[c] = sum;
  grad_gamma[c] = sum_centred * rstd[c];
}

// out[place(i)] = sum over splits of partial[split, i]. `taps` 9: i = (tap, o, c) goes to (o, c,
// tap).
template <class A, class Out>
__global__ void __launch_bounds__(kThreads)
    add_splits(const A* partial, int splits, int64_t size, int taps, Out* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  A sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[s * size + i];
  const int64_t plane = size / taps;
  out[i % plane * taps + i / plane] = narrow<Out>(sum);
}

template <class A>
TileStatistics<A> allocate_statistics(const Context& context, int64_t tiles, int64_t channels) {
  TileStatistics<A> s;
  s.mean = static_cast<A*>(context.workspace->allocate(sizeof(A) * tiles * channels));
  s.m2 = static_cast<A*>(context.workspace->allocate(sizeof(A) * tiles * channels));
  s.count = static_cast<int*>(context.workspace->allocate(sizeof(int) * tiles));
  return s;
}

template <class A>
TileSums<A> allocate_sums(const Context& context, int64_t tiles, int64_t channels) {
  return {static_cast<A*>(context.workspace->allocate(sizeof(A) * tiles * channels)),
          static_cast<A*>(context.workspace->allocate(sizeof(A) * tiles * channels))};
}

inline dim3 reduce_grid(int64_t channels) {
  return dim3(static_cast<unsigned>((channels + kReduceColumns - 1) / kReduceColumns));
}

template <class A>
void run_finish_statistics(const Context& context, const TileStatistics<A>& partial, int64_t tiles,
                           int64_t channels, const StatisticsResult& out) {
  launch(&finish_statistics<A>,
         LaunchConfig{"finish_statistics", reduce_grid(channels), dim3(kReduceColumns, kReduceRuns),
                      3 * sizeof(A) * kReduceColumns * kReduceRuns, context.stream},
         partial, static_cast<int>(tiles), static_cast<int>(channels), static_cast<A*>(out.mean),
         static_cast<A*>(out.var));
}

template <class A>
void run_finish_sums(const Context& context, const TileSums<A>& partial, int64_t tiles,
                     int64_t channels, const NormArgument& norm, const NormGradientResult& out) {
  launch(&finish_sums<A>,
         LaunchConfig{"finish_sums", reduce_grid(channels), dim3(kReduceColumns, kReduceRuns),
                      2 * sizeof(A) * kReduceColumns * kReduceRuns, context.stream},
         partial, static_cast<int>(tiles), static_cast<int>(channels),
         static_cast<const A*>(norm.rstd), static_cast<A*>(out.gamma), static_cast<A*>(out.beta));
}

// Adds split partials into a weight gradient of the weight's type.
template <class P>
void run_add_splits(const Context& context, const Accumulator<typename P::Element>* partial,
                    int64_t splits, int64_t size, int taps, const WeightGradient& out) {
  using E = typename P::Element;
  using A = Accumulator<E>;
  const LaunchConfig config{"add_splits",
                            dim3(static_cast<unsigned>((size + kThreads - 1) / kThreads)),
                            dim3(kThreads), 0, context.stream};
  if (out.is_float32 && sizeof(E) == 2) {
    launch(&add_splits<A, A>, config, partial, static_cast<int>(splits), size, taps,
           static_cast<A*>(out.data));
  } else {
    launch(&add_splits<A, E>, config, partial, static_cast<int>(splits), size, taps,
           static_cast<E*>(out.data));
  }
}

}  // namespace densenet_fast::cuda
