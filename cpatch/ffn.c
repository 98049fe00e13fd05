/* ffn.c - see ffn.h. */
#define _GNU_SOURCE
#include "ffn.h"

#include "ffn_tiles.h"
#include "kernels.h"
#include "panels.h"
#include "tiles.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum {
    CHUNK = 8,         /* neurons a thread takes at a time: small, because hot neurons lie together */
    BATCH = 256,       /* neurons handed to a kernel at once: it fetches ahead within them */
    STREAM_BATCH = 64, /* the same where bundles are streamed, and the last of them may be waited for */
    TILE = 256,        /* neurons scanned at a time */
    SET_ROWS = 256,    /* rows computed together where bundles are streamed, and read once for all, or may be in tiles */
    MAX_INPUTS = 3     /* types that x is rounded to: for gate, up and the predictor */
};

/* Rows of one expert that are computed together, and the neurons that at least one of them wants. Each thread scans
 * its own range of neurons and lists what it found from the start of that range on; found[t] says how many. */
struct block {
    struct ffn_row *rows;
    int first;      /* index of the first row in the set: in accumulators, work.wanted, work.rounded */
    int n_rows;
    int turn;       /* which thread begins, so that they take turns with the longer share */
    int32_t *list;  /* [n_ff] */
    int32_t *found; /* [n_threads] */
    int64_t *wanted; /* [n_threads] how many (row, neuron) pairs those are */
    bool tiled;     /* computed with its neighbours, in one of work.tiles */
};

struct tally {
    uint64_t selected, fired, touched;
};

/* An evaluation: what all threads share. */
struct work {
    const struct pi_layer *layer;
    enum pi_activation activation;
    bool all;          /* compute every neuron */
    bool predicts;     /* a predictor selects, and the deciding product is computed here */
    int round_type;    /* what stock's dot product with down takes; ABI_TYPE_F32: no rounding */
    int n_threads;

    int n_inputs, input_type[MAX_INPUTS]; /* x, rounded to the types that are wanted */
    size_t input_size[MAX_INPUTS];
    uint8_t *inputs[MAX_INPUTS]; /* [rows][input_size], by ffn_row.input */
    uint8_t *tile_inputs[MAX_INPUTS]; /* the same, packed for tiles; NULL where nothing is computed in tiles */
    size_t tile_input_size;
    int gate_input, up_input, pred_input; /* which of the types */

    struct block *blocks; /* of the set that is being computed */
    int n_blocks, n_rows, set_rows, turn;
    size_t most_blocks;   /* of a set */
    bool can_tile;
    struct tile_rows *tiles; /* of this set: blocks of one expert that are computed in tiles (ffn_tiles.h) */
    int n_tiles;
    uint8_t *some;        /* [experts of a set][n_ff] neurons that tiles want */
    float *sums;          /* [set_rows][ffn_tiles_outputs()] */
    uint8_t *tile_memory; /* [threads][tile_memory_size] */
    size_t tile_memory_size;

    float *acc;           /* [threads][set_rows][acc_size] sums of columns, and from n_embd on their offsets */
    int64_t acc_size;
    float *tmp;           /* [threads][n_embd] one dequantised column */
    uint8_t *wanted;      /* [set_rows][n_ff] selected (row, neuron) pairs */
    float *rounded;       /* [set_rows][rounded_stride] activations as stock would round them, in the source's order; in */
    int64_t rounded_stride; /* tiles: pairs of activations */
    uint8_t *packed;      /* [threads][packed_size] one row of activations on its way through the rounding type */
    size_t packed_size;
    float *z;             /* [set_rows][rank] the predictor's hidden layer, */
    uint8_t *zq;          /* [set_rows][zq_size] and rounded */
    size_t zq_size;
    int32_t *late;        /* [threads][n_ff] neurons whose bundles were not there yet */

    struct store *store;  /* NULL: all bundles are in memory */
    uint8_t *marks;       /* [n_units] units that some row of the set wants */
    int32_t *units;       /* the same as a list */
    int64_t n_units;
    bool one_wave;        /* everything wanted is in memory at once */
    const struct pi_layer *next; /* whose neurons are read ahead; NULL: none are */
    float *next_z;        /* [rank of next] its predictor's hidden layer for this layer's input, */
    uint8_t *next_zq;     /* [threads][next_zq_size] and rounded */
    size_t next_zq_size;
    bool ahead;           /* reading ahead pays now */
    int64_t lo, hi, end;  /* the wave: units from lo to hi - 1; where it ends in the list */
    atomic_int failed;
};

void *ffn_scratch_reserve(struct ffn_scratch *scratch, size_t size) {
    if (size > scratch->size) {
        free(scratch->memory);
        scratch->size = 0;
        const size_t rounded = (size + (size_t)4095) & ~(size_t)4095;
        scratch->memory = aligned_alloc(4096, rounded);
        if (scratch->memory != NULL) scratch->size = rounded;
    }
    return scratch->memory;
}

void ffn_scratch_free(struct ffn_scratch *scratch) {
    free(scratch->memory);
    *scratch = (struct ffn_scratch){0};
}

static size_t round64(size_t size) {
    return (size + 63) & ~(size_t)63;
}

/* ---- activations ---------------------------------------------------------------------------------------------- */

static inline float relu(float v) {
    return v > 0.0f ? v : 0.0f;
}

/* act(g), what thresholds are compared with. */
static inline float activate_gate(enum pi_activation activation, float g) {
    switch (activation) {
    case PI_ACT_RELU2: return relu(g) * relu(g);
    case PI_ACT_SILU: return g / (1.0f + expf(-g));
    case PI_ACT_GELU: return 0.5f * g * (1.0f + tanhf(0.79788456080286535588f * g * (1.0f + 0.044715f * g * g)));
    default: return relu(g);
    }
}

static inline float activate(enum pi_activation activation, float g, float u) {
    const float a = activate_gate(activation, g);
    return activation == PI_ACT_DRELU ? a * relu(u) : a * u;
}

void ffn_activate(enum pi_activation activation, int64_t n, const float *g, const float *u, float *h) {
    for (int64_t i = 0; i < n; i++) h[i] = activate(activation, g[i], u != NULL ? u[i] : 1.0f);
}

/* ---- what belongs to a neuron --------------------------------------------------------------------------------- */

/* The source's number of the neuron stored as j; its rounded activation stands there in a row of work.rounded. */
static int64_t source_index(const struct pi_layer *layer, int expert, int64_t j) {
    return layer->order == NULL ? j : layer->order[pi_unit(layer, expert, j)];
}

const uint16_t *ffn_scales(const struct pi_layer *layer, int expert, int64_t j) {
    const int64_t groups = layer->spec.n_ff / PI_SCALE_GROUP;
    return layer->scales + (expert * groups + source_index(layer, expert, j) / PI_SCALE_GROUP) * layer->spec.n_embd;
}

