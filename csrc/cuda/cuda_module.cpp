// The Python module `densenet_fast._cuda`. Importing it registers the operators on CUDA tensors,
// after `densenet_fast._C` has defined them; it needs no device and no driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "device.h"

namespace {

// 0 where there is no driver.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  namespace cuda = densenet_fast::cuda;
  m.doc() = "CUDA kernels of densenet_fast";
  m.def(
      "architectures", [] { return std::string(DENSENET_FAST_CUDA_ARCHITECTURES); },
      "Compute capabilities compiled in, separated by semicolons");
  m.def("architectures_reason", [] { return std::string(DENSENET_FAST_CUDA_REASON); }, "Why these");
  m.def("nvcc", [] { return std::string(DENSENET_FAST_NVCC); }, "Version of the CUDA compiler");
  m.def(
      "fingerprint", [] { return std::string(DENSENET_FAST_FINGERPRINT); },
      "Digest of the CUDA sources");
  m.def("runtime_version", &runtime_version,
        "The CUDA runtime linked in: 1000 * major + 10 * minor");
  m.def("driver_version", &driver_version,
        "The newest CUDA the driver knows, in the same form; 0 without a driver");
  m.def("take_failed_allocation", &cuda::take_failed_allocation,
        "What this thread's last call had no memory for, once; otherwise empty");
}
