#include "parallel.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

namespace densenet_fast::cpu {
namespace {

constexpr size_t kAlignment = 64;

void* allocate(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded ? rounded : kAlignment);
  if (!memory) throw std::bad_alloc();
  return memory;
}

struct ThreadScratch {
  void* memory[static_cast<size_t>(Scratch::kCount)] = {};
  size_t bytes[static_cast<size_t>(Scratch::kCount)] = {};
  ~ThreadScratch() {
    for (void* p : memory) std::free(p);
  }
};

// Consecutive tasks that one worker begins with.
struct alignas(kAlignment) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

}  // namespace

int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

void run_tasks(int64_t tasks, TaskFunction function, void* context) {
  if (tasks <= 0) return;
  const int64_t threads = thread_count();
  const int64_t workers = threads < tasks ? threads : tasks;
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) function(context, i, i - 1);
    return;
  }
  // Every worker begins with the same share of the tasks in every call, so that it finds what it
  // wrote in its own cache; who has finished takes from the others, so that a thread that was
  // descheduled delays only its own task.
  std::vector<Share> shares(static_cast<size_t>(workers));
  for (int64_t i = 0; i < workers; ++i) {
    Share& share = shares[static_cast<size_t>(i)];
    share.next.store(i * tasks / workers, std::memory_order_relaxed);
    share.end = (i + 1) * tasks / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      int64_t before = -1;
      for (int64_t i = 0; i < workers; ++i) {
        Share& share = shares[static_cast<size_t>((worker + i) % workers)];
        for (int64_t task = share.take(); task < share.end; task = share.take()) {
          function(context, task, before);
          before = task;
        }
      }
    }
  });
}

void* thread_scratch(Scratch slot, size_t bytes) {
  thread_local ThreadScratch scratch;
  const size_t i = static_cast<size_t>(slot);
  if (scratch.bytes[i] < bytes) {
    std::free(scratch.memory[i]);
    scratch.memory[i] = nullptr;
    scratch.bytes[i] = 0;
    scratch.memory[i] = allocate(bytes);
    scratch.bytes[i] = bytes;
  }
  return scratch.memory[i];
}

void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

void* call_memory_allocate(size_t bytes) { return allocate(bytes); }

void call_memory_free(void* memory) { std::free(memory); }

}  // namespace densenet_fast::cpu
