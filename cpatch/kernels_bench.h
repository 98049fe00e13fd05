/* kernels_bench.h - kernels.h as Python sees it, and timing: for tests/test_kernels.py and bench/kernels.py. */
#ifndef POWERINFER_KERNELS_BENCH_H
#define POWERINFER_KERNELS_BENCH_H

#include <stdbool.h>
#include <stdint.h>

/* kernels.h, as it is: see there. */
const char *pi_kernel_level(void);
int pi_kernel_force(const char *name);
int pi_kernel_input_type(int type);
void pi_kernel_round_input(int type, int64_t n, const float *x, void *y);
void pi_kernel_dequantize(int type, int64_t n, const void *x, float *y);
void pi_kernel_dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const void *xq, float *out);
void pi_kernel_dots_inputs(int type, int64_t n, const uint8_t *row, const void *const *xqs, int n_x, float *out);
void pi_kernel_axpys(int type, int64_t n, const uint8_t *const *cols, const float *a, int n_cols, float *y, float *offsets,
                     float *tmp);
void pi_kernel_finish_sums(int type, int64_t n, const float *offsets, float *y);
void pi_kernel_axpys_scaled(int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, const float *a,
                            int n_cols, float *y);

/* Tiles (ffn_tiles.h, tiles.h), for tests: how many rows must want a neuron on average for them to be used, 0 for
 * the default, negative for always; and the share from which their dense forms are: 0 always, 2 never, negative as measured. */
void pi_tiles_force(int least_wanted, float dense_share);
bool pi_tiles_available(void);

/* Panels (panels.h): out[i * n_out + j] = dot(row j, xs + i * n_in), for a matrix of n_out rows in ggml's layout. 0, or -1: it
 * cannot be kept so, this machine has not the instructions, or out of memory. */
int pi_panel_products(int type, int64_t n_in, int64_t n_out, const uint8_t *rows, const float *xs, int n_x, float *out,
                      int n_threads);
/* Writes rows into panels, `cut` bytes at a time, and reads them back from the last piece to the first. 0 or -1. */
int pi_panel_copy(int type, int64_t n_in, int64_t n_out, const uint8_t *rows, int64_t cut, uint8_t *copy);

/* Attention (attention.h): out[i][j] = dot(row j, x[i]) for n_x inputs, rows of n F16 values that begin `stride` bytes after
 * each other. 0, or -1: this machine has not the instructions, or out of memory. */
int pi_attention_dots(const uint8_t *rows, int64_t stride, int64_t n, int64_t n_rows, const float *xs, int n_x, float *out);

enum pi_kernel_op { PI_KERNEL_DOTS = 0, PI_KERNEL_AXPYS = 1, PI_KERNEL_READS = 2 /* computes nothing */ };

/* What is timed: rows of n weights of a ggml type (I8: the columns with scales), stride bytes apart in buffer. */
struct pi_kernel_job {
    int op, type;
    int64_t n, stride;
    const void *buffer;
    const void *input;  /* of dot products: n values of pi_kernel_input_type() */
    const void *scales; /* I8: n halves for every 32 rows */
};

/* Seconds that n_threads need for the rows listed, each thread its share of the list; -1.0: out of memory. */
double pi_kernel_seconds(const struct pi_kernel_job *job, const int32_t *rows, int n_rows, int n_threads);

/* Seconds that n_threads need for the product of one input with a matrix of n_out rows in panels; -1.0: out of memory, or
 * pi_panel_products() would not do it. */
double pi_panel_seconds(int type, int64_t n_in, int64_t n_out, const void *panels, int n_threads);

/* Whether matrices that stay in memory become panels on this machine. */
bool pi_panel_available(void);

/* Seconds that n_threads need to read size bytes, each its part, from one end to the other. */
double pi_read_seconds(const void *buffer, int64_t size, int n_threads);

#endif
