// Second stage of every reduction: per-tile partial results, merged in a fixed order. No atomics,
// so results are bitwise repeatable.
#pragma once

#include "arguments.cuh"
#include "launch.cuh"

namespace densenet_fast::cuda {

constexpr int kReduceColumns = 8;  // channels of a block
constexpr int kReduceRuns = 64;    // runs of tiles merged side by side, then as a tree

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

// Partial results of one channel over all tiles, in the first run's threads. `parts` tiles are 128
// rows.
template <class Partial>
__device__ typename Partial::Merged merge_tiles(const Partial& partial, int tiles, int parts, int c,
                                                int channels, unsigned char* shared) {
  using M = typename Partial::Merged;
  M total;
  if (0 <= c && c < channels) {
    for (int64_t first = 4 * threadIdx.y; first * parts < tiles; first += 4 * kReduceRuns) {
      M four[4];  // times 128 rows: loads that do not wait for each other
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        M unit[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int64_t tile = (first + i) * parts + part;
          if (part < parts && tile < tiles) unit[part] = partial.load(tile, c, channels);
        }
        four[i] = merged(unit);
      }
      total.merge(merged(four));
    }
  }
  M* runs = reinterpret_cast<M*>(shared) + threadIdx.x;
  runs[threadIdx.y * kReduceColumns] = total;
  for (int half = kReduceRuns / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.y) < half) {
      total.merge(runs[(threadIdx.y + half) * kReduceColumns]);
      runs[threadIdx.y * kReduceColumns] = total;
    }
  }
  return total;
}

// Mean and variance of a batch, and the norm that is made of them.
template <class A>
__global__ void __launch_bounds__(kReduceColumns* kReduceRuns)
    finish_statistics(TileStatistics<A> partial, int tiles, int parts, int channels, A* mean,
                      A* var, NormRecipe<A> next) {
  DF_DYNAMIC_SHARED(shared);
  const int before = next.channels ? next.channels - channels : 0;
  const int c = static_cast<int>(blockIdx.x * kReduceColumns + threadIdx.x) - before;
  const Moments<A> all = merge_tiles(partial, tiles, parts, c, channels, shared);
  if (threadIdx.y != 0 || c >= channels) return;
  if (c < 0) return next.make(before + c, next.mean[before + c], next.var[before + c]);
  const A v = all.m2 / all.count;
  mean[c] = all.mean;
  var[c] = v;
  if (next.channels) next.make(before + c, all.mean, v);
}

// grad_beta = sum, grad_gamma = rstd * sum of the centred products, over tiles.
template <class A>
__global__ void __launch_bounds__(kReduceColumns* kReduceRuns)
    finish_sums(TileSums<A> partial, int tiles, int parts, int channels, const A* rstd,
                A* grad_gamma, A* grad_beta, BackwardRecipe<A> next) {
  DF_DYNAMIC_SHARED(shared);
  const int c = blockIdx.x * kReduceColumns + threadIdx.x;
  const Sums<A> all = merge_tiles(partial, tiles, parts, c, channels, shared);
  if (threadIdx.y != 0 || c >= channels) return;
  const A gamma = all.centred * rstd[c];
  grad_beta[c] = all.sum;
  grad_gamma[c] = gamma;
  next.run(c, channels, gamma, all.sum);
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

template <class M>
LaunchConfig reduction(const Context& context, const char* name, int64_t channels) {
  return {name, dim3(static_cast<unsigned>(ceil_div(channels, kReduceColumns))),
          dim3(kReduceColumns, kReduceRuns), sizeof(M) * kReduceColumns * kReduceRuns,
          context.stream};
}

// `parts` tiles are 128 rows, or whatever else merges first.
template <class A>
void run_finish_statistics(const Context& context, const TileStatistics<A>& partial, int64_t tiles,
                           int parts, int64_t channels, const StatisticsResult& out) {
  launch(
      &finish_statistics<A>,
      reduction<Moments<A>>(context, "finish_statistics", out.next ? out.next->channels : channels),
      partial, static_cast<int>(tiles), parts, static_cast<int>(channels),
      static_cast<A*>(out.mean), static_cast<A*>(out.var),
      out.next ? norm_recipe<A>(*out.next) : NormRecipe<A>{});
}

template <class A>
void run_finish_sums(const Context& context, const TileSums<A>& partial, int64_t tiles, int parts,
                     int64_t channels, const NormArgument& norm, const NormGradientResult& out) {
  launch(&finish_sums<A>, reduction<Sums<A>>(context, "finish_sums", channels), partial,
         static_cast<int>(tiles), parts, static_cast<int>(channels),
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
