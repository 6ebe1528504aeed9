// The backward of "activate, then multiply": for a product P = act(X) * B with [K] output columns
// and [N] input channels, one pass over the rows of G = dL/dP and X makes
//
//   D  = G * B^T                 masked by the activation: the gradient of the norm's output
//   sums of D and D * (x - mean)   gradients of the norm's affine parameters
//   dB = G^T * act(X)
//
// so that G and X are read once for the data and the weight gradient together. The 1x1 and the 3x3
// convolution and the transition differ in how rows of G are made (Source) and in what is done with
// D (Sink).
#pragma once

#include "blocking.h"

namespace densenet_fast::cpu {
namespace {

constexpr int64_t kBackwardTile = 64;  // rows, at most
constexpr int kBackwardVectors = 3;

// One column block of one row tile, as a Sink sees it.
template <class T>
struct BackwardBlock {
  int64_t row, rows;  // of the product
  int64_t column;     // first channel of the block
  int64_t columns;    // valid channels
  int nv;             // whole vectors
  const T* product;   // D before masking, [rows, ld]; null where no data gradient is wanted
  T* activated;       // act(X) for the weight gradient, [rows, ld], zero in padded columns
  int64_t ld;
  T* sum;          // [nv * lanes] to add sums of D to
  T* sum_centred;  // ... and of D * (x - mean)
};

struct BackwardShape {
  int64_t rows, k, n;
  int64_t panel_width;  // columns of G in one panel, kPanel at most
};

// Coefficients of the norm padded to whole vectors.
template <class T>
class PaddedNorm {
 public:
  PaddedNorm(Norm<T> norm, int64_t columns) : width_(padded<T>(columns)), memory_(3 * width_) {
    pad_vector<T>(memory_.get(), norm.scale, columns);
    pad_vector<T>(memory_.get() + width_, norm.shift, columns);
    pad_vector<T>(memory_.get() + 2 * width_, norm.mean, columns);
  }
  const T* scale() const { return memory_.get(); }
  const T* shift() const { return memory_.get() + width_; }
  const T* mean() const { return memory_.get() + 2 * width_; }

