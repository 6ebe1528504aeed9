// Weights packed for products, and weight gradients added up from splits: several in one launch.
#include <algorithm>

#include "pack.cuh"
#include "pointwise.cuh"

namespace densenet_fast::cuda {
namespace {

constexpr int kPackColumns = 16;  // of a block

// A weight's strides by what a product takes its indices for: column and reduction index (channel).
struct Packing {
  const void* weight;
  void* packed;
  int64_t stride_column, stride_channel, stride_d, stride_h, stride_w;
  int columns, channels, steps, taps;
  Divisor of_taps, of_inner, of_groups;  // elements of a tap and of a row read, column groups
  bool is_float32, flipped;              // taps reversed: the data gradient

  int blocks() const { return steps * static_cast<int>(of_groups.by); }
};

struct PackingTable {
  Packing one[kTableSize];
};

// Block y packs the y-th weight: a step of some columns at a time, read in the weight's order and
// written in the packed one.
template <class P>
__global__ void __launch_bounds__(kThreads) pack_weight(PackingTable table) {
  using E = typename P::Element;
  const Packing& p = table.one[blockIdx.y];
  DF_DYNAMIC_SHARED(shared);
  E* tile = reinterpret_cast<E*>(shared);  // [taps, columns, kStep]
  const int step = p.of_groups.quotient(blockIdx.x);
  if (step >= p.steps) return;
  const int first = p.of_groups.remainder(blockIdx.x, step) * kPackColumns;
  for (int i = threadIdx.x; i < p.taps * kPackColumns * kStep<E>; i += kThreads) {
    const int outer = p.of_inner.quotient(i), rest = p.of_inner.remainder(i, outer);
    const int inner = p.of_taps.quotient(rest), tap = p.of_taps.remainder(rest, inner);
    const int local = p.flipped ? inner : outer, k = p.flipped ? outer : inner;
    const int column = first + local, channel = step * kStep<E> + k;
    Accumulator<E> value = 0;
    if (column < p.columns && channel < p.channels) {
      const int64_t at = column * p.stride_column + channel * p.stride_channel +
                         tap / 9 * p.stride_d + tap / 3 % 3 * p.stride_h + tap % 3 * p.stride_w;
      if constexpr (sizeof(E) == 4) {
        value = static_cast<const E*>(p.weight)[at];
      } else {
        value = p.is_float32 ? static_cast<const float*>(p.weight)[at]
                             : widen(static_cast<const E*>(p.weight)[at]);
      }
    }
    const int to = p.flipped ? p.taps - 1 - tap : tap;
    tile[(to * kPackColumns + local) * kStep<E> + k] = operand<P>(value);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.taps * kPackColumns * kStepPieces; i += kThreads) {
    const int tap = i / (kPackColumns * kStepPieces),
              column = first + i / kStepPieces % kPackColumns;
    if (column >= p.columns) continue;
    const int64_t slice_step = tap / 9 * p.steps + step;  // all steps of one slice in a row
    const int64_t row = (slice_step * smaller(p.taps, 9) + tap % 9) * p.columns + column;
    reinterpret_cast<Piece<E>*>(p.packed)[row * kStepPieces + i % kStepPieces] =
        reinterpret_cast<const Piece<E>*>(tile)[i];
  }
}

struct Addition {
  SplitSums sums;
  Divisor of_channels;
};

struct SplitTable {
  Addition one[kTableSize];
};

template <class E>
__device__ void store_sum(const WeightGradient& out, int64_t at, Accumulator<E> sum) {
  if (out.is_float32) {
    static_cast<float*>(out.data)[at] = static_cast<float>(sum);
  } else {
    static_cast<E*>(out.data)[at] = narrow<E>(sum);
  }
}

constexpr int kAddThreads = 9 * 32;  // nine taps of 32 weights, or as many of fewer taps

// Block y adds up the y-th gradient: added tap by tap, stored in the gradient's order.
template <class E>
__global__ void __launch_bounds__(3 * kAddThreads) add_splits_kernel(SplitTable table) {
  using A = Accumulator<E>;
  const SplitSums& g = table.one[blockIdx.y].sums;
  DF_DYNAMIC_SHARED(shared);
  A* sums = reinterpret_cast<A*>(shared);
  const int i = threadIdx.x, weights = blockDim.x / g.taps;
  const int tap = i / weights, weight = i - tap * weights;
  const int64_t plane = g.size / g.taps, first = int64_t{blockIdx.x} * weights;
  if (first >= plane) return;
  if (first + weight < plane) {
    A sum = 0;
    const A* from = static_cast<const A*>(g.partial) + tap * plane + first + weight;
    for (int s = 0; s < g.splits; ++s) sum += from[s * g.size];
    if (g.out.channels_last) {
      const Divisor& of = table.one[blockIdx.y].of_channels;
      const int at = static_cast<int>(first) + weight, o = of.quotient(at);
      store_sum<E>(g.out, (int64_t{o} * g.taps + tap) * g.channels + of.remainder(at, o), sum);
    } else {
      sums[weight * g.taps + tap] = sum;
    }
  }
  if (g.out.channels_last) return;  // all of a block
  __syncthreads();
  const int64_t to = first * g.taps + i;
  if (to < g.size) store_sum<E>(g.out, to, sums[i]);
}

}  // namespace

void pack_weights(const Context& context, const std::vector<PackRequest>& requests) {
  with_policy(context, [&](auto policy) {
    using P = decltype(policy);
    using E = typename P::Element;
    for_each_table<PackingTable>(
        requests,
        [&](const PackRequest& r, Packing& p) {
          WeightArgument& w = *r.weight;
          const auto shape = packed_shape<E>(w, r.gradient);
          const auto of = [&](auto out, auto in) { return r.gradient ? in : out; };
          const int taps = r.kernel == 1 ? 1 : Taps(w.dims).all();
          p = {
              w.data,
              context.workspace->allocate(int64_t{kStepBytes} * shape.steps * taps * shape.columns),
              of(w.stride_out, w.stride_in),
              of(w.stride_in, w.stride_out),
              w.stride_d,
              w.stride_h,
              w.stride_w,
              shape.columns,
              static_cast<int>(of(w.in, w.out)),
              shape.steps,
              taps,
              Divisor(taps),
              Divisor(taps * (r.gradient ? kPackColumns : kStep<E>)),
              Divisor(ceil_div(shape.columns, kPackColumns)),
              w.is_float32,
              r.gradient};
          w.packed[r.gradient] = p.packed;
          return int64_t{p.blocks()};
        },
        [&](const PackingTable& table, unsigned count, int64_t most) {
          int taps = 1;
          for (unsigned i = 0; i < count; ++i) taps = std::max(taps, table.one[i].taps);
          launch(
              &pack_weight<P>,
              LaunchConfig{"pack_weight", dim3(static_cast<unsigned>(most), count), dim3(kThreads),
                           static_cast<size_t>(taps) * kPackColumns * kStepBytes, context.stream},
              table);
        });
  });
}

void add_splits(const Context& context, const std::vector<SplitSums>& sums) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    for_each_table<SplitTable>(
        sums,
        [&](const SplitSums& s, Addition& one) {
          one = {s, Divisor(s.channels)};
          return ceil_div(s.size / s.taps, std::max(kAddThreads / s.taps, 32));
        },
        [&](const SplitTable& table, unsigned count, int64_t most) {
          int threads = kAddThreads;
          for (unsigned i = 0; i < count; ++i)
            threads = std::max(threads, 32 * table.one[i].sums.taps);
          launch(&add_splits_kernel<E>,
                 LaunchConfig{"add_splits", dim3(static_cast<unsigned>(most), count), dim3(threads),
                              sizeof(Accumulator<E>) * threads, context.stream},
                 table);
        });
  });
}

}  // namespace densenet_fast::cuda
