// The emulator as C functions, for ctypes. A function that can fail returns null or the text of the
// error.
#pragma once

#include <exception>
#include <string>

namespace emulator {

// The error of the last call through guarded(); empty after a success.
inline std::string& last_error() {
  static thread_local std::string text;
  return text;
}

// What every C entry point of a test wraps its body in: no exception leaves it.
template <class Body>
const char* guarded(const Body& body) {
  try {
    body();
    last_error().clear();
    return nullptr;
  } catch (const std::exception& error) {
    last_error() = error.what();
  } catch (...) {
    last_error() = "unknown exception";
  }
  return last_error().c_str();
}

}  // namespace emulator
