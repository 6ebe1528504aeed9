#include <atomic>

#include "args.h"

namespace densenet_fast::cpu {
namespace {

std::atomic<bool> winograd{true};

}  // namespace

bool winograd_allowed() { return winograd.load(std::memory_order_relaxed); }
void allow_winograd(bool allow) { winograd.store(allow, std::memory_order_relaxed); }

}  // namespace densenet_fast::cpu
