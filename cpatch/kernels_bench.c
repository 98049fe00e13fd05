/* kernels_bench.c - times kernels on lists of rows, and plain reading, with threads of OpenMP (bench/kernels.py). */
#define _GNU_SOURCE
#include "kernels_bench.h"

#include "attention.h"
#include "ggml_abi.h"
#include "ffn_tiles.h"
#include "kernels.h"
#include "panels.h"
#include "tiles.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PER_CALL = 256 };

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Reads a word of each line of rows, eight rows at a time while the next ones are fetched: what scattered rows allow when
 * nothing is computed. Short rows are asked for three times, since the second cache level drops requests; kernels ask
 * twice (kernels_template.h), because asking takes instructions, too. */
static uint64_t read_rows(const uint8_t *const *rows, int n, int64_t size) {
    enum { TOGETHER = 8, PART = 256, SHORT = 4608 };
    const int times = size <= SHORT ? 3 : 1;
    uint64_t all = 0;
    for (int k = 0; k < n; k += TOGETHER) {
        for (int64_t at = 0; at < size; at += PART) {
            const int64_t end = at + PART < size ? at + PART : size;
            for (int r = k + TOGETHER; r < k + (times + 1) * TOGETHER && r < n; r++) {
                for (int64_t i = at; i < end; i += 64) __builtin_prefetch(rows[r] + i, 0, 2);
            }
            for (int r = k; r < k + TOGETHER && r < n; r++) {
                for (int64_t i = at; i + 8 <= end; i += 64) {
                    uint64_t word;
                    memcpy(&word, rows[r] + i, 8);
                    all ^= word;
                }
            }
        }
    }
    return all;
}

/* One thread's rows, PER_CALL at a time. */
static void bench_part(const struct pi_kernel_job *job, const int32_t *rows, int n_rows, float *y, float *offsets,
                       float *tmp) {
    const uint8_t *list[PER_CALL];
    const uint16_t *scales[PER_CALL];
    float a[PER_CALL];
    for (int at = 0; at < n_rows; at += PER_CALL) {
        const int n = n_rows - at < PER_CALL ? n_rows - at : PER_CALL;
        for (int k = 0; k < n; k++) {
            list[k] = (const uint8_t *)job->buffer + (size_t)rows[at + k] * job->stride;
            scales[k] = (const uint16_t *)job->scales + (size_t)rows[at + k] / 32 * (size_t)job->n;
            a[k] = 1e-3f;
        }
        if (job->op == PI_KERNEL_READS) y[0] += (float)read_rows(list, n, job->stride);
        else if (job->op == PI_KERNEL_DOTS) kernel_dots(job->type, job->n, list, n, job->input, a);
        else if (job->type == ABI_TYPE_I8) kernel_axpys_scaled(job->n, list, scales, a, n, y);
        else kernel_axpys(job->type, job->n, list, a, n, y, offsets, tmp);
    }
}

double pi_kernel_seconds(const struct pi_kernel_job *job, const int32_t *rows, int n_rows, int n_threads) {
    const size_t room = ((size_t)job->n * sizeof(float) + 4095) / 4096 * 4096;
    float *scratch = aligned_alloc(4096, 3 * room * (size_t)n_threads);
    if (scratch == NULL) return -1.0;
    memset(scratch, 0, 3 * room * (size_t)n_threads);
    double start = 0.0;
#pragma omp parallel num_threads(n_threads)
    {
        const int t = omp_get_thread_num(), n = omp_get_num_threads();
        const int first = (int)((int64_t)n_rows * t / n), last = (int)((int64_t)n_rows * (t + 1) / n);
        float *own = scratch + 3 * room / sizeof(float) * (size_t)t;
#pragma omp barrier
#pragma omp master
        start = seconds();
        bench_part(job, rows + first, last - first, own, own + room / sizeof(float), own + 2 * room / sizeof(float));
    }
    const double end = seconds();
    free(scratch);
    return end - start;
}

double pi_read_seconds(const void *buffer, int64_t size, int n_threads) {
    double start = 0.0;
    uint64_t all = 0;
#pragma omp parallel num_threads(n_threads) reduction(^ : all)
    {
        const int64_t lines = size / 64, t = omp_get_thread_num(), n = omp_get_num_threads();
        const uint8_t *p = (const uint8_t *)buffer + lines * t / n * 64;
        const uint8_t *const end = (const uint8_t *)buffer + lines * (t + 1) / n * 64;
#pragma omp barrier
#pragma omp master
        start = seconds();
        for (; p < end; p += 64) { /* a word of every line: the rest comes along */
            uint64_t word;
            memcpy(&word, p, 8);
            all ^= word;
        }
    }
    const double end = seconds();
    return all == 1 ? -1.0 : end - start; /* the sum has to be wanted by somebody */
}

void pi_tiles_force(int least_wanted, float dense_share) {
    ffn_tiles_force(least_wanted);
    tile_force_dense_share(dense_share);
}

bool pi_tiles_available(void) {
    return tile_available();
}

/* ---- kernels.h, for Python ------------------------------------------------------------------------------------ */

const char *pi_kernel_level(void) {
    return kernel_level();
}

int pi_kernel_force(const char *name) {
    return kernel_force(name);
}

int pi_kernel_input_type(int type) {
    return kernel_input_type(type);
}