 private:
  int64_t width_;
  CallMemory<T> memory_;
};

// Gradients of the norm's affine parameters from the parts' sums, [parts, 2, width], in order.
template <class T>
void finish_sums(const T* sums, int64_t parts, int64_t width, const Norm<T>& norm, int64_t columns,
                 NormGradient<T> out) {
  constexpr int64_t kRun = 64;  // columns that are added side by side
  for (int64_t first = 0; first < columns; first += kRun) {
    const int64_t count = smaller(kRun, columns - first);
    double beta[kRun] = {}, gamma[kRun] = {};
    for (int64_t i = 0; i < parts; ++i) {
      const T* part = sums + 2 * i * width + first;
      for (int64_t c = 0; c < count; ++c) {
        beta[c] += static_cast<double>(part[c]);
        gamma[c] += static_cast<double>(part[width + c]);
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      out.beta[first + c] = static_cast<T>(beta[c]);
      out.gamma[first + c] = static_cast<T>(gamma[c]) * norm.rstd[first + c];
    }
  }
}

// A 1x1 weight as the operand B^T, [out, in], and its gradient.
template <class S>
struct MatrixWeight {
  using T = Compute<S>;
  Weight<S> weight;
  WeightGradient<S> gradient;

  using Element = S;
  int64_t taps() const { return 1; }
  // Outputs [out, out + count) of the block of vectors [v, v + nv).
  void pack(int64_t out, int64_t count, int64_t v, int nv, T* block) const {
    pack_block(backward_matrix(weight), out, count, v, nv, block + out * nv * kLanes<T>);
  }
  // Channels [c, c + columns) of an output's gradient, which `from`, [K, ld], begins with.
  void store(int64_t out, int64_t c, int64_t columns, const T* from, int64_t ld) const {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      store_gradient(gradient, out * weight.in + c + j, load<T>(from + out * ld + j), columns - j);
    }
  }
};

// Adds the parts' weight gradients, [parts, k, width], in order, and stores them.
template <class T, class AnyWeight>
void finish_weight(T* parts_of_weight, int64_t parts, int64_t k, int64_t width,
                   const AnyWeight& weight) {
  const int64_t outputs = weight.weight.out;
  for_each_task(outputs, [&](int64_t out) {
    for (int64_t i = out; i < k; i += outputs) {
      T* row = parts_of_weight + i * width;
      for (int64_t part = 1; part < parts; ++part) {
        const T* more = row + part * k * width;
        for (int64_t c = 0; c < width; c += kLanes<T>) {
          store<T>(row + c, load<T>(row + c) + load<T>(more + c));
        }
      }
    }
    weight.store(out, 0, weight.weight.in, parts_of_weight, width);
  });
}

// weight.pack and weight.store read B and take dB, see MatrixWeight;
// source.build(row, rows, panel, first, width, to) fills columns [first, first + width) of G;
// sink.block(block) applies the epilogue; their prefetch() names what that will read.
template <class T, class AnyWeight, class Source, class Sink>
void product_backward(const BackwardShape& shape, bool want_data, bool want_weight,
                      const AnyWeight& weight, const Norm<T>& norm, NormGradient<T> grad_affine,
                      const Source& source, const Sink& sink) {
  using S = typename AnyWeight::Element;
  constexpr int64_t L = kLanes<T>;
  constexpr int64_t kBlock = kBackwardVectors * L;
  const int64_t width = padded<T>(shape.n), vecs = vectors<T>(shape.n);
  const int64_t panels = ceil_div(shape.k, shape.panel_width);

  // Tasks: runs of rows, each cut into groups of column blocks where threads would be idle.
  const int64_t blocks = ceil_div(vecs, kBackwardVectors);
  const EqualParts chunks(shape.rows, 16, 384);
  const int64_t tile = equal_tile(chunks.size, kBackwardTile);
  // Column blocks are independent: how many share the source's rows changes no result.
  const int64_t groups = smaller(blocks, larger(ceil_div(4 * thread_count(), chunks.count),
                                                ceil_div(shape.k * width, most_own_weight())));

  // Of a single chunk every task stores what it makes, of a single tile block by block, and packs
  // what it reads as well.
  const bool single = chunks.count == 1, few = shape.rows <= tile;
  const int64_t outputs = weight.weight.out;
  CallMemory<T> partial_sums(2 * chunks.count * width);
  CallMemory<T> partial_weight(want_weight && !single ? chunks.count * shape.k * width : 0);

  for_each_task(chunks.count * groups, [&](int64_t task, int64_t before) {
    const int64_t chunk = task / groups, index = task % groups;
    T* sums = partial_sums.get() + 2 * chunk * width;
    const BlockGroup group(vecs, kBackwardVectors, index, groups);
    // Every thread packs the columns that it reads.
    const int64_t size = shape.k * (few ? kBlock : (group.end - group.begin) * L);
    const T* packed = nullptr;
    if (want_data && !few) {
      packed = own_weight<T>(size, before >= 0 && before % groups == index, [&](T* to) {
        for_each_block(group, [&](int64_t v, int nv) {
          weight.pack(0, outputs, v, nv, to + (v - group.begin) * L * shape.k);
        });
      });
    }
    const int64_t ldw = few ? kBlock : single ? (group.end - group.begin) * L : width;
    T* grad_weight = single ? scratch<T>(Scratch::kWeight, size)
                            : partial_weight.get() + chunk * shape.k * width + group.begin * L;
    const int64_t row_begin = chunks.begin(chunk), row_end = chunks.end(chunk);

    const int64_t c_begin = group.begin * L, c_end = smaller(shape.n, group.end * L);
    for (int64_t c = c_begin; c < group.end * L; ++c) sums[c] = sums[width + c] = T(0);

    const int64_t panel_size = kBackwardTile * kPanelPitch;
    T* operand = scratch<T>(Scratch::kOperand, panels * panel_size);
    T* product = scratch<T>(Scratch::kResult, kBackwardTile * kBlock);
    T* activated = scratch<T>(Scratch::kActivated, kBackwardTile * kBlock);
    PrefetchStream stream;

    for (int64_t r = row_begin; r < row_end; r += tile) {
      const int64_t rows = smaller(tile, row_end - r);
      for (int64_t q = 0; q < panels; ++q) {
        const int64_t k0 = q * shape.panel_width;
        source.build(r, rows, k0, smaller(shape.panel_width, shape.k - k0),
                     operand + q * panel_size);
      }
      for_each_block(group, [&](int64_t v, int nv) {
        const int64_t c = v * L;
        const int64_t columns = smaller(nv * L, shape.n - c);
        const int64_t next_v = v + nv;

        // While this block computes, fetch what the next one will touch.
        stream.clear();
        if (few && weight.gradient.data) {
          const int64_t taps = weight.taps();
          stream.add(weight.gradient.data + c * taps, columns * taps * sizeof(S),
                     shape.n * taps * sizeof(S), outputs, true);
        }
        if (next_v < group.end) {
          const int64_t next_columns = smaller(kBlock, c_end - next_v * L);
          if (few && weight.weight.stride_in == 1 && weight.weight.data) {
            stream.add(weight.weight.data + next_v * L, next_columns * sizeof(S),
                       weight.weight.stride_out * sizeof(S), outputs, false);
          }
          sink.prefetch(r, rows, next_v * L, next_columns, stream);
        } else if (r + tile < row_end) {
          const int64_t next = r + tile;
          const int64_t next_rows = smaller(tile, row_end - next);
          source.prefetch(next, next_rows, stream);
          sink.prefetch(next, next_rows, c_begin, smaller(kBlock, c_end - c_begin), stream);
        }
        const int64_t row_tiles = ceil_div(rows, kMaxRows[nv]);
        const int64_t k_tiles = ceil_div(shape.k, kMaxRows[nv]);
        stream.start((want_data ? row_tiles * ceil_div(shape.k, kPrefetchEvery) : 0) +
                     (want_weight ? k_tiles * ceil_div(rows, kPrefetchEvery) : 0));

        T* grad_block = few ? grad_weight : grad_weight + c - c_begin;
        if (want_data) {
          if (few) weight.pack(0, outputs, v, nv, grad_weight);
          const T* block = few ? grad_weight : packed + (v - group.begin) * L * shape.k;
          for (int64_t q = 0; q < panels; ++q) {
            const int64_t k0 = q * shape.panel_width;
            const int64_t panel_k = smaller(shape.panel_width, shape.k - k0);
            const T* b = block + k0 * nv * L;
            for_each_row_tile(rows, nv, [&](int64_t first, int count) {
              RowsProduct<T> p{operand + q * panel_size + first * kPanelPitch,
                               nullptr,
                               1,
                               panel_k,
                               b,
                               product + first * kBlock,
                               kBlock,
                               nv * L,
                               q > 0,
                               &stream};
              kMicrokernels<T>.rows[nv][count](p);
            });
          }
        }
        sink.block(BackwardBlock<T>{r, rows, c, columns, nv, want_data ? product : nullptr,
                                    activated, kBlock, sums + c, sums + width + c});
        if (want_weight) {
          for (int64_t q = 0; q < panels; ++q) {
            const int64_t k0 = q * shape.panel_width;
            for_each_row_tile(
                smaller(shape.panel_width, shape.k - k0), nv, [&](int64_t first, int count) {
                  TransposedProduct<T> p{
                      operand + q * panel_size + first, activated, kBlock,        rows,
                      grad_block + (k0 + first) * ldw,  ldw,       r > row_begin, &stream};
                  kMicrokernels<T>.transposed[nv][count](p);
                });
          }
          for (int64_t out = 0; few && out < outputs; ++out) {
            weight.store(out, c, columns, grad_block, ldw);
          }
        }
      });
    }
    for (int64_t out = 0; want_weight && single && !few && out < outputs; ++out) {
      weight.store(out, c_begin, c_end - c_begin, grad_weight, ldw);
    }
  });

  if (want_data)
    finish_sums<T>(partial_sums.get(), chunks.count, width, norm, shape.n, grad_affine);
  if (want_weight && !single) {
    finish_weight(partial_weight.get(), chunks.count, shape.k, width, weight);
  }
}

// The usual Sink: row r of the product is pixel r of X. kAccumulate: gradient += scale * D (the
// gradient buffer of the block); otherwise gradient = D (gradient of the norm's output).
template <class S, bool kAccumulate>
struct PixelSink {
  using T = Compute<S>;
  Image<const S> x;
  const PaddedNorm<T>& norm;
  Image<S> gradient;  // data null: only sums and the activation

