// Norm - ReLU - pooling at the two ends of the network.
#include "pointwise.cuh"

namespace densenet_fast::cuda {
namespace {

// One thread a channel of an image: the mean over its pixels, image row by image row.
template <class E>
__global__ void __launch_bounds__(kThreads)
    avgpool_kernel(Image<const E> x, Activation<Accumulator<E>> act, E* out) {
  using A = Accumulator<E>;
  const int64_t i = flat_index();
  if (i >= int64_t{x.n} * x.c) return;
  const int c = static_cast<int>(i % x.c);
  const A scale = act.scale[c], shift = act.shift[c];
  const int rows = x.d * x.h;
  const E* p = x.data + i / x.c * rows * x.w * x.pitch + c;
  A total = 0;
  for (int row = 0; row < rows; ++row) {
    A line = 0;
    for (int column = 0; column < x.w; ++column, p += x.pitch) {
      line += relu(multiply_add(scale, A(widen(*p)), shift));
    }
    total += line;
  }
  out[i] = narrow<E>(total / static_cast<A>(rows * x.w));
}

// gradient = scale * d; one tile of sums an image.
template <class E>
__global__ void __launch_bounds__(kThreads)
    avgpool_backward_kernel(const E* grad_out, Image<const E> x, Norm<Accumulator<E>> norm,
                            Image<E> gradient, TileSums<Accumulator<E>> partial) {
  using A = Accumulator<E>;
  const int64_t i = flat_index();
  if (i >= int64_t{x.n} * x.c) return;
  const int c = static_cast<int>(i % x.c);
  const int64_t pixels = x.rows() / x.n, first = i / x.c * pixels;
  const A scale = norm.scale[c], shift = norm.shift[c], mean = norm.mean[c];
  const A g = widen(grad_out[i]) / static_cast<A>(pixels);
  A sum = 0, centred = 0;
  for (int64_t p = first; p < first + pixels; ++p) {
    const A value = widen(x.data[p * x.pitch + c]);
    const A d = where_positive(multiply_add(scale, value, shift), g);
    sum += d;
    centred = multiply_add(d, value - mean, centred);
    gradient.data[p * gradient.pitch + c] = narrow<E>(scale * d);
  }
  partial.sum[i] = sum;
  partial.centred[i] = centred;
}

// A place in a window of 3x3x3 as a number. The only pixel of a dimension that images have not is
// in the middle of its window: `middle` of these dimensions is taken from all codes.
__device__ __forceinline__ int window_code(int kd, int kh, int kw) {
  return (kd * 3 + kh) * 3 + kw;
}
constexpr int middle(int dims) { return dims == 3 ? 0 : dims == 2 ? 9 : 9 + 3; }

// Windows of three pixels in each dimension, stride 2, padding 1; the first of equal maxima, the
// last NaN, as PyTorch's.
// sm_75 spills unless it is told how many blocks are enough; 0 leaves it to the compiler.
template <class E>
__global__ void __launch_bounds__(kThreads, kArchitecture < 800 ? 3 : 0)
    maxpool_kernel(Image<const E> x, Activation<Accumulator<E>> act, Image<E> out,
                   PixelPlaces places, int middle, uint8_t* argmax) {
  using A = Accumulator<E>;
  constexpr int V = kPieceElements<E>;
  const PieceIndex<E> at(out.rows(), out.c);
  if (at.valid <= 0) return;
  const auto [slice, oy, ox] = places.of(at.row);
  const int n = places.slices.quotient(slice), oz = places.slices.remainder(slice, n);
  A scale[V], shift[V];
  Piece<E> best;
  uint8_t code[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int c = v < at.valid ? at.channel + v : at.channel;
    scale[v] = act.scale[c];
    shift[v] = act.shift[c];
    best.element[v] = narrow<E>(-INFINITY);
  }
  for (int kd = 0; kd < 3; ++kd) {
    const int z = 2 * oz + kd - 1;
    if (z < 0 || z >= x.d) continue;
    for (int kh = 0; kh < 3; ++kh) {
      const int y = 2 * oy + kh - 1;
      if (y < 0 || y >= x.h) continue;
      for (int kw = 0; kw < 3; ++kw) {
        const int column = 2 * ox + kw - 1;
        if (column < 0 || column >= x.w) continue;
        const int64_t pixel = ((n * x.d + z) * x.h + y) * x.w + column;
        const auto piece =
            load_piece<E>(x.data + pixel * x.pitch + at.channel, at.valid, x.alignment);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          // Rounded, so that the maximum is that of the values PyTorch would compare.
          const E value =
              narrow<E>(relu(multiply_add(scale[v], A(widen(piece.element[v])), shift[v])));
          if (widen(value) > widen(best.element[v]) || widen(value) != widen(value)) {
            best.element[v] = value;
            code[v] = static_cast<uint8_t>(window_code(kd, kh, kw) - middle);
          }
        }
      }
    }
  }
  store_piece<E>(out.data + at.in(out), best, at.valid, out.alignment);
  for (int v = 0; v < V; ++v) {
    if (v < at.valid) argmax[at.row * out.c + at.channel + v] = code[v];
  }
}

constexpr int kUnpoolRows = 256;  // pixels of one tile of sums

// d of one pixel: every window that holds it (two in a dimension at most) is asked whether it was
// its maximum.
template <class E>
__global__ void __launch_bounds__(kTileColumns* kTileRuns, 4)
    unpool_kernel(Image<const E> grad_out, const uint8_t* argmax, Image<const E> x,
                  PixelPlaces places, int middle, Norm<Accumulator<E>> norm, Image<E> gradient,
                  TileSums<Accumulator<E>> partial) {
  using A = Accumulator<E>;
  DF_DYNAMIC_SHARED(shared);
  const int c = blockIdx.y * kTileColumns + threadIdx.x, run = threadIdx.y;
  const int64_t begin = int64_t{blockIdx.x} * kUnpoolRows;
  const int64_t end = begin + kUnpoolRows < x.rows() ? begin + kUnpoolRows : x.rows();
  A sum = 0, centred = 0;
  if (c < x.c) {
    const A scale = norm.scale[c], shift = norm.shift[c], mean = norm.mean[c];
    for (int64_t pixel = begin + run; pixel < end; pixel += kTileRuns) {
      const auto [slice, py, px] = places.of(pixel);
      const int n = places.slices.quotient(slice), pz = places.slices.remainder(slice, n);
      A g = 0;
      for (int oz = pz / 2; oz <= (pz + 1) / 2 && oz < grad_out.d; ++oz) {
        for (int oy = py / 2; oy <= (py + 1) / 2 && oy < grad_out.h; ++oy) {
          for (int ox = px / 2; ox <= (px + 1) / 2 && ox < grad_out.w; ++ox) {
            const int code = window_code(pz + 1 - 2 * oz, py + 1 - 2 * oy, px + 1 - 2 * ox);
            const int64_t window =
                ((int64_t{n} * grad_out.d + oz) * grad_out.h + oy) * grad_out.w + ox;
            if (argmax[window * x.c + c] == code - middle) {
              g += widen(grad_out.data[window * grad_out.pitch + c]);
            }
          }
        }
      }
      const A value = widen(x.data[pixel * x.pitch + c]);
      const A d = where_positive(multiply_add(scale, value, shift), g);
      sum += d;
      centred = multiply_add(d, value - mean, centred);
      gradient.data[pixel * gradient.pitch + c] = narrow<E>(d);
    }
  }
  const Sums<A> all{sum_of_runs(sum, shared), sum_of_runs(centred, shared)};
  if (run == 0 && c < x.c) partial.store(blockIdx.x, c, x.c, all);
}

// gradient = scale * (d - beta / M - xhat * gamma / M), in place over d.
template <class E>
__global__ void __launch_bounds__(kThreads)
    norm_gradient_kernel(Image<const E> x, Norm<Accumulator<E>> norm, const Accumulator<E>* gamma,
                         const Accumulator<E>* beta, Accumulator<E> inverse, Image<E> gradient) {
  using A = Accumulator<E>;
  const PieceIndex<E> at(x.rows(), x.c);
  if (at.valid <= 0) return;
  const auto value = load_piece<E>(x.data + at.in(x), at.valid, x.alignment);
  E* const to = gradient.data + at.in(gradient);
  auto piece = load_piece<E>(to, at.valid, gradient.alignment);
#pragma unroll
  for (int v = 0; v < kPieceElements<E>; ++v) {
    const int c = v < at.valid ? at.channel + v : at.channel;
    const A centred = widen(value.element[v]) - norm.mean[c];
    const A d =
        widen(piece.element[v]) - beta[c] * inverse - centred * (gamma[c] * inverse * norm.rstd[c]);
    piece.element[v] = narrow<E>(norm.scale[c] * d);
  }
  store_piece<E>(to, piece, at.valid, gradient.alignment);
}

}  // namespace

