#include "pointwise.cuh"

#include <algorithm>

namespace densenet_fast::cuda {
namespace {

constexpr int kStatisticsRows = 256;  // of one tile

// Mean and M2 of 256 rows for 32 channels: two passes, eight rows side by side.
template <class E>
__global__ void __launch_bounds__(kReduceColumns* kReduceRuns)
    tile_statistics(Image<const E> x, int64_t rows, TileStatistics<Accumulator<E>> partial) {
  using A = Accumulator<E>;
  DF_DYNAMIC_SHARED(shared);
  A* sums = reinterpret_cast<A*>(shared);
  const int c = blockIdx.y * kReduceColumns + threadIdx.x, run = threadIdx.y;
  const int64_t begin = int64_t{blockIdx.x} * kStatisticsRows;
  const int64_t end = begin + kStatisticsRows < rows ? begin + kStatisticsRows : rows;
  const auto total = [&](A value) {  // over the runs, in order
    __syncthreads();
    sums[run * kReduceColumns + threadIdx.x] = value;
    __syncthreads();
    A sum = 0;
    for (int r = 0; r < kReduceRuns; ++r) sum += sums[r * kReduceColumns + threadIdx.x];
    return sum;
  };
  A sum = 0;
  if (c < x.c) {
    for (int64_t r = begin + run; r < end; r += kReduceRuns) sum += widen(x.data[r * x.pitch + c]);
  }
  const A mean = total(sum) / static_cast<A>(end - begin);
  A m2 = 0;
  if (c < x.c) {
    for (int64_t r = begin + run; r < end; r += kReduceRuns) {
      const A d = widen(x.data[r * x.pitch + c]) - mean;
      m2 = multiply_add(d, d, m2);
    }
  }
  m2 = total(m2);
  if (run != 0) return;
  if (blockIdx.y == 0 && threadIdx.x == 0)
    partial.count[blockIdx.x] = static_cast<int>(end - begin);
  if (c >= x.c) return;
  partial.mean[int64_t{blockIdx.x} * x.c + c] = mean;
  partial.m2[int64_t{blockIdx.x} * x.c + c] = m2;
}

template <class A>
struct NormTable {
  NormRecipe<A> one[kTableSize];
};

// Block y is the y-th norm.
template <class A>
__global__ void __launch_bounds__(kThreads) coefficients_kernel(NormTable<A> table) {
  const NormRecipe<A>& n = table.one[blockIdx.y];
  const int64_t c = flat_index();
  if (c < n.channels) n.make(c, n.mean[c], n.var[c]);
}

template <class A>
struct UpdateTable {
  struct One {
    const A* mean;
    const A* var;
    const A* total;
    A unbiased, keep, take;
    A* running_mean;
    A* running_var;
    int channels;
  } one[kTableSize];
};

// Block y is the y-th norm.
template <class A>
__global__ void __launch_bounds__(kThreads) running_statistics_kernel(UpdateTable<A> table) {
  const auto& u = table.one[blockIdx.y];
  const int64_t c = flat_index();
  if (c >= u.channels) return;
  const A unbiased = u.total ? *u.total / (*u.total - A(1)) : u.unbiased;
  u.running_mean[c] = u.keep * u.running_mean[c] + u.take * u.mean[c];
  u.running_var[c] = u.keep * u.running_var[c] + u.take * (u.var[c] * unbiased);
}

struct CounterTable {
  int64_t* one[kTableSize];
};

__global__ void count_kernel(CounterTable table, unsigned count) {
  // One thread: a counter that norms share may be there twice.
  for (unsigned i = 0; i < count; ++i) ++*table.one[i];
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    grad_coefficients_kernel(int channels, BackwardRecipe<A> recipe, const A* gamma,
                             const A* beta) {
  const int c = static_cast<int>(flat_index());
  if (c < channels) recipe.run(c, channels, gamma ? gamma[c] : A(0), beta ? beta[c] : A(0));
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    finish_gradient_kernel(Image<const E> x, Image<const E> grad, const Accumulator<E>* mean,
                           const Accumulator<E>* sum_grad, const Accumulator<E>* sum_grad_x,
                           Accumulator<E> inverse, int64_t rows, Image<E> out) {
  using A = Accumulator<E>;
  const int64_t i = flat_index();
  if (i >= rows * x.c) return;
  const int64_t row = i / x.c;
  const int c = static_cast<int>(i % x.c);
  const A value = widen(x.data[row * x.pitch + c]) - mean[c];
  const A g = widen(grad.data[row * grad.pitch + c]) - sum_grad[c] * inverse;
  out.data[row * out.pitch + c] = narrow<E>(g - value * (sum_grad_x[c] * inverse));
}

// Philox-4x32-10 (Salmon et al., SC 2011): word `index % 4` of block `index / 4`.
__device__ __forceinline__ uint32_t philox_word(uint64_t seed, uint64_t index) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(index / 4), c1 = static_cast<uint32_t>(index / 4 >> 32);
  uint32_t c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const uint64_t word = index % 4;
  return word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3;
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(Image<E> x, int64_t rows, uint64_t seed, uint64_t threshold,
                   Accumulator<E> keep) {
  using A = Accumulator<E>;
  const int64_t i = flat_index();
  if (i >= rows * x.c) return;
  E& value = x.data[i / x.c * x.pitch + i % x.c];
  const bool kept = philox_word(seed, static_cast<uint64_t>(i)) >= threshold;
  value = narrow<E>(kept ? A(widen(value)) * keep : A(0));
}

}  // namespace

void channel_statistics(const Context& context, const ImageArgument& features,
                        const StatisticsResult& statistics) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    using A = Accumulator<E>;
    const auto x = image<const E>(features);
    const int64_t tiles = (x.rows() + kStatisticsRows - 1) / kStatisticsRows;
    const auto partial = allocate_statistics<A>(context, tiles, x.c);
    launch(&tile_statistics<E>,
           LaunchConfig{"tile_statistics", dim3(static_cast<unsigned>(tiles), reduce_grid(x.c).x),
                        dim3(kReduceColumns, kReduceRuns), sizeof(A) * kReduceColumns * kReduceRuns,
                        context.stream},
           x, x.rows(), partial);
    run_finish_statistics<A>(context, partial, tiles, x.c, statistics);
  });
}

