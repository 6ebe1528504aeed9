// Fixed tasks on PyTorch's threads, and scratch memory.
//
// What a task computes depends on shapes alone, never on the number of threads; results of tasks
// are merged in task order. That makes every operator bitwise repeatable for any thread count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace densenet_fast::cpu {

using TaskFunction = void (*)(void* context, int64_t task, int64_t before);

// Runs `function(context, 0 .. tasks - 1, before)`, each once, in any order and on any thread;
// `before` is the one that its thread ran before, or -1.
void run_tasks(int64_t tasks, TaskFunction function, void* context);

// PyTorch's threads for operators. Only for choices that change no result.
int64_t thread_count();

// Scratch of the calling thread, 64-byte aligned, kept for the next call; bounded by the tile
// sizes. Every slot is one buffer: asking again for the same slot may move it, but for what is
// packed: asking for as much finds it as it was.
enum class Scratch { kOperand, kResult, kActivated, kWeight, kPacked, kCount };
void* thread_scratch(Scratch slot, size_t bytes);

// Memory that lives for one operator call: packed weights, partial results of tasks.
void* call_memory_allocate(size_t bytes);
void call_memory_free(void* memory);

// Asks for 2 MiB pages behind the whole pages of [memory, memory + bytes): touching a large buffer
// for the first time then costs hundreds of page faults less. A hint, and only on Linux.
void advise_huge_pages(void* memory, size_t bytes);

namespace {

template <class T>
class CallMemory {
 public:
  explicit CallMemory(int64_t count)
      : data_(static_cast<T*>(call_memory_allocate(static_cast<size_t>(count) * sizeof(T)))) {}
  ~CallMemory() { call_memory_free(data_); }
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Calls body(task), or body(task, before).
template <class F>
void for_each_task(int64_t tasks, const F& body) {
  run_tasks(
      tasks,
      [](void* context, int64_t task, [[maybe_unused]] int64_t before) {
        const F& call = *static_cast<const F*>(context);
        if constexpr (std::is_invocable_v<const F&, int64_t, int64_t>) {
          call(task, before);
        } else {
          call(task);
        }
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <class T>
T* scratch(Scratch slot, int64_t count) {
  return static_cast<T*>(thread_scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace
}  // namespace densenet_fast::cpu
