// Small kernels, right and wrong, for the tests of the emulator itself.
#include "cuda/ptx.cuh"
#include "run.h"

namespace ptx = densenet_fast::cuda::ptx;

namespace {

// ---- Barriers

// Sums of blockDim.x floats by a tree in shared memory.
template <bool kBarriers>
__global__ void tree_sum(const float* x, float* sum) {
  DF_DYNAMIC_SHARED(shared);
  float* partial = reinterpret_cast<float*>(shared);
  const unsigned i = threadIdx.x;
  partial[i] = x[blockIdx.x * blockDim.x + i];
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (kBarriers) __syncthreads();
    if (i < step) partial[i] += partial[i + step];
  }
  if (i == 0) sum[blockIdx.x] = partial[0];
}

// Rounds in which every thread hands its number to the next: `kBarriers` of the two are there.
template <int kBarriers>
__global__ void rotate(int* x, int rounds) {
  DF_DYNAMIC_SHARED(shared);
  int* ring = reinterpret_cast<int*>(shared);
  int value = x[threadIdx.x];
  for (int r = 0; r < rounds; ++r) {
    ring[threadIdx.x] = value;
    __syncthreads();
    value = ring[(threadIdx.x + 1) % blockDim.x];
    if (kBarriers == 2) __syncthreads();
  }
  x[threadIdx.x] = value;
}

__global__ void some_skip_the_barrier(int skipping) {
  if (static_cast<int>(threadIdx.x) == skipping) return;
  __syncthreads();
}

__global__ void barriers_in_both_branches() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void votes(int* out) {
  const int odd = threadIdx.x % 2;
  out[threadIdx.x] =
      __syncthreads_count(odd) * 4 + __syncthreads_or(odd) * 2 + __syncthreads_and(odd);
}

__global__ void barrier_after_barrier() {
  while (true) __syncthreads();
}

__global__ void one_thread_spins(volatile int* flag) {
  if (threadIdx.x == 33) {
    while (*flag == 0) {
    }
  }
  __syncthreads();
}

struct Slow {
  int* destroyed;
  ~Slow() { ++*destroyed; }
};

__global__ void one_thread_fails(int* destroyed) {
  const Slow slow{destroyed};
  if (threadIdx.x == 7) __trap();
  __syncthreads();
}

__global__ void adds_floats(float* x) { atomicAdd(x, 1.0f); }
__global__ void takes_tickets(unsigned* counter, unsigned* tickets) {
  tickets[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1u);
}

__global__ void geometry(int* out) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      static_cast<int>(block * 1000 + thread);
}

// ---- Warps

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int* o = out + threadIdx.x * 8;
  o[0] = __shfl_sync(0xffffffffu, lane, 5);
  o[1] = __shfl_xor_sync(0xffffffffu, lane, 3);
  o[2] = __shfl_up_sync(0xffffffffu, lane, 2);
  o[3] = __shfl_down_sync(0xffffffffu, lane, 2);
  o[4] = __shfl_sync(0xffffffffu, lane, 1, 8);
  o[5] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  o[6] = __any_sync(0xffffffffu, lane == 9) * 2 + __all_sync(0xffffffffu, lane < 32);
  o[7] = lane < 8 ? __shfl_down_sync(0xffu, lane, 4, 8) : __shfl_xor_sync(0xffffff00u, lane, 1);
}

__global__ void one_lane_skips_the_shuffle() {
  if (threadIdx.x % 32 != 5) __shfl_xor_sync(0xffffffffu, 0, 1);
}
__global__ void lanes_at_different_collectives() {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __ballot_sync(0xffffffffu, true);
  }
}
__global__ void not_in_its_own_mask() { __syncwarp(0x7fffffffu); }
__global__ void more_lanes_than_threads() { __syncwarp(0xffffffffu); }
__global__ void reads_from_outside_the_mask() {
  if (threadIdx.x < 4) __shfl_sync(0xfu, 1, 6);
}

