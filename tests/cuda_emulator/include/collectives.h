// Warp collectives: shuffles, votes, ldmatrix and mma by the PTX ISA's fragment tables.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "execution.h"
#include "memory.h"

namespace emulator {

// ---- Shuffles and votes
// --------------------------------------------------------------------------

// `source(lane in its segment)` is the lane in the segment to read, or none: out of the segment.
template <class T, class Source>
T shuffle(const Site& site, uint32_t mask, T value, int width, const Source& source) {
  if (width < 1 || width > kWarp || (width & (width - 1))) {
    fail(site.text() + ": the width is not a power of two up to 32");
  }
  struct Slot {
    T in, out;
  } slot{value, value};
  warp_meeting(site, mask, &slot, [&](void* const* slots) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!slots[lane]) continue;
      const int in_segment = source(lane % width);
      if (in_segment < 0 || in_segment >= width) continue;  // keeps its own
      const int from = lane - lane % width + in_segment;
      if (!slots[from]) {
        fail_at(self().linear / kWarp * kWarp + lane, site.text() + ": reads from lane " +
                                                          std::to_string(from) +
                                                          ", which does not take part");
      }
      static_cast<Slot*>(slots[lane])->out = static_cast<Slot*>(slots[from])->in;
    }
  });
  return slot.out;
}

inline uint32_t ballot(const Site& site, uint32_t mask, bool predicate) {
  struct Slot {
    bool in;
    uint32_t out;
  } slot{predicate, 0};
  warp_meeting(site, mask, &slot, [](void* const* slots) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (slots[i] && static_cast<Slot*>(slots[i])->in) bits |= 1u << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (slots[i]) static_cast<Slot*>(slots[i])->out = bits;
    }
  });
  return slot.out;
}

inline void sync_warp(const Site& site, uint32_t mask) {
  warp_meeting(site, mask, nullptr, [&](void* const*) {
    const int index = self().linear / kWarp;
    if (mask == block()->lanes(index)) ++block()->warps[index].clock;
  });
}

// ---- ldmatrix
// ------------------------------------------------------------------------------------

// Row r of matrix q is at the address lane 8q + r gave; lane i receives elements 2(i % 4) and
// 2(i % 4) + 1 of row i / 4 (transposed: of column i / 4).
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed,
                        const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const Site site{transposed ? "ldmatrix.trans" : "ldmatrix", file, line};
  check_shared(row, 16, 16, site.name);
  struct Slot {
    const void* row;
    uint32_t* out;
  } slot{row, r};
  warp_meeting(site, 0xffffffffu, &slot, [&](void* const* slots) {
    uint16_t element[4][8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const void* from = static_cast<Slot*>(slots[lane])->row;
      const int thread = self().linear / kWarp * kWarp + lane;
      access_checks::shared_read(thread, from, 16, site.name);
      uint16_t (&to)[8] = element[lane / 8][lane % 8];
      std::memcpy(to, from, 16);
      for (int j = 0; j < 8; ++j) {
        if (to[j] == kPoison) {
          fail_at(thread, std::string(site.name) + ": reads shared memory that nobody has written" +
                              " or whose copy is still under way, at offset " +
                              std::to_string(shared_offset(from) + 2 * j) + " (row " +
                              std::to_string(lane % 8) + " of matrix " + std::to_string(lane / 8) +
                              ")");
        }
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int q = 0; q < 4; ++q) {
        const uint32_t low = transposed ? element[q][t][g] : element[q][g][t];
        const uint32_t high = transposed ? element[q][t + 1][g] : element[q][g][t + 1];
        static_cast<Slot*>(slots[lane])->out[q] = low | high << 16;
      }
    }
  });
}

// ---- mma
// -----------------------------------------------------------------------------------------

// What __CUDA_ARCH__ would be.
#ifdef DENSENET_FAST_EMULATED_ARCHITECTURE
constexpr int kArchitecture = DENSENET_FAST_EMULATED_ARCHITECTURE;
#else
constexpr int kArchitecture = 800;
#endif

