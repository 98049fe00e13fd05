/* kernels.c - see kernels.h. One source per idea: the compiler makes the AVX-512, AVX2 and portable versions, and
 * the loader picks one for the machine. */
#include "kernels.h"

#include "ggml_abi.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(PI_NO_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3")))
#else
#define CLONES
#endif

CLONES static void axpy_f32(int64_t n, float a, const float *x, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

CLONES void kernel_add_f32(int64_t n, const float *x, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

/* IEEE half to single; subnormals included. Bit twiddling, because scales come one at a time. */
static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    union {
        uint32_t u;
        float f;
    } bits = {magnitude}, scale = {0x77800000u}; /* 2^112 moves the exponent bias from 15 to 127 */
    bits.f *= scale.f;
    if ((h & 0x7c00) == 0x7c00) bits.u |= 0x7f800000u; /* infinity and NaN */
    bits.u |= sign;
    return bits.f;
}

CLONES static void axpy_scaled(int64_t n, float a, const int8_t *x, const uint16_t *scales, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] += a * half_to_float(scales[i]) * (float)x[i];
}

CLONES void kernel_dequantize_scaled(int64_t n, const int8_t *x, const uint16_t *scales, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] = half_to_float(scales[i]) * (float)x[i];
}

/* Q8_0: blocks of 32 values, a half scale then 32 signed bytes. */
CLONES static void axpy_q8_0(int64_t n, float a, const uint8_t *x, float *restrict y) {
    for (int64_t b = 0; b < n / 32; b++, x += 34, y += 32) {
        uint16_t h;
        int8_t q[32];
        memcpy(&h, x, 2);
        memcpy(q, x + 2, 32);
        const float d = a * half_to_float(h);
        for (int i = 0; i < 32; i++) y[i] += d * (float)q[i];
    }
}

/* Q4_0: blocks of 32 values, a half scale then 16 bytes; low nibbles are values 0..15, high ones 16..31, minus 8. */
CLONES static void axpy_q4_0(int64_t n, float a, const uint8_t *x, float *restrict y) {
    for (int64_t b = 0; b < n / 32; b++, x += 18, y += 32) {
        uint16_t h;
        uint8_t q[16];
        memcpy(&h, x, 2);
        memcpy(q, x + 2, 16);
        const float d = a * half_to_float(h);
        for (int i = 0; i < 16; i++) y[i] += d * (float)((int)(q[i] & 15) - 8);
        for (int i = 0; i < 16; i++) y[i + 16] += d * (float)((int)(q[i] >> 4) - 8);
    }
}

/* Q8_1: blocks of 32 values, half scale, half sum (not needed here), 32 signed bytes. */
CLONES static void dequantize_q8_1(int64_t n, const uint8_t *x, float *restrict y) {
    for (int64_t b = 0; b < n / 32; b++, x += 36, y += 32) {
        uint16_t h;
        memcpy(&h, x, 2);
        const float d = half_to_float(h);
        for (int i = 0; i < 32; i++) y[i] = d * (float)(int8_t)x[4 + i];
    }
}

/* Q8_K: blocks of 256 values, float scale, 256 signed bytes, 16 sums of 16 values (not needed here). */
CLONES static void dequantize_q8_k(int64_t n, const uint8_t *x, float *restrict y) {
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

void kernel_dequantize(int type, int64_t n, const void *x, float *y) {
    switch (type) {
    case ABI_TYPE_F32: memcpy(y, x, (size_t)n * sizeof(float)); break;
    case ABI_TYPE_F16: ggml.ggml_cpu_fp16_to_fp32(x, y, n); break;
    case ABI_TYPE_BF16: ggml.ggml_cpu_bf16_to_fp32(x, y, n); break;
    case ABI_TYPE_Q8_0:
        memset(y, 0, (size_t)n * sizeof(float));
        axpy_q8_0(n, 1.0f, x, y);
        break;
    case ABI_TYPE_Q4_0:
        memset(y, 0, (size_t)n * sizeof(float));
        axpy_q4_0(n, 1.0f, x, y);
        break;
    case ABI_TYPE_Q8_1: dequantize_q8_1(n, x, y); break;
    case ABI_TYPE_Q8_K: dequantize_q8_k(n, x, y); break;
    default: ggml.ggml_get_type_traits(type)->to_float(x, y, n);
    }
}

void kernel_round_input(int type, int64_t n, const float *x, void *y) {
    if (type == ABI_TYPE_F32) memcpy(y, x, (size_t)n * sizeof(float));
    else ggml.ggml_get_type_traits_cpu(type)->from_float(x, y, n);
}

int kernel_input_type(int type) {
    const struct ggml_type_traits_cpu *traits = ggml.ggml_get_type_traits_cpu(type);
    return traits->vec_dot == NULL ? -1 : traits->vec_dot_type;
}

void kernel_dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const void *xq, float *out) {
    const struct ggml_type_traits_cpu *traits = ggml.ggml_get_type_traits_cpu(type);
    for (int k = 0; k < n_rows; k++) traits->vec_dot((int)n, out + k, 0, rows[k], 0, xq, 0, 1);
}

void kernel_dots_inputs(int type, int64_t n, const uint8_t *row, const void *const *xqs, int n_x, float *out) {
    const struct ggml_type_traits_cpu *traits = ggml.ggml_get_type_traits_cpu(type);
    for (int i = 0; i < n_x; i++) traits->vec_dot((int)n, out + i, 0, row, 0, xqs[i], 0, 1);
}

static void axpy(int type, int64_t n, float a, const void *x, float *y, float *tmp) {
    switch (type) {
    case ABI_TYPE_F32: axpy_f32(n, a, x, y); break;
    case ABI_TYPE_Q8_0: axpy_q8_0(n, a, x, y); break;
    case ABI_TYPE_Q4_0: axpy_q4_0(n, a, x, y); break;
    default:
        kernel_dequantize(type, n, x, tmp);
        axpy_f32(n, a, tmp, y);
    }
}

void kernel_axpys(int type, int64_t n, const uint8_t *const *cols, const float *a, int n_cols, float *y, float *tmp) {
    for (int k = 0; k < n_cols; k++) axpy(type, n, a[k], cols[k], y, tmp);
}

void kernel_axpys_outputs(int type, int64_t n, const uint8_t *col, const float *a, float *const *ys, int n_y, float *tmp) {
    kernel_dequantize(type, n, col, tmp);
    for (int i = 0; i < n_y; i++) axpy_f32(n, a[i], tmp, ys[i]);
}

void kernel_axpys_scaled(int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, const float *a, int n_cols,
                         float *y) {
    for (int k = 0; k < n_cols; k++) axpy_scaled(n, a[k], (const int8_t *)cols[k], scales[k], y);
}

void kernel_axpys_outputs_scaled(int64_t n, const uint8_t *col, const uint16_t *scales, const float *a, float *const *ys,
                                 int n_y, float *tmp) {
    kernel_dequantize_scaled(n, (const int8_t *)col, scales, tmp);
    for (int i = 0; i < n_y; i++) axpy_f32(n, a[i], tmp, ys[i]);
}
