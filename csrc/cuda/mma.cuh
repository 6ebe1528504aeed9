// Warp products of shared-memory tiles. A warp holds a tile of 32 rows x 8*NT columns; whatever the
// arithmetic, lane i of it holds rows i/4 + {0, 8, 16, 24} and columns 2(i%4) + {0, 1} of every
// eight, the layout of the tensor cores' accumulators, so that all epilogues are the same.
#pragma once

#include "types.cuh"

namespace densenet_fast::cuda {

// How products are computed. Tensor cores for 16-bit types and, where the caller allows it, for
// float32 as tf32; otherwise ordinary multiply-adds in the accumulator's precision.
struct HalfPolicy {
  using Element = __half;
  static constexpr bool kTf32 = false;
};
struct BfloatPolicy {
  using Element = __nv_bfloat16;
  static constexpr bool kTf32 = false;
};
struct Tf32Policy {
  using Element = float;
  static constexpr bool kTf32 = true;
};
struct FloatPolicy {
  using Element = float;
  static constexpr bool kTf32 = false;
};
struct DoublePolicy {
  using Element = double;
  static constexpr bool kTf32 = false;
};

// What device code is compiled for; the emulator says what it stands for.
#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__;
#elif defined(DENSENET_FAST_EMULATED_ARCHITECTURE)
constexpr int kArchitecture = DENSENET_FAST_EMULATED_ARCHITECTURE;
#else
constexpr int kArchitecture = 800;
#endif

enum class Arithmetic { kTensor16, kTensorTf32, kPlain };

template <class P>
__host__ __device__ constexpr Arithmetic arithmetic() {
  if constexpr (sizeof(typename P::Element) == 2) {
    // sm_75 multiplies float16 on its tensor cores, bfloat16 not at all.
    constexpr bool kPlain = kArchitecture < 800 && __is_same(P, BfloatPolicy);
    return kPlain ? Arithmetic::kPlain : Arithmetic::kTensor16;
  } else if constexpr (P::kTf32) {
    return kArchitecture < 800 ? Arithmetic::kPlain : Arithmetic::kTensorTf32;
  } else {
    return Arithmetic::kPlain;
  }
}

// A number as an operand of products: of the images' type, and rounded to tf32 where that is how
// they multiply.
template <class P>
__device__ __forceinline__ typename P::Element operand(Accumulator<typename P::Element> x) {
  if constexpr (arithmetic<P>() == Arithmetic::kTensorTf32) {
    return __uint_as_float(ptx::float_to_tf32(x));
  } else {
    return narrow<typename P::Element>(x);
  }
}

template <class P>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (P::kTf32) {
    ptx::mma_m16n8k8_tf32(d, a, b);
  } else {
    ptx::mma_m16n8k16(d, a, b, typename P::Element{});
  }
}

// Operand rows carry 64 bytes of the reduction at a time; the pitch of 80 bytes makes ldmatrix and
// scalar fragment loads free of bank conflicts.
constexpr int kStepBytes = 64;
constexpr int kRowBytes = kStepBytes + 16;
constexpr int kStepPieces = kStepBytes / kPieceBytes;

template <class E>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(E));  // reduction elements in a step

// The tile rows whose addresses a lane needs: two for ldmatrix, its four own ones otherwise.
constexpr int kRowHandles = 4;

template <class P>
__host__ __device__ __forceinline__ int row_of_handle(int handle, int lane) {
  if constexpr (arithmetic<P>() != Arithmetic::kPlain) {
    return handle % 2 * 16 + lane % 16;
  } else {
    return handle / 2 * 16 + handle % 2 * 8 + lane / 4;
  }
}

template <class P, int NT>
using WarpTile = Accumulator<typename P::Element>[2][NT][4];

template <class P, int NT>
__device__ __forceinline__ void clear(WarpTile<P, NT>& acc) {
#pragma unroll
  for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
    for (int ni = 0; ni < NT; ++ni) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[mi][ni][i] = 0;
    }
  }
}