void ffn_column(const struct pi_layer *layer, int expert, int64_t j, float *y) {
    const struct pi_layer_spec *spec = &layer->spec;
    const uint8_t *column = pi_bundle(layer, expert, j) + spec->down_offset;
    if (spec->down_type != ABI_TYPE_I8) kernel_dequantize(spec->down_type, spec->n_embd, column, y);
    else kernel_dequantize_scaled(spec->n_embd, (const int8_t *)column, ffn_scales(layer, expert, j), y);
}

const uint8_t *ffn_bundle(const struct pi_layer *layer, int expert, int64_t j, atomic_int *failed) {
    if (layer->store != NULL && store_wait(layer->store, (uint32_t)pi_unit(layer, expert, j)) != 0) {
        atomic_store_explicit(failed, 1, memory_order_relaxed);
        return NULL;
    }
    return pi_bundle(layer, expert, j);
}

/* ---- selecting ------------------------------------------------------------------------------------------------ */

static const void *input_of(const struct work *w, const struct ffn_row *row, int which) {
    return w->inputs[which] + (size_t)row->input * w->input_size[which];
}

/* A thread's share of a predictor's hidden layer for one x, rounded as pred_a takes it: z = relu(A x), or A x. */
static void hidden(const struct pi_layer *layer, const void *x, int thread, int n_threads, float *z) {
    const struct pi_layer_spec *spec = &layer->spec;
    const size_t row = abi_row_size(spec->pred_a_type, spec->n_embd);
    const int64_t begin = spec->rank * thread / n_threads, end = spec->rank * (thread + 1) / n_threads;
    for (int64_t i = begin; i < end; i += BATCH) {
        const uint8_t *rows[BATCH];
        const int n = (int)(end - i < BATCH ? end - i : BATCH);
        for (int k = 0; k < n; k++) rows[k] = layer->pred_a + (size_t)(i + k) * row;
        kernel_dots(spec->pred_a_type, spec->n_embd, rows, n, x, z + i);
        for (int k = 0; k < n && spec->predictor == PI_PREDICT_LOWRANK; k++) z[i + k] = relu(z[i + k]);
    }
}

/* The same for every row of the set. */
static void predict_hidden(struct work *w, int thread) {
    for (int r = 0; r < w->n_rows; r++) {
        hidden(w->layer, input_of(w, &w->blocks[0].rows[r], w->pred_input), thread, w->n_threads,
               w->z + r * w->layer->spec.rank);
    }
}

/* A hidden layer as pred_b takes it: bytes, and how it is made. */
static size_t rounded_size(const struct pi_layer *layer) {
    const struct pi_layer_spec *spec = &layer->spec;
    return round64(layer->pred_panels ? panel_inputs_size(spec->pred_b_type, spec->rank, 1)
                                      : abi_row_size(kernel_input_type(spec->pred_b_type), spec->rank));
}

static void round_hidden(const struct pi_layer *layer, const float *z, uint8_t *zq) {
    const struct pi_layer_spec *spec = &layer->spec;
    if (layer->pred_panels) panel_round(spec->pred_b_type, spec->rank, z, zq);
    else kernel_round_input(kernel_input_type(spec->pred_b_type), spec->rank, z, zq);
}

/* wanted[0..n) = does the layer's predictor select the neurons from j on, n <= TILE? input: as pred_b takes it. */
static void predict(const struct pi_layer *layer, const void *input, int32_t j, int n, uint8_t *wanted) {
    const struct pi_layer_spec *spec = &layer->spec;
    const int64_t n_in = pi_has_hidden(spec->predictor) ? spec->rank : spec->n_embd;
    float all[TILE + 2 * PANEL_ROWS], *scores = all;
    if (layer->pred_panels) {
        panel_rows(spec->pred_b_type, n_in, spec->n_ff, layer->pred_b, input, j / PANEL_ROWS,
                   (j + n + PANEL_ROWS - 1) / PANEL_ROWS, all);
        scores += j % PANEL_ROWS;
    } else {
        const size_t row = abi_row_size(spec->pred_b_type, n_in);
        const uint8_t *rows[TILE];
        for (int k = 0; k < n; k++) rows[k] = layer->pred_b + (size_t)(j + k) * row;
        kernel_dots(spec->pred_b_type, n_in, rows, n, input, scores);
    }
    for (int k = 0; k < n; k++) wanted[k] = scores[k] + layer->pred_bias[j + k] > 0.0f;
}

/* Row r's input of the predictor (a predicted layer has no experts, so the set's rows are in one sequence). */
static const void *predictor_input(const struct work *w, int r) {
    if (pi_has_hidden(w->layer->spec.predictor)) return w->zq + (size_t)r * w->zq_size;
    return input_of(w, &w->blocks[0].rows[r], w->pred_input);
}

/* Selects for one row among n neurons from j on, and settles the activations that are zero. In h, the deciding products
 * of the others stay as they are: up replaces them, also when h is g. Returns how many were selected; when all are to be
 * computed, how many would have been (predicted: up counts them, for no predictor is asked). */
static uint32_t select_row(const struct work *w, const struct block *block, int r, int32_t j, int n, uint8_t *wanted) {
    const struct ffn_row *row = &block->rows[r];
    const float *g = row->g != NULL ? row->g + j : NULL;
    float *h = row->h != NULL ? row->h + j : NULL;
    const float *threshold = w->layer->thresholds != NULL ? w->layer->thresholds + pi_unit(w->layer, row->expert, j) : NULL;
    uint32_t selected = 0;
    if (w->predicts) {
        if (w->all) memset(wanted, 0, (size_t)n);
        else predict(w->layer, predictor_input(w, block->first + r), j, n, wanted);
    } else if (h == NULL) {
        for (int k = 0; k < n; k++) wanted[k] = g[k] != 0.0f;
    } else if (threshold != NULL) {
        for (int k = 0; k < n; k++) wanted[k] = fabsf(activate_gate(w->activation, g[k])) >= threshold[k];
    } else {
        for (int k = 0; k < n; k++) wanted[k] = g[k] > 0.0f;
    }
    for (int k = 0; k < n; k++) selected += wanted[k];
    if (w->all) memset(wanted, 1, (size_t)n);
    for (int k = 0; k < n && h != NULL; k++) h[k] = wanted[k] && g != NULL ? g[k] : 0.0f;
    return selected;
}

/* Lists the neurons of [begin, end) that some row of the block wants. */
static int32_t scan(struct work *w, const struct block *block, int32_t begin, int32_t end, int64_t *pairs,
                    struct tally *tally) {
    int32_t *list = block->list + begin, found = 0;
    for (int32_t tile = begin; tile < end; tile += TILE) {
        const int n = end - tile < TILE ? end - tile : TILE;
        uint8_t some[TILE] = {0};
        for (int r = 0; r < block->n_rows; r++) {
            uint8_t *wanted = w->wanted + (int64_t)(block->first + r) * w->layer->spec.n_ff + tile;
            const uint32_t selected = select_row(w, block, r, tile, n, wanted);
            tally->selected += selected;
            *pairs += w->all ? (uint32_t)n : selected;
            for (int k = 0; k < n; k++) some[k] |= wanted[k];
        }
        for (int k = 0; k < n; k++) {
            list[found] = tile + k;
            found += some[k];
        }
    }
    if (w->marks != NULL) {
        for (int32_t i = 0; i < found; i++) w->marks[pi_unit(w->layer, block->rows[0].expert, list[i])] = 1;
    }
    tally->touched += (uint64_t)found;
    return found;
}

