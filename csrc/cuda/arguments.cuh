// Untyped arguments become typed ones; the element type and the arithmetic pick the policy.
#pragma once

#include <limits>
#include <stdexcept>

#include "epilogue.cuh"
#include "kernels.h"

namespace densenet_fast::cuda {

// body(Policy{}) for the context's type.
template <class Body>
void with_policy(const Context& context, const Body& body) {
  switch (context.dtype) {
    case Dtype::kFloat16:
      return body(HalfPolicy{});
    case Dtype::kBfloat16:
      return body(BfloatPolicy{});
    case Dtype::kFloat32:
      return context.allow_tf32 ? body(Tf32Policy{}) : body(FloatPolicy{});
    case Dtype::kFloat64:
      return body(DoublePolicy{});
  }
  throw std::invalid_argument("unknown element type");
}

// The same for kernels without products, where tf32 makes no difference.
template <class Body>
void with_element(const Context& context, const Body& body) {
  switch (context.dtype) {
    case Dtype::kFloat16:
      return body(HalfPolicy{});
    case Dtype::kBfloat16:
      return body(BfloatPolicy{});
    case Dtype::kFloat32:
      return body(FloatPolicy{});
    case Dtype::kFloat64:
      return body(DoublePolicy{});
  }
  throw std::invalid_argument("unknown element type");
}

template <class E>
Image<E> image(const ImageArgument& a) {
  E* data = static_cast<E*>(a.data);
  return {data,
          a.pitch,
          static_cast<int>(a.n),
          static_cast<int>(a.d),
          static_cast<int>(a.h),
          static_cast<int>(a.w),
          static_cast<int>(a.c),
          row_alignment<E>(a.data, a.pitch)};
}

template <class A>
Activation<A> activation(const NormArgument& a) {
  return {static_cast<const A*>(a.scale), static_cast<const A*>(a.shift),
          a.linear ? -std::numeric_limits<A>::infinity() : A(0)};
}

template <class A>
Norm<A> norm(const NormArgument& a) {
  return {static_cast<const A*>(a.scale), static_cast<const A*>(a.shift),
          static_cast<const A*>(a.mean), static_cast<const A*>(a.rstd),
          a.linear ? std::numeric_limits<A>::quiet_NaN() : A(0)};
}

}  // namespace densenet_fast::cuda
