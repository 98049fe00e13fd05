/* attention.h - a token's products with its context: of queries with keys, and of attention's weights with values.
 *
 * Keys and values are rows of the cache, F16, a few hundred bytes each; stock multiplies them one by one, with a call and
 * a sum over a vector's lanes for each, which takes longer than the reading. Here 16 products are made at once, of 4 rows with
 * the x of 4 heads that share them or of 16 rows with one, and their 16 vectors of sums become one. Bits depend on the row
 * and on x alone. Needs the instructions of panel_runs(). */
#ifndef POWERINFER_ATTENTION_H
#define POWERINFER_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* Rounds n values to F16, as ggml does with what meets F16 rows, and back; up to attention_stride(n) there are zeros. */
void attention_round(int64_t n, const float *x, float *rounded);
int64_t attention_stride(int64_t n);

/* out[x][j] = dot(row j, xs[x]), 0 <= j < n_rows, for n_x inputs, four of which share what is loaded. Rows of n F16 values begin
 * `stride` bytes after each other; xs: attention_round(). */
void attention_dots(const uint8_t *rows, size_t stride, int64_t n, int64_t n_rows, const float *const *xs, int n_x,
                    float *const *out);

#endif