/* ---- computing ------------------------------------------------------------------------------------------------ */

/* The deciding product of neurons whose bundles are at rows, for one input, and what is left of the list: in exact mode g
 * is given (it waits in h); predicted, it is computed, and neurons that do not fire go. Returns how many are left. */
static int decide(const struct work *w, const struct ffn_row *row, int32_t *neurons, const uint8_t **bundles, int n,
                  float *g) {
    const struct pi_layer_spec *spec = &w->layer->spec;
    if (!w->predicts) {
        for (int k = 0; k < n; k++) g[k] = row->h[neurons[k]];
        return n;
    }
    const int64_t offset = spec->gated ? spec->gate_offset : spec->up_offset;
    const uint8_t *rows[BATCH];
    for (int k = 0; k < n; k++) rows[k] = bundles[k] + offset;
    kernel_dots(spec->gated ? spec->gate_type : spec->up_type, spec->n_embd, rows, n,
                input_of(w, row, spec->gated ? w->gate_input : w->up_input), g);
    int left = 0;
    for (int k = 0; k < n; k++) {
        if (!w->all && !(g[k] > 0.0f)) continue;
        neurons[left] = neurons[k];
        bundles[left] = bundles[k];
        g[left++] = g[k];
    }
    return left;
}

/* The activations of n neurons for one row. */
static void up_batch(const struct work *w, const struct ffn_row *row, const int32_t *batch, int n, struct tally *tally) {
    const struct pi_layer_spec *spec = &w->layer->spec;
    const uint8_t *bundles[BATCH], *rows[BATCH];
    int32_t neurons[BATCH];
    float g[BATCH], u[BATCH];
    for (int k = 0; k < n; k++) {
        neurons[k] = batch[k];
        bundles[k] = pi_bundle(w->layer, row->expert, batch[k]);
    }
    n = decide(w, row, neurons, bundles, n, g);
    for (int k = 0; k < n && w->all && w->predicts; k++) tally->selected += g[k] > 0.0f;
    if (spec->gated) {
        for (int k = 0; k < n; k++) rows[k] = bundles[k] + spec->up_offset;
        kernel_dots(spec->up_type, spec->n_embd, rows, n, input_of(w, row, w->up_input), u);
    }
    for (int k = 0; k < n; k++) {
        const float h = activate(w->activation, g[k], spec->gated ? u[k] : 1.0f);
        row->h[neurons[k]] = h;
        tally->fired += h != 0.0f;
    }
}

/* The activation that meets the column of neuron j: rounded as stock rounds it, or as it is. */
static float down_input(const struct work *w, const struct block *block, int r, int32_t j) {
    const struct ffn_row *row = &block->rows[r];
    if (w->predicts) return row->h[j];
    return w->rounded[(block->first + r) * w->rounded_stride + source_index(w->layer, row->expert, j)];
}

/* Adds the columns of n neurons, times their activations for row r of a block, to its accumulator. */
static void down_batch(const struct work *w, const struct block *block, int r, const int32_t *batch, int n, float *y,
                       float *tmp) {
    const struct pi_layer_spec *spec = &w->layer->spec;
    const int expert = block->rows[0].expert;
    const uint8_t *columns[BATCH];
    const uint16_t *scales[BATCH];
    float a[BATCH];
    int left = 0;
    for (int k = 0; k < n; k++) {
        a[left] = down_input(w, block, r, batch[k]);
        if (a[left] == 0.0f && !w->all) continue;
        columns[left] = pi_bundle(w->layer, expert, batch[k]) + spec->down_offset;
        if (spec->down_type == ABI_TYPE_I8) scales[left] = ffn_scales(w->layer, expert, batch[k]);
        left++;
    }
    if (spec->down_type == ABI_TYPE_I8) kernel_axpys_scaled(spec->n_embd, columns, scales, a, left, y);
    else kernel_axpys(spec->down_type, spec->n_embd, columns, a, left, y, y + spec->n_embd, tmp);
}

/* ---- passes over the lists ------------------------------------------------------------------------------------ */

enum pass { PASS_UP, PASS_DOWN, PASS_BOTH };

/* Row by row: the batch's bundles come from memory for the first of them, and stay in the cache for the others. */
static void run_batch(enum pass pass, struct work *w, const struct block *block, const int32_t *batch, int n, float *acc,
                      float *tmp, struct tally *tally) {
    for (int r = 0; r < block->n_rows; r++) {
        const uint8_t *wanted = w->wanted + (int64_t)(block->first + r) * w->layer->spec.n_ff;
        int32_t own[BATCH];
        int left = 0;
        for (int k = 0; k < n; k++) {
            own[left] = batch[k];
            left += wanted[batch[k]];
        }
        if (pass != PASS_DOWN) up_batch(w, &block->rows[r], own, left, tally);
        if (pass == PASS_UP) continue;
        down_batch(w, block, r, own, left, acc + (block->first + r) * w->acc_size, tmp);
    }
}

/* The batch as it is, or, where bundles are streamed, without those whose bundles are still on their way: they go to
 * the end of late. Returns what is left of n. */
static int split_late(struct work *w, int expert, int32_t *batch, int n, int32_t *late, int32_t *n_late) {
    int left = 0;
    for (int k = 0; k < n; k++) {
        if (store_ready(w->store, (uint32_t)pi_unit(w->layer, expert, batch[k]))) batch[left++] = batch[k];
        else late[(*n_late)++] = batch[k];
    }
    return left;
}

static bool wait_for(struct work *w, int expert, const int32_t *batch, int n) {
    for (int k = 0; k < n; k++) {
        if (ffn_bundle(w->layer, expert, batch[k], &w->failed) == NULL) return false;
    }
    return true;
}

static bool failed(const struct work *w) {
    return atomic_load_explicit(&w->failed, memory_order_relaxed) != 0;
}

/* Runs a batch of a block's neurons. Up goes ahead with what is there; down keeps the order, which fixes its sums. */
static void run_ready(enum pass pass, struct work *w, const struct block *block, int32_t *batch, int n, float *acc,
                      float *tmp, int32_t *late, int32_t *n_late, struct tally *tally) {
    const int expert = block->rows[0].expert;
    if (w->store != NULL) {
        (void)flash_progress(w->store->flash);
        if (pass == PASS_UP) n = split_late(w, expert, batch, n, late, n_late);
        else if (!wait_for(w, expert, batch, n)) return;
    }
    if (n > 0) run_batch(pass, w, block, batch, n, acc, tmp, tally);
}

/* One pass over the thread's chunks of all lists, as far as they are in the wave. Whose a chunk is does not depend on the
 * wave, and so sums do not. */