template <bool kSync>
__global__ void neighbours_of_a_warp(int* out) {
  DF_DYNAMIC_SHARED(shared);
  int* x = reinterpret_cast<int*>(shared);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kSync) {
    __syncwarp();
  } else {
    __ballot_sync(0xffffffffu, true);  // all arrive, but it orders no memory
  }
  out[threadIdx.x] = x[threadIdx.x ^ 1];
}

// `rounds` of shuffles and barriers, to take the time of.
__global__ void many_arrivals(int* out, int rounds) {
  int x = static_cast<int>(threadIdx.x);
  for (int r = 0; r < rounds; ++r) {
    for (int i = 1; i < 16; i *= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    __syncthreads();
  }
  out[threadIdx.x] = x;
}

// ---- Matrices

// Every lane's four registers of an 8 x 32 arrangement: four 8 x 8 matrices, rows of `pitch` bytes.
template <bool kTransposed>
__global__ void load_matrices(const uint16_t* x, uint32_t* out, int pitch, int offset,
                              int rows_written) {
  DF_DYNAMIC_SHARED(shared);
  if (static_cast<int>(threadIdx.x) < rows_written) {
    for (int j = 0; j < 8; ++j) {
      reinterpret_cast<uint16_t*>(shared + threadIdx.x * pitch)[j] = x[threadIdx.x * 8 + j];
    }
  }
  __syncwarp();
  uint32_t r[4];
  const void* row = shared + threadIdx.x * pitch + offset;
  if (kTransposed) {
    ptx::ldmatrix_x4_trans(r, row);
  } else {
    ptx::ldmatrix_x4(r, row);
  }
  for (int q = 0; q < 4; ++q) out[threadIdx.x * 4 + q] = r[q];
}

__device__ uint32_t pair(const uint16_t* low, const uint16_t* high) {
  return *low | static_cast<uint32_t>(*high) << 16;
}

// d[16, 8] += a[16, 16] b[16, 8], row by row in global memory; fragments by hand.
template <class E>
__global__ void multiply16(const uint16_t* a, const uint16_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4 * 2;
  uint32_t fa[4], fb[2];
  for (int r = 0; r < 4; ++r) {
    const uint16_t* p = a + (g + r % 2 * 8) * 16 + t + r / 2 * 8;
    fa[r] = pair(p, p + 1);
  }
  for (int r = 0; r < 2; ++r) {
    const uint16_t* p = b + (t + r * 8) * 8 + g;
    fb[r] = pair(p, p + 8);
  }
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[(g + i / 2 * 8) * 8 + t + i % 2];
  ptx::mma_m16n8k16(fd, fa, fb, E{});
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t + i % 2] = fd[i];
}

