/* kernels.h - the arithmetic on one neuron's segment.
 *
 * Dot products with up rows go through ggml's own vec_dot (as stock computes them, so results agree with stock);
 * what ggml has no kernel for is adding a scaled quantised column of down to an accumulator, which is here. */
#ifndef POWERINFER_KERNELS_H
#define POWERINFER_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

/* y[0..n) += a * dequantised(x). n is a multiple of the type's block. tmp: n floats of scratch. */
void kernel_axpy(int type, int64_t n, float a, const void *x, float *y, float *tmp);

/* y[i] += a * scales[i] * x[i]; y[i] = scales[i] * x[i]: columns of integers with a row of half-precision scales. */
void kernel_axpy_scaled(int64_t n, float a, const int8_t *x, const uint16_t *scales, float *y);
void kernel_dequantize_scaled(int64_t n, const int8_t *x, const uint16_t *scales, float *y);

/* y[0..n) = dequantised(x). Also for the types that only vec_dot operands have: Q8_1 and Q8_K. */
void kernel_dequantize(int type, int64_t n, const void *x, float *y);

/* Whether kernel_dequantize() knows the type. */
bool kernel_can_dequantize(int type);

/* y = x rounded to a type that vec_dot takes as its second operand (F32: a copy). */
void kernel_round_input(int type, int64_t n, const float *x, void *y);

/* y[0..n) += a * x[0..n) */
void kernel_axpy_f32(int64_t n, float a, const float *x, float *y);

/* y[0..n) += x[0..n) */
void kernel_add_f32(int64_t n, const float *x, float *y);

#endif
