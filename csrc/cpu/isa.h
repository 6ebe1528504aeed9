// The instruction sets this build holds, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "args.h"

namespace densenet_fast::cpu {

// Names of the compiled sets, and of those that this machine can run; widest first.
const std::vector<std::string>& isa_compiled();
const std::vector<std::string>& isa_usable();
std::string isa_in_use();

// Throws std::invalid_argument naming the choices. Not to be called while kernels run.
void set_isa(const std::string& name);

template <class S>
const Kernels<S>& kernels();

}  // namespace densenet_fast::cpu
