// Second stage of every reduction: per-tile partial results, merged in a fixed order. No atomics,
// so results are bitwise repeatable.
#pragma once

#include "arguments.cuh"
#include "launch.cuh"

namespace densenet_fast::cuda {

constexpr int kReduceColumns = 32;  // channels of a block
constexpr int kReduceRuns = 8;      // runs of tiles merged side by side

// A launch's parameters hold so many norms, weights or counters.
constexpr int kTableSize = 48;

// `NormCoefficients`, typed.
template <class A>
struct NormRecipe {
  const A* mean;
  const A* var;
  const A* gamma;
  const A* beta;
  A eps;
  A* scale;
  A* shift;
  A* rstd;
  int channels;  // 0: there is none

  __device__ void make(int64_t c, A m, A v) const {
    const A r = A(1) / sqrt(v + eps);
    const A a = gamma ? gamma[c] * r : r;
    rstd[c] = r;
    scale[c] = a;
    shift[c] = (beta ? beta[c] : A(0)) - multiply(m, a);
  }
};

template <class A>
NormRecipe<A> norm_recipe(const NormCoefficients& n) {
  return {
      static_cast<const A*>(n.mean), static_cast<const A*>(n.var), static_cast<const A*>(n.weight),
      static_cast<const A*>(n.bias), static_cast<A>(n.eps),        static_cast<A*>(n.scale),
      static_cast<A*>(n.shift),      static_cast<A*>(n.rstd),      static_cast<int>(n.channels)};
}

// `NormBackward`, typed.
template <class A>
struct BackwardRecipe {
  Norm<A> norm;
  A inverse;  // of the count; 0: frozen
  A* map;
  A* sum_grad;
  A* sum_grad_x;

  __device__ void run(int c, int channels, A gamma, A beta) const {
    if (map) {
      const bool frozen = inverse == A(0);
      const A q = frozen ? A(0) : -norm.scale[c] * norm.rstd[c] * gamma * inverse;
      map[c] = norm.scale[c];
      map[channels + c] = q;
      map[2 * channels + c] =
          frozen ? A(0) : -norm.scale[c] * beta * inverse - multiply(q, norm.mean[c]);
    }
    if (sum_grad) {
      sum_grad[c] = multiply_add(norm.scale[c], beta, sum_grad[c]);
      sum_grad_x[c] = multiply_add(norm.scale[c] * norm.rstd[c], gamma, sum_grad_x[c]);
    }
  }
};

template <class A>
BackwardRecipe<A> backward_recipe(const NormBackward* next) {
  if (!next) return {};
  return {norm<A>(next->norm),
          static_cast<A>(next->count ? 1.0 / static_cast<double>(next->count) : 0.0),
          static_cast<A*>(next->map), static_cast<A*>(next->sum_grad),
          static_cast<A*>(next->sum_grad_x)};
}

// Chan's merge of (count, mean, M2) over tiles: eight interleaved runs, then the runs in order.
template <class A>
__global__ void __launch_bounds__(kReduceColumns* kReduceRuns)
    finish_statistics(TileStatistics<A> partial, int tiles, int channels, A* mean, A* var,
                      NormRecipe<A> next) {
  DF_DYNAMIC_SHARED(shared);
  A* means = reinterpret_cast<A*>(shared);
  A* m2s = means + kReduceColumns * kReduceRuns;
  A* counts = m2s + kReduceColumns * kReduceRuns;
  const int before = next.channels ? next.channels - channels : 0;
  const int c = static_cast<int>(blockIdx.x * kReduceColumns + threadIdx.x) - before;
  const int run = threadIdx.y;
  const int slot = run * kReduceColumns + threadIdx.x;
  const auto merge = [](A& count, A& mean, A& m2, A added, A other_mean, A other_m2) {
    if (added == A(0)) return;
    const A total = count + added, delta = other_mean - mean, share = added / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * share * count;
    count = total;
  };
  A count = 0, m = 0, m2 = 0;
  if (0 <= c && c < channels) {
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
  if (c < 0) return next.make(before + c, next.mean[before + c], next.var[before + c]);
  for (int r = 1; r < kReduceRuns; ++r) {
    const int other = r * kReduceColumns + threadIdx.x;
    merge(count, m, m2, counts[other], means[other], m2s[other]);
  }
  const A v = m2 / count;
  mean[c] = m;
  var[c] = v;
  if (next.channels) next.make(before + c, m, v);
}

// grad_beta = sum, grad_gamma = rstd * sum of the centred products, over tiles.
template <class A>
__global__ void __launch_bounds__(kReduceColumns* kReduceRuns)
    finish_sums(TileSums<A> partial, int tiles, int channels, const A* rstd, A* grad_gamma,
                A* grad_beta, BackwardRecipe<A> next) {
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
  const A gamma = sum_centred * rstd[c];
  grad_beta[c] = sum;
  grad_gamma[c] = gamma;
  next.run(c, channels, gamma, sum);
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
         LaunchConfig{"finish_statistics", reduce_grid(out.next ? out.next->channels : channels),
                      dim3(kReduceColumns, kReduceRuns),
                      3 * sizeof(A) * kReduceColumns * kReduceRuns, context.stream},
         partial, static_cast<int>(tiles), static_cast<int>(channels), static_cast<A*>(out.mean),
         static_cast<A*>(out.var), out.next ? norm_recipe<A>(*out.next) : NormRecipe<A>{});
}

template <class A>
void run_finish_sums(const Context& context, const TileSums<A>& partial, int64_t tiles,
                     int64_t channels, const NormArgument& norm, const NormGradientResult& out) {
  launch(&finish_sums<A>,
         LaunchConfig{"finish_sums", reduce_grid(channels), dim3(kReduceColumns, kReduceRuns),
                      2 * sizeof(A) * kReduceColumns * kReduceRuns, context.stream},
         partial, static_cast<int>(tiles), static_cast<int>(channels),
         static_cast<const A*>(norm.rstd), static_cast<A*>(out.gamma), static_cast<A*>(out.beta),
         backward_recipe<A>(out.next));
}

// Now, or with those of other products.
inline void leave_splits(const Context& context, const SplitSums& sums) {
  if (context.later) {
    context.later->push_back(sums);
  } else {
    add_splits(context, {sums});
  }
}

}  // namespace densenet_fast::cuda