// acc += A * B^T over one step: row r of A at a + a_row[handle of r], column n of B at b + n *
// kRowBytes.
template <class P, int NT>
__device__ __forceinline__ void multiply_step(WarpTile<P, NT>& acc, const unsigned char* a,
                                              const int (&a_row)[kRowHandles],
                                              const unsigned char* b, int lane) {
  using E = typename P::Element;
  using A = Accumulator<E>;
  constexpr Arithmetic kind = arithmetic<P>();
  if constexpr (kind != Arithmetic::kPlain) {
    // 32 bytes of the reduction at a time. Four bytes of a row are two elements or one of tf32:
    // ldmatrix brings them to the same lanes.
#pragma unroll
    for (int ks = 0; ks < 2; ++ks) {
      uint32_t af[2][4];
#pragma unroll
      for (int mi = 0; mi < 2; ++mi) {
        ptx::ldmatrix_x4(af[mi], a + a_row[mi] + (ks * 2 + lane / 16) * 16);
      }
#pragma unroll
      for (int ni = 0; ni < NT; ni += 2) {
        uint32_t bf[4];
        const int column = ni * 8 + lane % 8 + lane / 16 * 8;
        ptx::ldmatrix_x4(bf, b + column * kRowBytes + (ks * 2 + lane / 8 % 2) * 16);
        const uint32_t b0[2] = {bf[0], bf[1]}, b1[2] = {bf[2], bf[3]};
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) {
          mma<P>(acc[mi][ni], af[mi], b0);
          mma<P>(acc[mi][ni + 1], af[mi], b1);
        }
      }
    }
  } else {
    constexpr int V = kPieceElements<E>;
#pragma unroll
    for (int piece = 0; piece < kStepPieces; ++piece) {
      Piece<E> rows[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        rows[h] = *reinterpret_cast<const Piece<E>*>(a + a_row[h] + piece * kPieceBytes);
      }
#pragma unroll
      for (int ni = 0; ni < NT; ++ni) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = ni * 8 + lane % 4 * 2 + e;
          const auto column =
              *reinterpret_cast<const Piece<E>*>(b + n * kRowBytes + piece * kPieceBytes);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A bv = widen(column.element[v]);
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              A& sum = acc[h / 2][ni][h % 2 * 2 + e];
              sum = multiply_add(widen(rows[h].element[v]), bv, sum);
            }
          }
        }
      }
    }
  }
}

// Pixels of the reduction that multiply_pixels takes at a time.
constexpr int kPixelStep = 16;

// acc[i, j] += sum over 16 pixels of A[pixel, i] * B[pixel, j]; a_row(p) and b_row(p) are the byte
// offsets of pixel p's row; the warp's tile starts at those rows' first byte.
template <class P, int NT, class RowA, class RowB>
__device__ __forceinline__ void multiply_pixels(WarpTile<P, NT>& acc, const unsigned char* a,
                                                const RowA& a_row, const unsigned char* b,
                                                const RowB& b_row, int lane) {
  using E = typename P::Element;
  using A = Accumulator<E>;
  constexpr Arithmetic kind = arithmetic<P>();
  if constexpr (kind == Arithmetic::kTensor16) {
    uint32_t af[2][4];
    const unsigned char* row = a + a_row(lane / 16 * 8 + lane % 8);
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
      ptx::ldmatrix_x4_trans(af[mi], row + (mi * 16 + lane / 8 % 2 * 8) * 2);
    }
    const unsigned char* column = b + b_row(lane / 8 % 2 * 8 + lane % 8);
#pragma unroll
    for (int ni = 0; ni < NT; ni += 2) {
      uint32_t bf[4];
      ptx::ldmatrix_x4_trans(bf, column + (ni * 8 + lane / 16 * 8) * 2);
      const uint32_t b0[2] = {bf[0], bf[1]}, b1[2] = {bf[2], bf[3]};
#pragma unroll
      for (int mi = 0; mi < 2; ++mi) {
        mma<P>(acc[mi][ni], af[mi], b0);
        mma<P>(acc[mi][ni + 1], af[mi], b1);
      }
    }
  } else if constexpr (kind == Arithmetic::kTensorTf32) {
    const int t = lane % 4, g = lane / 4;
#pragma unroll
    for (int ks = 0; ks < 2; ++ks) {
      const auto value = [&](const unsigned char* base, int offset, int element) {
        return reinterpret_cast<const uint32_t*>(base + offset)[element];
      };
      const int a0 = a_row(ks * 8 + t), a1 = a_row(ks * 8 + t + 4);
      const int b0 = b_row(ks * 8 + t), b1 = b_row(ks * 8 + t + 4);
      uint32_t af[2][4];
#pragma unroll
      for (int mi = 0; mi < 2; ++mi) {
        af[mi][0] = value(a, a0, mi * 16 + g);
        af[mi][1] = value(a, a0, mi * 16 + g + 8);
        af[mi][2] = value(a, a1, mi * 16 + g);
        af[mi][3] = value(a, a1, mi * 16 + g + 8);
      }
#pragma unroll
      for (int ni = 0; ni < NT; ++ni) {
        const uint32_t bf[2] = {value(b, b0, ni * 8 + g), value(b, b1, ni * 8 + g)};
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) mma<P>(acc[mi][ni], af[mi], bf);
      }
    }
  } else {
#pragma unroll 4
    for (int p = 0; p < kPixelStep; ++p) {
      const E* row = reinterpret_cast<const E*>(a + a_row(p));
      const E* column = reinterpret_cast<const E*>(b + b_row(p));
      A left[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) left[h] = widen(row[h / 2 * 16 + h % 2 * 8 + lane / 4]);
#pragma unroll
      for (int ni = 0; ni < NT; ++ni) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const A right = widen(column[ni * 8 + lane % 4 * 2 + e]);
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            A& sum = acc[h / 2][ni][h % 2 * 2 + e];
            sum = multiply_add(left[h], right, sum);
          }
        }
      }
    }
  }
}

}  // namespace densenet_fast::cuda
