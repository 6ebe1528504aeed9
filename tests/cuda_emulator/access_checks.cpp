// Checks every load and store of a kernel. The kernels are compiled with -fsanitize=thread, which
// makes the compiler call a function at every access, and linked with the functions here in place
// of its runtime library.
//
// Shared memory: reads of bytes that nobody has written or that an asynchronous copy has yet to
// write, and accesses of two threads, one of them a write, that neither a barrier nor (within a
// warp)
// __syncwarp orders. That does not depend on the order in which threads ran.
// Global memory, if the test has named its buffers: accesses outside all of them.
#include "access_checks.h"

#include <link.h>
#include <pthread.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace emulator::access_checks {
namespace {

// Who touched a byte, and when: block barriers so far, __syncwarp so far, thread.
class Stamp {
 public:
  Stamp() = default;
  explicit Stamp(int thread)
      : bits_(uint64_t{block()->interval} << 32 |
              uint64_t{block()->warps[thread / kWarp].clock & 0x3fffff} << 10 |
              static_cast<uint64_t>(thread)) {}
  uint32_t interval() const { return static_cast<uint32_t>(bits_ >> 32); }
  int thread() const { return static_cast<int>(bits_ & 0x3ff); }
  int warp() const { return thread() / kWarp; }
  bool of_this_block() const { return interval() >= block()->first_interval; }
  bool before(const Stamp& now) const {
    if (interval() < now.interval() || thread() == now.thread()) return true;
    return warp() == now.warp() && (bits_ >> 10 & 0x3fffff) < (now.bits_ >> 10 & 0x3fffff);
  }

 private:
  uint64_t bits_ = 0;
};

struct Byte {
  Stamp write;
  Stamp reads[2];  // the last one, and the last one of another warp or thread
  Stamp copy;      // the start of an asynchronous copy that is under way
  bool copying = false;
};

Byte* bytes_of_shared() {
  static thread_local std::vector<Byte> bytes;
  if (bytes.size() < block()->launch.shared_bytes) bytes.resize(block()->launch.shared_bytes);
  return bytes.data();
}

enum class Access { kRead, kWrite, kCopyStart, kCopyFinish };

// Empty if all is well.
std::string shared_access(int thread, int64_t offset, size_t size, Access access) {
  const Stamp now(thread);
  Byte* const bytes = bytes_of_shared();
  const auto at = [&](size_t i) {
    return " at offset " + std::to_string(offset + static_cast<int64_t>(i));
  };
  const auto who = [](const Stamp& s) { return "thread " + std::to_string(s.thread()); };
  for (size_t i = 0; i < size; ++i) {
    Byte& b = bytes[offset + static_cast<int64_t>(i)];
    const bool copying = b.copying && b.copy.of_this_block();
    if (access == Access::kRead) {
      if (copying) {
        return "reads shared memory" + at(i) + " while an asynchronous copy of " + who(b.copy) +
               " to it is under way";
      }
      if (!b.write.of_this_block()) {
        return "reads shared memory" + at(i) + " that nobody has written";
      }
      if (!b.write.before(now)) {
        return "reads shared memory" + at(i) + " that " + who(b.write) +
               " has written, with no barrier in between";
      }
      if (b.reads[0].warp() != now.warp() ||
          (b.reads[1].warp() == now.warp() && b.reads[0].thread() != now.thread())) {
        b.reads[1] = b.reads[0];
      }
      b.reads[0] = now;
      continue;
    }
    if (copying && access != Access::kCopyFinish) {
      return "writes shared memory" + at(i) + " while an asynchronous copy of " + who(b.copy) +
             " to it is under way";
    }
    if (b.write.of_this_block() && !b.write.before(now)) {
      return "writes shared memory" + at(i) + " that " + who(b.write) +
             " has written, with no barrier in between";
    }
    for (const Stamp& read : b.reads) {
      if (read.of_this_block() && !read.before(now)) {
        return "writes shared memory" + at(i) + " that " + who(read) +
               " has read, with no barrier in between";
      }
    }
    b.write = now;
    b.copying = access == Access::kCopyStart;
    if (b.copying) b.copy = now;
  }
  return "";
}

struct Range {
  uintptr_t begin, end;
};

// The calling thread's stack and what the loader has mapped: constants and tables.
const std::vector<Range>& host_ranges() {
  static thread_local std::vector<Range> ranges = [] {
    std::vector<Range> found;
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      void* stack = nullptr;
      size_t bytes = 0;
      pthread_attr_getstack(&attributes, &stack, &bytes);
      pthread_attr_destroy(&attributes);
      found.push_back(
          {reinterpret_cast<uintptr_t>(stack), reinterpret_cast<uintptr_t>(stack) + bytes});
    }
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            static_cast<std::vector<Range>*>(result)->push_back({begin, begin + header.p_memsz});
          }
          return 0;
        },
        &found);
    return found;
  }();
  return ranges;
}

