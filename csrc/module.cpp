// The Python module `densenet_fast._C`. Importing it registers torch.ops.densenet_fast; its own
// functions say how it was built and choose the CPU's instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "facts.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown compiler";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators and CPU kernels of densenet_fast";
  m.def("isa_compiled", &densenet_fast::cpu::isa_compiled,
        "Instruction sets compiled in, best first");
  m.def("isa_usable", &densenet_fast::cpu::isa_usable,
        "Those of them that this processor can run, best first");
  m.def("isa_in_use", &densenet_fast::cpu::isa_in_use,
        "The instruction set the CPU kernels run with");
  m.def("set_isa", &densenet_fast::cpu::set_isa, pybind11::arg("name"),
        "Run the CPU kernels with this instruction set from now on");
  m.def("winograd_allowed", &densenet_fast::cpu::winograd_allowed,
        "Whether 3x3 convolutions may use Winograd's minimal filtering");
  m.def("allow_winograd", &densenet_fast::cpu::allow_winograd, pybind11::arg("allow"),
        "Let 3x3 convolutions use Winograd's minimal filtering, or not");
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) {
        densenet_fast::cpu::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      pybind11::arg("address"), pybind11::arg("bytes"),
      "Ask the system for 2 MiB pages behind this memory");
  using densenet_fast::Facts;
  pybind11::class_<Facts>(m, "Facts", "Python objects as they were")
      .def(pybind11::init<Facts::Objects, std::vector<pybind11::dict>, Facts::Objects>(),
           pybind11::arg("typed"), pybind11::arg("dicts"), pybind11::arg("sized"))
      .def("hold", &Facts::hold, "Whether they are what they were");
  m.def("compiler", &compiler, "The C++ compiler");
  m.def(
      "built_with_torch", [] { return std::string(DENSENET_FAST_BUILT_WITH_TORCH); },
      "The torch whose headers were used; any torch from 2.10 on runs it");
  m.def(
      "cuda_missing", [] { return std::string(DENSENET_FAST_CUDA_MISSING); },
      "Why the CUDA kernels were not built; empty if they were");
  m.def(
      "fingerprint", [] { return std::string(DENSENET_FAST_FINGERPRINT); },
      "Digest of the C++ sources");
}
