/* kernels_avx512bf16.c - AVX-512 with VNNI, with VBMI's permutations of bytes, and with BF16's dot products of pairs. */
#define WITH_VNNI
#define WITH_BF16
#include "kernels_avx512.c"