void norm_relu_avgpool_forward(const Context& context, const ImageArgument& features,
                               const NormArgument& act, void* out) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    using A = Accumulator<E>;
    const auto x = image<const E>(features);
    launch(&avgpool_kernel<E>, flat(context, "norm_relu_avgpool_forward", int64_t{x.n} * x.c), x,
           activation<A>(act), static_cast<E*>(out));
  });
}

void norm_relu_avgpool_backward(const Context& context, const void* grad_out,
                                const ImageArgument& features, const NormArgument& norm_argument,
                                const ImageArgument& grad_features,
                                const NormGradientResult& grad_affine) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    using A = Accumulator<E>;
    const auto x = image<const E>(features);
    const auto partial = allocate_sums<A>(context, x.n, x.c);
    launch(&avgpool_backward_kernel<E>,
           flat(context, "norm_relu_avgpool_backward", int64_t{x.n} * x.c),
           static_cast<const E*>(grad_out), x, norm<A>(norm_argument), image<E>(grad_features),
           partial);
    run_finish_sums<A>(context, partial, x.n, 1, x.c, norm_argument, grad_affine);
  });
}

void norm_relu_maxpool_forward(const Context& context, const ImageArgument& input,
                               const NormArgument& act, const ImageArgument& out, uint8_t* argmax) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    using A = Accumulator<E>;
    const auto to = image<E>(out);
    launch(&maxpool_kernel<E>, pieces<E>(context, "norm_relu_maxpool_forward", to.rows(), to.c),
           image<const E>(input), activation<A>(act), to, PixelPlaces(to.d, to.h, to.w),
           middle(input.dims), argmax);
  });
}

