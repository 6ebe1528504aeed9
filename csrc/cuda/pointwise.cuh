// Kernels without products: one thread a channel of a pixel, neighbours side by side in memory.
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

// Pixels that pooling cuts off (odd sizes) get no gradient.
template <class E>
__global__ void __launch_bounds__(kThreads) clear_cut_pixels(Image<E> gradient, int64_t pixels) {
  const int64_t i = flat_index();
  if (i >= pixels * gradient.c) return;
  const int64_t pixel = i / gradient.c;
  const int x = static_cast<int>(pixel % gradient.w);
  const int y = static_cast<int>(pixel / gradient.w % gradient.h);
  if (x >= gradient.w / 2 * 2 || y >= gradient.h / 2 * 2) {
    gradient.data[pixel * gradient.pitch + i % gradient.c] = narrow<E>(0);
  }
}

template <class E>
void run_clear_cut_pixels(const Context& context, const Image<E>& gradient) {
  if (gradient.h % 2 == 0 && gradient.w % 2 == 0) return;
  launch(&clear_cut_pixels<E>, flat(context, "clear_cut_pixels", gradient.rows() * gradient.c),
         gradient, gradient.rows());
}

}  // namespace densenet_fast::cuda
