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
    int acc_row; /* index of the first row in the accumulators */
    int32_t *list; /* [n_ff] */
    int32_t *found; /* [n_threads] */
};

struct tally {
    uint64_t selected, fired, touched;
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

/* Lists the neurons of [begin, end) that some row of the block wants, and settles the activations that are zero.
 * In h, g's positive values are kept as they are: compute_neuron() replaces them, also when h is g. */
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

/* Adds neuron j's contribution to the accumulators of all rows of the block that want it. */
static void compute_neuron(const struct pi_layer *layer, const struct block *block, int32_t j, bool all, float *acc,
                           float *tmp, const struct ggml_type_traits_cpu *up, struct tally *tally) {
    const struct pi_layer_spec *spec = &layer->spec;
    const int64_t n = spec->n_embd;
    const uint8_t *bundle = layer->data + ((int64_t)block->rows[0].expert * spec->n_ff + j) * spec->stride;
    bool expanded = false;
    for (int r = 0; r < block->n_rows; r++) {
        const struct ffn_row *row = &block->rows[r];
        float h = row->g[j];
        if (row->h != NULL) {
            if (!all && !(h > 0.0f)) continue;
            tally->selected += h > 0.0f;
            float u;
            up->vec_dot((int)n, &u, 0, bundle + spec->up_offset, 0, row->xq, 0, 1);
            h = activate(layer->model->activation, h, u);
            row->h[j] = h;
        } else {
            tally->selected += h != 0.0f;
        }
        tally->fired += h != 0.0f;
        if (h == 0.0f && !all) continue;
        float *y = acc + (int64_t)(block->acc_row + r) * n;
        if (block->n_rows == 1) {
            kernel_axpy(spec->down_type, n, h, bundle + spec->down_offset, y, tmp);
        } else {
            if (!expanded) kernel_dequantize(spec->down_type, n, bundle + spec->down_offset, tmp);
            expanded = true;
            kernel_axpy_f32(n, h, tmp, y);
        }
    }
    tally->touched++;
}

/* One thread's part of a set of blocks; called by all threads of a team. */
static void run_blocks(const struct pi_layer *layer, const struct block *blocks, int n_blocks, int n_acc_rows,
                       bool all, int thread, int n_threads, float *accs, float *tmps, struct tally *tally) {
    const int64_t n_embd = layer->spec.n_embd, n_ff = layer->spec.n_ff;
    const size_t acc_size = (size_t)n_acc_rows * (size_t)n_embd;
    float *acc = accs + (size_t)thread * acc_size;
    float *tmp = tmps + (size_t)thread * (size_t)n_embd;
    const struct ggml_type_traits_cpu *up =
        layer->spec.up_name == NULL ? NULL : ggml.ggml_get_type_traits_cpu(layer->spec.up_type);

    memset(acc, 0, acc_size * sizeof(float));
    const int32_t begin = (int32_t)(n_ff * thread / n_threads), end = (int32_t)(n_ff * (thread + 1) / n_threads);
    for (int b = 0; b < n_blocks; b++) {
        blocks[b].found[thread] = scan(&blocks[b], begin, end, all, blocks[b].list + begin);
    }
#pragma omp barrier
    int64_t chunk = 0; /* counted through all blocks, so that threads share the last chunks evenly too */
    for (int b = 0; b < n_blocks; b++) {
        for (int t = 0; t < n_threads; t++) {
            const int32_t *list = blocks[b].list + n_ff * t / n_threads;
            for (int32_t k = 0; k < blocks[b].found[t]; k += CHUNK, chunk++) {
                if (chunk % n_threads != thread) continue;
                for (int32_t i = k; i < k + CHUNK && i < blocks[b].found[t]; i++) {
                    compute_neuron(layer, &blocks[b], list[i], all, acc, tmp, up, tally);
                }
            }
        }
    }
#pragma omp barrier
    /* All inputs have been read: now the outputs may be written, wherever they lie. */
    for (int b = 0; b < n_blocks; b++) {
        for (int r = 0; r < blocks[b].n_rows; r++) {
            const int64_t first = n_embd * thread / n_threads, last = n_embd * (thread + 1) / n_threads;
            float *out = blocks[b].rows[r].out;
            const float *part = accs + (int64_t)(blocks[b].acc_row + r) * n_embd;
            memcpy(out + first, part + first, (size_t)(last - first) * sizeof(float));
            for (int t = 1; t < n_threads; t++) {
                kernel_add_f32(last - first, part + (size_t)t * acc_size + first, out + first);
            }
        }
    }
#pragma omp barrier
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
    const size_t acc_bytes = round64(threads * (size_t)set_rows * n_embd * sizeof(float));
    const size_t tmp_bytes = round64(threads * n_embd * sizeof(float));
    const size_t list_bytes = round64((size_t)set_rows * n_ff * sizeof(int32_t));
    const size_t found_bytes = (size_t)set_rows * threads * sizeof(int32_t);
    const size_t out_bytes = collect ? round64((size_t)n_rows * n_embd * sizeof(float)) : 0;
    const size_t dst_bytes = collect ? round64((size_t)n_rows * sizeof(float *)) : 0;
    uint8_t *memory =
        ffn_scratch_reserve(scratch, acc_bytes + tmp_bytes + out_bytes + dst_bytes + list_bytes + found_bytes);
    if (memory == NULL) return -1;
    float *accs = (float *)memory;
    float *tmps = (float *)(memory + acc_bytes);
    float *outs = (float *)(memory + acc_bytes + tmp_bytes);
    float **dsts = (float **)(memory + acc_bytes + tmp_bytes + out_bytes);
    int32_t *lists = (int32_t *)(memory + acc_bytes + tmp_bytes + out_bytes + dst_bytes);
    int32_t *founds = (int32_t *)((uint8_t *)lists + list_bytes);

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
            run_blocks(layer, blocks, n_blocks, set_rows, dense, thread, team, accs, tmps, &tally);
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
        if (gated && type == ABI_TYPE_F32) memcpy(xq, x + r * spec->n_embd, (size_t)spec->n_embd * sizeof(float));
        else if (gated) ggml.ggml_get_type_traits_cpu(type)->from_float(x + r * spec->n_embd, xq, spec->n_embd);
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
