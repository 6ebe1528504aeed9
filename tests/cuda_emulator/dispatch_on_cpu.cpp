// The dispatch of CUDA tensors, compiled for CPU tensors.
#define TORCH_TARGET_VERSION 0x020a000000000000
#define DENSENET_FAST_CUDA_KEY CPU
#include "cuda/dispatch.cpp"