bool of_the_host(uintptr_t at) {
  const auto within = [&](const void* begin, size_t bytes) {
    return at - reinterpret_cast<uintptr_t>(begin) < bytes;
  };
  if (within(block(), sizeof(Block)) || within(&current_block, sizeof current_block) ||
      within(block()->thread, sizeof(Thread) * kMaxThreads)) {
    return true;
  }
  for (const Range& r : host_ranges()) {
    if (at >= r.begin && at < r.end) return true;
  }
  return false;
}

// What is wrong with an access of the running thread; empty if all is well.
std::string check(const void* p, size_t size, bool write) {
  const Block* b = block();
  if (!b || !b->current || b->current->inside || b->cancelled) return "";
  const Thread& t = *b->current;
  if (t.fiber.on_stack(p)) return "";
  const int64_t offset = shared_offset(p);
  const auto shared_bytes = static_cast<int64_t>(b->launch.shared_bytes);
  constexpr auto kMargin = static_cast<int64_t>(SharedMemory::kMargin);
  if (offset >= -kMargin && offset < shared_bytes + kMargin) {
    if (offset < 0 || offset + static_cast<int64_t>(size) > shared_bytes) {
      return (write ? "writes " : "reads ") + std::to_string(size) + " bytes outside the block's " +
             std::to_string(shared_bytes) + " bytes of shared memory, at offset " +
             std::to_string(offset);
    }
    return shared_access(t.linear, offset, size, write ? Access::kWrite : Access::kRead);
  }
  if (global_ranges().empty()) return "";
  const std::string wrong = outside_ranges(p, size);
  if (wrong.empty() || of_the_host(reinterpret_cast<uintptr_t>(p))) return "";
  return (write ? "write: " : "read: ") + wrong;
}

// Inline functions that check() calls may be the linker's choice of an instrumented copy.
constinit thread_local bool checking = false;

void access(const void* p, size_t size, bool write) {
  if (checking) return;
  checking = true;
  const std::string wrong = check(p, size, write);
  if (!wrong.empty()) record(self().linear, wrong);
  const bool failed = !wrong.empty();
  checking = false;
  if (failed) leave_for_good();
}

void copy(const void* shared, size_t bytes, Access access) {
  const std::string wrong = shared_access(self().linear, shared_offset(shared), bytes, access);
  if (!wrong.empty()) fail("cp.async: " + wrong);
}

}  // namespace

void copy_started(const void* shared, size_t bytes) { copy(shared, bytes, Access::kCopyStart); }
void copy_finished(const void* shared, size_t bytes) { copy(shared, bytes, Access::kCopyFinish); }

void shared_read(int thread, const void* shared, size_t bytes, const char* what) {
  const std::string wrong = shared_access(thread, shared_offset(shared), bytes, Access::kRead);
  if (!wrong.empty()) fail_at(thread, std::string(what) + ": " + wrong);
}

}  // namespace emulator::access_checks

// What the compiler calls.
extern "C" {

#define EMULATOR_ACCESS(bytes)                                                                     \
  void __tsan_read##bytes(void* p) { emulator::access_checks::access(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { emulator::access_checks::access(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulator::access_checks::access(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { emulator::access_checks::access(p, bytes, true); }

EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)

void __tsan_read_range(void* p, unsigned long bytes) {
  emulator::access_checks::access(p, bytes, false);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  emulator::access_checks::access(p, bytes, true);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// Of a static variable's guard.
char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

}  // extern "C"