  void prefetch(int64_t row, int64_t rows, int64_t c, int64_t columns,
                PrefetchStream& stream) const {
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(S));
    stream.add(x.data + row * x.pitch + c, bytes, x.pitch * sizeof(S), rows, false);
    if (gradient.data) {
      stream.add(gradient.data + row * gradient.pitch + c, bytes, gradient.pitch * sizeof(S), rows,
                 true);
    }
  }

  void block(const BackwardBlock<T>& b) const {
    for (int j = 0; j < b.nv; ++j) {
      const int64_t n = b.columns - j * kLanes<T>;
      if (n >= kLanes<T>) {
        vector<true>(b, j, n);
      } else {
        vector<false>(b, j, n);
      }
    }
  }

 private:
  template <bool kFull>
  DF_INLINE Vec<T> get(const S* p, int64_t n) {
    return kFull ? load<T>(p) : load_partial<T>(p, n);
  }

  template <bool kFull>
  void vector(const BackwardBlock<T>& b, int j, int64_t n) const {
    constexpr int L = kLanes<T>;
    const int64_t c = b.column + j * L;
    const Vec<T> scale = load<T>(norm.scale() + c), shift = load<T>(norm.shift() + c);
    const S* from = x.data + b.row * x.pitch + c;
    T* activated = b.activated + j * L;
    if (!b.product) {
      for (int64_t r = 0; r < b.rows; ++r) {
        const Vec<T> y = fma<T>(scale, get<kFull>(from + r * x.pitch, n), shift);
        store<T>(activated + r * b.ld, relu<T>(y));
      }
      return;
    }
    const Vec<T> mean = load<T>(norm.mean() + c);
    const T* product = b.product + j * L;
    S* to = gradient.data ? gradient.data + b.row * gradient.pitch + c : nullptr;
    Vec<T> sum = zero<T>(), sum_centred = zero<T>();
    for (int64_t r = 0; r < b.rows; ++r) {
      const Vec<T> value = get<kFull>(from + r * x.pitch, n);
      const Vec<T> y = fma<T>(scale, value, shift);
      Vec<T> d = where_positive<T>(y, load<T>(product + r * b.ld));
      if (!kAccumulate) d = rounded<S>(d);  // sums of what will be read again
      store<T>(activated + r * b.ld, relu<T>(y));
      sum += d;
      sum_centred = fma<T>(d, value - mean, sum_centred);
      if (!to) continue;
      S* g = to + r * gradient.pitch;
      const Vec<T> out = kAccumulate ? fma<T>(scale, d, get<kFull>(g, n)) : d;
      if (kFull) {
        store<T>(g, out);
      } else {
        store_partial<T>(g, out, n);
      }
    }
    store<T>(b.sum + j * L, load<T>(b.sum + j * L) + sum);
    store<T>(b.sum_centred + j * L, load<T>(b.sum_centred + j * L) + sum_centred);
  }
};

}  // namespace
}  // namespace densenet_fast::cpu
