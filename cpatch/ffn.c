/* ffn.c - see ffn.h. */
#define _GNU_SOURCE
#include "ffn.h"

#include "kernels.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum {
    CHUNK = 8, /* neurons a thread takes at a time: small, because hot neurons lie together */
    TILE = 256 /* neurons scanned at a time */
};

/* Rows of one expert that are computed together, and the neurons that at least one of them wants. Each thread scans
 * its own range of neurons and lists what it found from the start of that range on; found[t] says how many. */
struct block {
    struct ffn_row *rows;
    int n_rows;
    int acc_row; /* index of the first row in the accumulators and in work.rounded */
    int32_t *list; /* [n_ff] */
    int32_t *found; /* [n_threads] */
};

struct tally {
    uint64_t selected, fired, touched;
};

/* Scratch memory of one set of blocks, shared by the threads. */
struct work {
    int n_rows;         /* rows of accumulators per thread */
    float *acc;         /* [threads][n_rows][n_embd] */
    float *tmp;         /* [threads][n_embd] one dequantised column */
    float *rounded;     /* [n_rows][n_ff] activations as stock would round them, in the source's order */
    uint8_t *packed;    /* [threads][packed_size] one row of activations on its way through the rounding type */
    size_t packed_size;
    int round_type;     /* what stock's dot product with down takes; ABI_TYPE_F32: no rounding */
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

static inline float activate(enum pi_activation activation, float g, float u) {
    const float r = g > 0.0f ? g : 0.0f;
    switch (activation) {
    case PI_ACT_RELU2: return r * r * u;
    case PI_ACT_DRELU: return r * (u > 0.0f ? u : 0.0f);
    default: return r * u;
    }
}

void ffn_activate(enum pi_activation activation, int64_t n, const float *g, const float *u, float *h) {
    for (int64_t i = 0; i < n; i++) h[i] = activate(activation, g[i], u[i]);
}

static int by_expert(const void *a, const void *b) {
    const struct ffn_row *x = a, *y = b;
    if (x->expert != y->expert) return x->expert < y->expert ? -1 : 1;
    return x->out < y->out ? -1 : x->out > y->out; /* a fixed order: qsort is not stable */
}

/* When only down is computed: its input decides, so what is selected has fired. */
static void count_nonzero(const struct block *block, int32_t begin, int32_t end, struct tally *tally) {
    for (int r = 0; r < block->n_rows; r++) {
        uint64_t n = 0;
        for (int32_t j = begin; j < end; j++) n += block->rows[r].g[j] != 0.0f;
        tally->selected += n;
        tally->fired += n;
    }
}

/* Lists the neurons of [begin, end) that some row of the block wants, and settles the activations that are zero.
 * In h, g's positive values are kept as they are: compute_up() replaces them, also when h is g. */
static int32_t scan(const struct block *block, int32_t begin, int32_t end, bool all, int32_t *list) {
    int32_t n = 0;
    for (int32_t tile = begin; tile < end; tile += TILE) {
        const int32_t size = end - tile < TILE ? end - tile : TILE;
        uint8_t wanted[TILE] = {0};
        for (int r = 0; r < block->n_rows && !all; r++) {
            const float *g = block->rows[r].g + tile;
            float *h = block->rows[r].h;
            if (h != NULL) {
                h += tile;
                for (int32_t j = 0; j < size; j++) {
                    const float v = g[j];
                    wanted[j] |= v > 0.0f;
                    h[j] = v > 0.0f ? v : 0.0f;
                }
            } else {
                for (int32_t j = 0; j < size; j++) wanted[j] |= g[j] != 0.0f;
            }
        }
        for (int32_t j = 0; j < size; j++) {
            list[n] = tile + j;
            n += all || wanted[j];
        }
    }
    return n;
}

static const uint8_t *bundle_of(const struct pi_layer *layer, int expert, int64_t j) {
    return layer->data + (expert * layer->spec.n_ff + j) * layer->spec.stride;
}

/* The source's number of the neuron stored as j; its rounded activation stands there in a row of work.rounded. */
static int64_t source_index(const struct pi_layer *layer, int expert, int64_t j) {
    return layer->order == NULL ? j : layer->order[expert * layer->spec.n_ff + j];
}

/* The row of scales that neuron j shares with its neighbours in the source; only where down_type is I8. */
static const uint16_t *scales_of(const struct pi_layer *layer, int expert, int64_t j) {
    const int64_t groups = layer->spec.n_ff / PI_SCALE_GROUP;
    return layer->scales + (expert * groups + source_index(layer, expert, j) / PI_SCALE_GROUP) * layer->spec.n_embd;
}

void ffn_column(const struct pi_layer *layer, int expert, int64_t j, float *y) {
    const struct pi_layer_spec *spec = &layer->spec;
    const uint8_t *column = bundle_of(layer, expert, j) + spec->down_offset;
    if (spec->down_type != ABI_TYPE_I8) kernel_dequantize(spec->down_type, spec->n_embd, column, y);
    else kernel_dequantize_scaled(spec->n_embd, (const int8_t *)column, scales_of(layer, expert, j), y);
}

/* y += a * the column of neuron j. */
static void add_column(const struct pi_layer *layer, int expert, int64_t j, float a, float *y, float *tmp) {
    const struct pi_layer_spec *spec = &layer->spec;
    const uint8_t *column = bundle_of(layer, expert, j) + spec->down_offset;
    if (spec->down_type != ABI_TYPE_I8) {
        kernel_axpys(spec->down_type, spec->n_embd, &column, &a, 1, y, tmp);
    } else {
        const uint16_t *scales = scales_of(layer, expert, j);
        kernel_axpys_scaled(spec->n_embd, &column, &scales, &a, 1, y);
    }
}

/* The activation of neuron j for all rows of the block that want it. */
static void compute_up(const struct pi_layer *layer, const struct block *block, int32_t j, bool all,
                       const struct ggml_type_traits_cpu *up, struct tally *tally) {
    const uint8_t *row = bundle_of(layer, block->rows[0].expert, j) + layer->spec.up_offset;
    for (int r = 0; r < block->n_rows; r++) {
        const float g = block->rows[r].g[j];
        if (!all && !(g > 0.0f)) continue;
        float u;
        up->vec_dot((int)layer->spec.n_embd, &u, 0, row, 0, block->rows[r].xq, 0, 1);
        const float h = activate(layer->model->activation, g, u);
        block->rows[r].h[j] = h;
        tally->selected += g > 0.0f;
        tally->fired += h != 0.0f;
    }
}

/* Adds neuron j's column, times its activation, to the accumulators of the block's rows. */
static void compute_down(const struct pi_layer *layer, const struct block *block, int32_t j, bool all,
                         const struct work *w, float *acc, float *tmp) {
    const int64_t n_embd = layer->spec.n_embd;
    const int expert = block->rows[0].expert;
    const float *h = w->rounded + block->acc_row * layer->spec.n_ff + source_index(layer, expert, j);
    float *y = acc + block->acc_row * n_embd;
    if (block->n_rows == 1) {
        if (*h != 0.0f || all) add_column(layer, expert, j, *h, y, tmp);
        return;
    }
    float *ys[FFN_BLOCK_ROWS], a[FFN_BLOCK_ROWS];
    int n = 0;
    for (int r = 0; r < block->n_rows; r++, h += layer->spec.n_ff, y += n_embd) {
        if (*h == 0.0f && !all) continue;
        a[n] = *h;
        ys[n++] = y;
    }
    const uint8_t *column = bundle_of(layer, expert, j) + layer->spec.down_offset;
    if (n == 0) return;
    if (layer->spec.down_type != ABI_TYPE_I8) {
        kernel_axpys_outputs(layer->spec.down_type, n_embd, column, a, ys, n, tmp);
    } else {
        kernel_axpys_outputs_scaled(n_embd, column, scales_of(layer, expert, j), a, ys, n, tmp);
    }
}

/* Copies the thread's share of the block's activations to work.rounded, where they get the source's order. */
static void gather_activations(const struct pi_layer *layer, const struct block *block, const struct work *w,
                               int32_t begin, int32_t end) {
    for (int r = 0; r < block->n_rows; r++) {
        const float *h = block->rows[r].h != NULL ? block->rows[r].h : block->rows[r].g;
        float *to = w->rounded + (int64_t)(block->acc_row + r) * layer->spec.n_ff;
        if (layer->order == NULL) {
            memcpy(to + begin, h + begin, (size_t)(end - begin) * sizeof(float));
        } else {
            for (int32_t j = begin; j < end; j++) to[source_index(layer, block->rows[r].expert, j)] = h[j];
        }
    }
}

/* Rounds the thread's share of work.rounded in place, in whole blocks of the rounding type. */
static void round_activations(const struct pi_layer *layer, const struct work *w, int n_rows, int thread,
                              int n_threads) {
    const int64_t unit = ggml.ggml_get_type_traits(w->round_type)->blck_size;
    const int64_t units = layer->spec.n_ff / unit;
    const int64_t begin = units * thread / n_threads * unit, n = units * (thread + 1) / n_threads * unit - begin;
    uint8_t *packed = w->packed + (size_t)thread * w->packed_size;
    for (int r = 0; r < n_rows && n > 0; r++) {
        float *values = w->rounded + r * layer->spec.n_ff + begin;
        kernel_round_input(w->round_type, n, values, packed);
        kernel_dequantize(w->round_type, n, packed, values);
    }
}

enum pass { PASS_UP, PASS_DOWN };

/* Runs one pass over the thread's chunks of all lists. Chunks are counted through all blocks, so that threads share
 * the last ones evenly too. */
static void run_pass(enum pass pass, const struct pi_layer *layer, const struct block *blocks, int n_blocks, bool all,
                     int thread, int n_threads, const struct work *w, struct tally *tally) {
    const int64_t n_embd = layer->spec.n_embd, n_ff = layer->spec.n_ff;
    float *acc = w->acc + (int64_t)thread * w->n_rows * n_embd, *tmp = w->tmp + thread * n_embd;
    const struct ggml_type_traits_cpu *up = pass == PASS_UP ? ggml.ggml_get_type_traits_cpu(layer->spec.up_type) : NULL;
    int64_t chunk = 0;
    for (int b = 0; b < n_blocks; b++) {
        for (int t = 0; t < n_threads; t++) {
            const int32_t *list = blocks[b].list + n_ff * t / n_threads;
            for (int32_t k = 0; k < blocks[b].found[t]; k += CHUNK, chunk++) {
                if (chunk % n_threads != thread) continue;
                for (int32_t i = k; i < k + CHUNK && i < blocks[b].found[t]; i++) {
                    if (pass == PASS_UP) compute_up(layer, &blocks[b], list[i], all, up, tally);
                    else compute_down(layer, &blocks[b], list[i], all, w, acc, tmp);
                }
            }
        }
    }
}

/* One thread's part of a set of blocks; called by all threads of a team. */
static void run_blocks(const struct pi_layer *layer, const struct block *blocks, int n_blocks, bool all, int thread,
                       int n_threads, const struct work *w, struct tally *tally) {
    const int64_t n_embd = layer->spec.n_embd, n_ff = layer->spec.n_ff;
    const size_t acc_size = (size_t)w->n_rows * (size_t)n_embd;
    const int32_t begin = (int32_t)(n_ff * thread / n_threads), end = (int32_t)(n_ff * (thread + 1) / n_threads);
    const bool fused = blocks[0].rows[0].h != NULL; /* up is computed too */
    int n_rows = 0;

    memset(w->acc + (size_t)thread * acc_size, 0, acc_size * sizeof(float));
    for (int b = 0; b < n_blocks; b++) {
        n_rows += blocks[b].n_rows;
        blocks[b].found[thread] = scan(&blocks[b], begin, end, all, blocks[b].list + begin);
        tally->touched += (uint64_t)blocks[b].found[thread];
        if (!fused) count_nonzero(&blocks[b], begin, end, tally);
    }
    if (fused) {
#pragma omp barrier
        run_pass(PASS_UP, layer, blocks, n_blocks, all, thread, n_threads, w, tally);
#pragma omp barrier
    }
    for (int b = 0; b < n_blocks; b++) gather_activations(layer, &blocks[b], w, begin, end);
#pragma omp barrier
    if (w->round_type != ABI_TYPE_F32) {
        round_activations(layer, w, n_rows, thread, n_threads);
#pragma omp barrier
    }
    run_pass(PASS_DOWN, layer, blocks, n_blocks, all, thread, n_threads, w, tally);
#pragma omp barrier
    /* All inputs have been read: now the outputs may be written, wherever they lie. */
    for (int b = 0; b < n_blocks; b++) {
        for (int r = 0; r < blocks[b].n_rows; r++) {
            const int64_t first = n_embd * thread / n_threads, last = n_embd * (thread + 1) / n_threads;
            float *out = blocks[b].rows[r].out;
            const float *part = w->acc + (int64_t)(blocks[b].acc_row + r) * n_embd;
            memcpy(out + first, part + first, (size_t)(last - first) * sizeof(float));
            for (int t = 1; t < n_threads; t++) {
                kernel_add_f32(last - first, part + (size_t)t * acc_size + first, out + first);
            }
        }
    }
#pragma omp barrier
}

/* What stock rounds the input of down to before its dot products; F32 (no rounding) for types we cannot read back. */
static int rounding_type(const struct pi_layer *layer) {
    const int type = ggml.ggml_get_type_traits_cpu(layer->spec.down_source_type)->vec_dot_type;
    const bool readable = kernel_can_dequantize(type) && abi_row_size(type, layer->spec.n_ff) > 0;
    return readable && ggml.ggml_get_type_traits_cpu(type)->from_float != NULL ? type : ABI_TYPE_F32;
}

int ffn_sparse(const struct pi_layer *layer, struct ffn_row *rows, int n_rows, bool dense, int n_threads,
               struct ffn_scratch *scratch, struct pi_counters *counters) {
    const size_t n_embd = (size_t)layer->spec.n_embd, n_ff = (size_t)layer->spec.n_ff;
    if (n_rows <= 0) return 0;
    if (layer->spec.n_expert > 0) qsort(rows, (size_t)n_rows, sizeof *rows, by_expert);

