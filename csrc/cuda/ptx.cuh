// Every architecture instruction behind one named function: inline PTX on the device, the
// documented semantics on the host, where the emulator of tests/cuda_emulator runs these same
// kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef DENSENET_FAST_EMULATOR
#define DF_DYNAMIC_SHARED(name) unsigned char* name = ::emulator::dynamic_shared()
#else
#define DF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace densenet_fast::cuda::ptx {

#ifndef DENSENET_FAST_EMULATOR
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// The compiler keeps x in a register instead of computing it again in every turn of a loop.
__device__ __forceinline__ void keep([[maybe_unused]] int& x) {
#ifndef DENSENET_FAST_EMULATOR
  asm volatile("" : "+r"(x));
#endif
}

// The larger one, NaN where x is: an instruction of sm_80 and newer. `other` is a number.
__device__ __forceinline__ float maximum(float x, float other) {
#if !defined(DENSENET_FAST_EMULATOR) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(other));
  return result;
#else
  return x <= other ? other : x;
#endif
}
__device__ __forceinline__ double maximum(double x, double other) {
  return !(x <= other) ? x : other;
}

// ---- Tensor cores: d += a * b, fragments as in the PTX ISA ("Matrix fragments for mma")
// ----------

// float16, m16n8k16; on sm_75, which has half the depth, two of m16n8k8.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
#ifdef DENSENET_FAST_EMULATOR
  ::emulator::mma_m16n8k16(d, a, b, ::emulator::HalfOperand{});
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

// bfloat16, sm_80 and newer.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
#ifdef DENSENET_FAST_EMULATOR
  ::emulator::mma_m16n8k16(d, a, b, ::emulator::BfloatOperand{});
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm volatile("trap;");  // sm_75 has no bfloat16 products; the policy never comes here
#endif
}

// tf32 (19-bit) operands, sm_80 and newer.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#ifdef DENSENET_FAST_EMULATOR
  ::emulator::mma_m16n8k8_tf32(d, a, b);
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm volatile("trap;");
#endif
}

__device__ __forceinline__ uint32_t float_to_tf32(float x) {
#ifdef DENSENET_FAST_EMULATOR
  return ::emulator::float_to_tf32(x);
#elif __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
#else
  return __float_as_uint(x);
#endif
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef DENSENET_FAST_EMULATOR
  ::emulator::ldmatrix_x4(r, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
#endif
}

// The same, every matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef DENSENET_FAST_EMULATOR
  ::emulator::ldmatrix_x4(r, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
#endif
}

// ---- Asynchronous copies, global to shared; plain copies before sm_80
// ------------------------------

// kBytes (4, 8 or 16), of which the first `valid` come from global memory and the rest are zero.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid) {
#ifdef DENSENET_FAST_EMULATOR
  ::emulator::cp_async(shared, global, kBytes, valid);
#elif __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(valid)
                 : "memory");
  }
#else
  struct alignas(kBytes) Words {
    uint32_t word[kBytes / 4];
  } words;
  if (valid == kBytes) {
    words = *static_cast<const Words*>(global);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {  // elements have two bytes at least
      const auto* half = static_cast<const uint16_t*>(global) + 2 * i;
      words.word[i] = 4 * i < valid ? half[0] : 0;
      if (4 * i + 2 < valid) words.word[i] |= uint32_t{half[1]} << 16;
    }
  }
  *static_cast<Words*>(shared) = words;
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef DENSENET_FAST_EMULATOR
  ::emulator::cp_async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Until at most `kPending` of this thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef DENSENET_FAST_EMULATOR
  ::emulator::cp_async_wait(kPending);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

}  // namespace densenet_fast::cuda::ptx