struct HalfOperand {
  static constexpr const char* kName = "mma.f16";
  static constexpr int kOldest = 750;
  static float value(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7fffu;
    uint32_t wide = magnitude << 13;
    if (magnitude >= 0x7c00) {
      wide |= 0x7f800000u;  // infinity and NaN
    } else if (magnitude < 0x400) {
      return (bits & 0x8000u ? -1.0f : 1.0f) * static_cast<float>(magnitude) * 0x1p-24f;
    } else {
      wide += 112u << 23;
    }
    wide |= (bits & 0x8000u) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
};

struct BfloatOperand {
  static constexpr const char* kName = "mma.bf16";
  static constexpr int kOldest = 800;
  static float value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
};

struct MmaSlot {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Position of element `i` of a lane's fragment, PTX ISA "Matrix fragments for mma".
struct Position {
  int row, column;
};
inline Position fragment_a16(int lane, int i) {  // 8 elements of 16 bits, 16 x 16
  return {lane / 4 + (i / 2 % 2) * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
inline Position fragment_b16(int lane, int i) {  // 4 elements, 16 x 8
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}
// m16n8k8 of 16 bits: the first half of both.
inline Position fragment_a8(int lane, int i) { return fragment_a16(lane, i); }  // 4, 16 x 8
inline Position fragment_b8(int lane, int i) { return fragment_b16(lane, i); }  // 2, 8 x 8
inline Position fragment_a_tf32(int lane, int i) {  // 4 elements, 16 x 8
  return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4};
}
inline Position fragment_b_tf32(int lane, int i) {  // 2 elements, 8 x 8
  return {lane % 4 + i * 4, lane / 4};
}
inline Position fragment_c(int lane, int i) {  // 4 elements, 16 x 8
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

inline void check_architecture(const char* name, int oldest) {
  if (kArchitecture < oldest) {
    fail(std::string(name) + ": not an instruction of sm_" + std::to_string(kArchitecture / 10));
  }
}

// d += a * b over K of the columns of `a`, from `first`. Products are exact in float32; the
// hardware's order of addition is its own.
template <int K, int N>
void accumulate(void* const* slots, const float (&a)[16][N], const float (&b)[N][8], int first) {
  float sum[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = first; k < first + K; ++k) {
      const float x = a[i][k];
      for (int j = 0; j < 8; ++j) sum[i][j] += x * b[k][j];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<MmaSlot*>(slots[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const Position p = fragment_c(lane, i);
      d[i] += sum[p.row][p.column];
    }
  }
}

template <class Operand>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operand,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check_architecture(Operand::kName, Operand::kOldest);
  MmaSlot slot{d, a, b};
  warp_meeting({Operand::kName, file, line}, 0xffffffffu, &slot, [](void* const* slots) {
    float am[16][16], bm[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* s = static_cast<MmaSlot*>(slots[lane]);
      for (int i = 0; i < 8; ++i) {
        const Position p = fragment_a16(lane, i);
        am[p.row][p.column] = Operand::value(static_cast<uint16_t>(s->a[i / 2] >> 16 * (i % 2)));
      }
      for (int i = 0; i < 4; ++i) {
        const Position p = fragment_b16(lane, i);
        bm[p.row][p.column] = Operand::value(static_cast<uint16_t>(s->b[i / 2] >> 16 * (i % 2)));
      }
    }
    if (kArchitecture < 800) {  // two instructions of half the depth
      accumulate<8>(slots, am, bm, 0);
      accumulate<8>(slots, am, bm, 8);
    } else {
      accumulate<16>(slots, am, bm, 0);
    }
  });
}

inline uint32_t float_to_tf32(float x) {  // nearest, ties away: 13 bits of the mantissa go
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check_architecture("mma.tf32", 800);
  MmaSlot slot{d, a, b};
  warp_meeting({"mma.tf32", file, line}, 0xffffffffu, &slot, [](void* const* slots) {
    const auto value = [](uint32_t bits) {
      bits &= ~0x1fffu;  // the hardware reads 19 bits
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    };
    float am[16][8], bm[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* s = static_cast<MmaSlot*>(slots[lane]);
      for (int i = 0; i < 4; ++i) {
        const Position p = fragment_a_tf32(lane, i);
        am[p.row][p.column] = value(s->a[i]);
      }
      for (int i = 0; i < 2; ++i) {
        const Position p = fragment_b_tf32(lane, i);
        bm[p.row][p.column] = value(s->b[i]);
      }
    }
    accumulate<8>(slots, am, bm, 0);
  });
}

}  // namespace emulator
