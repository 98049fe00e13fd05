/* ffn_tiles.h - FFN layers for many tokens: neurons by neurons, in tiles that meet all rows of an expert (tiles.h).
 *
 * For ffn.c, which selects neurons, brings bundles into memory wave by wave and calls the phases below in this order, each
 * by all threads, with a barrier in between. A result depends neither on waves nor on threads: every dot product is
 * computed whole, and every output is summed in the order of the stored neurons by one thread. */
#ifndef POWERINFER_FFN_TILES_H
#define POWERINFER_FFN_TILES_H

#include "ffn.h"

/* The rows of one expert. */
struct tile_rows {
    const struct pi_layer *layer;
    enum pi_activation activation;
    bool predicts, all;       /* as in ffn.c: the deciding product is computed here; every neuron is */
    int round_type;           /* what activations are rounded to first, in the source's order; F32: nothing */
    int expert, n_rows;
    struct ffn_row *rows;
    const uint8_t *wanted;    /* [n_rows][n_ff], and 64 bytes more */
    const uint8_t *some;      /* [n_ff] wanted by some row */
    const uint8_t *gate_inputs, *up_inputs; /* packed inputs, by ffn_row.input, */
    size_t input_size;        /* and their size */
    uint32_t *pairs;          /* [n_rows][ffn_tiles_pairs()] activations of two neurons each; cleared */
    float *sums;              /* [n_rows][ffn_tiles_outputs()] down's output, tile by tile; cleared */
    atomic_int *failed;       /* set when a bundle could not be read */
};

/* Units in memory now: those from lo to hi - 1. */
struct tile_wave {
    int64_t lo, hi;
    int thread, n_threads;
    void *memory;             /* ffn_tiles_memory() bytes, the thread's own, 64-byte aligned */
};

/* Can the layer be computed so, and would it be no less accurate than stock's own rounding? */
bool ffn_tiles_can(const struct pi_layer *layer);

int64_t ffn_tiles_pairs(const struct pi_layer *layer);
int64_t ffn_tiles_outputs(const struct pi_layer *layer);
size_t ffn_tiles_memory(const struct pi_layer *layer);

/* Zeroes the thread's share of pairs and sums. */
void ffn_tiles_clear(const struct tile_rows *t, int thread, int n_threads);

/* The activations of wanted neurons, into ffn_row.h (and pairs, where nothing is rounded first). Adds to the counts: of
 * activations that are not zero, and, where all are computed, of deciding products that are positive. */
void ffn_tiles_up(const struct tile_rows *t, const struct tile_wave *wave, uint64_t *fired, uint64_t *positive);

/* Rounds the rows' activations as stock does, into pairs. */
void ffn_tiles_round(const struct tile_rows *t, const struct tile_wave *wave);

/* Adds the columns of the wave's neurons to sums. */
void ffn_tiles_down(const struct tile_rows *t, const struct tile_wave *wave);

/* Copies sums to ffn_row.out. */
void ffn_tiles_write(const struct tile_rows *t, const struct tile_wave *wave);

/* How many rows must want a neuron, on average, for tiles to be faster: a neuron is unpacked once for all of them. n: from
 * now on, for tests; 0: the default; negative: always. */
int ffn_tiles_least_wanted(void);
void ffn_tiles_force(int n);

#endif
