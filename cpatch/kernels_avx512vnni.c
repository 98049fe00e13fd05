/* kernels_avx512vnni.c - AVX-512 with VNNI's dot products of bytes. */
#define WITH_VNNI
#include "kernels_avx512.c"
