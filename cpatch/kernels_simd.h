/* kernels_simd.h - what kernels.c knows of its versions for instruction sets. Each is one file, kernels_LEVEL.c: the
 * set's few primitives, then kernels_template.h, which holds the arithmetic once for all. */
#ifndef POWERINFER_KERNELS_SIMD_H
#define POWERINFER_KERNELS_SIMD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Functions between these two may use the instructions named. Included headers belong before: clang gives what it finds
 * between them the instructions too. */
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(names) PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(names) PRAGMA(GCC push_options) PRAGMA(GCC target(names))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

/* Types with kernels of their own, by their ggml numbers; I8_SCALED is ours: integers with a row of half scales. */
enum kernel_type {
    K_F32 = 0, K_F16 = 1, K_Q4_0 = 2, K_Q8_0 = 8, K_Q4_K = 12, K_Q5_K = 13, K_Q6_K = 14, K_BF16 = 30, K_MXFP4 = 39,
    K_I8_SCALED = -2,
};

struct kernel_level {
    const char *name;
    /* out[i] = dot product of row i and input i; the rows are many and the input one, or the other way round. */
    bool (*dots)(int type, int64_t n, const uint8_t *const *rows, int n_rows, const uint8_t *const *xs, int n_xs,
                 float *out);
    /* y += a[k] * column k, in order; scales: only for I8_SCALED. offsets: as in kernel_axpys(); NULL: what
     * belongs there is added to y, in floats with all levels. */
    bool (*axpys)(int type, int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, const float *a,
                  int n_cols, float *y, float *offsets);
    void (*finish)(int type, int64_t n, float *y); /* what sums with offsets need at their end; NULL: nothing */
};
/* All return false, having done nothing, for types they have no code for. axpys is NULL with AVX-512 without
 * BF16, whose wider vectors gain nothing there (measured on Zen 4): AVX2's serve, and give the same bits as any fused
 * ones. */

/* NULL where the compiler's target has no such thing. */
extern const struct kernel_level *const kernel_portable, *const kernel_neon, *const kernel_avx2, *const kernel_avx512,
    *const kernel_avx512vnni, *const kernel_avx512bf16;

#endif
