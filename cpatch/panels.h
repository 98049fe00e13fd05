/* panels.h - matrices that are multiplied whole (attention, the deciding product, the head): kept in memory in a layout of
 * our own, so that few instructions go into a weight and memory's bandwidth is what bounds a token.
 *
 * A panel is 16 rows of a matrix of quantised weights. Its bytes are those of the rows, in another order: of their first
 * blocks, then of their second ones, and so on; of each field of a block (panel_field in panels.c) chunks of a few bytes, in
 * turn from every row. So a vector of 64 bytes has 4 bytes of every row, and its 16 lanes sum up the 16 dot products.
 *
 * A product is the sum, in the order of the row's blocks, of a block's exact integer dot product times its scales, one
 * multiply-add each. It depends neither on threads nor on which products are computed together. Inputs are rounded as ggml
 * rounds them for the type. All needs AVX-512 with VNNI. */
#ifndef POWERINFER_PANELS_H
#define POWERINFER_PANELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PANEL_ROWS = 16 };

/* Are the instructions there and in use (kernel_force)? */
bool panel_runs(void);

/* Are they better than stock's own kernels? Not where stock has AMX. */
bool panel_available(void);

/* Bytes of a matrix of n_out rows (of each of n_expert experts, else 1) of n_in values; 0: it cannot be kept so. The last
 * panel may be filled up with rows of zeros. */
size_t panel_size(int type, int64_t n_in, int64_t n_out, int64_t n_expert);

/* Copies bytes [offset, offset + size) of the matrix, rows of n_in values one after the other, to where they belong in
 * `panels`; and back. Threads may write side by side, but not parts of the same block. */
void panel_write(int type, int64_t n_in, uint8_t *panels, const uint8_t *data, size_t offset, size_t size);
void panel_read(int type, int64_t n_in, const uint8_t *panels, uint8_t *data, size_t offset, size_t size);

/* One row of a result: out[j] = dot(row j of the matrix, xs[input]), j < n_out. */
struct panel_product {
    const uint8_t *panels; /* of one expert */
    int input;
    float *out;
};

/* Bytes of scratch for panel_products(). */
size_t panel_inputs_size(int type, int64_t n_in, int n_inputs);

/* Computes n products of n_inputs inputs of n_in values each. Those with the same matrix should follow each other. scratch:
 * panel_inputs_size() bytes. */
void panel_products(int type, int64_t n_in, int64_t n_out, const float *const *xs, int n_inputs,
                    const struct panel_product *products, int n, uint8_t *scratch, int n_threads);

/* The same for one input and some of the panels, by the calling thread: rounds x to panel_inputs_size(type, n_in, 1) bytes;
 * out[0] and on are the products with the rows of panels lo to hi - 1, as far as the matrix has them. */
void panel_round(int type, int64_t n_in, const float *x, uint8_t *rounded);
void panel_rows(int type, int64_t n_in, int64_t n_out, const uint8_t *panels, const uint8_t *rounded, int64_t lo, int64_t hi,
                float *out);

#endif
