/* kernels.c - see kernels.h: which version serves, and ggml's own routines for the types that have none. */
#include "kernels.h"

#include "ggml_abi.h"
#include "kernels_simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- levels --------------------------------------------------------------------------------------------------- */

static _Atomic(const struct kernel_level *) level_in_use;

/* Best first. NULL where this machine lacks the instructions, or the compiler's target does. */
static int usable_levels(const struct kernel_level *out[6]) {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned eax, ebx, ecx = 0, edx; /* clang 14 does not know "f16c" */
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("gfni");
    if (bf16) out[n++] = kernel_avx512bf16;
    if (vnni) out[n++] = kernel_avx512vnni;
    if (avx512) out[n++] = kernel_avx512;
    if (avx2) out[n++] = kernel_avx2;
#endif
    if (kernel_neon != NULL) out[n++] = kernel_neon;
    out[n++] = kernel_portable;
    return n;
}

static const struct kernel_level *find_level(const char *name) {
    const struct kernel_level *usable[6];
    const int n = usable_levels(usable);
    for (int i = 0; i < n; i++) {
        if (name == NULL || strcmp(usable[i]->name, name) == 0) return usable[i];
    }
    return NULL;
}

static const struct kernel_level *level(void) {
    const struct kernel_level *found = atomic_load_explicit(&level_in_use, memory_order_relaxed);
    if (found != NULL) return found;
    const char *name = getenv("POWERINFER_KERNELS");
    found = find_level(name);
    if (found == NULL) {
        fprintf(stderr, "powerinfer: POWERINFER_KERNELS=%s: not on this machine\n", name);
        found = find_level(NULL);
    }
    atomic_store_explicit(&level_in_use, found, memory_order_relaxed);
    return found;
}

/* Whose sums of columns are used. */
static const struct kernel_level *columns(void) {
    const struct kernel_level *found = level();
    return found->axpys != NULL ? found : kernel_avx2;
}

const char *kernel_level(void) {
    return level()->name;
}

int kernel_force(const char *name) {
    const struct kernel_level *found = name == NULL ? NULL : find_level(name);
    if (name != NULL && found == NULL) return -1;
    atomic_store_explicit(&level_in_use, found, memory_order_relaxed); /* NULL: chosen anew */
    return 0;
}

/* ---- dequantising --------------------------------------------------------------------------------------------- */

/* Q8_1: blocks of 32 values, half scale, half sum (not needed here), 32 signed bytes: Q8_0's with 2 bytes more. */
static void dequantize_q8_1(int64_t n, const uint8_t *x, float *y) {
    for (int64_t b = 0; b < n / 32; b++, x += 36, y += 32) {
        uint8_t block[34];
        memcpy(block, x, 2);
        memcpy(block + 2, x + 4, 32);
        kernel_dequantize(ABI_TYPE_Q8_0, 32, block, y);
    }
}

/* Q8_K: blocks of 256 values, float scale, 256 signed bytes, 16 sums of 16 values (not needed here). */
static void dequantize_q8_k(int64_t n, const uint8_t *x, float *restrict y) {
    for (int64_t b = 0; b < n / 256; b++, x += 292, y += 256) {
        float d;
        memcpy(&d, x, 4);
        for (int i = 0; i < 256; i++) y[i] = d * (float)(int8_t)x[4 + i];
    }
}

bool kernel_can_dequantize(int type) {
    if (type < 0 || type >= ABI_TYPE_COUNT) return false;
    return type == ABI_TYPE_F32 || type == ABI_TYPE_Q8_1 || type == ABI_TYPE_Q8_K ||
           ggml.ggml_get_type_traits(type)->to_float != NULL;
}

static const float one = 1.0f;

void kernel_dequantize(int type, int64_t n, const void *x, float *y) {
    switch (type) {
    case ABI_TYPE_F32: memcpy(y, x, (size_t)n * sizeof(float)); return;
    case ABI_TYPE_Q8_1: dequantize_q8_1(n, x, y); return;
    case ABI_TYPE_Q8_K: dequantize_q8_k(n, x, y); return;
    }
    const uint8_t *col = x;
    memset(y, 0, (size_t)n * sizeof(float));
    if (!columns()->axpys(type, n, &col, NULL, &one, 1, y, NULL)) ggml.ggml_get_type_traits(type)->to_float(x, y, n);
}

void kernel_dequantize_scaled(int64_t n, const int8_t *x, const uint16_t *scales, float *y) {
    const uint8_t *col = (const uint8_t *)x;
    memset(y, 0, (size_t)n * sizeof(float));
    (void)columns()->axpys(K_I8_SCALED, n, &col, &scales, &one, 1, y, NULL);
}

/* ---- dot products --------------------------------------------------------------------------------------------- */

void kernel_round_input(int type, int64_t n, const float *x, void *y) {
    if (type == ABI_TYPE_F32) memcpy(y, x, (size_t)n * sizeof(float));
    else ggml.ggml_get_type_traits_cpu(type)->from_float(x, y, n);
}

int kernel_input_type(int type) {
    const struct ggml_type_traits_cpu *traits = ggml.ggml_get_type_traits_cpu(type);
    return traits->vec_dot == NULL ? -1 : traits->vec_dot_type;
}

void kernel_dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const void *xq, float *out) {
    const uint8_t *x = xq;
    if (level()->dots(type, n, rows, n_rows, &x, 1, out)) return;
    const struct ggml_type_traits_cpu *traits = ggml.ggml_get_type_traits_cpu(type);
    for (int k = 0; k < n_rows; k++) traits->vec_dot((int)n, out + k, 0, rows[k], 0, xq, 0, 1);
}

void kernel_dots_inputs(int type, int64_t n, const uint8_t *row, const void *const *xqs, int n_x, float *out) {
    if (level()->dots(type, n, &row, 1, (const uint8_t *const *)xqs, n_x, out)) return;
    const struct ggml_type_traits_cpu *traits = ggml.ggml_get_type_traits_cpu(type);
    for (int i = 0; i < n_x; i++) traits->vec_dot((int)n, out + i, 0, row, 0, xqs[i], 0, 1);
}

/* ---- sums of columns ------------------------------------------------------------------------------------------ */

static void axpy_f32(int64_t n, float a, const float *x, float *y) {
    const uint8_t *col = (const uint8_t *)x;
    (void)columns()->axpys(ABI_TYPE_F32, n, &col, NULL, &a, 1, y, NULL);
}

void kernel_add_f32(int64_t n, const float *x, float *y) {
    axpy_f32(n, one, x, y);
}

void kernel_axpys(int type, int64_t n, const uint8_t *const *cols, const float *a, int n_cols, float *y,
                  float *offsets, float *tmp) {
    if (columns()->axpys(type, n, cols, NULL, a, n_cols, y, offsets)) return;
    for (int k = 0; k < n_cols; k++) {
        kernel_dequantize(type, n, cols[k], tmp);
        axpy_f32(n, a[k], tmp, y);
    }
}

void kernel_finish_sums(int type, int64_t n, const float *offsets, float *y) {
    if (columns()->finish != NULL) columns()->finish(type, n, y);
    for (int64_t i = 0; i < n; i++) y[i] += offsets[i / 32];
}

void kernel_axpys_scaled(int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, const float *a, int n_cols,
                         float *y) {
    (void)columns()->axpys(K_I8_SCALED, n, cols, scales, a, n_cols, y, NULL);
}
