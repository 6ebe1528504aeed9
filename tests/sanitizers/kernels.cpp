// Runs every CPU kernel of every instruction set over many odd shapes, without torch, for the
// sanitizers to watch. Buffers are as small as the kernels may assume: an image ends with its last
// channel, scratch and call memory have exactly the size asked for and start as NaN. Besides what
// the sanitizers see, this checks that
// - nothing is written between the rows of a channel slice,
// - every output is written and finite, so that neither row gaps nor fresh memory reach a result,
// - results are bitwise the same for any number of threads and any order of tasks,
// - instruction sets agree.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/isa.h"
#include "tester.h"

namespace densenet_fast::cpu {

extern int num_threads;  // runtime.cpp

namespace {

// ---- comparisons --------------------------------------------------------------------------------

template <class T>
void compare(const std::vector<T>& got, const std::vector<T>& want, double tolerance,
             const std::string& where) {
  if (got.size() != want.size()) fail(where + ": another number of outputs");
  double largest = 1;
  for (T value : want) largest = std::max(largest, std::abs(static_cast<double>(value)));
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = got[i], b = want[i];
    if (std::abs(a - b) > tolerance * (std::abs(b) + 1e-2 * largest)) {
      fail(where + ": output " + std::to_string(i) + " is " + std::to_string(a) + ", baseline " +
           std::to_string(b));
    }
  }
}

// Sums of up to a few thousand products of numbers below 10^2, in another order; in bfloat16 that
// may round a result to its neighbour, and twice where a kernel reads it again.
template <class S>
struct Type;
template <>
struct Type<float> {
  static constexpr const char* name = " float32 ";
  static constexpr double tolerance = 3e-4;
};
template <>
struct Type<double> {
  static constexpr const char* name = " float64 ";
  static constexpr double tolerance = 1e-12;
};
template <>
struct Type<bfloat16> {
  static constexpr const char* name = " bfloat16 ";
  static constexpr double tolerance = 1e-2;
};

template <class S>
void check(const Case& shape) {
  using T = Compute<S>;
  std::vector<T> baseline;
  const std::vector<std::string>& names = isa_usable();  // baseline is last
  for (auto isa = names.rbegin(); isa != names.rend(); ++isa) {
    const std::string where = *isa + Type<S>::name + name(shape);
    std::fprintf(stderr, "%s\n", where.c_str());
    set_isa(*isa);
    num_threads = 1;
    const std::vector<T> one = Tester<S>(kernels<S>(), shape).run();
    num_threads = 3;
    const std::vector<T> three = Tester<S>(kernels<S>(), shape).run();
    if (one.size() != three.size() ||
        std::memcmp(one.data(), three.data(), one.size() * sizeof(T)) != 0) {
      fail(where + ": results depend on the number of threads");
    }
    if (baseline.empty()) baseline = one;
    compare(one, baseline, Type<S>::tolerance, where);
  }
}

int64_t pick(std::mt19937& random, std::initializer_list<int64_t> from) {
  return from.begin()[random() % from.size()];
}

// dims, n, {d, h, w}, channels, out, gap, permuted, optional: single pixels, single lines, images
// that are cut into bands and columns, batches long enough for tasks of several tiles.
constexpr Case kCases[] = {
    {2, 1, {1, 1, 1}, 1, 1, 0, false, true},      {2, 3, {1, 1, 1}, 300, 12, 1, false, true},
    {2, 2, {1, 1, 9}, 128, 32, 3, true, true},    {2, 2, {1, 7, 7}, 129, 32, 5, false, true},
    {2, 1, {1, 7, 7}, 256, 48, 0, false, false},  {2, 1, {1, 13, 5}, 257, 48, 0, true, true},
    {2, 2, {1, 13, 5}, 300, 3, 7, false, true},   {2, 1, {1, 3, 70}, 20, 12, 1, false, true},
    {2, 1, {1, 2, 129}, 33, 32, 0, true, false},  {2, 2, {1, 5, 65}, 48, 24, 3, false, true},
    {2, 1, {1, 40, 33}, 20, 12, 3, false, true},  {2, 1, {1, 37, 29}, 16, 8, 0, true, true},
    {2, 3, {1, 30, 30}, 17, 16, 1, false, false}, {2, 3, {1, 24, 24}, 40, 33, 0, false, true},
    {2, 1, {1, 8, 8}, 290, 70, 1, false, true},   {2, 1, {1, 2, 2}, 131, 5, 0, false, true},
    {1, 3, {1, 1, 33}, 131, 12, 1, false, true},  {1, 1, {1, 1, 150}, 17, 32, 0, true, true},
    {3, 1, {1, 1, 1}, 5, 3, 0, false, true},      {3, 2, {3, 7, 7}, 129, 32, 3, false, true},
    {3, 1, {5, 12, 13}, 20, 12, 0, true, true},   {3, 2, {2, 9, 8}, 33, 48, 1, false, false},
};

void check_chosen() {
  for (const Case& shape : kCases) {
    check<float>(shape);
    check<double>(shape);
    check<bfloat16>(shape);
  }
}

void check_random(int cases) {
  std::mt19937 random{1};
  for (int i = 0; i < cases; ++i) {
    const int64_t channels = 1 + static_cast<int64_t>(random() % 300);
    const int dims = 1 + i % 3;
    const int64_t n = pick(random, {1, 2, 3}), d = pick(random, {1, 2, 3, 4});
    const int64_t h = pick(random, {1, 2, 3, 5, 8, 13}), w = pick(random, {1, 2, 3, 4, 7, 9, 30});
    const Case shape{dims,
                     dims == 3 ? 1 + n / 2 : n,
                     {dims == 3 ? d : 1, dims > 1 ? h : 1, dims == 3 ? 1 + w / 2 : w},
                     random() % 2 ? channels : pick(random, {1, 3, 8, 15, 16, 17, 33, 48, 70, 130}),
                     pick(random, {1, 2, 3, 4, 12, 16, 17, 24, 32, 47, 48, 64, 129}),
                     pick(random, {0, 0, 1, 5}),
                     random() % 3 == 0,
                     random() % 4 != 0};
    check<float>(shape);
    check<double>(shape);
    check<bfloat16>(shape);
  }
}

}  // namespace
}  // namespace densenet_fast::cpu

// kernels RANDOM [chosen]: so many random shapes, and the chosen ones if asked for.
int main(int argc, char** argv) {
  if (argc > 2) densenet_fast::cpu::check_chosen();
  densenet_fast::cpu::check_random(argc > 1 ? std::atoi(argv[1]) : 40);
  std::puts("passed");
}
