// Storage narrower than what is computed with: bfloat16, the upper half of a float32. Widening is
// exact; narrowing rounds to nearest, ties to even, and keeps NaN. Integer arithmetic does both on
// every instruction set.
#pragma once

#include "args.h"
#include "simd.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace densenet_fast::cpu {
namespace {

typedef uint32_t FloatBits __attribute__((vector_size(DF_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(DF_VECTOR_BYTES / 2)));

DF_INLINE Vec<float> from_upper_halves(HalfBits x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#elif defined(__SSE2__)
  int64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (Vec<float>)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128(bits));
#else
  return (Vec<float>)(__builtin_convertvector(x, FloatBits) << 16);
#endif
}

DF_INLINE HalfBits upper_halves(FloatBits x) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16));
#elif defined(__AVX2__)
  const __m256i halves = _mm256_srli_epi32((__m256i)x, 16);
  const __m128i upper = _mm256_extracti128_si256(halves, 1);
  return (HalfBits)_mm_packus_epi32(_mm256_castsi256_si128(halves), upper);
#elif defined(__SSE2__)
  const __m128i halves = _mm_srai_epi32((__m128i)x, 16);  // signed: what the packing saturates as
  const int64_t bits = _mm_cvtsi128_si64(_mm_packs_epi32(halves, halves));
  HalfBits result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
#else
  return __builtin_convertvector(x >> 16, HalfBits);
#endif
}

// Lanes whose upper halves are x rounded to bfloat16.
DF_INLINE FloatBits rounded_bits(Vec<float> x) {
  const FloatBits bits = (FloatBits)x;
  const FloatBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x == x ? rounded : bits | 0x400000u;  // a NaN's payload must not become an infinity's
}

template <class T>
DF_INLINE Vec<T> load(const bfloat16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return from_upper_halves(bits);
}

template <class T>
DF_INLINE void store(bfloat16* p, Vec<T> v) {
  const HalfBits bits = upper_halves(rounded_bits(v));
  std::memcpy(p, &bits, sizeof(bits));
}

template <class T>
DF_INLINE Vec<T> load_partial(const bfloat16* p, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
  return from_upper_halves((HalfBits)_mm256_maskz_loadu_epi16(mask, p));
#else
#if defined(__AVX2__)
  // Half a vector is what a growth rate of 12 leaves over.
  if (n == 4) {
    return from_upper_halves((HalfBits)_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
#endif
  bfloat16 lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load<T>(lanes);
#endif
}

template <class T>
DF_INLINE void store_partial(bfloat16* p, Vec<T> v, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
  _mm256_mask_storeu_epi16(p, mask, (__m256i)upper_halves(rounded_bits(v)));
#else
#if defined(__AVX2__)
  if (n == 4) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), (__m128i)upper_halves(rounded_bits(v)));
    return;
  }
#endif
  bfloat16 lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// The first lanes of a row that has `n` left, whatever it is stored as.
template <class T, class S>
DF_INLINE Vec<T> load_upto(const S* p, int64_t n) {
  return n >= kLanes<T> ? load<T>(p) : load_partial<T>(p, n);
}

template <class T, class S>
DF_INLINE void store_upto(S* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) {
    store<T>(p, v);
  } else {
    store_partial<T>(p, v, n);
  }
}

// What a store to S and a load would give.
template <class S>
DF_INLINE Vec<Compute<S>> rounded(Vec<Compute<S>> x) {
  if constexpr (kNarrow<S>) {
    return (Vec<float>)(rounded_bits(x) & 0xffff0000u);
  } else {
    return x;
  }
}

template <class S>
DF_INLINE Compute<S> widen(S x) {
  if constexpr (kNarrow<S>) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
  } else {
    return x;
  }
}

template <class S>
DF_INLINE S narrow(Compute<S> x) {
  if constexpr (kNarrow<S>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    bits = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    return {static_cast<uint16_t>(bits >> 16)};
  } else {
    return x;
  }
}

// Element i of a weight, as a value of S.
template <class S>
DF_INLINE Compute<S> weight_at(const Weight<S>& weight, int64_t i) {
  if constexpr (kNarrow<S>) {
    return widen<S>(weight.wide ? narrow<S>(weight.wide[i]) : weight.data[i]);
  } else {
    return weight.data[i];
  }
}

}  // namespace
}  // namespace densenet_fast::cpu
