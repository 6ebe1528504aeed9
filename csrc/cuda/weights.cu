// Weights packed for products, and weight gradients added up from splits: several in one launch.
#include "pack.cuh"
#include "pointwise.cuh"

namespace densenet_fast::cuda {
namespace {

// A weight's strides by what a product takes its indices for: column and reduction index (channel).
struct Packing {
  const void* weight;
  void* packed;
  int64_t stride_column, stride_channel, stride_h, stride_w;
  int columns, channels, padded_columns, steps;
  int taps;
  bool is_float32, flipped;  // taps reversed: the data gradient

  template <class E>
  __host__ __device__ int64_t size() const {
    return int64_t{steps} * taps * padded_columns * kStep<E>;
  }
};

struct PackingTable {
  Packing one[kTableSize];
};

// Block y packs the y-th weight.
template <class E>
__global__ void __launch_bounds__(kThreads) pack_weight(PackingTable table) {
  const Packing& p = table.one[blockIdx.y];
  const int64_t i = flat_index();
  if (i >= p.size<E>()) return;
  const int64_t k = i % kStep<E>, column = i / kStep<E> % p.padded_columns;
  const int64_t tap = i / kStep<E> / p.padded_columns % p.taps;
  const int64_t channel = i / kStep<E> / p.padded_columns / p.taps * kStep<E> + k;
  const int64_t from = p.flipped ? p.taps - 1 - tap : tap;
  Accumulator<E> value = 0;
  if (column < p.columns && channel < p.channels) {
    const int64_t at = column * p.stride_column + channel * p.stride_channel +
                       from / 3 * p.stride_h + from % 3 * p.stride_w;
    value = p.is_float32 ? static_cast<Accumulator<E>>(static_cast<const float*>(p.weight)[at])
                         : widen(static_cast<const E*>(p.weight)[at]);
  }
  static_cast<E*>(p.packed)[i] = narrow<E>(value);
}

struct SplitTable {
  SplitSums one[kTableSize];
};

// Block y adds up the y-th gradient.
template <class E>
__global__ void __launch_bounds__(kThreads) add_splits_kernel(SplitTable table) {
  using A = Accumulator<E>;
  const SplitSums& g = table.one[blockIdx.y];
  const int64_t i = flat_index();
  if (i >= g.size) return;
  A sum = 0;
  for (int s = 0; s < g.splits; ++s) sum += static_cast<const A*>(g.partial)[s * g.size + i];
  const int64_t plane = g.size / g.taps, to = i % plane * g.taps + i / plane;
  if (g.out.is_float32) {
    static_cast<float*>(g.out.data)[to] = static_cast<float>(sum);
  } else {
    static_cast<E*>(g.out.data)[to] = narrow<E>(sum);
  }
}

}  // namespace

void pack_weights(const Context& context, const std::vector<PackRequest>& requests) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    for_each_table<PackingTable>(
        requests,
        [&](const PackRequest& r, Packing& p) {
          WeightArgument& w = *r.weight;
          const auto shape = packed_shape<E>(w, r.kernel, r.gradient);
          const auto of = [&](auto out, auto in) { return r.gradient ? in : out; };
          p = {w.data,
               nullptr,
               of(w.stride_out, w.stride_in),
               of(w.stride_in, w.stride_out),
               w.stride_h,
               w.stride_w,
               static_cast<int>(of(w.out, w.in)),
               static_cast<int>(of(w.in, w.out)),
               shape.columns,
               shape.steps,
               r.kernel * r.kernel,
               w.is_float32,
               r.gradient};
          p.packed = context.workspace->allocate(sizeof(E) * p.size<E>());
          w.packed[r.gradient] = p.packed;
          return p.size<E>();
        },
        [&](const PackingTable& table, unsigned count, int64_t most) {
          launch(&pack_weight<E>, flat(context, "pack_weight", most, count), table);
        });
  });
}

void add_splits(const Context& context, const std::vector<SplitSums>& sums) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    for_each_table<SplitTable>(
        sums,
        [&](const SplitSums& s, SplitSums& one) {
          one = s;
          return s.size;
        },
        [&](const SplitTable& table, unsigned count, int64_t most) {
          launch(&add_splits_kernel<E>, flat(context, "add_splits", most, count), table);
        });
  });
}

}  // namespace densenet_fast::cuda
