// Partial results of tiles and how they merge. Warps hold 32 rows, tiles 32, 64 or 128 and always
// within the same 128: merged as one tree over these, the result is the same whatever the tile.
#pragma once

#include "tiles.h"
#include "types.cuh"

namespace densenet_fast::cuda {

constexpr int kWarpRows = 32;

// Chan, Golub, LeVeque.
template <class A>
struct Moments {
  A count = 0, mean = 0, m2 = 0;

  __device__ void merge(const Moments& other) {
    if (other.count == A(0)) return;
    const A total = count + other.count, delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * share * count;
    count = total;
  }
};

// Sums of D and of D * (x - mean).
template <class A>
struct Sums {
  A sum = 0, centred = 0;

  __device__ void merge(const Sums& other) {
    sum += other.sum;
    centred += other.centred;
  }
};

// All of x, neighbours first.
template <class M, int N>
__device__ __forceinline__ M merged(M (&x)[N]) {
#pragma unroll
  for (int apart = 1; apart < N; apart *= 2) {
#pragma unroll
    for (int i = 0; i + apart < N; i += 2 * apart) x[i].merge(x[i + apart]);
  }
  return x[0];
}

// Of each tile and column: [tiles, columns]; counts [tiles].
template <class A>
struct TileStatistics {
  using Merged = Moments<A>;
  A* mean = nullptr;  // null: not wanted
  A* m2 = nullptr;
  int* count = nullptr;

  __device__ Merged load(int64_t tile, int c, int columns) const {
    return {static_cast<A>(count[tile]), mean[tile * columns + c], m2[tile * columns + c]};
  }
  __device__ void store(int64_t tile, int c, int columns, const Merged& m) const {
    mean[tile * columns + c] = m.mean;
    m2[tile * columns + c] = m.m2;
    if (c == 0) count[tile] = static_cast<int>(m.count);
  }
};

template <class A>
struct TileSums {
  using Merged = Sums<A>;
  A* sum = nullptr;
  A* centred = nullptr;

  __device__ Merged load(int64_t tile, int c, int columns) const {
    return {sum[tile * columns + c], centred[tile * columns + c]};
  }
  __device__ void store(int64_t tile, int c, int columns, const Merged& s) const {
    sum[tile * columns + c] = s.sum;
    centred[tile * columns + c] = s.centred;
  }
};

}  // namespace densenet_fast::cuda
