// Every load and store of a kernel, checked, in builds that have the compiler report them
// (DENSENET_FAST_CHECK_ACCESSES, access_checks.cpp); nothing otherwise.
#pragma once

#include <cstddef>

namespace emulator::access_checks {

#ifdef DENSENET_FAST_CHECK_ACCESSES

// An asynchronous copy to shared memory that the running thread starts, or waits for.
void copy_started(const void* shared, size_t bytes);
void copy_finished(const void* shared, size_t bytes);

// A read of shared memory on behalf of `thread`. Ends the launch with an error where there is one.
void shared_read(int thread, const void* shared, size_t bytes, const char* what);

#else

inline void copy_started(const void*, size_t) {}
inline void copy_finished(const void*, size_t) {}
inline void shared_read(int, const void*, size_t, const char*) {}

#endif

}  // namespace emulator::access_checks
