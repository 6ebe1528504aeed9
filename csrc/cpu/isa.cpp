#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace densenet_fast::cpu {
namespace {

struct Choice {
  std::string name;
  KernelSet kernels;
};

// Widest first; only what this processor can run.
std::vector<Choice> available() {
  std::vector<Choice> choices;
#ifdef DENSENET_FAST_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    choices.push_back({"avx512", kernels_avx512()});
  }
#endif
#ifdef DENSENET_FAST_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    choices.push_back({"avx2", kernels_avx2()});
  }
#endif
#ifdef DENSENET_FAST_HAVE_NEON
  choices.push_back({"neon", kernels_neon()});
#endif
#ifdef DENSENET_FAST_HAVE_BASELINE
  choices.push_back({"baseline", kernels_baseline()});
#endif
  return choices;
}

const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = available();
  return all;
}

const Choice& find(const std::string& name, const char* origin) {
  std::string names;
  for (const Choice& choice : choices()) {
    if (choice.name == name) return choice;
    names += (names.empty() ? "" : ", ") + choice.name;
  }
  throw std::invalid_argument("unknown or unsupported instruction set '" + name + "' in " + origin +
                              "; this build on this processor has: " + names);
}

const Choice*& current() {
  static const Choice* choice = [] {
    const char* forced = std::getenv("DENSENET_FAST_ISA");
    return forced && *forced ? &find(forced, "DENSENET_FAST_ISA") : &choices().front();
  }();
  return choice;
}

}  // namespace

const std::vector<std::string>& isa_compiled() {
  static const std::vector<std::string> names = {
#ifdef DENSENET_FAST_HAVE_AVX512
      "avx512",
#endif
#ifdef DENSENET_FAST_HAVE_AVX2
      "avx2",
#endif
#ifdef DENSENET_FAST_HAVE_NEON
      "neon",
#endif
#ifdef DENSENET_FAST_HAVE_BASELINE
      "baseline",
#endif
  };
  return names;
}

const std::vector<std::string>& isa_usable() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> result;
    for (const Choice& choice : choices()) result.push_back(choice.name);
    return result;
  }();
  return names;
}

std::string isa_in_use() { return current()->name; }

void set_isa(const std::string& name) { current() = &find(name, "set_isa()"); }

template <>
const Kernels<float>& kernels<float>() {
  return *current()->kernels.f32;
}

template <>
const Kernels<double>& kernels<double>() {
  return *current()->kernels.f64;
}

template <>
const Kernels<bfloat16>& kernels<bfloat16>() {
  return *current()->kernels.bf16;
}

}  // namespace densenet_fast::cpu
