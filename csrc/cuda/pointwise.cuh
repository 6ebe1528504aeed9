// Kernels without products: neighbouring threads have neighbours in memory.
#pragma once

#include "arguments.cuh"
#include "launch.cuh"
#include "reductions.cuh"

namespace densenet_fast::cuda {

// Requests, as many at once as a table holds and `fits(table, count, request)` allows: `fill`
// writes one into its place and says how many threads it takes, `run` launches a table.
template <class Table, class Request, class Fill, class Run, class Fits>
void for_each_table(const std::vector<Request>& requests, const Fill& fill, const Run& run,
                    const Fits& fits) {
  for (size_t next = 0; next < requests.size();) {
    Table table{};
    unsigned count = 0;
    int64_t most = 0;
    while (next < requests.size() && count < kTableSize && fits(table, count, requests[next])) {
      const int64_t threads = fill(requests[next++], table.one[count++]);
      most = most < threads ? threads : most;
    }
    run(table, count, most);
  }
}

template <class Table, class Request, class Fill, class Run>
void for_each_table(const std::vector<Request>& requests, const Fill& fill, const Run& run) {
  for_each_table<Table>(requests, fill, run, [](const auto&...) { return true; });
}

inline LaunchConfig flat(const Context& context, const char* name, int64_t threads,
                         unsigned places = 1) {
  return {name, dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads), places),
          dim3(kThreads), 0, context.stream};
}

__device__ __forceinline__ int64_t flat_index() {
  return int64_t{blockIdx.x} * kThreads + threadIdx.x;
}

// One thread a 16-byte piece of a row; as many pieces side by side as there are, up to 32.
template <class E>
LaunchConfig pieces(const Context& context, const char* name, int64_t rows, int64_t channels) {
  const int64_t across = ceil_div(channels, kPieceElements<E>);
  unsigned wide = 1;
  while (wide < 32 && wide < across) wide *= 2;
  const unsigned high = kThreads / wide;
  return {name,
          dim3(static_cast<unsigned>(ceil_div(rows, high)),
               static_cast<unsigned>(ceil_div(across, wide))),
          dim3(wide, high), 0, context.stream};
}

// Its place.
template <class E>
struct PieceIndex {
  int64_t row;
  int channel, valid;  // elements

  __device__ PieceIndex(int64_t rows, int channels)
      : row(int64_t{blockIdx.x} * blockDim.y + threadIdx.y),
        channel(static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kPieceElements<E>),
        valid(row < rows ? channels - channel : 0) {}
  template <class Image>
  __device__ int64_t in(const Image& image) const {
    return row * image.pitch + channel;
  }
};

constexpr int kTileColumns = 32;  // channels of a block that reduces rows
constexpr int kTileRuns = 8;      // of rows side by side

// The sum over the runs, in order; for everyone.
template <class A>
__device__ A sum_of_runs(A value, unsigned char* shared) {
  A* sums = reinterpret_cast<A*>(shared) + threadIdx.x;
  __syncthreads();
  sums[threadIdx.y * kTileColumns] = value;
  __syncthreads();
  A sum = 0;
  for (int r = 0; r < kTileRuns; ++r) sum += sums[r * kTileColumns];
  return sum;
}

// Pixels that pooling cuts off (odd sizes) get no gradient.
template <class E>
__global__ void __launch_bounds__(kThreads)
    clear_cut_pixels(Image<E> gradient, PixelPlaces places, int d, int h, int w) {
  const PieceIndex<E> at(gradient.rows(), gradient.c);
  if (at.valid <= 0) return;
  const auto [slice, y, x] = places.of(at.row);
  if (x >= w || y >= h || places.slices.remainder(slice, places.slices.quotient(slice)) >= d) {
    store_piece<E>(gradient.data + at.in(gradient), Piece<E>{}, at.valid, gradient.alignment);
  }
}

template <class E>
void run_clear_cut_pixels(const Context& context, const Image<E>& gradient, int dims) {
  const int d = dims > 2 ? gradient.d / 2 * 2 : 1, h = dims > 1 ? gradient.h / 2 * 2 : 1;
  const int w = gradient.w / 2 * 2;
  if (d == gradient.d && h == gradient.h && w == gradient.w) return;
  launch(&clear_cut_pixels<E>, pieces<E>(context, "clear_cut_pixels", gradient.rows(), gradient.c),
         gradient, PixelPlaces(gradient.d, gradient.h, gradient.w), d, h, w);
}

}  // namespace densenet_fast::cuda
