#include "pointwise.cuh"

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
__global__ void __launch_bounds__(kThreads)
    coefficients_kernel(int channels, const A* mean, const A* var, const A* gamma, const A* beta,
                        A eps, A* scale, A* shift, A* rstd) {
  const int64_t c = flat_index();
  if (c >= channels) return;
  const A r = A(1) / sqrt(var[c] + eps);
  const A a = gamma ? gamma[c] * r : r;
  rstd[c] = r;
  scale[c] = a;
  shift[c] = (beta ? beta[c] : A(0)) - mean[c] * a;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    running_statistics_kernel(int channels, const A* mean, const A* var, A unbiased, A keep, A take,
                              A* running_mean, A* running_var) {
  const int64_t c = flat_index();
  if (c >= channels) return;
  running_mean[c] = keep * running_mean[c] + take * mean[c];
  running_var[c] = keep * running_var[c] + take * (var[c] * unbiased);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    grad_coefficients_kernel(int channels, Norm<A> norm, const A* gamma, const A* beta, A inverse,
                             A* out) {
  const int64_t c = flat_index();
  if (c >= channels) return;
  const A q = -norm.scale[c] * norm.rstd[c] * gamma[c] * inverse;
  out[c] = norm.scale[c];
  out[channels + c] = q;
  out[2 * channels + c] = -norm.scale[c] * beta[c] * inverse - q * norm.mean[c];
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

void norm_coefficients(const Context& context, int64_t channels, const void* mean, const void* var,
                       const void* gamma, const void* beta, double eps, void* scale, void* shift,
                       void* rstd) {
  with_element(context, [&](auto policy) {
    using A = Accumulator<typename decltype(policy)::Element>;
    launch(&coefficients_kernel<A>, flat(context, "norm_coefficients", channels),
           static_cast<int>(channels), static_cast<const A*>(mean), static_cast<const A*>(var),
           static_cast<const A*>(gamma), static_cast<const A*>(beta), static_cast<A>(eps),
           static_cast<A*>(scale), static_cast<A*>(shift), static_cast<A*>(rstd));
  });
}

void update_running_statistics(const Context& context, int64_t channels, const void* mean,
                               const void* var, int64_t count, double momentum, void* running_mean,
                               void* running_var) {
  with_element(context, [&](auto policy) {
    using A = Accumulator<typename decltype(policy)::Element>;
    launch(&running_statistics_kernel<A>, flat(context, "update_running_statistics", channels),
           static_cast<int>(channels), static_cast<const A*>(mean), static_cast<const A*>(var),
           static_cast<A>(static_cast<double>(count) / static_cast<double>(count - 1)),
           static_cast<A>(1.0 - momentum), static_cast<A>(momentum), static_cast<A*>(running_mean),
           static_cast<A*>(running_var));
  });
}

void norm_grad_coefficients(const Context& context, int64_t channels, const NormArgument& argument,
                            const NormGradientResult& sums, int64_t count, void* coefficients) {
  with_element(context, [&](auto policy) {
    using A = Accumulator<typename decltype(policy)::Element>;
    launch(&grad_coefficients_kernel<A>, flat(context, "norm_grad_coefficients", channels),
           static_cast<int>(channels), norm<A>(argument), static_cast<const A*>(sums.gamma),
           static_cast<const A*>(sums.beta), static_cast<A>(1.0 / static_cast<double>(count)),
           static_cast<A*>(coefficients));
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
