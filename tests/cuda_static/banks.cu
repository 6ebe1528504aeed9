// Prints the shared-memory wavefronts of a warp's accesses over the fewest possible, by the
// kernels' own maps: name, wavefronts, ideal; separated by tabs.
#include <algorithm>
#include <cstdio>

#include "cuda/rows_product.cuh"

using namespace densenet_fast::cuda;

// Threads whose accesses of `bytes` are served together take turns where words of one bank differ.
template <class Address>
void print(const char* name, int bytes, const Address& address) {
  const int together = 128 / bytes, words = bytes / 4;
  int wavefronts = 0;
  for (int first = 0; first < 32; first += together) {
    int most = 0;
    for (int bank = 0; bank < 32; ++bank) {
      int seen[32], count = 0;
      for (int lane = first; lane < first + together; ++lane) {
        for (int w = 0; w < words; ++w) {
          const int word = address(lane) / 4 + w;
          if (word % 32 == bank && std::find(seen, seen + count, word) == seen + count)
            seen[count++] = word;
        }
      }
      most = std::max(most, count);
    }
    wavefronts += most;
  }
  std::printf("%s\t%d\t%d\n", name, wavefronts, 32 / together);
}

template <class E>
void slices(const char* type) {
  using S = Slice<E>;
  char name[64];
  std::snprintf(name, sizeof(name), "epilogue, %s: pairs are stored", type);
  print(name, 8, [](int lane) { return 4 * S::at(lane / 4, lane % 4 * 2); });
  for (int v = 0; v < S::V; v += 4) {
    std::snprintf(name, sizeof(name), "epilogue, %s: four of columns %d are loaded", type, v);
    print(name, 16, [&](int lane) { return 4 * S::at(S::row(lane, 0), S::column(lane) + v); });
  }
}

int main() {
  print("pieces of a step", 16, [](int lane) {
    const ThreadPieces<256> own(lane);
    return own.row * kRowBytes + own.column * kPieceBytes;
  });
  print("coefficients of a step", 16,
        [](int lane) { return ThreadPieces<256>(lane).column * kPieceElements<__half> * 4; });
  print("ldmatrix", 16,
        [](int lane) { return row_of_handle<HalfPolicy>(0, lane) * kRowBytes + lane / 16 * 16; });
  slices<__half>("16 bits");
  slices<float>("32 bits");
}