static void run_pass(enum pass pass, struct work *w, int thread, struct tally *tally) {
    const struct pi_layer *layer = w->layer;
    const int64_t n_embd = layer->spec.n_embd, n_ff = layer->spec.n_ff;
    float *acc = w->acc + thread * w->set_rows * w->acc_size, *tmp = w->tmp + thread * n_embd;
    int32_t *late = w->late + thread * n_ff;
    const int most = w->store != NULL ? STREAM_BATCH : BATCH;
    for (int b = 0; b < w->n_blocks && !failed(w); b++) {
        if (w->blocks[b].tiled) continue;
        const struct block *block = &w->blocks[b];
        int64_t chunk = block->turn;
        const int64_t base = pi_unit(layer, block->rows[0].expert, 0);
        int32_t batch[BATCH], n_late = 0;
        int n = 0;
        for (int t = 0; t < w->n_threads; t++) {
            const int32_t *list = block->list + n_ff * t / w->n_threads;
            for (int32_t k = 0; k < block->found[t]; k += CHUNK, chunk++) {
                if (chunk % w->n_threads != thread) continue;
                for (int32_t i = k; i < k + CHUNK && i < block->found[t]; i++) {
                    if (base + list[i] < w->lo || base + list[i] >= w->hi) continue;
                    batch[n++] = list[i];
                    if (n < most) continue;
                    run_ready(pass, w, block, batch, n, acc, tmp, late, &n_late, tally);
                    n = 0;
                }
            }
        }
        if (n > 0) run_ready(pass, w, block, batch, n, acc, tmp, late, &n_late, tally);
        for (int32_t k = 0; k < n_late && !failed(w); k += most) {
            n = n_late - k < most ? n_late - k : most;
            if (wait_for(w, block->rows[0].expert, late + k, n)) run_batch(pass, w, block, late + k, n, acc, tmp, tally);
        }
    }
}

/* ---- waves: as many neurons at a time as the store has room for ------------------------------------------------ */

/* Thread 0 only. What all blocks want, as one ascending list. */
static void list_units(struct work *w) {
    w->n_units = 0;
    if (w->marks != NULL) {
        const int64_t all = w->store->spec.n_units;
        for (int64_t u = 0; u < all; u++) {
            w->units[w->n_units] = (int32_t)u;
            w->n_units += w->marks[u];
        }
        memset(w->marks, 0, (size_t)all);
        return;
    }
    for (int b = 0; b < w->n_blocks; b++) { /* experts ascend, and each has one block */
        const int64_t base = pi_unit(w->layer, w->blocks[b].rows[0].expert, 0);
        for (int t = 0; t < w->n_threads; t++) {
            const int32_t *list = w->blocks[b].list + w->layer->spec.n_ff * t / w->n_threads;
            for (int32_t k = 0; k < w->blocks[b].found[t]; k++) w->units[w->n_units++] = (int32_t)(base + list[k]);
        }
    }
}

/* How far from unit `from` of the list on a wave reaches for which there is so much room in the store. */
static int64_t wave_end(const struct work *w, int64_t from, int64_t room) {
    int64_t end = from;
    while (end < w->n_units && room > 0) room -= store_takes_room(w->store, (uint32_t)w->units[end++]);
    return end;
}

/* Thread 0 only. Wants the units of the next wave, and of the one after it as far as there is room. */
static void begin_wave(struct work *w, int64_t from) {
    const int64_t room = store_room(w->store);
    int64_t end = wave_end(w, from, room), got = from;
    w->one_wave = from == 0 && end == w->n_units;
    w->ahead = w->one_wave && w->next != NULL && store_pays(w->next->store);
    if (!w->one_wave) end = wave_end(w, from, room > 1 ? room / 2 : 1); /* the other half is for reading ahead */
    store_begin(w->store);
    while (got < end && !failed(w)) {
        const int n = store_want(w->store, w->units + got, (int)(end - got), false);
        got += n;
        store_flush(w->store);
        if (got == end || flash_wait(w->store->flash, flash_generation(w->store->flash)) || n > 0) continue;
        /* Nothing is on its way, so slots are what is missing: an earlier evaluation that failed has left some that
         * seem to be needed. A new round forgets them; what this wave wanted so far is all there and is wanted again. */
        store_begin(w->store);
        got = from;
    }
    w->lo = w->units[from];
    w->hi = (int64_t)w->units[end - 1] + 1;
    w->end = end;
    if (end < w->n_units) {
        const int64_t next = wave_end(w, end, room / 2);
        (void)store_want(w->store, w->units + end, (int)(next - end), true);
        store_flush(w->store);
    }
}

/* ---- reading ahead --------------------------------------------------------------------------------------------- */

/* The layer whose neurons are worth reading ahead while this one's are computed: the next, if it is streamed and a
 * predictor says early what it wants. The input of one layer's FFN is nearly that of the next's (Deja Vu, arXiv
 * 2310.17157, 4.2). Of many rows nearly everything is wanted anyway. */
static const struct pi_layer *layer_to_read_ahead(const struct work *w, int n_rows) {
    const struct pi_model *model = w->layer->model;
    const struct pi_layer *next = w->layer + 1;
    if (!model->ahead || w->store == NULL || !w->predicts || w->all || n_rows > 1) return NULL;
    if (next == model->layers + model->n_layers || next->store == NULL || !pi_has_hidden(next->spec.predictor)) return NULL;
    const bool same_input = pi_has_hidden(w->layer->spec.predictor) && next->spec.n_embd == w->layer->spec.n_embd &&
                            kernel_input_type(next->spec.pred_a_type) == w->input_type[w->pred_input];
    return same_input ? next : NULL;
}

/* All threads. Wants, ahead of time, what the next layer's predictor selects for this layer's input. */
static void read_ahead(struct work *w, int thread) {
    const struct pi_layer *next = w->next;
    const int32_t n_ff = (int32_t)next->spec.n_ff;
    uint8_t *zq = w->next_zq + (size_t)thread * w->next_zq_size;
    hidden(next, input_of(w, &w->blocks[0].rows[0], w->pred_input), thread, w->n_threads, w->next_z);
#pragma omp barrier
    round_hidden(next, w->next_z, zq);
    for (int32_t tile = TILE * thread; tile < n_ff; tile += TILE * w->n_threads) {
        const int some = n_ff - tile < TILE ? n_ff - tile : TILE;
        int32_t units[TILE];
        uint8_t wanted[TILE];
        int n = 0, left = 0;
        for (int k = 0; k < some; k++) {
            units[n] = tile + k;
            n += !store_has(next->store, (uint32_t)(tile + k));
        }
        if (n == 0) continue; /* as where hot neurons lie */
        predict(next, zq, tile, some, wanted);
        for (int k = 0; k < n; k++) {
            if (wanted[units[k] - tile]) units[left++] = units[k];
        }
        if (left > 0) (void)store_want(next->store, units, left, true);
    }
    store_flush(next->store);
}

/* ---- tiles ----------------------------------------------------------------------------------------------------- */

static struct tile_wave tile_wave(const struct work *w, int thread) {
    return (struct tile_wave){w->lo, w->hi, thread, w->n_threads, w->tile_memory + (size_t)thread * w->tile_memory_size};
}

