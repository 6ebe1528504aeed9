// Element types: what images are stored as, and what is computed with.
#pragma once

#include <cstdint>
#include <type_traits>

namespace densenet_fast::cpu {

struct bfloat16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = S;
};

template <>
struct ComputeOf<bfloat16> {
  using type = float;
};

// The type of sums, statistics and coefficients where images are stored as S.
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class S>
constexpr bool kNarrow = !std::is_same_v<S, Compute<S>>;

}  // namespace densenet_fast::cpu