void norm_coefficients(const Context& context, const std::vector<NormCoefficients>& norms) {
  with_element(context, [&](auto policy) {
    using A = Accumulator<typename decltype(policy)::Element>;
    for_each_table<NormTable<A>>(
        norms,
        [](const NormCoefficients& n, NormRecipe<A>& one) {
          one = norm_recipe<A>(n);
          return n.channels;
        },
        [&](const NormTable<A>& table, unsigned count, int64_t most) {
          launch(&coefficients_kernel<A>, flat(context, "norm_coefficients", most, count), table);
        });
  });
}

void update_running_statistics(const Context& context, const std::vector<RunningUpdate>& updates,
                               const std::vector<int64_t*>& counters) {
  with_element(context, [&](auto policy) {
    using A = Accumulator<typename decltype(policy)::Element>;
    using Table = UpdateTable<A>;
    for_each_table<Table>(
        updates,
        [](const RunningUpdate& u, auto& one) {
          const double values = static_cast<double>(u.count);
          one = {static_cast<const A*>(u.mean),    static_cast<const A*>(u.var),
                 static_cast<const A*>(u.total),   static_cast<A>(values / (values - 1)),
                 static_cast<A>(1.0 - u.momentum), static_cast<A>(u.momentum),
                 static_cast<A*>(u.running_mean),  static_cast<A*>(u.running_var),
                 static_cast<int>(u.channels)};
          return u.channels;
        },
        [&](const Table& table, unsigned count, int64_t most) {
          launch(&running_statistics_kernel<A>,
                 flat(context, "update_running_statistics", most, count), table);
        },
        // Buffers that norms share take one step after the other.
        [](const Table& table, unsigned count, const RunningUpdate& u) {
          return std::none_of(table.one, table.one + count, [&](const auto& other) {
            return other.running_mean == u.running_mean;
          });
        });
  });
  for_each_table<CounterTable>(
      counters,
      [](int64_t* counter, int64_t*& one) {
        one = counter;
        return int64_t{1};
      },
      [&](const CounterTable& table, unsigned count, int64_t) {
        launch(&count_kernel, LaunchConfig{"count", dim3(1), dim3(1), 0, context.stream}, table,
               count);
      });
}

void norm_grad_coefficients(const Context& context, const NormBackward& next,
                            const NormGradientResult& sums) {
  with_element(context, [&](auto policy) {
    using A = Accumulator<typename decltype(policy)::Element>;
    launch(&grad_coefficients_kernel<A>, flat(context, "norm_grad_coefficients", next.channels),
           static_cast<int>(next.channels), backward_recipe<A>(&next),
           static_cast<const A*>(sums.gamma), static_cast<const A*>(sums.beta));
  });
}

void finish_gradient(const Context& context, const ImageArgument& features,
                     const ImageArgument& grad_features, const void* mean, const void* sum_grad,
                     const void* sum_grad_x, const ImageArgument& out) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    using A = Accumulator<E>;
    const auto x = image<const E>(features);
    launch(&finish_gradient_kernel<E>, flat(context, "finish_gradient", x.rows() * x.c), x,
           image<const E>(grad_features), static_cast<const A*>(mean),
           static_cast<const A*>(sum_grad), static_cast<const A*>(sum_grad_x),
           static_cast<A>(1.0 / static_cast<double>(x.rows())), x.rows(), image<E>(out));
  });
}

void dropout(const Context& context, const ImageArgument& growth, uint64_t seed, double p) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    using A = Accumulator<E>;
    const auto x = image<E>(growth);
    launch(&dropout_kernel<E>, flat(context, "dropout", x.rows() * x.c), x, x.rows(), seed,
           static_cast<uint64_t>(p * 4294967296.0),
           static_cast<A>(p < 1.0 ? 1.0 / (1.0 - p) : 0.0));
  });
}

}  // namespace densenet_fast::cuda