/* Thread 0 only. Decides which blocks are computed in tiles: neighbours of one expert, where unpacking a neuron pays. What
 * is chosen depends on the rows alone, because the two ways round differently. */
static void choose_tiles(struct work *w) {
    const struct pi_layer *layer = w->layer;
    const int64_t n_ff = layer->spec.n_ff;
    w->n_tiles = 0;
    for (int b = 0, end; w->can_tile && b < w->n_blocks; b = end) {
        const struct block *first = &w->blocks[b];
        int64_t wanted = 0;
        int n_rows = 0;
        for (end = b; end < w->n_blocks && w->blocks[end].rows[0].expert == first->rows[0].expert; end++) {
            for (int t = 0; t < w->n_threads; t++) wanted += w->blocks[end].wanted[t];
            n_rows += w->blocks[end].n_rows;
        }
        if (wanted < ffn_tiles_least_wanted() * n_ff) continue;
        uint8_t *some = w->some + w->n_tiles * n_ff;
        memset(some, 0, (size_t)n_ff);
        for (int i = b; i < end; i++) {
            w->blocks[i].tiled = true;
            for (int t = 0; t < w->n_threads; t++) {
                const int32_t *list = w->blocks[i].list + n_ff * t / w->n_threads;
                for (int32_t k = 0; k < w->blocks[i].found[t]; k++) some[list[k]] = 1;
            }
        }
        w->tiles[w->n_tiles++] = (struct tile_rows){
            .layer = layer,
            .activation = w->activation,
            .predicts = w->predicts,
            .all = w->all,
            .round_type = w->round_type,
            .expert = first->rows[0].expert,
            .n_rows = n_rows,
            .rows = first->rows,
            .wanted = w->wanted + first->first * n_ff,
            .some = some,
            .gate_inputs = w->tile_inputs[w->gate_input],
            .up_inputs = w->tile_inputs[w->up_input],
            .input_size = w->tile_input_size,
            .pairs = (uint32_t *)(w->rounded + first->first * w->rounded_stride),
            .sums = w->sums + first->first * ffn_tiles_outputs(layer),
            .failed = &w->failed,
        };
    }
}

/* A pass over what is computed in tiles. Both: down follows when all activations of the wave are there. */
static void run_tiles(enum pass pass, struct work *w, int thread, struct tally *tally) {
    const struct tile_wave wave = tile_wave(w, thread);
    for (int i = 0; i < w->n_tiles && pass != PASS_DOWN; i++) ffn_tiles_up(&w->tiles[i], &wave, &tally->fired, &tally->selected);
    if (pass == PASS_BOTH) {
#pragma omp barrier
    }
    for (int i = 0; i < w->n_tiles && pass != PASS_UP && !failed(w); i++) ffn_tiles_down(&w->tiles[i], &wave);
    if (pass == PASS_BOTH) {
#pragma omp barrier
    }
}

/* All threads. Runs a pass over everything that is wanted; again: an earlier pass has wanted it already. */
static void run_waves(enum pass pass, struct work *w, int thread, struct tally *tally, bool again) {
    const bool streams = w->store != NULL;
    if (!streams) w->lo = 0, w->hi = INT64_MAX;
    for (int64_t from = 0; !streams || from < w->n_units;) {
        if (streams && !(again && w->one_wave)) {
#pragma omp barrier
            if (thread == 0) begin_wave(w, from);
#pragma omp barrier
            if (w->ahead && from == 0) read_ahead(w, thread);
        }
        if (w->n_tiles > 0) run_tiles(pass, w, thread, tally);
        if (pass == PASS_BOTH && streams) { /* up runs ahead of what is missing; a thread's neurons are its own */
            run_pass(PASS_UP, w, thread, tally);
            run_pass(PASS_DOWN, w, thread, tally);
        } else {
            run_pass(pass, w, thread, tally);
        }
        if (!streams) return;
        from = w->end;
    }
}

/* ---- rounding and adding up ------------------------------------------------------------------------------------ */

/* Copies the thread's share of the set's activations to work.rounded, where they get the source's order. */
static void gather_activations(const struct work *w, int thread) {
    const struct pi_layer *layer = w->layer;
    const int64_t n_ff = layer->spec.n_ff, begin = n_ff * thread / w->n_threads, end = n_ff * (thread + 1) / w->n_threads;
    for (int b = 0; b < w->n_blocks; b++) {
        const struct block *block = &w->blocks[b];
        for (int r = 0; r < block->n_rows && !block->tiled; r++) {
            const float *h = block->rows[r].h != NULL ? block->rows[r].h : block->rows[r].g;
            float *to = w->rounded + (block->first + r) * w->rounded_stride;
            if (layer->order == NULL) {
                memcpy(to + begin, h + begin, (size_t)(end - begin) * sizeof(float));
            } else {
                for (int64_t j = begin; j < end; j++) to[source_index(layer, block->rows[r].expert, j)] = h[j];
            }
        }
    }
}

/* Rounds the thread's share of work.rounded in place, in whole blocks of the rounding type. */
static void round_activations(const struct work *w, int thread) {
    const int64_t unit = ggml.ggml_get_type_traits(w->round_type)->blck_size;
    const int64_t n_ff = w->layer->spec.n_ff, units = n_ff / unit;
    const int64_t begin = units * thread / w->n_threads * unit, n = units * (thread + 1) / w->n_threads * unit - begin;
    uint8_t *packed = w->packed + (size_t)thread * w->packed_size;
    for (int b = 0; b < w->n_blocks && n > 0; b++) {
        const struct block *block = &w->blocks[b];
        for (int r = block->first; r < block->first + block->n_rows && !block->tiled; r++) {
            float *values = w->rounded + r * w->rounded_stride + begin;
            kernel_round_input(w->round_type, n, values, packed);
            kernel_dequantize(w->round_type, n, packed, values);
        }
    }
}

/* All inputs have been read: now the outputs may be written, wherever they lie. The thread's share of the columns. */
static void write_outputs(const struct work *w, int thread) {
    const int64_t n_embd = w->layer->spec.n_embd;
    const int64_t first = n_embd * thread / w->n_threads, last = n_embd * (thread + 1) / w->n_threads;
    for (int b = 0; b < w->n_blocks; b++) {
        for (int r = 0; r < w->blocks[b].n_rows && !w->blocks[b].tiled; r++) {
            float *out = w->blocks[b].rows[r].out;
            const float *part = w->acc + (w->blocks[b].first + r) * w->acc_size;
            memcpy(out + first, part + first, (size_t)(last - first) * sizeof(float));
            for (int t = 1; t < w->n_threads; t++) {
                kernel_add_f32(last - first, part + t * w->set_rows * w->acc_size + first, out + first);
            }
        }
    }
}

