/* ffn.h - evaluating FFN layers over neuron bundles.
 *
 * The unit of work is a row: one token, or in a mixture one (token, expert) pair. Rows of the same expert are
 * computed together in blocks, some neurons at a time, so that a bundle is read once for all rows of the block that
 * want it; many rows with many neurons in common go through tiles (ffn_tiles.h). Work is split over threads by neurons; each thread sums into its own accumulators, which are added up at the
 * end. For a given thread count the order of every sum is fixed, so results are reproducible bit for bit, and the same
 * whether bundles are all in memory or streamed through a store, whatever its size.
 *
 * Which neurons are computed is decided per row and neuron:
 *   exact      the deciding product g is given (stock computed it): g > 0, or |act(g)| >= threshold
 *   predicted  a predictor names them; g is then computed here, and skipped where it is not positive
 *   dense      all of them
 *
 * Stock rounds the input of down to the type that its dot product wants (8 bit for quantised weights). In exact mode we
 * round the activations in the same way, in the source's order and blocks: in itself neither is nearer to the truth, but
 * small differences flip expert routing, and the answer that users know is stock's. A predicted layer is not rounded. */
#ifndef POWERINFER_FFN_H
#define POWERINFER_FFN_H

#include "model.h"

enum { FFN_BLOCK_ROWS = 32 }; /* accumulators of a block: 32 rows x 4096 floats = 512 KiB, fits an L2 cache */

/* One row. Pointers may alias as ggml's allocator lets them: h may be g itself, out may lie over x, g or h;
 * ffn_sparse() orders its accesses accordingly. */
struct ffn_row {
    int expert;      /* 0 in a dense FFN */
    const float *x;  /* [n_embd] input of gate and up; NULL when only down is to be computed */
    const float *g;  /* [n_ff] the deciding product; when only down is to be computed: the activation itself; NULL when
                        a predictor selects (all rows alike) */
    float *h;        /* [n_ff] receives the activation, zeros included; NULL when only down is to be computed */
    float *out;      /* [n_embd] receives the FFN's output */
    int input;       /* for ffn_sparse() itself: where x is, rounded */
};

/* Memory that evaluations reuse; grows, never shrinks. Zero-initialise, one per backend instance. */
struct ffn_scratch {
    void *memory;
    size_t size;
};

/* At least size bytes, 64-byte aligned, contents undefined. NULL when there is no memory. */
void *ffn_scratch_reserve(struct ffn_scratch *scratch, size_t size);
void ffn_scratch_free(struct ffn_scratch *scratch);

enum ffn_result { FFN_OK = 0, FFN_NO_MEMORY = -1, FFN_READ_FAILED = -2 /* pi_model_error() says where */ };

/* Computes the rows; they are reordered (grouped by expert). rows[i].expert must be valid.
 * The rows themselves must not lie in scratch. Counts into counters. */
enum ffn_result ffn_sparse(const struct pi_layer *layer, struct ffn_row *rows, int n_rows, bool dense, int n_threads,
                           struct ffn_scratch *scratch, struct pi_counters *counters);

/* The bundle of neuron j, waited for where it is streamed; NULL, and *failed set, when its read failed. */
const uint8_t *ffn_bundle(const struct pi_layer *layer, int expert, int64_t j, atomic_int *failed);

/* The row of scales that neuron j shares with its neighbours in the source; only where down_type is I8. */
const uint16_t *ffn_scales(const struct pi_layer *layer, int expert, int64_t j);

/* y[0..n_embd) = the down column of neuron j (stored index) of an expert, whose bundle is in memory. */
void ffn_column(const struct pi_layer *layer, int expert, int64_t j, float *y);

/* Calls visit(unit, context) for every neuron of the layer in stored order, each when its bundle is in memory.
 * Returns FFN_OK or FFN_READ_FAILED. */
enum ffn_result ffn_each_bundle(const struct pi_layer *layer, void (*visit)(int64_t unit, void *context), void *context);

/* One product row of an ordinary matrix: out[j] = dot(weights + j * stride, xq), j < n_out. */
struct ffn_product {
    const uint8_t *weights;
    const void *xq;
    float *out;
};

/* Dense products, for graphs that do not match: n_in values per weight row of the given type. */
void ffn_dense(const struct ffn_product *products, int n_products, int type, int64_t n_in, int64_t n_out,
               size_t stride, int n_threads);

/* h = activation(g, u), elementwise over n values; h may be g or u. u NULL: ungated. */
void ffn_activate(enum pi_activation activation, int64_t n, const float *g, const float *u, float *h);

#endif
