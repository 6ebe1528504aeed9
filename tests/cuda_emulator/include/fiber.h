// A stackful fiber: the smallest context switch that serves the emulator. One kernel thread is one
// fiber; all of a block run on one OS thread, so nothing here needs to be thread safe.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

namespace emulator {

#if defined(__x86_64__)
#define EMULATOR_ASSEMBLY_SWITCH 1
// Saves the callee-saved registers on the stack and swaps stacks: swapcontext without its system
// calls, 50 times faster.
asm(R"(
.text
.weak emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");
extern "C" void emulator_switch_stack(void** save, void* load);
#else
#define EMULATOR_ASSEMBLY_SWITCH 0
#endif

class Fiber {
 public:
  using Entry = void (*)(void*);

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_) munmap(static_cast<char*>(stack_) - guard_bytes(), guard_bytes() + kStackBytes);
  }

  // Makes the fiber start `entry(argument)` at the next resume. `entry` must end with exit().
  void prepare(Entry entry, void* argument) {
    if (!stack_) {
      void* memory = mmap(nullptr, guard_bytes() + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, guard_bytes(), PROT_NONE);  // an overflow faults
      stack_ = static_cast<char*>(memory) + guard_bytes();
    }
#if EMULATOR_ASAN
    // What a fiber that stopped half way has left.
    __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
    entry_ = entry;
    argument_ = argument;
#if EMULATOR_ASSEMBLY_SWITCH
    void** top =
        reinterpret_cast<void**>(static_cast<char*>(stack_) + kStackBytes) - 3;  // as after a call
    *top = nullptr;  // the return address of start(), which never returns
    *--top = reinterpret_cast<void*>(&Fiber::start);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    own_ = top;
#else
    getcontext(&own_context_);
    own_context_.uc_stack.ss_sp = stack_;
    own_context_.uc_stack.ss_size = kStackBytes;
    own_context_.uc_link = nullptr;
    makecontext(&own_context_, reinterpret_cast<void (*)()>(&Fiber::start), 0);
#endif
  }

  // Runs the fiber until it yields or exits.
  void resume() {
    starting() = this;
#if EMULATOR_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
#endif
#if EMULATOR_ASSEMBLY_SWITCH
    emulator_switch_stack(&caller_, own_);
#else
    swapcontext(&caller_context_, &own_context_);
#endif
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  bool on_stack(const void* p) const {
    return p >= stack_ && p < static_cast<const char*>(stack_) + kStackBytes;
  }

  // From inside: back to whoever resumed it.
  void yield() { leave(false); }
  void exit() { leave(true); }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;

  static size_t guard_bytes() {
    static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return page;
  }

  static Fiber*& starting() {
    constinit static thread_local Fiber* fiber = nullptr;
    return fiber;
  }

  static void start() {
    Fiber* self = starting();
    self->arrived(nullptr);
    self->entry_(self->argument_);
    std::abort();  // entry ends with exit()
  }

  void arrived(void* fake) {
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake, &caller_stack_, &caller_stack_bytes_);
#else
    (void)fake;
#endif
  }

  void leave(bool for_good) {
    void* fake = nullptr;
#if EMULATOR_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, caller_stack_, caller_stack_bytes_);
#else
    (void)for_good;
#endif
#if EMULATOR_ASSEMBLY_SWITCH
    emulator_switch_stack(&own_, caller_);
#else
    swapcontext(&own_context_, &caller_context_);
#endif
    arrived(fake);
  }

  void* stack_ = nullptr;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
#if EMULATOR_ASSEMBLY_SWITCH
  void* own_ = nullptr;
  void* caller_ = nullptr;
#else
  ucontext_t own_context_, caller_context_;
#endif
#if EMULATOR_ASAN
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
#endif
};

}  // namespace emulator