/* One thread's part of a set of blocks; called by all threads of a team. */
static void run_set(struct work *w, int thread, struct tally *tally) {
    const int64_t n_embd = w->layer->spec.n_embd, n_ff = w->layer->spec.n_ff;
    const int32_t begin = (int32_t)(n_ff * thread / w->n_threads), end = (int32_t)(n_ff * (thread + 1) / w->n_threads);
    const bool up = w->blocks[0].rows[0].h != NULL;

    if (w->predicts && w->z != NULL && !w->all) {
        predict_hidden(w, thread);
#pragma omp barrier
        for (int r = thread; r < w->n_rows; r += w->n_threads)
            round_hidden(w->layer, w->z + r * w->layer->spec.rank, w->zq + (size_t)r * w->zq_size);
#pragma omp barrier
    }
    float *acc = w->acc + thread * w->set_rows * w->acc_size;
    memset(acc, 0, (size_t)(w->n_rows * w->acc_size) * sizeof *acc);
    for (int b = 0; b < w->n_blocks; b++) {
        w->blocks[b].wanted[thread] = 0;
        w->blocks[b].found[thread] = scan(w, &w->blocks[b], begin, end, &w->blocks[b].wanted[thread], tally);
    }
#pragma omp barrier
    if (w->store != NULL || w->can_tile) {
        if (thread == 0) choose_tiles(w);
        if (thread == 0 && w->store != NULL) list_units(w);
#pragma omp barrier
    }
    if (w->n_tiles > 0) {
        for (int i = 0; i < w->n_tiles; i++) ffn_tiles_clear(&w->tiles[i], thread, w->n_threads);
#pragma omp barrier
    }
    if (w->predicts) {
        run_waves(PASS_BOTH, w, thread, tally, false);
    } else {
        if (up) {
            run_waves(PASS_UP, w, thread, tally, false);
#pragma omp barrier
        }
        const struct tile_wave wave = tile_wave(w, thread);
        for (int i = 0; i < w->n_tiles; i++) ffn_tiles_round(&w->tiles[i], &wave);
        gather_activations(w, thread);
#pragma omp barrier
        if (w->round_type != ABI_TYPE_F32) {
            round_activations(w, thread);
#pragma omp barrier
        }
        run_waves(PASS_DOWN, w, thread, tally, up);
    }
    for (int r = 0; r < w->n_rows; r++, acc += w->acc_size) kernel_finish_sums(w->layer->spec.down_type, n_embd, acc + n_embd, acc);
#pragma omp barrier
    const struct tile_wave wave = tile_wave(w, thread);
    for (int i = 0; i < w->n_tiles; i++) ffn_tiles_write(&w->tiles[i], &wave);
    write_outputs(w, thread);
#pragma omp barrier
}

/* ---- the evaluation ------------------------------------------------------------------------------------------- */

static int by_expert(const void *a, const void *b) {
    const struct ffn_row *x = a, *y = b;
    if (x->expert != y->expert) return x->expert < y->expert ? -1 : 1;
    return x->out < y->out ? -1 : x->out > y->out; /* a fixed order: qsort is not stable */
}

/* What stock rounds the input of down to before its dot products; F32 (no rounding) for types we cannot read back. */
static int rounding_type(const struct pi_layer *layer) {
    const int type = ggml.ggml_get_type_traits_cpu(layer->spec.down_source_type)->vec_dot_type;
    const bool readable = kernel_can_dequantize(type) && abi_row_size(type, layer->spec.n_ff) > 0;
    return readable && ggml.ggml_get_type_traits_cpu(type)->from_float != NULL ? type : ABI_TYPE_F32;
}

/* The number of x's rounding to what dot products with rows of a type take; a new one if nobody wanted it yet. */
static int add_input(struct work *w, int weight_type) {
    const int type = kernel_input_type(weight_type);
    for (int i = 0; i < w->n_inputs; i++) {
        if (w->input_type[i] == type) return i;
    }
    w->input_type[w->n_inputs] = type;
    w->input_size[w->n_inputs] = round64(abi_row_size(type, w->layer->spec.n_embd));
    return w->n_inputs++;
}

static void *carve(uint8_t *memory, size_t *at, size_t size) {
    void *here = memory == NULL ? NULL : memory + *at;
    *at += round64(size);
    return here;
}

struct outputs {
    float *rows, **destinations; /* NULL unless there are several sets */
};

/* What only tiles need. */
static void lay_out_tiles(struct work *w, int n_rows, uint8_t *memory, size_t *at) {
    const struct pi_layer *layer = w->layer;
    const size_t rows = (size_t)w->set_rows, experts = (size_t)(layer->spec.n_expert == 0 ? 1 : layer->spec.n_expert);
    const size_t most = rows < experts ? rows : experts;
    w->tile_input_size = tile_input_size(layer->spec.n_embd);
    for (int i = 0; i < w->n_inputs; i++) w->tile_inputs[i] = carve(memory, at, (size_t)n_rows * w->tile_input_size);
    w->tiles = carve(memory, at, most * sizeof *w->tiles);
    w->some = carve(memory, at, most * (size_t)layer->spec.n_ff);
    w->sums = carve(memory, at, rows * (size_t)ffn_tiles_outputs(layer) * sizeof *w->sums);
    w->tile_memory_size = round64(ffn_tiles_memory(layer));
    w->tile_memory = carve(memory, at, (size_t)w->n_threads * w->tile_memory_size);
}

/* Lays the arrays out in memory, or, for NULL, only adds up their size, which is returned. */
static size_t lay_out(struct work *w, struct outputs *outputs, int n_rows, uint8_t *memory, int32_t **lists,
                      int32_t **founds, int64_t **wanted) {
    const struct pi_layer_spec *spec = &w->layer->spec;
    const size_t n_embd = (size_t)spec->n_embd, n_ff = (size_t)spec->n_ff, rows = (size_t)w->set_rows;
    const size_t threads = (size_t)w->n_threads;
    size_t at = 0;
    for (int i = 0; i < w->n_inputs; i++) w->inputs[i] = carve(memory, &at, (size_t)n_rows * w->input_size[i]);
    w->blocks = carve(memory, &at, rows * sizeof *w->blocks);
    w->acc_size = spec->n_embd + (spec->n_embd + 511) / 512 * 16;
    w->acc = carve(memory, &at, threads * rows * (size_t)w->acc_size * sizeof(float));
    w->tmp = carve(memory, &at, threads * n_embd * sizeof(float));
    w->wanted = carve(memory, &at, rows * n_ff + 64);
    w->rounded_stride = !w->predicts ? spec->n_ff : w->can_tile ? ffn_tiles_pairs(w->layer) : 0;
    w->rounded = carve(memory, &at, rows * (size_t)w->rounded_stride * sizeof(float));
    if (!w->predicts) {
        w->packed_size = round64(abi_row_size(w->round_type, spec->n_ff));
        w->packed = carve(memory, &at, threads * w->packed_size);
    }
    if (w->predicts && pi_has_hidden(spec->predictor)) {
        w->zq_size = rounded_size(w->layer);
        w->z = carve(memory, &at, rows * (size_t)spec->rank * sizeof(float));
        w->zq = carve(memory, &at, rows * w->zq_size);
    }
    if (w->next != NULL) {
        w->next_zq_size = rounded_size(w->next);
        w->next_z = carve(memory, &at, (size_t)w->next->spec.rank * sizeof(float));
        w->next_zq = carve(memory, &at, threads * w->next_zq_size);
    }
    *lists = carve(memory, &at, w->most_blocks * n_ff * sizeof(int32_t));
    *founds = carve(memory, &at, w->most_blocks * threads * sizeof(int32_t));
    *wanted = carve(memory, &at, w->most_blocks * threads * sizeof(int64_t));
    w->late = carve(memory, &at, threads * n_ff * sizeof(int32_t));
    if (w->store != NULL) {
        w->units = carve(memory, &at, w->store->spec.n_units * sizeof(int32_t));
        if (n_rows > FFN_BLOCK_ROWS) w->marks = carve(memory, &at, w->store->spec.n_units);
    }
    if (w->can_tile) lay_out_tiles(w, n_rows, memory, &at);
    if (n_rows > w->set_rows) {
        outputs->rows = carve(memory, &at, (size_t)n_rows * n_embd * sizeof(float));
        outputs->destinations = carve(memory, &at, (size_t)n_rows * sizeof(float *));
    }
    return at;
}

