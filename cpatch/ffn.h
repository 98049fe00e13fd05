/* ffn.h - evaluating FFN layers over neuron bundles.
 *
 * The unit of work is a row: one token, or in a mixture one (token, expert) pair. Rows of the same expert are
 * computed together in blocks, neuron by neuron, so that a bundle is read once for all rows of the block that want
 * it. Work is split over threads by neurons; each thread sums into its own accumulators, which are added up at the
 * end. For a given thread count the order of every sum is fixed, so results are reproducible bit for bit.
 *
 * Stock rounds the input of down to the type that its dot product wants (8 bit for quantised weights). We round the
 * activations in the same way, in the source's order and blocks: in itself neither is nearer to the truth, but small
 * differences flip expert routing, and the answer that users know is stock's. */
#ifndef POWERINFER_FFN_H
#define POWERINFER_FFN_H

#include "model.h"

enum { FFN_BLOCK_ROWS = 32 }; /* accumulators of a block: 32 rows x 4096 floats = 512 KiB, fits an L2 cache */

/* One row. Pointers may alias as ggml's allocator lets them: h may be g itself, out may lie over g, h or the input
 * of up; ffn_sparse() orders its accesses accordingly. */
struct ffn_row {
    int expert;      /* 0 in a dense FFN */
    const void *xq;  /* input of up, in the type its vec_dot wants; NULL when only down is computed */
    const float *g;  /* [n_ff] the deciding product; when only down is computed: the activation itself */
    float *h;        /* [n_ff] receives the activation, zeros included; NULL when only down is computed */
    float *out;      /* [n_embd] receives the FFN's output */
};

/* Memory that evaluations reuse; grows, never shrinks. Zero-initialise, one per backend instance. */
struct ffn_scratch {
    void *memory;
    size_t size;
};

/* At least size bytes, 64-byte aligned, contents undefined. NULL when there is no memory. */
void *ffn_scratch_reserve(struct ffn_scratch *scratch, size_t size);
void ffn_scratch_free(struct ffn_scratch *scratch);

/* Computes the rows; they are reordered (grouped by expert). rows[i].expert must be valid.
 * The rows' xq and the rows themselves must not lie in scratch.
 * Returns 0, or -1 when there is no memory. Counts into counters. */
int ffn_sparse(const struct pi_layer *layer, struct ffn_row *rows, int n_rows, bool dense, int n_threads,
               struct ffn_scratch *scratch, struct pi_counters *counters);

/* y[0..n_embd) = the down column of neuron j (stored index) of an expert. */
void ffn_column(const struct pi_layer *layer, int expert, int64_t j, float *y);

/* One product row of an ordinary matrix: out[j] = dot(weights + j * stride, xq), j < n_out. */
struct ffn_product {
    const uint8_t *weights;
    const void *xq;
    float *out;
};

/* Dense products, for graphs that do not match: n_in values per weight row of the given type. */
void ffn_dense(const struct ffn_product *products, int n_products, int type, int64_t n_in, int64_t n_out,
               size_t stride, int n_threads);

/* h = activation(g, u), elementwise over n values; h may be g or u. */
void ffn_activate(enum pi_activation activation, int64_t n, const float *g, const float *u, float *h);

#endif
