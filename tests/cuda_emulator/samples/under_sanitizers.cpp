// Runs samples as a program, for the sanitizers: correct ones and ones that end with an error,
// whose fibers stop half way; or, if named, one fault that the sanitizers must see.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "memory.cu"
#include "samples.cu"

namespace {

void expect(const char* error, bool fails) {
  if ((error != nullptr) == fails) return;
  std::printf("%s\n", error ? error : "no error");
  std::exit(1);
}

void all_of_them() {
  std::vector<float> x(4 * 256, 1.0f), sums(4);
  std::vector<int> ints(1024 * 8);
  std::vector<uint32_t> words(1024);
  std::vector<uint16_t> halves(256);
  std::vector<float4> pieces(5 * 32), copied(5 * 32);
  std::vector<float> a(128), b(64), d(128);
  for (int i = 0; i < 4; ++i) {
    expect(sample_tree_sum(1, x.data(), sums.data(), 4, 256), false);
    expect(sample_rotate(2, ints.data(), 64, 3), false);
    expect(sample_some_skip_the_barrier(i), true);
    expect(sample_barriers_in_both_branches(), true);
    expect(sample_one_thread_fails(ints.data()), true);
    expect(sample_shuffles(ints.data(), 64), false);
    expect(sample_one_lane_skips_the_shuffle(), true);
    expect(sample_geometry(ints.data(), 2, 1, 1, 1024, 1, 1), false);
    expect(sample_load_matrices(i % 2, halves.data(), words.data(), 16, 0, 32), false);
    expect(sample_load_matrices(i % 2, halves.data(), words.data(), 16, 0, 31), true);
    expect(sample_multiply_tf32(1, a.data(), b.data(), d.data()), false);
    expect(sample_copy_through_ring(kNone, pieces.data(), copied.data(), 32, 5), false);
    expect(sample_copy_through_ring(kLeavesEarly, pieces.data(), copied.data(), 32, 5), true);
  }
}

void fault(const std::string& name) {
  std::vector<int> out(32);
  unsigned char bytes[64] = {};
  if (name == "shared") sample_writes_shared(64);
  if (name == "below") sample_writes_shared(-4);
  if (name == "global") sample_writes_global(out.data(), 32);
  if (name == "misaligned") sample_writes_shared(2);
  if (name == "copy") {
    std::vector<unsigned char> source(20);
    sample_copy_bytes(source.data() + 16, bytes, 16, 16, 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const struct {
    emulator::Order order;
    uint64_t seed;
  } schedules[] = {{emulator::Order::kForward, 0},
                   {emulator::Order::kReverse, 0},
                   {emulator::Order::kRandom, 1},
                   {emulator::Order::kRandom, 2}};
  if (argc > 1) fault(argv[1]);
  for (const auto& s : schedules) {
    emulator::schedule() = {s.order, s.seed};
    all_of_them();
  }
  std::printf("passed\n");
}