/* Forms the blocks of the next set, which begins at row `done`. Returns where it ends. Thread 0 only. A set is of whole
 * blocks, so that blocks, and with them the order of sums, do not depend on how large sets are. */
static int form_set(struct work *w, struct ffn_row *rows, int n_rows, int done, int32_t *lists, int32_t *founds,
                    int64_t *wanted) {
    w->n_blocks = w->n_rows = w->n_tiles = 0;
    while (done < n_rows) {
        int n = 1;
        while (n < FFN_BLOCK_ROWS && done + n < n_rows && rows[done + n].expert == rows[done].expert) n++;
        if (w->n_rows + n > w->set_rows) break;
        w->blocks[w->n_blocks] = (struct block){.rows = rows + done,
                                                .first = w->n_rows,
                                                .n_rows = n,
                                                .turn = w->turn++,
                                                .list = lists + (int64_t)w->n_blocks * w->layer->spec.n_ff,
                                                .found = founds + (int64_t)w->n_blocks * w->n_threads,
                                                .wanted = wanted + (int64_t)w->n_blocks * w->n_threads};
        w->n_blocks++;
        w->n_rows += n;
        done += n;
    }
    return done;
}

/* Rounds x once per token and type, and packs it for tiles. In a mixture a token's rows share their x, and come one after
 * the other. */
static void round_inputs(struct work *w, struct ffn_row *rows, int n_rows) {
    const struct pi_layer_spec *spec = &w->layer->spec;
    for (int r = 0; r < n_rows; r++) rows[r].input = r > 0 && rows[r].x == rows[r - 1].x ? rows[r - 1].input : r;
    for (int i = 0; i < w->n_inputs; i++) {
        const bool gate = spec->gate_name != NULL && i == w->gate_input, up = spec->up_name != NULL && i == w->up_input;
        const bool packs = w->can_tile && (gate || up);
#pragma omp parallel for num_threads(w->n_threads) if (n_rows > 8) schedule(static)
        for (int r = 0; r < n_rows; r++) {
            if (rows[r].input != r) continue;
            uint8_t *to = w->inputs[i] + (size_t)r * w->input_size[i];
            kernel_round_input(w->input_type[i], spec->n_embd, rows[r].x, to);
            if (packs) {
                tile_pack_input(gate ? spec->gate_type : spec->up_type, spec->n_embd, to,
                                w->tile_inputs[i] + (size_t)r * w->tile_input_size);
            }
        }
    }
}

static void start(struct work *w, const struct pi_layer *layer, const struct ffn_row *rows, int n_rows, bool dense,
                  int n_threads) {
    const struct pi_layer_spec *spec = &layer->spec;
    *w = (struct work){.layer = layer,
                       .activation = layer->model->activation,
                       .all = dense,
                       .predicts = rows[0].g == NULL,
                       .round_type = rounding_type(layer),
                       .n_threads = n_threads,
                       .store = layer->store};
    w->can_tile = n_rows >= ffn_tiles_least_wanted() && ffn_tiles_can(layer); /* no row wants a neuron more than once */
    const int most = w->store != NULL || w->can_tile ? SET_ROWS : FFN_BLOCK_ROWS;
    w->set_rows = n_rows < most ? n_rows : most;
    const int64_t n_experts = spec->n_expert == 0 ? 1 : spec->n_expert, full = w->set_rows / FFN_BLOCK_ROWS + 1;
    w->most_blocks = (size_t)(w->set_rows < n_experts + full ? w->set_rows : n_experts + full);
    if (rows[0].x == NULL) return;
    if (spec->gate_name != NULL) w->gate_input = add_input(w, spec->gate_type);
    if (spec->up_name != NULL) w->up_input = add_input(w, spec->up_type);
    if (pi_has_hidden(spec->predictor)) w->pred_input = add_input(w, spec->pred_a_type);
    if (spec->predictor == PI_PREDICT_DIRECT) w->pred_input = add_input(w, spec->pred_b_type);
    w->next = layer_to_read_ahead(w, n_rows);
}

/* ---- verifying a prediction ----------------------------------------------------------------------------------- */

struct check {
    const struct work *w;
    const struct ffn_row *row;
    const uint8_t *wanted; /* [n_ff] what the predictor selected for it */
    uint64_t fired, missed;
};

/* ffn_each_bundle()'s visitor: does neuron j fire, and was it missed? */
static void check_neuron(int64_t j, void *context) {
    struct check *check = context;
    const struct work *w = check->w;
    const struct pi_layer_spec *spec = &w->layer->spec;
    const uint8_t *own = pi_bundle(w->layer, 0, j);
    const uint8_t *deciding = own + (spec->gated ? spec->gate_offset : spec->up_offset), *up = own + spec->up_offset;
    float g, u = 1.0f;
    kernel_dots(spec->gated ? spec->gate_type : spec->up_type, spec->n_embd, &deciding, 1,
                input_of(w, check->row, spec->gated ? w->gate_input : w->up_input), &g);
    if (!(g > 0.0f)) return;
    if (spec->gated) kernel_dots(spec->up_type, spec->n_embd, &up, 1, input_of(w, check->row, w->up_input), &u);
    if (activate(w->activation, g, u) == 0.0f) return;
    check->fired++;
    check->missed += !check->wanted[j];
}

/* Looks at all neurons for one row of the set that was computed last, if it is this evaluation's turn: layers take turns,
 * so that a token does not pay for all of them, and so do the rows of a batch. */
