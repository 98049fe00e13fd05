/* slab.h - matrices in stock's layout that are streamed from flash: the experts of a mixture, read at their offsets in an
 * unconverted GGUF, and tiles of rows of dense matrices.
 *
 * A slab is one tensor, its units are experts or tiles (store.h). Products with it are computed node by node, as the graph
 * has them, so any activation, bias or scale between them is stock's business. What a node wants is computed in the order
 * in which it arrives: every output is a dot product of its own, so order changes no bit.
 *
 * The slabs of a layer that share their routing (gate, up, down) are a group: the first node of a group has the others'
 * experts read too, while it computes. */
#ifndef POWERINFER_SLAB_H
#define POWERINFER_SLAB_H

#include "ffn.h"

struct pi_slab {
    struct pi_model *model;
    struct pi_slab_spec spec; /* name is copied into the array below */
    char name[ABI_MAX_NAME];
    size_t row_size;      /* bytes of one row of n_in values */
    int64_t unit_rows;    /* rows of a unit */
    struct store *store;  /* NULL for a router */
    uint8_t *data;        /* routers: the matrix, */
    float *norm;          /* and the scale of its input, or NULL */
    uint64_t passes;      /* how many nodes were computed with it: tells which of a group are still to come */
    struct pi_weight weight;
};

/* Checks a spec against the types and the files and opens its store. 0, or -1 with a sentence. */
int slab_init(struct pi_slab *slab, struct pi_model *model, const struct pi_slab_spec *spec, char *err, size_t err_len);

/* Routers: reads the matrix. 0, or -1 with a sentence. */
int slab_read(struct pi_slab *slab, int fd, char *err, size_t err_len);
void slab_free(struct pi_slab *slab);

/* Starts the reads that a router's products for a few tokens ask for: of the experts that its layer will use, and of those
 * that the next layer's router would choose for the same input, which changes little from layer to layer. x: [n_in] input,
 * logits: [n_out]. scratch: at least 2 x n_out + n_in floats. */
void slab_route(struct pi_slab *router, const float *x, const float *logits, float *scratch);

/* One row of the product: out[j] = dot(row j of the expert's matrix, xq), j < n_out. */
struct slab_row {
    int expert; /* 0 for a dense matrix */
    const void *xq;
    float *out;
};

/* Computes the rows, which are reordered. They must not lie in scratch. */
enum ffn_result slab_product(struct pi_slab *slab, struct slab_row *rows, int n_rows, int n_threads,
                             struct ffn_scratch *scratch);

/* out[i] = row ids[i] as floats, i < n: an embedding. */
enum ffn_result slab_get_rows(struct pi_slab *slab, const int32_t *ids, int n, float *const *out);

/* Copies the whole matrix, row by row as in the file, reading what is not in memory. */
enum ffn_result slab_copy(struct pi_slab *slab, uint8_t *dst);

#endif