    /* Several sets of blocks would overwrite inputs of the later ones when an output lies over an input, so then
     * outputs are collected in scratch and copied at the very end. */
    const bool collect = n_rows > FFN_BLOCK_ROWS;
    const int set_rows = n_rows < FFN_BLOCK_ROWS ? n_rows : FFN_BLOCK_ROWS;
    const size_t threads = (size_t)n_threads;
    const int round_type = rounding_type(layer);
    const size_t packed_size = round64(abi_row_size(round_type, layer->spec.n_ff));
    const size_t acc_bytes = round64(threads * (size_t)set_rows * n_embd * sizeof(float));
    const size_t tmp_bytes = round64(threads * n_embd * sizeof(float));
    const size_t rounded_bytes = round64((size_t)set_rows * n_ff * sizeof(float));
    const size_t packed_bytes = threads * packed_size;
    const size_t list_bytes = round64((size_t)set_rows * n_ff * sizeof(int32_t));
    const size_t found_bytes = round64((size_t)set_rows * threads * sizeof(int32_t));
    const size_t out_bytes = collect ? round64((size_t)n_rows * n_embd * sizeof(float)) : 0;
    const size_t dst_bytes = collect ? round64((size_t)n_rows * sizeof(float *)) : 0;
    uint8_t *memory = ffn_scratch_reserve(scratch, acc_bytes + tmp_bytes + rounded_bytes + packed_bytes + list_bytes +
                                                       found_bytes + out_bytes + dst_bytes);
    if (memory == NULL) return -1;
    struct work work = {.n_rows = set_rows, .round_type = round_type, .packed_size = packed_size};
    work.acc = (float *)memory, memory += acc_bytes;
    work.tmp = (float *)memory, memory += tmp_bytes;
    work.rounded = (float *)memory, memory += rounded_bytes;
    work.packed = memory, memory += packed_bytes;
    int32_t *lists = (int32_t *)memory;
    memory += list_bytes;
    int32_t *founds = (int32_t *)memory;
    memory += found_bytes;
    float *outs = (float *)memory;
    float **dsts = (float **)(memory + out_bytes);

