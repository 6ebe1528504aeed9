#define DF_ISA kernels_neon
#include "kernels.inc"