void pi_kernel_round_input(int type, int64_t n, const float *x, void *y) {
    kernel_round_input(type, n, x, y);
}

void pi_kernel_dequantize(int type, int64_t n, const void *x, float *y) {
    kernel_dequantize(type, n, x, y);
}

void pi_kernel_dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const void *xq, float *out) {
    kernel_dots(type, n, rows, n_rows, xq, out);
}

void pi_kernel_dots_inputs(int type, int64_t n, const uint8_t *row, const void *const *xqs, int n_x, float *out) {
    kernel_dots_inputs(type, n, row, xqs, n_x, out);
}

void pi_kernel_axpys(int type, int64_t n, const uint8_t *const *cols, const float *a, int n_cols, float *y, float *offsets,
                     float *tmp) {
    kernel_axpys(type, n, cols, a, n_cols, y, offsets, tmp);
}

void pi_kernel_finish_sums(int type, int64_t n, const float *offsets, float *y) {
    kernel_finish_sums(type, n, offsets, y);
}

void pi_kernel_axpys_scaled(int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, const float *a,
                            int n_cols, float *y) {
    kernel_axpys_scaled(n, cols, scales, a, n_cols, y);
}

/* The matrix in panels, to be freed; NULL where it cannot be. */
static uint8_t *packed(int type, int64_t n_in, int64_t n_out, const uint8_t *rows, size_t size, size_t cut) {
    const size_t bytes = panel_size(type, n_in, n_out, 1);
    uint8_t *panels = bytes == 0 ? NULL : aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    if (panels == NULL) return NULL;
    memset(panels, 0, bytes);
    for (size_t at = 0; at < size; at += cut) panel_write(type, n_in, panels, rows + at, at, cut < size - at ? cut : size - at);
    return panels;
}

int pi_panel_copy(int type, int64_t n_in, int64_t n_out, const uint8_t *rows, int64_t cut, uint8_t *copy) {
    const size_t size = abi_row_size(type, n_in) * (size_t)n_out, step = (size_t)cut;
    uint8_t *panels = cut < 1 ? NULL : packed(type, n_in, n_out, rows, size, step);
    if (panels == NULL) return -1;
    for (size_t at = (size - 1) / step * step;; at -= step) {
        panel_read(type, n_in, panels, copy + at, at, step < size - at ? step : size - at);
        if (at == 0) break;
    }
    free(panels);
    return 0;
}

int pi_panel_products(int type, int64_t n_in, int64_t n_out, const uint8_t *rows, const float *xs, int n_x, float *out,
                      int n_threads) {
    if (!panel_runs() || n_x < 1 || n_threads < 1) return -1;
    const size_t size = abi_row_size(type, n_in) * (size_t)n_out;
    uint8_t *panels = packed(type, n_in, n_out, rows, size, size);
    if (panels == NULL) return -1;
    uint8_t *scratch = malloc(panel_inputs_size(type, n_in, n_x));
    const float **inputs = malloc((size_t)n_x * sizeof *inputs);
    struct panel_product *products = malloc((size_t)n_x * sizeof *products);
    const bool enough = scratch != NULL && inputs != NULL && products != NULL;
    for (int i = 0; i < n_x && enough; i++) {
        inputs[i] = xs + i * n_in;
        products[i] = (struct panel_product){panels, i, out + i * n_out};
    }
    if (enough) panel_products(type, n_in, n_out, inputs, n_x, products, n_x, scratch, n_threads);
    free(products);
    free(inputs);
    free(scratch);
    free(panels);
    return enough ? 0 : -1;
}

int pi_attention_dots(const uint8_t *rows, int64_t stride, int64_t n, int64_t n_rows, const float *xs, int n_x, float *out) {
    const size_t size = (size_t)attention_stride(n);
    float *rounded = panel_runs() ? malloc((size_t)n_x * size * sizeof *rounded) : NULL;
    const float **x = malloc((size_t)n_x * sizeof *x);
    float **to = malloc((size_t)n_x * sizeof *to);
    const bool enough = rounded != NULL && x != NULL && to != NULL;
    for (int i = 0; i < n_x && enough; i++) {
        attention_round(n, xs + i * n, rounded + (size_t)i * size);
        x[i] = rounded + (size_t)i * size;
        to[i] = out + i * n_rows;
    }
    if (enough) attention_dots(rows, (size_t)stride, n, n_rows, x, n_x, to);
    free(to);
    free(x);
    free(rounded);
    return enough ? 0 : -1;
}

double pi_panel_seconds(int type, int64_t n_in, int64_t n_out, const void *panels, int n_threads) {
    if (!panel_runs() || panel_size(type, n_in, n_out, 1) == 0 || n_threads < 1) return -1.0;
    uint8_t *scratch = malloc(panel_inputs_size(type, n_in, 1));
    float *x = calloc((size_t)n_in, sizeof *x), *out = malloc((size_t)n_out * sizeof *out);
    double taken = -1.0;
    if (scratch != NULL && x != NULL && out != NULL) {
        const struct panel_product product = {panels, 0, out};
        const float *input = x;
        const double start = seconds();
        panel_products(type, n_in, n_out, &input, 1, &product, 1, scratch, n_threads);
        taken = seconds() - start;
    }
    free(out);
    free(x);
    free(scratch);
    return taken;
}

bool pi_panel_available(void) {
    return panel_available();
}
