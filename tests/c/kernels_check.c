/* kernels_check.c - the kernels of every level against double precision, without ggml and Python: for machines that are
 * emulated (tests/test_kernels.py builds it for 64-bit ARM). Rows are random bytes with sensible scales; what they mean
 * is written down here a second time, value by value. Exit status 0 when everything came out right.
 * Usage: kernels_check LEVEL. */
#include "ggml_abi.h"
#include "kernels.h"
#include "kernels_simd.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct abi_functions ggml; /* never called: every type here has a kernel */

enum { MAX_N = 1280, ROWS = 11, ROW_BYTES = 4 * MAX_N };

static uint64_t state = 1;

static uint32_t next_random(void) { /* splitmix64 */
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

static double half_value(const uint8_t *p) {
    const int exponent = p[1] >> 2 & 31, mantissa = (p[1] & 3) << 8 | p[0];
    const double size = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
    return p[1] & 128 ? -size : size;
}

/* A half between 1/256 and 1/2, of either sign. */
static void random_half(uint8_t *p) {
    p[0] = (uint8_t)next_random();
    p[1] = (uint8_t)((next_random() & 0x83) | (7 + next_random() % 7) << 2);
}

static float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static size_t size_of_row(int type, int n) {
    switch (type) {
    case K_F32: return (size_t)n * 4;
    case K_F16: case K_BF16: return (size_t)n * 2;
    case K_Q4_0: return (size_t)n / 32 * 18;
    case K_Q8_0: return (size_t)n / 32 * 34;
    case K_MXFP4: return (size_t)n / 32 * 17;
    case K_Q4_K: return (size_t)n / 256 * 144;
    case K_Q5_K: return (size_t)n / 256 * 176;
    case K_Q6_K: return (size_t)n / 256 * 210;
    default: return (size_t)n / 256 * 292; /* Q8_K */
    }
}

static void scale_min(const uint8_t *s, int j, int *scale, int *minimum) {
    *scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    *minimum = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}

/* Value i of a row. */
static double value(int type, const uint8_t *row, int i) {
    static const int fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const int in32 = i % 32, in256 = i % 256;
    const uint8_t *b;
    switch (type) {
    case K_F32: return as_float((uint32_t)row[4 * i] | (uint32_t)row[4 * i + 1] << 8 | (uint32_t)row[4 * i + 2] << 16 |
                                (uint32_t)row[4 * i + 3] << 24);
    case K_F16: return half_value(row + 2 * i);
    case K_BF16: return as_float((uint32_t)row[2 * i] << 16 | (uint32_t)row[2 * i + 1] << 24);
    case K_Q4_0:
        b = row + i / 32 * 18;
        return half_value(b) * ((b[2 + in32 % 16] >> in32 / 16 * 4 & 15) - 8);
    case K_Q8_0:
        b = row + i / 32 * 34;
        return half_value(b) * (int8_t)b[2 + in32];
    case K_MXFP4:
        b = row + i / 32 * 17;
        return ldexp(fp4[b[1 + in32 % 16] >> in32 / 16 * 4 & 15], b[0] - 128);
    case K_Q4_K: case K_Q5_K: {
        b = row + (size_t)(i / 256) * (type == K_Q4_K ? 144 : 176);
        const int j = in256 / 32;
        int scale, minimum, q = b[(type == K_Q4_K ? 16 : 48) + j / 2 * 32 + in32] >> j % 2 * 4 & 15;
        scale_min(b + 4, j, &scale, &minimum);
        if (type == K_Q5_K) q += (b[16 + in32] >> j & 1) * 16;
        return half_value(b) * scale * q - half_value(b + 2) * minimum;
    }
    case K_Q6_K: {
        b = row + i / 256 * 210;
        const int j = in256 % 128 / 32, low = b[in256 / 128 * 64 + j % 2 * 32 + in32] >> j / 2 * 4 & 15;
        const int high = b[128 + in256 / 128 * 32 + in32] >> j * 2 & 3;
        return half_value(b + 208) * (int8_t)b[192 + in256 / 16] * (low + 16 * high - 32);
    }
    default: { /* Q8_K */
        b = row + i / 256 * 292;
        float d;
        memcpy(&d, b, 4);
        return d * (int8_t)b[4 + in256];
    }
    }
}

static void random_row(int type, int n, uint8_t *row) {
    for (size_t i = 0; i < size_of_row(type, n); i++) row[i] = (uint8_t)next_random();
    for (int i = 0; i < n; i++) {
        if (type == K_F16) random_half(row + 2 * i);
        if (type == K_F32 || type == K_BF16) { /* between 1/4 and 2 */
            uint8_t *top = row + (type == K_F32 ? 4 * i + 2 : 2 * i);
            top[1] = (uint8_t)(62 + next_random() % 2 + (next_random() & 128));
        }
        if (i % 32 == 0 && type == K_MXFP4) row[i / 32 * 17] = (uint8_t)(120 + next_random() % 8);
        if (i % 32 == 0 && (type == K_Q4_0 || type == K_Q8_0)) random_half(row + i / 32 * (type == K_Q4_0 ? 18 : 34));
        if (i % 256 == 0 && type == K_Q6_K) random_half(row + i / 256 * 210 + 208);
        if (i % 256 == 0 && (type == K_Q4_K || type == K_Q5_K)) {
            random_half(row + i / 256 * (type == K_Q4_K ? 144 : 176));
            random_half(row + i / 256 * (type == K_Q4_K ? 144 : 176) + 2);
        }
        if (i % 256 == 0 && type == ABI_TYPE_Q8_K) {
            const float d = (float)(1 + next_random() % 100) / 1000.0f;
            uint8_t *block = row + i / 256 * 292;
            memcpy(block, &d, 4);
            for (int g = 0; g < 16; g++) {
                int16_t sum = 0;
                for (int k = 0; k < 16; k++) {
                    if (block[4 + g * 16 + k] == 128) block[4 + g * 16 + k] = 127; /* inputs are at least -127 */
                    sum = (int16_t)(sum + (int8_t)block[4 + g * 16 + k]);
                }
                memcpy(block + 260 + 2 * g, &sum, 2);
            }
        }
        if (type == K_Q8_0 && row[i / 32 * 34 + 2 + i % 32] == 128) row[i / 32 * 34 + 2 + i % 32] = 127;
    }
}

static int failures;

static void expect(int type, int n, const char *what, double got, double wanted, double tolerance) {
    if (fabs(got - wanted) <= tolerance) return;
    if (failures++ < 20) fprintf(stderr, "type %d, n %d, %s: %.9g, not %.9g\n", type, n, what, got, wanted);
}

static uint8_t *rows[ROWS], inputs[ROWS][ROW_BYTES];

/* Rows of exactly this many bytes, so that sanitizers see what reads beyond them; not aligned to anything. */
static void new_rows(size_t bytes) {
    for (int i = 0; i < ROWS; i++) {
        free(rows[i]);
        rows[i] = malloc(bytes + 1);
        if (rows[i] == NULL) exit(2);
    }
}

/* size: the sum of the absolute values of what is summed; with K-quants, of minima and scaled integers by themselves. */
static double exact_dot(int type, const uint8_t *row, int input_type, const uint8_t *input, int n, double *size) {
    double sum = 0;
    *size = 0;
    for (int k = 0; k < n; k++) {
        const double x = value(input_type, input, k), w = value(type, row, k);
        sum += w * x;
        *size += fabs(w * x) + (type == K_Q4_K || type == K_Q5_K ? 2 * 0.5 * 63 * fabs(x) : 0);
    }
    return sum;
}

static void check_dots(int type, int input_type, int n) {
    const uint8_t *list[ROWS];
    const void *xs[ROWS];
    float out[ROWS], again[ROWS], turned[ROWS];
    new_rows(size_of_row(type, n));
    for (int i = 0; i < ROWS; i++) random_row(input_type, n, inputs[i]), xs[i] = inputs[i];
    for (int i = 0; i < ROWS; i++) random_row(type, n, rows[i] + 1), list[i] = rows[i] + 1;
    kernel_dots(type, n, list, ROWS, inputs[0], out);
    kernel_dots(type, n, list, 1, inputs[0], again);
    kernel_dots(type, n, list + 1, ROWS - 1, inputs[0], again + 1);
    kernel_dots_inputs(type, n, list[0], xs, ROWS, turned);
    if (memcmp(out, again, sizeof out) != 0 || out[0] != turned[0]) expect(type, n, "dots, cut", 1, 0, 0);
    for (int i = 0; i < ROWS; i++) {
        double size, sum = exact_dot(type, list[i], input_type, inputs[0], n, &size);
        expect(type, n, "dots", out[i], sum, size * 1e-6);
        sum = exact_dot(type, list[0], input_type, inputs[i], n, &size);
        expect(type, n, "dots_inputs", turned[i], sum, size * 1e-6);
    }
}

static void check_axpys(int type, int n) {
    const uint8_t *list[ROWS];
    static float y[MAX_N], cut[MAX_N], tmp[MAX_N], y_offsets[MAX_N / 32 + 1], cut_offsets[MAX_N / 32 + 1];
    /* Factors are rounded to bfloat16, for K-quants those of the integers less 8. */
    const bool coarse = strcmp(kernel_level(), "avx512bf16") == 0 && (type == K_Q4_0 || type == K_MXFP4 || type == K_Q4_K);
    float a[ROWS];
    new_rows(size_of_row(type, n));
    for (int i = 0; i < ROWS; i++) {
        random_row(type, n, rows[i] + 1);
        list[i] = rows[i] + 1;
        a[i] = (float)(int32_t)next_random() / 2147483648.0f;
    }
    memset(y, 0, sizeof y);
    memset(cut, 0, sizeof cut);
    memset(y_offsets, 0, sizeof y_offsets);
    memset(cut_offsets, 0, sizeof cut_offsets);
    kernel_axpys(type, n, list, a, ROWS, y, y_offsets, tmp);
    kernel_axpys(type, n, list, a, 3, cut, cut_offsets, tmp);
    kernel_axpys(type, n, list + 3, a + 3, ROWS - 3, cut, cut_offsets, tmp);
    kernel_finish_sums(type, n, y_offsets, y);
    kernel_finish_sums(type, n, cut_offsets, cut);
    if (memcmp(y, cut, (size_t)n * 4) != 0) expect(type, n, "axpys, cut", 1, 0, 0);
    for (int k = 0; k < n; k++) {
        double sum = 0, size = 0;
        for (int i = 0; i < ROWS; i++) {
            const double term = a[i] * value(type, list[i], k);
            sum += term;
            /* What 32 values have in common may be added apart, and is then part of what is rounded. */
            size += fabs(term) + (type == K_Q4_K || type == K_Q5_K ? fabs(a[i]) * 0.5 * 63 * 32 : 0);
            if (type == K_Q4_0) size += fabs(8 * a[i] * half_value(list[i] + k / 32 * 18));
        }
        expect(type, n, "axpys", y[k], sum, size * (coarse ? 1.0 / 256 : 1e-6));
    }
    kernel_dequantize(type, n, list[0], tmp);
    for (int k = 0; k < n && type != K_F32; k++) expect(type, n, "dequantize", tmp[k], (float)value(type, list[0], k), 0);
}

static void check_scaled(int n) {
    static uint16_t scales[MAX_N];
    static float y[MAX_N];
    const uint16_t *scale_list[ROWS];
    const uint8_t *list[ROWS];
    float a[ROWS];
    new_rows((size_t)n);
    for (int k = 0; k < n; k++) random_half((uint8_t *)(scales + k)), y[k] = 0.0f;
    for (int i = 0; i < ROWS; i++) {
        for (int k = 0; k < n; k++) rows[i][k + 1] = (uint8_t)next_random();
        list[i] = rows[i] + 1, scale_list[i] = scales, a[i] = (float)(i - 4) / 3.0f;
    }
    kernel_axpys_scaled(n, list, scale_list, a, ROWS, y);
    for (int k = 0; k < n; k++) {
        double sum = 0, size = 0;
        for (int i = 0; i < ROWS; i++) {
            const double term = a[i] * half_value((const uint8_t *)(scales + k)) * (int8_t)list[i][k];
            sum += term, size += fabs(term);
        }
        expect(ABI_TYPE_I8, n, "axpys_scaled", y[k], sum, size * 1e-6);
    }
}

int main(int argc, char **argv) {
    if (argc != 2 || kernel_force(argv[1]) != 0 || strcmp(kernel_level(), argv[1]) != 0) {
        fprintf(stderr, "usage: kernels_check LEVEL, one that this machine has\n");
        return 2;
    }
    static const struct { int type, input; } types[] = {
        {K_F32, K_F32}, {K_F16, K_F16}, {K_BF16, K_BF16}, {K_Q4_0, K_Q8_0}, {K_Q8_0, K_Q8_0}, {K_MXFP4, K_Q8_0},
        {K_Q4_K, ABI_TYPE_Q8_K}, {K_Q5_K, ABI_TYPE_Q8_K}, {K_Q6_K, ABI_TYPE_Q8_K}};
    for (size_t t = 0; t < sizeof types / sizeof types[0]; t++) {
        const int block = t < 3 ? 1 : t < 6 ? 32 : 256;
        static const int counts[] = {1, 2, 3, 5, 17, 37};
        for (size_t c = 0; c < 6 && counts[c] * block <= MAX_N; c++) {
            check_dots(types[t].type, types[t].input, counts[c] * block);
            check_axpys(types[t].type, counts[c] * block);
        }
    }
    for (int n = 1; n <= 100; n += 9) check_scaled(n);
    for (int i = 0; i < ROWS; i++) free(rows[i]);
    return failures == 0 ? 0 : 1;
}
