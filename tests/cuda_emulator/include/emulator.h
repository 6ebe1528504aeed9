// CUDA's execution model for the host compiler, included in front of every kernel source.
//
// A kernel thread is a fiber (fiber.h). Blocks run one after another, and so do the threads of a
// block, each until it has to wait for others, in an order that the test chooses: a missing barrier
// shows as a different result or as poison (scheduling.h). Barriers, shuffles, ldmatrix and mma
// wait until every participant has arrived and report it when one cannot (collectives.h). Shared
// memory starts as NaNs, and what cp.async copies becomes visible only at the issuing thread's
// matching wait (memory.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#undef __constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "kernels use dynamic shared memory only");
#define __constant__

#include "collectives.h"
#include "execution.h"
#include "memory.h"

// ---- The names kernels use
// -----------------------------------------------------------------------

#define threadIdx (::emulator::self().index)
#define blockIdx (::emulator::block()->index)
#define blockDim (::emulator::block()->launch.block)
#define gridDim (::emulator::block()->launch.grid)
#define warpSize 32

// The caller's place in the source, for reports.
#define EMULATOR_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_CALLER) {
  ::emulator::block_meeting({"__syncthreads", file, line}, false);
}
inline int __syncthreads_count(int predicate, EMULATOR_CALLER) {
  return ::emulator::block_meeting({"__syncthreads_count", file, line}, predicate != 0);
}
inline int __syncthreads_or(int predicate, EMULATOR_CALLER) {
  return ::emulator::block_meeting({"__syncthreads_or", file, line}, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, EMULATOR_CALLER) {
  return ::emulator::block_meeting({"__syncthreads_and", file, line}, predicate != 0) ==
         ::emulator::block()->threads;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, EMULATOR_CALLER) {
  ::emulator::sync_warp({"__syncwarp", file, line}, mask);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32, EMULATOR_CALLER) {
  return ::emulator::shuffle<T>({"__shfl_sync", file, line}, mask, value, width,
                                [&](int) { return from & (width - 1); });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, EMULATOR_CALLER) {
  return ::emulator::shuffle<T>({"__shfl_xor_sync", file, line}, mask, value, width,
                                [&](int lane) { return lane ^ lanes; });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned lanes, int width = 32, EMULATOR_CALLER) {
  return ::emulator::shuffle<T>({"__shfl_up_sync", file, line}, mask, value, width,
                                [&](int lane) { return lane - static_cast<int>(lanes); });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned lanes, int width = 32, EMULATOR_CALLER) {
  return ::emulator::shuffle<T>({"__shfl_down_sync", file, line}, mask, value, width,
                                [&](int lane) { return lane + static_cast<int>(lanes); });
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, EMULATOR_CALLER) {
  return ::emulator::ballot({"__ballot_sync", file, line}, mask, predicate);
}
inline int __any_sync(uint32_t mask, bool predicate, EMULATOR_CALLER) {
  return ::emulator::ballot({"__any_sync", file, line}, mask, predicate) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate, EMULATOR_CALLER) {
  return ::emulator::ballot({"__all_sync", file, line}, mask, predicate) == mask;
}

// Whole operations between two points where threads wait: nothing comes in between.
template <class T>
T atomicAdd(T* p, T value) {
  if constexpr (std::is_integral_v<T>) {
    const T before = *p;
    *p = before + value;
    return before;
  } else {
    ::emulator::fail("atomicAdd of floating-point numbers: reductions have a fixed order here");
  }
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline void __trap() { ::emulator::fail("__trap"); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
