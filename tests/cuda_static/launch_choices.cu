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

// The halo of the largest tile, which has the most shared memory.
constexpr int kLargestHalo = 34 * 6;

void print(const std::string& name, const Device& device, int threads, size_t bytes, int stages) {
  std::printf("%s\t%s\t%d\t%zu\t%d\n", name.c_str(), device.name, threads, bytes, stages);
}

template <class P, class Source, int BN>
void rows(const std::string& p, const std::string& source, const std::string& sink,
          const Device& d) {
  const int stages = product_stages<P, Source, BN>(d.limits);
  print("rows_product<" + p + ", " + source + "<" + p + ">, " + sink + ", " + std::to_string(BN) +
            ">",
        d, kThreads, product_shared_bytes<P, Source, BN>(stages), stages);
}

template <class P, int BN>
void conv3x3(const std::string& p, const Device& d) {
  const std::string end = ", " + std::to_string(BN) + ">";
  const size_t bytes = conv3x3_shared_bytes<P, BN>(kLargestHalo);
  print("conv3x3_product<" + p + ", ActivatedSource<" + p + ">, StoreStatistics<" + p + ">" + end,
        d, kThreads, bytes, 2);
  print(
      "conv3x3_product<" + p + ", PlainSource<" + p + ">, MaskedGradient<" + p + ", (Into)1>" + end,
      d, kThreads, bytes, 2);
}

template <class P, class SourceI, class SourceJ, bool kNarrow>
void pixels(const std::string& p, const std::string& i, const std::string& j, const Device& d) {
  constexpr size_t kStage = pixel_stage_bytes<typename P::Element, SourceI, SourceJ, kNarrow>();
  const int stages = 2 * kStage <= static_cast<size_t>(d.limits.shared_bytes_per_block) ? 2 : 1;
  print("pixel_product<" + p + ", " + i + "<" + p + ">, " + j + "<" + p + ">, " +
            (kNarrow ? "true" : "false") + ">",
        d, kThreads, stages * kStage, stages);
}

template <class P, int BN>
void widths(const std::string& p, const Device& d) {
  const std::string statistics = "StoreStatistics<" + p + ">";
  const std::string masked = "MaskedGradient<" + p + ", (Into)0>";
  rows<P, ActivatedSource<P>, BN>(p, "ActivatedSource", statistics, d);
  rows<P, NormGradientSource<P>, BN>(p, "NormGradientSource", masked, d);
  rows<P, PlainSource<P>, BN>(p, "PlainSource", "UnpooledGradient<" + p + ">", d);
  conv3x3<P, BN>(p, d);
}

template <class P>
void all(const std::string& p, const Device& d) {
  using E = typename P::Element;
  widths<P, 64>(p, d);
  if constexpr (kMaxColumns<P> > 64) widths<P, 128>(p, d);
  conv3x3<P, 32>(p, d);
  rows<P, PooledSource<P>, 64>(p, "PooledSource", "StoreStatistics<" + p + ">", d);
  pixels<P, NormGradientSource<P>, ActivatedSource<P>, true>(p, "NormGradientSource",
                                                             "ActivatedSource", d);
  pixels<P, PlainSource<P>, PooledSource<P>, true>(p, "PlainSource", "PooledSource", d);
  if constexpr (sizeof(E) == 2) {
    pixels<P, NormGradientSource<P>, ActivatedSource<P>, false>(p, "NormGradientSource",
                                                                "ActivatedSource", d);
    pixels<P, PlainSource<P>, PooledSource<P>, false>(p, "PlainSource", "PooledSource", d);
  }
  const size_t stage = tap_stage_bytes<E>(kLargestHalo);
  const int stages = 2 * stage <= static_cast<size_t>(d.limits.shared_bytes_per_block) ? 2 : 1;
  print("tap_product<" + p + ">", d, kTapThreads, stages * stage, stages);
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
