/* kernels_avx512vbmi.c - AVX-512 with VNNI, and VBMI's permutations of bytes. */
#define WITH_VNNI
#define WITH_VBMI
#include "kernels_avx512.c"