static enum ffn_result verify(const struct work *w, struct pi_counters *counters) {
    const struct pi_layer *layer = w->layer;
    const uint32_t every = atomic_load_explicit(&layer->model->verify, memory_order_relaxed);
    const uint64_t turn = layer->counters[0].calls + layer->counters[1].calls + (uint64_t)(layer - layer->model->layers);
    if (every == 0 || !w->predicts || w->all || turn % every != 0) return FFN_OK;
    const int r = (int)(turn / every % (uint64_t)w->n_rows);
    struct check check = {
        .w = w, .row = &w->blocks[0].rows[r], .wanted = w->wanted + (int64_t)r * layer->spec.n_ff};
    const enum ffn_result result = ffn_each_bundle(layer, check_neuron, &check);
    if (result != FFN_OK) return result;
    counters->verified += 1;
    counters->true_fired += check.fired;
    counters->missed += check.missed;
    return FFN_OK;
}

enum ffn_result ffn_sparse(const struct pi_layer *layer, struct ffn_row *rows, int n_rows, bool dense, int n_threads,
                           struct ffn_scratch *scratch, struct pi_counters *counters) {
    const size_t n_embd = (size_t)layer->spec.n_embd;
    struct work work;
    struct outputs outputs = {0};
    int32_t *lists, *founds;
    int64_t *wanted;
    if (n_rows <= 0) return FFN_OK;
    start(&work, layer, rows, n_rows, dense, n_threads);
    uint8_t *memory = ffn_scratch_reserve(scratch, lay_out(&work, &outputs, n_rows, NULL, &lists, &founds, &wanted));
    if (memory == NULL) return FFN_NO_MEMORY;
    (void)lay_out(&work, &outputs, n_rows, memory, &lists, &founds, &wanted);
    if (work.marks != NULL) memset(work.marks, 0, layer->store->spec.n_units);
    if (work.n_inputs > 0) round_inputs(&work, rows, n_rows);
    if (layer->spec.n_expert > 0) qsort(rows, (size_t)n_rows, sizeof *rows, by_expert);
    /* Several sets would overwrite inputs of the later ones when an output lies over an input, so then outputs are
     * collected in scratch and copied at the very end. */
    for (int r = 0; r < n_rows && outputs.rows != NULL; r++) {
        outputs.destinations[r] = rows[r].out;
        rows[r].out = outputs.rows + (size_t)r * n_embd;
    }
    if (layer->store != NULL) pthread_mutex_lock(&layer->model->evaluating);
    uint64_t selected = 0, fired = 0, touched = 0;
    int done = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : selected, fired, touched)
    {
        const int thread = omp_get_thread_num();
        struct tally tally = {0};
        if (thread == 0) work.n_threads = omp_get_num_threads();
        for (bool more = true; more;) {
#pragma omp barrier
            if (thread == 0) done = form_set(&work, rows, n_rows, done, lists, founds, wanted);
#pragma omp barrier
            more = done < n_rows; /* before the next barrier, after which thread 0 goes on */
            run_set(&work, thread, &tally);
        }
        if (outputs.rows != NULL && !failed(&work)) {
#pragma omp for
            for (int r = 0; r < n_rows; r++) memcpy(outputs.destinations[r], rows[r].out, n_embd * sizeof(float));
        }
        selected += tally.selected;
        fired += tally.fired;
        touched += tally.touched;
    }
    if (layer->store != NULL) pthread_mutex_unlock(&layer->model->evaluating);
    if (failed(&work)) return FFN_READ_FAILED;
    const enum ffn_result verified = verify(&work, counters);
    if (verified != FFN_OK) return verified;
    const bool only_down = rows[0].h == NULL; /* its input decides, so what is selected has fired */
    counters->calls += 1;
    counters->rows += (uint64_t)n_rows;
    counters->neurons += (uint64_t)n_rows * (uint64_t)layer->spec.n_ff;
    counters->selected += selected;
    counters->fired += only_down ? selected : fired;
    counters->touched += touched;
    return FFN_OK;
}

/* ---- dense, for what does not match ---------------------------------------------------------------------------- */

enum ffn_result ffn_each_bundle(const struct pi_layer *layer, void (*visit)(int64_t unit, void *context), void *context) {
    struct store *store = layer->store;
    const int64_t n = layer->spec.n_ff * (layer->spec.n_expert == 0 ? 1 : layer->spec.n_expert);
    enum ffn_result result = FFN_OK;
    if (store == NULL) {
        for (int64_t u = 0; u < n; u++) visit(u, context);
        return result;
    }
    pthread_mutex_lock(&layer->model->evaluating);
    for (int32_t u = 0, end; u < n && result == FFN_OK; u = end) {
        int32_t units[STREAM_BATCH];
        store_begin(store);
        for (end = u; end < n && end < u + STREAM_BATCH; end++) {
            units[0] = end;
            if (store_want(store, units, 1, false) == 0) break;
        }
        store_flush(store);
        if (end == u && !flash_wait(store->flash, flash_generation(store->flash))) store_begin(store);
        for (int32_t i = u; i < end && result == FFN_OK; i++) {
            if (store_wait(store, (uint32_t)i) != 0) result = FFN_READ_FAILED;
            else visit(i, context);
        }
    }
    pthread_mutex_unlock(&layer->model->evaluating);
    return result;
}

void ffn_dense(const struct ffn_product *products, int n_products, int type, int64_t n_in, int64_t n_out,
               size_t stride, int n_threads) {
    const struct ggml_type_traits_cpu *traits = ggml.ggml_get_type_traits_cpu(type);
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t j = 0; j < n_out; j++) {
        for (int p = 0; p < n_products; p++) {
            traits->vec_dot((int)n_in, products[p].out + j, 0, products[p].weights + (size_t)j * stride, 0,
                            products[p].xq, 0, 1);
        }
    }
}

int pi_ffn(struct pi_model *model, int i, int n_rows, const int32_t *expert, const float *x, const float *g, float *h,
           float *out, int n_threads) {
    if (i < 0 || i >= model->n_layers || n_rows <= 0 || n_threads < 1) return -1;
    struct pi_layer *layer = &model->layers[i];
    const struct pi_layer_spec *spec = &layer->spec;
    const bool up = spec->up_name != NULL, predicts = spec->predictor != PI_PREDICT_NONE;
    if (up != (x != NULL) || up != (h != NULL) || predicts == (g != NULL) || (expert != NULL) != (spec->n_expert > 0))
        return -1;
    struct ffn_scratch work = {0};
    struct ffn_row *rows = calloc((size_t)n_rows, sizeof *rows);
    int result = rows == NULL ? -1 : 0;
    for (int r = 0; r < n_rows && result == 0; r++) {
        rows[r] = (struct ffn_row){.expert = expert != NULL ? expert[r] : 0,
                                   .x = up ? x + r * spec->n_embd : NULL,
                                   .g = g != NULL ? g + r * spec->n_ff : NULL,
                                   .h = up ? h + r * spec->n_ff : NULL,
                                   .out = out + r * spec->n_embd};
        if (rows[r].expert < 0 || (expert != NULL && rows[r].expert >= spec->n_expert)) result = -1;
    }
    if (result == 0) {
        result = ffn_sparse(layer, rows, n_rows, atomic_load(&model->dense), n_threads, &work,
                            &layer->counters[n_rows > 1]) == FFN_OK
                     ? 0
                     : -1;
    }
    ffn_scratch_free(&work);
    free(rows);
    return result;
}
