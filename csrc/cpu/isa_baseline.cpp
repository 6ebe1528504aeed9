#define DF_ISA kernels_baseline
#include "kernels.inc"
