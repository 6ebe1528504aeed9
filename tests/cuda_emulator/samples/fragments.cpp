// Prints, for every lane and element of every fragment, its row and column: "name lane element row
// column", first by the emulator's tables, then by CuTe's.
#include <cstdio>
#include <cute/atom/mma_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

namespace {

using emulator::Position;

void print_table(const char* whose, const char* name, int elements,
                 Position (*position)(int, int)) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < elements; ++i) {
      const Position p = position(lane, i);
      std::printf("%s %s %d %d %d %d\n", whose, name, lane, i, p.row, p.column);
    }
  }
}

// CuTe's layouts give (thread, value) an index into the operand, of which `rows` come first: A is
// M x K, B is N x K and C is M x N.
template <class Layout, int kRows, bool kTransposed>
Position by_cute(int lane, int i) {
  const int index = static_cast<int>(Layout{}(lane, i));
  return kTransposed ? Position{index / kRows, index % kRows}
                     : Position{index % kRows, index / kRows};
}

template <class Operation>
void print_cute(const char* a, const char* b, const char* c) {
  using Traits = cute::MMA_Traits<Operation>;
  using A = typename Traits::ALayout;
  using B = typename Traits::BLayout;
  using C = typename Traits::CLayout;
  print_table("cute", a, int{cute::size<1>(A{})}, &by_cute<A, 16, false>);
  print_table("cute", b, int{cute::size<1>(B{})}, &by_cute<B, 8, true>);  // K x N here
  print_table("cute", c, int{cute::size<1>(C{})}, &by_cute<C, 16, false>);
}

}  // namespace

int main() {
  print_table("emulator", "a16", 8, &emulator::fragment_a16);
  print_table("emulator", "b16", 4, &emulator::fragment_b16);
  print_table("emulator", "c16", 4, &emulator::fragment_c);
  print_table("emulator", "a8", 4, &emulator::fragment_a8);
  print_table("emulator", "b8", 2, &emulator::fragment_b8);
  print_table("emulator", "c8", 4, &emulator::fragment_c);
  print_table("emulator", "a_tf32", 4, &emulator::fragment_a_tf32);
  print_table("emulator", "b_tf32", 2, &emulator::fragment_b_tf32);
  print_table("emulator", "c_tf32", 4, &emulator::fragment_c);
  print_cute<cute::SM80_16x8x16_F32F16F16F32_TN>("a16", "b16", "c16");
  print_cute<cute::SM75_16x8x8_F32F16F16F32_TN>("a8", "b8", "c8");
  print_cute<cute::SM80_16x8x8_F32TF32TF32F32_TN>("a_tf32", "b_tf32", "c_tf32");
}
