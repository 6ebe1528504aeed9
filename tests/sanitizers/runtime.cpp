// What the kernels get from torch in the extension: memory and threads.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace densenet_fast::cpu {

int num_threads = 1;

namespace {

void* allocate_nan(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes ? bytes : 1) != 0) std::abort();
  std::memset(memory, 0xFF, bytes);
  return memory;
}

struct ThreadScratch {
  void* memory[static_cast<size_t>(Scratch::kCount)] = {};
  size_t bytes_packed = 0;
  ~ThreadScratch() {
    for (void* p : memory) std::free(p);
  }
};

}  // namespace

void* call_memory_allocate(size_t bytes) { return allocate_nan(bytes); }
void call_memory_free(void* memory) { std::free(memory); }

// A new buffer for every request: nothing that was left behind can be found again, but what is
// packed.
void* thread_scratch(Scratch slot, size_t bytes) {
  thread_local ThreadScratch scratch;
  void*& memory = scratch.memory[static_cast<size_t>(slot)];
  if (slot == Scratch::kPacked) {
    if (memory && scratch.bytes_packed == bytes) return memory;
    scratch.bytes_packed = bytes;
  }
  std::free(memory);
  return memory = allocate_nan(bytes);
}

int64_t thread_count() { return num_threads; }

void run_tasks(int64_t tasks, TaskFunction function, void* context) {
  if (num_threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) function(context, i, i - 1);
    return;
  }
  std::atomic<int64_t> left{tasks};  // from the last task to the first
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&] {
      int64_t before = -1;
      for (int64_t i = left.fetch_sub(1); i > 0; i = left.fetch_sub(1)) {
        function(context, i - 1, before);
        before = i - 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace densenet_fast::cpu
