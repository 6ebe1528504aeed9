#include "pointwise.cuh"

#include <algorithm>

namespace densenet_fast::cuda {
namespace {

constexpr int kStatisticsRows = 256;  // of one tile
constexpr int kSplitRows = 32;        // of one whose rows are added up first

// Mean and M2 of a tile's rows for 32 channels: two passes, eight rows side by side. Where rows
// come in splits these are added up and stored first.
template <class E>
__global__ void __launch_bounds__(kTileColumns* kTileRuns)
    tile_statistics(Image<E> x, int64_t rows, int tile_rows, const Accumulator<E>* split,
                    int splits, TileStatistics<Accumulator<E>> partial) {
  using A = Accumulator<E>;
  DF_DYNAMIC_SHARED(shared);
  const int c = blockIdx.y * kTileColumns + threadIdx.x, run = threadIdx.y;
  const int64_t begin = int64_t{blockIdx.x} * tile_rows;
  const int64_t end = begin + tile_rows < rows ? begin + tile_rows : rows;
  A sum = 0;
  if (c < x.c) {
    for (int64_t r = begin + run; r < end; r += kTileRuns) {
      E& value = x.data[r * x.pitch + c];
      if (split) {
        A whole = 0;
        for (int s = 0; s < splits; ++s) whole += split[(s * rows + r) * x.c + c];
        value = narrow<E>(whole);
      }
      sum += widen(value);
    }
  }
  if (partial.mean == nullptr) return;
  const A mean = sum_of_runs(sum, shared) / static_cast<A>(end - begin);
  A m2 = 0;
  if (c < x.c) {
    for (int64_t r = begin + run; r < end; r += kTileRuns) {
      const A d = widen(x.data[r * x.pitch + c]) - mean;
      m2 = multiply_add(d, d, m2);
    }
  }
  m2 = sum_of_runs(m2, shared);
  if (run == 0 && c < x.c)
    partial.store(blockIdx.x, c, x.c, {static_cast<A>(end - begin), mean, m2});
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
  const PieceIndex<E> at(rows, x.c);
  if (at.valid <= 0) return;
  const auto value = load_piece<E>(x.data + at.in(x), at.valid, x.alignment);
  const auto gradient = load_piece<E>(grad.data + at.in(grad), at.valid, grad.alignment);
  Piece<E> result;
#pragma unroll
  for (int v = 0; v < kPieceElements<E>; ++v) {
    const int c = v < at.valid ? at.channel + v : at.channel;
    const A centred = widen(value.element[v]) - mean[c];
    const A g = widen(gradient.element[v]) - sum_grad[c] * inverse;
    result.element[v] = narrow<E>(g - centred * (sum_grad_x[c] * inverse));
  }
  store_piece<E>(out.data + at.in(out), result, at.valid, out.alignment);
}

// Philox-4x32-10 (Salmon et al., SC 2011): the four words of a block.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t block) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
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
  return make_uint4(c0, c1, c2, c3);
}

// Element i of all has word i % 4 of block i / 4; all pixels of an image count as one where whole
// channels are dropped.
template <class E>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(Image<E> x, int64_t rows, Divisor pixels, uint64_t seed, uint64_t threshold,
                   Accumulator<E> keep) {
  using A = Accumulator<E>;
  const PieceIndex<E> at(rows, x.c);
  if (at.valid <= 0) return;
  const int64_t draw = pixels.quotient(static_cast<int>(at.row));
  const uint64_t first = static_cast<uint64_t>(draw * x.c + at.channel);
  const int before = static_cast<int>(first % 4);
  const int last = before + (at.valid < kPieceElements<E> ? at.valid : kPieceElements<E>);
  uint32_t kept = 0;  // bit by bit, from the first word of the first block
  for (int i = 0; i < last; i += 4) {
    const uint4 words = philox(seed, first / 4 + i / 4);
    const uint32_t four = (words.x >= threshold ? 1 : 0) | (words.y >= threshold ? 2 : 0) |
                          (words.z >= threshold ? 4 : 0) | (words.w >= threshold ? 8 : 0);
    kept |= four << i;
  }
  E* const to = x.data + at.in(x);
  auto piece = load_piece<E>(to, at.valid, x.alignment);
#pragma unroll
  for (int v = 0; v < kPieceElements<E>; ++v) {
    const bool keeps = kept >> (before + v) & 1;
    piece.element[v] = narrow<E>(keeps ? A(widen(piece.element[v])) * keep : A(0));
  }
  store_piece<E>(to, piece, at.valid, x.alignment);
}

}  // namespace

namespace {

template <class E>
void run_tile_statistics(const Context& context, const Image<E>& x, int tile_rows,
                         const void* split, int splits, const StatisticsResult& statistics) {
  using A = Accumulator<E>;
  const int64_t tiles = ceil_div(x.rows(), tile_rows);
  TileStatistics<A> partial;
  if (statistics.mean) partial = allocate_statistics<A>(context, tiles, x.c);
  launch(&tile_statistics<E>,
         LaunchConfig{
             split ? "add_row_splits" : "tile_statistics",
             dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(x.c, kTileColumns))),
             dim3(kTileColumns, kTileRuns), sizeof(A) * kTileColumns * kTileRuns, context.stream},
         x, x.rows(), tile_rows, static_cast<const A*>(split), splits, partial);
  if (statistics.mean) run_finish_statistics<A>(context, partial, tiles, 1, x.c, statistics);
}

}  // namespace

void channel_statistics(const Context& context, const ImageArgument& features,
                        const StatisticsResult& statistics) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    run_tile_statistics(context, image<E>(features), kStatisticsRows, nullptr, 0, statistics);
  });
}

void add_row_splits(const Context& context, const ImageArgument& out, const void* split, int splits,
                    const StatisticsResult& statistics) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    run_tile_statistics(context, image<E>(out), kSplitRows, split, splits, statistics);
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
    launch(&finish_gradient_kernel<E>, pieces<E>(context, "finish_gradient", x.rows(), x.c), x,
           image<const E>(grad_features), static_cast<const A*>(mean),
           static_cast<const A*>(sum_grad), static_cast<const A*>(sum_grad_x),
           static_cast<A>(1.0 / static_cast<double>(x.rows())), x.rows(), image<E>(out));
  });
}

void dropout(const Context& context, const ImageArgument& growth, uint64_t seed, double p,
             bool channels) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    using A = Accumulator<E>;
    const auto x = image<E>(growth);
    launch(&dropout_kernel<E>, pieces<E>(context, "dropout", x.rows(), x.c), x, x.rows(),
           Divisor(channels ? x.rows() / x.n : 1), seed, static_cast<uint64_t>(p * 4294967296.0),
           static_cast<A>(p < 1.0 ? 1.0 / (1.0 - p) : 0.0));
  });
}

}  // namespace densenet_fast::cuda
