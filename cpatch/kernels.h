/* kernels.h - the arithmetic on rows of weights: dot products with rows of gate and up, sums of columns of down.
 *
 * Rows are given as lists of pointers, because the neurons that fire lie scattered, in memory or in cache slots. A
 * kernel takes the whole list, so that it can fetch the next rows' cache lines while it computes, and keep
 * accumulators in registers over tiles of columns.
 *
 * Results do not depend on how a list is cut into calls, bit for bit: each dot product is a sum of its own, and every
 * element of y receives its terms in list order, one fused multiply-add each: of the factor with the weight, or, in
 * types of integers with scales, of factor times scale with the integer (the portable version rounds product and
 * sum); in types of 4 bits the integer may have a constant added, which is taken off in the end. Streaming relies on that.
 *
 * Where there are AVX-512's products of pairs of bfloat16 (level avx512bf16), factor times scale is rounded to bfloat16 for
 * the types of 4 bits (Q4_0, Q4_K, MXFP4): half the instructions, which is what bounds those sums. It moves each term by
 * at most 0.4 %, sums by 0.17 % (random data; tests/test_kernels.py bounds both), where stock's rounding of the factors to
 * 8 bits with shared scales moves them by 0.7 to 0.9 %. A pair is added as two multiply-adds, one after the other, so that it does
 * not matter who is paired with whom.
 *
 * Inputs of dot products are rounded once, to the type that ggml's own kernel for the weight type takes
 * (kernel_input_type), so that answers agree with stock llama.cpp. */
#ifndef POWERINFER_KERNELS_H
#define POWERINFER_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* out[k] = dot(rows[k], xq) for k < n_rows; n values per row, a multiple of the type's block. xq: kernel_input_type. */
void kernel_dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const void *xq, float *out);

/* out[i] = dot(row, xqs[i]) for i < n_x: one row, several tokens. */
void kernel_dots_inputs(int type, int64_t n, const uint8_t *row, const void *const *xqs, int n_x, float *out);

/* y[0..n) += a[0] * cols[0] + a[1] * cols[1] + ..., in this order, but for what is the same for 32 neighbours: that may be
 * added to offsets[0..n/32) instead, and y's elements may be kept in another order and scaled. A sum begins with zeros and
 * ends, after all calls, with kernel_finish_sums().
 * tmp: n floats of scratch. */
void kernel_axpys(int type, int64_t n, const uint8_t *const *cols, const float *a, int n_cols, float *y, float *offsets,
                  float *tmp);

/* Puts y in its order, and adds the offsets. */
void kernel_finish_sums(int type, int64_t n, const float *offsets, float *y);

/* The same for columns of integers with a row of half-precision scales each: a * scales[i] * col[i] (I8 in FORMAT.md). */
void kernel_axpys_scaled(int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, const float *a, int n_cols,
                         float *y);
void kernel_dequantize_scaled(int64_t n, const int8_t *x, const uint16_t *scales, float *y);

/* The type that inputs of dot products with rows of this type are rounded to; -1: no dot product for it. */
int kernel_input_type(int type);

/* y[0..n) = dequantised(x). Also for the types that only inputs of dot products have: Q8_1 and Q8_K. */
void kernel_dequantize(int type, int64_t n, const void *x, float *y);

/* Whether kernel_dequantize() knows the type. */
bool kernel_can_dequantize(int type);

/* y = x rounded to a type that dot products take (F32: a copy). */
void kernel_round_input(int type, int64_t n, const float *x, void *y);

/* y[0..n) += x[0..n) */
void kernel_add_f32(int64_t n, const float *x, float *y);

/* The instructions in use: avx512bf16, avx512vnni, avx512, avx2, neon or portable. Chosen at first use: the best, or what
 * the environment variable POWERINFER_KERNELS says. */
const char *kernel_level(void);

/* Uses another of them from now on, for tests and benchmarks; NULL: chosen anew. -1: this machine does not have it. */
int kernel_force(const char *name);

#endif
