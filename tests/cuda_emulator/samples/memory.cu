// Small kernels for the tests of the emulator's memory: copies, bounds, races.
#include "cuda/ptx.cuh"
#include "run.h"

namespace ptx = densenet_fast::cuda::ptx;

namespace {

// ---- Asynchronous copies

enum CopyFault { kNone, kNoWait, kWaitsForTooFew, kNoBarrier, kLeavesEarly };

// Every thread copies 16 bytes per step through a ring of two stages; its neighbour stores them.
template <CopyFault kFault>
__global__ void copy_through_ring(const float4* from, float4* to, int steps) {
  DF_DYNAMIC_SHARED(shared);
  float4* ring = reinterpret_cast<float4*>(shared);
  const int n = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  const auto start = [&](int step) {
    if (step < steps) ptx::cp_async<16>(&ring[step % 2 * n + i], &from[step * n + i], 16);
    ptx::cp_async_commit();
  };
  start(0);
  if (kFault == kLeavesEarly) return;
  for (int step = 0; step < steps; ++step) {
    start(step + 1);
    if (kFault == kWaitsForTooFew) {
      ptx::cp_async_wait<2>();
    } else if (kFault != kNoWait) {
      ptx::cp_async_wait<1>();
    }
    if (kFault != kNoBarrier) __syncthreads();
    const int neighbour = (i + 1) % n;
    to[step * n + neighbour] = ring[step % 2 * n + neighbour];
    if (kFault != kNoBarrier) __syncthreads();
  }
  ptx::cp_async_wait<0>();
}

__global__ void copy_bytes(const unsigned char* from, unsigned char* to, int size, int valid,
                           int shared_offset) {
  DF_DYNAMIC_SHARED(shared);
  if (size == 16) {
    ptx::cp_async<16>(shared + shared_offset, from, valid);
  } else {
    ptx::cp_async<4>(shared + shared_offset, from, valid);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < size; ++i) to[i] = shared[shared_offset + i];
}

// ---- Plain accesses

__global__ void reads_unwritten(int* out) {
  DF_DYNAMIC_SHARED(shared);
  int* x = reinterpret_cast<int*>(shared);
  if (threadIdx.x != 3) x[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = x[(threadIdx.x + 1) % blockDim.x];
}

__global__ void writes_shared(int offset) {
  DF_DYNAMIC_SHARED(shared);
  if (threadIdx.x == 2) *reinterpret_cast<volatile int*>(shared + offset) = 1;
}

__global__ void writes_global(int* out, int64_t at) {
  if (threadIdx.x == 2) *const_cast<volatile int*>(out + at) = 1;
}

__constant__ const int kTable[4] = {10, 20, 30, 40};

// Constants, parameters and locals are nobody's buffers, and fine.
struct Parameters {
  int values[24];
};
__global__ void reads_constants(int* out, Parameters parameters) {
  volatile int local[32];
  for (int i = 0; i < 32; ++i) local[i] = i;
  out[threadIdx.x] =
      kTable[threadIdx.x % 4] + parameters.values[threadIdx.x % 24] + local[threadIdx.x % 32];
}

}  // namespace

extern "C" {

const char* sample_copy_through_ring(int fault, const float4* from, float4* to, int threads,
                                     int steps) {
  void (*const kernels[])(const float4*, float4*, int) = {
      &copy_through_ring<kNone>, &copy_through_ring<kNoWait>, &copy_through_ring<kWaitsForTooFew>,
      &copy_through_ring<kNoBarrier>, &copy_through_ring<kLeavesEarly>};
  return run("copy_through_ring", 1, threads, 2 * threads * sizeof(float4), kernels[fault], from,
             to, steps);
}
const char* sample_copy_bytes(const unsigned char* from, unsigned char* to, int size, int valid,
                              int shared_offset) {
  return run("copy_bytes", 1, 1, 64, &copy_bytes, from, to, size, valid, shared_offset);
}

const char* sample_reads_unwritten(int* out) {
  return run("reads_unwritten", 1, 32, 32 * sizeof(int), &reads_unwritten, out);
}
const char* sample_writes_shared(int offset) {
  return run("writes_shared", 1, 32, 64, &writes_shared, offset);
}
const char* sample_writes_global(int* out, int64_t at) {
  return run("writes_global", 3, 32, 0, &writes_global, out, at);
}
const char* sample_reads_constants(int* out) {
  Parameters parameters;
  for (int i = 0; i < 24; ++i) parameters.values[i] = i;
  return run("reads_constants", 1, 32, 0, &reads_constants, out, parameters);
}

}  // extern "C"