// The same for a[16, 8] b[8, 8] as tf32.
template <bool kRound>
__global__ void multiply_tf32(const float* a, const float* b, float* d) {
  const auto operand = [](float x) { return kRound ? ptx::float_to_tf32(x) : __float_as_uint(x); };
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const uint32_t fa[4] = {operand(a[g * 8 + t]), operand(a[(g + 8) * 8 + t]),
                          operand(a[g * 8 + t + 4]), operand(a[(g + 8) * 8 + t + 4])};
  const uint32_t fb[2] = {operand(b[t * 8 + g]), operand(b[(t + 4) * 8 + g])};
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  ptx::mma_m16n8k8_tf32(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

}  // namespace

extern "C" {

const char* sample_tree_sum(int barriers, const float* x, float* sum, int blocks, int threads) {
  return run("tree_sum", blocks, threads, threads * sizeof(float),
             barriers ? &tree_sum<true> : &tree_sum<false>, x, sum);
}
const char* sample_rotate(int barriers, int* x, int threads, int rounds) {
  return run("rotate", 1, threads, threads * sizeof(int), barriers == 2 ? &rotate<2> : &rotate<1>,
             x, rounds);
}
const char* sample_some_skip_the_barrier(int skipping) {
  return run("some_skip_the_barrier", 2, 64, 0, &some_skip_the_barrier, skipping);
}
const char* sample_barriers_in_both_branches() {
  return run("barriers_in_both_branches", 1, 64, 0, &barriers_in_both_branches);
}
const char* sample_votes(int* out) { return run("votes", 1, 48, 0, &votes, out); }
const char* sample_barrier_after_barrier() {
  return run("barrier_after_barrier", 1, 32, 0, &barrier_after_barrier);
}
const char* sample_one_thread_spins(int* flag) {
  return run("one_thread_spins", 1, 64, 0, &one_thread_spins, flag);
}
const char* sample_one_thread_fails(int* destroyed) {
  return run("one_thread_fails", 1, 64, 0, &one_thread_fails, destroyed);
}
const char* sample_adds_floats(float* x) { return run("adds_floats", 1, 1, 0, &adds_floats, x); }
const char* sample_takes_tickets(unsigned* counter, unsigned* tickets) {
  return run("takes_tickets", 4, 64, 0, &takes_tickets, counter, tickets);
}
const char* sample_geometry(int* out, int gx, int gy, int gz, int bx, int by, int bz) {
  return run("geometry", dim3(gx, gy, gz), dim3(bx, by, bz), 0, &geometry, out);
}
const char* sample_geometry_with_shared(int* out, int64_t bytes) {
  return run("geometry", 1, 32, static_cast<size_t>(bytes), &geometry, out);
}

const char* sample_shuffles(int* out, int threads) {
  return run("shuffles", 1, threads, 0, &shuffles, out);
}
const char* sample_one_lane_skips_the_shuffle() {
  return run("one_lane_skips_the_shuffle", 1, 64, 0, &one_lane_skips_the_shuffle);
}
const char* sample_lanes_at_different_collectives() {
  return run("lanes_at_different_collectives", 1, 32, 0, &lanes_at_different_collectives);
}
const char* sample_not_in_its_own_mask() {
  return run("not_in_its_own_mask", 1, 32, 0, &not_in_its_own_mask);
}
const char* sample_more_lanes_than_threads() {
  return run("more_lanes_than_threads", 1, 40, 0, &more_lanes_than_threads);
}
const char* sample_reads_from_outside_the_mask() {
  return run("reads_from_outside_the_mask", 1, 32, 0, &reads_from_outside_the_mask);
}
const char* sample_neighbours_of_a_warp(int sync, int* out) {
  return run("neighbours_of_a_warp", 1, 64, 64 * sizeof(int),
             sync ? &neighbours_of_a_warp<true> : &neighbours_of_a_warp<false>, out);
}
const char* sample_many_arrivals(int* out, int threads, int rounds) {
  return run("many_arrivals", 1, threads, 0, &many_arrivals, out, rounds);
}

const char* sample_load_matrices(int transposed, const uint16_t* x, uint32_t* out, int pitch,
                                 int offset, int rows_written) {
  return run("load_matrices", 1, 32, 32 * pitch,
             transposed ? &load_matrices<true> : &load_matrices<false>, x, out, pitch, offset,
             rows_written);
}
const char* sample_multiply_f16(const uint16_t* a, const uint16_t* b, float* d) {
  return run("multiply16", 1, 32, 0, &multiply16<__half>, a, b, d);
}
const char* sample_multiply_bf16(const uint16_t* a, const uint16_t* b, float* d) {
  return run("multiply16", 1, 32, 0, &multiply16<__nv_bfloat16>, a, b, d);
}
const char* sample_multiply_tf32(int rounding, const float* a, const float* b, float* d) {
  return run("multiply_tf32", 1, 32, 0, rounding ? &multiply_tf32<true> : &multiply_tf32<false>, a,
             b, d);
}

}  // extern "C"