void norm_relu_maxpool_backward(const Context& context, const ImageArgument& grad_out,
                                const uint8_t* argmax, const ImageArgument& input,
                                const NormArgument& norm_argument, bool batch_statistics,
                                const ImageArgument& grad_input,
                                const NormGradientResult& grad_affine) {
  with_element(context, [&](auto policy) {
    using E = typename decltype(policy)::Element;
    using A = Accumulator<E>;
    const auto x = image<const E>(input);
    const auto gradient = image<E>(grad_input);
    const int64_t tiles = (x.rows() + kUnpoolRows - 1) / kUnpoolRows;
    const auto partial = allocate_sums<A>(context, tiles, x.c);
    launch(
        &unpool_kernel<E>,
        LaunchConfig{
            "norm_relu_maxpool_backward",
            dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(x.c, kTileColumns))),
            dim3(kTileColumns, kTileRuns), sizeof(A) * kTileColumns * kTileRuns, context.stream},
        image<const E>(grad_out), argmax, x, PixelPlaces(x.d, x.h, x.w), middle(input.dims),
        norm<A>(norm_argument), gradient, partial);
    run_finish_sums<A>(context, partial, tiles, 1, x.c, norm_argument, grad_affine);
    const double inverse = batch_statistics ? 1.0 / static_cast<double>(x.rows()) : 0.0;
    launch(&norm_gradient_kernel<E>, pieces<E>(context, "norm_gradient", x.rows(), x.c), x,
           norm<A>(norm_argument), static_cast<const A*>(grad_affine.gamma),
           static_cast<const A*>(grad_affine.beta), static_cast<A>(inverse), gradient);
  });
}

}  // namespace densenet_fast::cuda
