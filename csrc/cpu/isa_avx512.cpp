#define DF_ISA kernels_avx512
#include "kernels.inc"