    for (int r = 0; r < n_rows && collect; r++) {
        dsts[r] = rows[r].out;
        rows[r].out = outs + (size_t)r * n_embd;
    }
    uint64_t selected = 0, fired = 0, touched = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : selected, fired, touched)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        struct tally tally = {0};
        int done = 0;
        while (done < n_rows) { /* every thread forms the same blocks */
            struct block blocks[FFN_BLOCK_ROWS];
            int n_blocks = 0, in_set = 0;
            while (done < n_rows && in_set < set_rows) {
                int n = 1;
                while (in_set + n < set_rows && done + n < n_rows && rows[done + n].expert == rows[done].expert) n++;
                blocks[n_blocks] = (struct block){.rows = rows + done,
                                                  .n_rows = n,
                                                  .acc_row = in_set,
                                                  .list = lists + (size_t)n_blocks * n_ff,
                                                  .found = founds + (size_t)n_blocks * threads};
                n_blocks++;
                done += n;
                in_set += n;
            }
            run_blocks(layer, blocks, n_blocks, dense, thread, team, &work, &tally);
        }
        if (collect) {
#pragma omp for
            for (int r = 0; r < n_rows; r++) memcpy(dsts[r], rows[r].out, n_embd * sizeof(float));
        }
        selected += tally.selected;
        fired += tally.fired;
        touched += tally.touched;
    }
    counters->calls += 1;
    counters->rows += (uint64_t)n_rows;
    counters->neurons += (uint64_t)n_rows * n_ff;
    counters->selected += selected;
    counters->fired += fired;
    counters->touched += touched;
    return 0;
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
    const bool gated = spec->up_name != NULL;
    if (gated != (x != NULL) || gated != (h != NULL) || (expert != NULL) != (spec->n_expert > 0)) return -1;
    const int type = gated ? ggml.ggml_get_type_traits_cpu(spec->up_type)->vec_dot_type : ABI_TYPE_F32;
    const size_t row_size = round64(gated ? abi_row_size(type, spec->n_embd) : 0);
    struct ffn_scratch inputs = {0}, work = {0};
    uint8_t *memory = ffn_scratch_reserve(&inputs, (size_t)n_rows * (row_size + sizeof(struct ffn_row)));
    if (memory == NULL) return -1;
    struct ffn_row *rows = (struct ffn_row *)(memory + (size_t)n_rows * row_size);
    int result = 0;
    for (int r = 0; r < n_rows && result == 0; r++) {
        uint8_t *xq = memory + (size_t)r * row_size;
        if (gated) kernel_round_input(type, spec->n_embd, x + r * spec->n_embd, xq);
        rows[r] = (struct ffn_row){.expert = expert != NULL ? expert[r] : 0,
                                   .xq = gated ? xq : NULL,
                                   .g = g + r * spec->n_ff,
                                   .h = gated ? h + r * spec->n_ff : NULL,
                                   .out = out + r * spec->n_embd};
        if (rows[r].expert < 0 || (expert != NULL && rows[r].expert >= spec->n_expert)) result = -1;
    }
    if (result == 0) {
        result = ffn_sparse(layer, rows, n_rows, atomic_load(&model->dense), n_threads, &work,
                            &layer->counters[n_rows > 1]);
    }
    ffn_scratch_free(&inputs);
    ffn_scratch_free(&work);
    return result;
}
