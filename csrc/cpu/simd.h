// One vector type per instruction set, by compiler vector extensions. Every instruction-set file
// compiles the same kernels with its own flags; nothing here has external linkage, so that no wide
// instruction can leak into code that runs before the dispatch.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own headers start some intrinsics from an undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#define DF_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define DF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DF_VECTOR_BYTES 32
#else
#define DF_VECTOR_BYTES 16
#endif

namespace densenet_fast::cpu {
namespace {

template <class T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(DF_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(DF_VECTOR_BYTES), aligned(4), may_alias));
};

template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(DF_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(DF_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = DF_VECTOR_BYTES / static_cast<int>(sizeof(T));

// Registers hold kMaxRows(NV) x NV accumulators, NV vectors of weights and one broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxVectors = 3;
constexpr int kMaxRows[kMaxVectors + 1] = {0, 14, 14, 9};
#else
constexpr int kMaxVectors = 3;
constexpr int kMaxRows[kMaxVectors + 1] = {0, 8, 6, 4};
#endif

template <class T>
DF_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
DF_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <class T>
DF_INLINE Vec<T> zero() {
  return Vec<T>{};
}

// A subtraction, which is no instruction at all: x - 0 is x. x + 0 is not, for x = -0.
template <class T>
DF_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// A mask of the first `n` lanes of T.
template <class T>
DF_INLINE __m256i first_lanes(int64_t n) {
  alignas(32) static constexpr int32_t kOnes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const int64_t words = n * static_cast<int64_t>(sizeof(T) / 4);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnes + 8 - words));
}
#endif

// The first `n` lanes (0 < n <= lanes); the others read as zero and are not touched in memory.
template <class T>
DF_INLINE Vec<T> load_partial(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1u), p);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_maskload_ps(p, first_lanes<T>(n));
  } else {
    return (Vec<T>)_mm256_maskload_pd(p, first_lanes<T>(n));
  }
#else
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load<T>(lanes);
#endif
}

template <class T>
DF_INLINE void store_partial(T* p, Vec<T> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1u), (__m512d)v);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(p, first_lanes<T>(n), (__m256)v);
  } else {
    _mm256_maskstore_pd(p, first_lanes<T>(n), (__m256d)v);
  }
#else
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// relu as PyTorch's, at `floor`: NaN stays NaN (the x86 maximum returns its second operand when
// unordered), and above a floor of NaN everything stays.
template <class T>
DF_INLINE Vec<T> relu(Vec<T> x, Vec<T> floor = zero<T>()) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_max_ps((__m512)floor, (__m512)x);
  } else {
    return (Vec<T>)_mm512_max_pd((__m512d)floor, (__m512d)x);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_max_ps((__m256)floor, (__m256)x);
  } else {
    return (Vec<T>)_mm256_max_pd((__m256d)floor, (__m256d)x);
  }
#else
  return x < floor ? floor : x;
#endif
}

// `g` where `x > floor`, else zero; a NaN in x stops the gradient's flow as PyTorch's threshold
// does not: threshold_backward keeps g unless x <= 0, so the unordered case keeps it here as well.
template <class T>
DF_INLINE Vec<T> where_positive(Vec<T> x, Vec<T> g, Vec<T> floor = zero<T>()) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, (__m512)floor, _CMP_NLE_UQ);
    return (Vec<T>)_mm512_maskz_mov_ps(keep, (__m512)g);
  } else {
    const __mmask8 keep = _mm512_cmp_pd_mask((__m512d)x, (__m512d)floor, _CMP_NLE_UQ);
    return (Vec<T>)_mm512_maskz_mov_pd(keep, (__m512d)g);
  }
#else
  return x <= floor ? zero<T>() : g;
#endif
}

template <class T>
DF_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;  // contracted by -ffp-contract=fast
}

constexpr int kCacheLine = 64;

DF_INLINE void prefetch_read(const char* p) { __builtin_prefetch(p, 0, 2); }
DF_INLINE void prefetch_write(const char* p) { __builtin_prefetch(p, 1, 2); }

}  // namespace
}  // namespace densenet_fast::cpu
