// Prints, for every kernel with a product and every device, the threads and the shared memory of
// the launch that would be chosen: name, device, threads, bytes, stages; separated by tabs.
#include <cstdio>
#include <string>

#include "cuda/conv3x3_product.cuh"
#include "cuda/pixel_product.cuh"

using namespace densenet_fast::cuda;

struct Device {
  const char* name;
  DeviceLimits limits;
};

const Device kDevices[] = {
    {"sm_75", {7, 5, 64 << 10, 64 << 10, 72}},
    {"sm_80", {8, 0, 163 << 10, 164 << 10, 108}},
    {"sm_86", {8, 6, 99 << 10, 100 << 10, 84}},
    {"sm_90", {9, 0, 227 << 10, 228 << 10, 132}},
};

void print(const std::string& name, const Device& device, int threads, size_t bytes, int stages) {
  std::printf("%s\t%s\t%d\t%zu\t%d\n", name.c_str(), device.name, threads, bytes, stages);
}

template <class T>
std::string end(const std::string& more = ">") {
  return ", " + std::to_string(T::kRows) + ", " + std::to_string(T::kColumns) + more;
}

// body(Tile) for all of a product's.
template <const auto& kTiles, size_t i = 0, class Body>
void for_each_tile(const Body& body) {
  if constexpr (i < std::size(kTiles)) {
    body(Tile<kTiles[i].rows, kTiles[i].columns>{});
    for_each_tile<kTiles, i + 1>(body);
  }
}

template <class P, class Source, const auto& kTiles>
void rows(const std::string& name, const Device& d) {
  for_each_tile<tiles_of<P, kTiles>()>([&](auto tile) {
    using T = decltype(tile);
    const int stages = product_stages<P, T, Source>(d.limits);
    print("rows_product<" + name + end<T>(), d, T::kThreads,
          product_shared_bytes<P, T, Source>(stages), stages);
  });
}

template <class P, class Source, const auto& kTiles>
void conv3x3(const std::string& name, const Device& d) {
  for_each_tile<tiles_of<P, kTiles>()>([&](auto tile) {
    using T = decltype(tile);
    const size_t bytes = conv3x3_shared_bytes<P, T, Source>(kMostHaloPixels<T::kRows>);
    print("conv3x3_product<" + name + end<T>(", false>"), d, T::kThreads, bytes, 2);
    if (kTapsPerStage<T> > 1) {
      print("conv3x3_product<" + name + end<T>(", true>"), d, T::kThreads, bytes, 2);
    }
  });
}

template <class P, class SourceI, class SourceJ, bool kNarrow>
void pixels(const std::string& name, const Device& d) {
  const auto bytes = pixel_shared_bytes<P, SourceI, SourceJ, kNarrow>;
  const int stages = bytes(2) <= static_cast<size_t>(d.limits.shared_bytes_per_block) ? 2 : 1;
  print("pixel_product<" + name + (kNarrow ? ", true>" : ", false>"), d, kThreads, bytes(stages),
        stages);
}

template <class P>
void all(const std::string& p, const Device& d) {
  const auto of = [&](const std::string& name, const std::string& more = "") {
    return name + "<" + p + more + ">";
  };
  const std::string activated = of("ActivatedSource"), plain = of("PlainSource");
  const std::string gradient = of("NormGradientSource"), pooled = of("PooledSource");
  const std::string stored = ", " + of("StoreStatistics");
  const auto masked = [&](const char* into) { return ", " + of("MaskedGradient", into); };
  rows<P, ActivatedSource<P>, kRowsTiles>(p + ", " + activated + stored, d);
  rows<P, NormGradientSource<P>, kRowsTiles>(p + ", " + gradient + masked(", (Into)0"), d);
  rows<P, PooledSource<P>, kPooledTiles>(p + ", " + pooled + stored, d);
  rows<P, PlainSource<P>, kPooledTiles>(p + ", " + plain + stored, d);
  rows<P, PlainSource<P>, kPooledTiles>(p + ", " + plain + masked(", (Into)2"), d);
  conv3x3<P, ActivatedSource<P>, kForwardTiles>(p + ", " + activated + stored, d);
  conv3x3<P, PlainSource<P>, kRowsTiles>(p + ", " + plain + masked(", (Into)1"), d);
  const std::string wgrad = p + ", " + gradient + ", " + activated;
  const std::string transition = p + ", " + plain + ", " + pooled;
  const std::string volumes = p + ", " + plain + ", " + plain;
  pixels<P, NormGradientSource<P>, ActivatedSource<P>, true>(wgrad, d);
  pixels<P, PlainSource<P>, PooledSource<P>, true>(transition, d);
  pixels<P, PlainSource<P>, PlainSource<P>, true>(volumes, d);
  if constexpr (sizeof(typename P::Element) == 2) {
    pixels<P, NormGradientSource<P>, ActivatedSource<P>, false>(wgrad, d);
    pixels<P, PlainSource<P>, PooledSource<P>, false>(transition, d);
    pixels<P, PlainSource<P>, PlainSource<P>, false>(volumes, d);
  }
  // The largest halos, which have the most shared memory.
  const auto taps = [&](const char* lines, const TileShape& shape, const ImageArgument& x) {
    const TileGrid grid(TileCount(shape, x), 1, x);
    const size_t two = tap_shared_bytes<P>(grid, 2);
    const int stages = two <= static_cast<size_t>(d.limits.shared_bytes_per_block) ? 2 : 1;
    print("tap_product<" + p + lines, d, kTapThreads, tap_shared_bytes<P>(grid, stages), stages);
  };
  taps(", false>", {1, 4, 32}, {nullptr, 1, 1, 4, 32, 1, 1, 2});
  taps(", true>", {32, 1, 4, 0}, {nullptr, 32, 1, 1, 4, 1, 1, 1});
}

int main() {
  for (const Device& d : kDevices) {
    all<HalfPolicy>("HalfPolicy", d);
    all<BfloatPolicy>("BfloatPolicy", d);
    all<Tf32Policy>("Tf32Policy", d);
    all<FloatPolicy>("FloatPolicy", d);
    all<DoublePolicy>("DoublePolicy", d);
  }
}
