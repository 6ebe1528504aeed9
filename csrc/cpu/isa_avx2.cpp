#define DF_ISA kernels_avx2
#include "kernels.inc"
