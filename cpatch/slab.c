/* slab.c - see slab.h. */
#define _GNU_SOURCE
#include "slab.h"

#include "kernels.h"

#include <errno.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    CHUNK_ROWS = 128, /* weight rows that a thread takes at a time */
    SPARE_TILES = 12 /* slots of a dense matrix that tiles pass through: enough reads in flight for the disk's bandwidth */
};

static int64_t unit_rows(const struct pi_slab_spec *spec) {
    return spec->kind == PI_SLAB_EXPERTS ? spec->n_out : spec->kind == PI_SLAB_TILES ? spec->tile : 1;
}

/* The field of a spec that does not fit, or NULL. */
static const char *check_spec(const struct pi_slab_spec *spec) {
    if (spec->name == NULL || strlen(spec->name) >= ABI_MAX_NAME) return "name";
    if (abi_row_size(spec->type, spec->n_in) == 0 || spec->n_in > INT32_MAX) return "type";
    if (spec->kind == PI_SLAB_ROWS ? !kernel_can_dequantize(spec->type) : kernel_input_type(spec->type) < 0) return "type";
    if (spec->n_out <= 0 || spec->n_out > INT32_MAX || spec->n_expert < 0 || spec->n_expert > 65536) return "shape";
    if (spec->kind < PI_SLAB_EXPERTS || spec->kind > PI_SLAB_ROUTER) return "kind";
    if ((spec->n_expert > 0) != (spec->kind == PI_SLAB_EXPERTS)) return "number of experts";
    if (spec->kind == PI_SLAB_TILES && (spec->tile <= 0 || spec->n_out % spec->tile != 0)) return "tile";
    if (spec->kind == PI_SLAB_ROUTER && (spec->n_used < 0 || spec->n_used > spec->n_out)) return "number of experts";
    if (spec->offset < 0 || spec->n_slots < 0 || spec->n_slots > INT32_MAX || spec->norm_offset < 0) return "size";
    return NULL;
}

int slab_init(struct pi_slab *slab, struct pi_model *model, const struct pi_slab_spec *spec, char *err, size_t err_len) {
    const char *field = check_spec(spec);
    if (field != NULL) {
        snprintf(err, err_len, "%s: the matrix's %s does not fit", spec->name == NULL ? "?" : spec->name, field);
        return -1;
    }
    slab->model = model;
    slab->spec = *spec;
    strcpy(slab->name, spec->name);
    slab->spec.name = slab->name;
    slab->row_size = abi_row_size(spec->type, spec->n_in);
    slab->unit_rows = unit_rows(spec);
    slab->weight = (struct pi_weight){PI_ROLE_SLAB, NULL, slab};
    if (spec->kind == PI_SLAB_ROUTER) return 0;
    const int64_t units = spec->kind == PI_SLAB_EXPERTS ? spec->n_expert : spec->n_out / slab->unit_rows;
    /* A dense matrix is wanted from end to end every time: then nothing beats keeping a part and streaming the rest. */
    const bool pin = spec->kind == PI_SLAB_TILES && spec->n_slots < units;
    const int64_t spare = spec->n_slots > SPARE_TILES ? SPARE_TILES : spec->n_slots;
    const struct store_spec store = {.file = spec->file,
                                     .offset = (uint64_t)spec->offset,
                                     .unit_size = (uint64_t)slab->unit_rows * slab->row_size,
                                     .n_units = (uint32_t)units,
                                     .n_slots = (uint32_t)spec->n_slots,
                                     .n_pinned = pin ? (uint32_t)(spec->n_slots - spare) : 0,
                                     .policy = model->policy};
    char why[128];
    slab->store = store_open(model->flash, &store, why, sizeof why);
    if (slab->store == NULL) snprintf(err, err_len, "%s: %s", spec->name, why);
    return slab->store == NULL ? -1 : 0;
}

void slab_free(struct pi_slab *slab) {
    store_close(slab->store);
    free(slab->data);
    free(slab->norm);
}

int slab_read(struct pi_slab *slab, int fd, char *err, size_t err_len) {
    const size_t size = (size_t)slab->spec.n_out * slab->row_size, norm = (size_t)slab->spec.n_in * sizeof(float);
    if (slab->data == NULL) slab->data = aligned_alloc(64, (size + 63) & ~(size_t)63);
    if (slab->norm == NULL && slab->spec.norm_offset > 0) slab->norm = malloc(norm);
    if (slab->data == NULL || (slab->norm == NULL && slab->spec.norm_offset > 0)) {
        snprintf(err, err_len, "%s: no memory for %zu bytes", slab->name, size);
        return -1;
    }
    if (io_read_now(fd, slab->data, size, slab->spec.offset) == 0 &&
        (slab->norm == NULL || io_read_now(fd, slab->norm, norm, slab->spec.norm_offset) == 0))
        return 0;
    snprintf(err, err_len, "%s: reading it at offset %lld failed", slab->name, (long long)slab->spec.offset);
    return -1;
}

/* Has the experts with the n highest logits read into the slots of a layer's matrices, for its next evaluation. */
static void read_likely(struct pi_model *model, int group, const float *logits, int64_t n_expert, int64_t n, float *order) {
    int32_t chosen[256];
    if (n > 256) n = 256;
    memcpy(order, logits, (size_t)n_expert * sizeof(float));
    for (int64_t k = 0; k < n; k++) {
        int64_t best = 0;
        for (int64_t e = 1; e < n_expert; e++) {
            if (order[e] > order[best]) best = e;
        }
        order[best] = -INFINITY;
        chosen[k] = (int32_t)best;
    }
    for (int i = 0; i < model->n_slabs; i++) {
        struct pi_slab *slab = &model->slabs[i];
        if (slab->spec.group != group || slab->spec.kind != PI_SLAB_EXPERTS || slab->spec.n_expert != n_expert) continue;
        if ((int64_t)slab->store->spec.n_slots < 2 * n || !store_pays(slab->store)) continue;
        (void)store_want(slab->store, chosen, (int)n, true);
        store_flush(slab->store);
    }
}

void slab_route(struct pi_slab *router, const float *x, const float *logits, float *scratch) {
    struct pi_model *model = router->model;
    const int64_t n = router->spec.n_used, n_expert = router->spec.n_out, n_in = router->spec.n_in;
    struct pi_slab *next = NULL;
    float *order = scratch, *guess = scratch + n_expert, *scaled = guess + n_expert;
    if (n == 0 || !model->ahead) return;
    pthread_mutex_lock(&model->evaluating);
    read_likely(model, router->spec.group, logits, n_expert, n, order);
    for (int i = 0; i < model->n_slabs; i++) {
        struct pi_slab *slab = &model->slabs[i];
        if (slab->spec.kind != PI_SLAB_ROUTER || slab->spec.group <= router->spec.group) continue;
        if (next == NULL || slab->spec.group < next->spec.group) next = slab;
    }
    if (next != NULL && next->spec.n_in == n_in && next->spec.n_out == n_expert && next->spec.type == ABI_TYPE_F32) {
        for (int64_t i = 0; i < n_in; i++) {
            const bool rescale = router->norm != NULL && next->norm != NULL && router->norm[i] != 0.0f;
            scaled[i] = rescale ? x[i] / router->norm[i] * next->norm[i] : x[i];
        }
        const struct ffn_product product = {next->data, scaled, guess};
        ffn_dense(&product, 1, ABI_TYPE_F32, n_in, n_expert, next->row_size, 1);
        read_likely(model, next->spec.group, guess, n_expert, n, order);
    }
    pthread_mutex_unlock(&model->evaluating);
}

/* A unit that is wanted, and the rows of the product that want it. */
struct task {
    int32_t unit;
    int begin, end;      /* of the rows */
    _Atomic int32_t next, done; /* chunks of weight rows that were taken, that are computed */
};

/* What the threads of a product share. */
struct product {
    struct pi_slab *slab;
    const struct slab_row *rows;
    struct task *tasks;
    int n_tasks;
    int32_t n_chunks;    /* of a unit */
    atomic_int fed, finished, failed; /* tasks whose units were wanted from the store; that are computed */
    atomic_flag feeding;
};

/* Wants the units of as many tasks as there is room for. Any thread, one at a time. */
static void feed(struct product *p) {
    struct store *store = p->slab->store;
    if (atomic_load(&p->fed) == p->n_tasks || atomic_flag_test_and_set(&p->feeding)) return;
    int fed = atomic_load(&p->fed);
    const int before = fed;
    while (fed < p->n_tasks && store_want(store, &p->tasks[fed].unit, 1, false) == 1) fed++;
    store_flush(store);
    if (fed == before && atomic_load(&p->finished) == fed) {
        /* Nobody uses a slot and still there is none: an evaluation that failed left some that seem to be needed. */
        (void)flash_progress(store->flash);
        store_begin(store);
    }
    atomic_store(&p->fed, fed);
    atomic_flag_clear(&p->feeding);
}

/* Chunk c of a task: some weight rows, all rows of the product that want the unit. */
static void compute_chunk(const struct product *p, const struct task *task, int32_t c) {
    const struct pi_slab *slab = p->slab;
    const bool experts = slab->spec.n_expert > 0;
    const int64_t begin = (int64_t)c * CHUNK_ROWS, left = slab->unit_rows - begin;
    const int n = (int)(left < CHUNK_ROWS ? left : CHUNK_ROWS);
    const int64_t first = begin + (experts ? 0 : task->unit * slab->unit_rows); /* output that the first row makes */
    const uint8_t *base = store_unit(slab->store, (uint32_t)task->unit) + (size_t)begin * slab->row_size;
    if (task->end - task->begin == 1) {
        const uint8_t *weights[CHUNK_ROWS];
        for (int k = 0; k < n; k++) weights[k] = base + (size_t)k * slab->row_size;
        const struct slab_row *row = &p->rows[task->begin];
        kernel_dots(slab->spec.type, slab->spec.n_in, weights, n, row->xq, row->out + first);
        return;
    }
    for (int r = task->begin; r < task->end; r += FFN_BLOCK_ROWS) {
        const int n_x = task->end - r < FFN_BLOCK_ROWS ? task->end - r : FFN_BLOCK_ROWS;
        const void *xqs[FFN_BLOCK_ROWS];
        float out[FFN_BLOCK_ROWS];
        for (int i = 0; i < n_x; i++) xqs[i] = p->rows[r + i].xq;
        for (int k = 0; k < n; k++) {
            kernel_dots_inputs(slab->spec.type, slab->spec.n_in, base + (size_t)k * slab->row_size, xqs, n_x, out);
            for (int i = 0; i < n_x; i++) p->rows[r + i].out[first + k] = out[i];
        }
    }
}

/* Computes what is there of a task. Returns whether there was anything. */
static bool work_on(struct product *p, struct task *task) {
    bool some = false;
    for (int32_t c; (c = atomic_fetch_add(&task->next, 1)) < p->n_chunks; some = true) {
        compute_chunk(p, task, c);
        if (atomic_fetch_add(&task->done, 1) + 1 < p->n_chunks) continue;
        store_release(p->slab->store, (uint32_t)task->unit);
        atomic_fetch_add(&p->finished, 1);
        feed(p);
    }
    return some;
}

/* One thread: whatever has arrived, until nothing is left to take or a read has failed. */
static void run_thread(struct product *p) {
    struct store *store = p->slab->store;
    for (bool left = true; left && !atomic_load_explicit(&p->failed, memory_order_relaxed);) {
        bool some = false;
        const uint32_t generation = flash_generation(store->flash);
        const int fed = atomic_load(&p->fed);
        left = fed < p->n_tasks;
        for (int i = 0; i < fed; i++) {
            struct task *task = &p->tasks[i];
            if (atomic_load_explicit(&task->next, memory_order_relaxed) >= p->n_chunks) continue;
            left = true;
            if (store_ready(store, (uint32_t)task->unit)) {
                some |= work_on(p, task);
            } else if (atomic_load(&store->slot_of[task->unit]) < 0 && atomic_load(&task->next) == 0) {
                atomic_store(&p->failed, 1);
            }
            (void)flash_progress(store->flash);
        }
        if (some || !left) continue;
        feed(p);
        store_sleep(store, generation);
    }
}

static int by_expert(const void *a, const void *b) {
    const struct slab_row *x = a, *y = b;
    if (x->expert != y->expert) return x->expert < y->expert ? -1 : 1;
    return x->out < y->out ? -1 : x->out > y->out;
}

static void ready_first(const struct pi_slab *slab, struct task *tasks, int n) {
    int ready = 0;
    for (int i = 0; i < n; i++) {
        if (!store_ready(slab->store, (uint32_t)tasks[i].unit)) continue;
        const struct task swap = tasks[ready];
        tasks[ready].unit = tasks[i].unit, tasks[ready].begin = tasks[i].begin, tasks[ready].end = tasks[i].end;
        tasks[i].unit = swap.unit, tasks[i].begin = swap.begin, tasks[i].end = swap.end;
        ready++;
    }
}

/* The tasks of a product, whose rows are sorted. Returns their number. */
static int list_tasks(const struct pi_slab *slab, const struct slab_row *rows, int n_rows, struct task *tasks) {
    int n = 0;
    if (slab->spec.n_expert == 0) {
        for (uint32_t u = 0; u < slab->store->spec.n_units; u++) {
            tasks[n++] = (struct task){.unit = (int32_t)u, .begin = 0, .end = n_rows};
        }
    }
    for (int r = 0; r < n_rows && slab->spec.n_expert > 0; r++) {
        if (n > 0 && tasks[n - 1].unit == rows[r].expert) tasks[n - 1].end = r + 1;
        else tasks[n++] = (struct task){.unit = rows[r].expert, .begin = r, .end = r + 1};
    }
    ready_first(slab, tasks, n);
    return n;
}

/* Has the experts read that the group's other nodes will want next, as far as they leave room for the others. */
static void read_ahead(struct pi_slab *slab, const struct product *p) {
    struct pi_model *model = slab->model;
    for (int i = 0; i < model->n_slabs; i++) {
        struct pi_slab *other = &model->slabs[i];
        if (other == slab || other->spec.kind != PI_SLAB_EXPERTS || other->spec.group != slab->spec.group || other->passes >= slab->passes) continue;
        const int room = (int)(other->store->spec.n_slots / 2);
        for (int t = 0; t < p->n_tasks && t < room; t++) {
            if (store_want(other->store, &p->tasks[t].unit, 1, true) == 0) break;
        }
        store_flush(other->store);
    }
}

/* Has the first tiles read that do not stay in memory, of the dense matrix that comes next, in the next token's pass after
 * the last. */
static void read_next(const struct pi_slab *slab) {
    struct pi_model *model = slab->model;
    for (int step = 1, at = (int)(slab - model->slabs); step < model->n_slabs; step++) {
        struct pi_slab *next = &model->slabs[(at + step) % model->n_slabs];
        if (next->spec.kind != PI_SLAB_TILES) continue;
        const struct store_spec *spec = &next->store->spec;
        for (uint32_t u = spec->n_pinned; u < spec->n_units && u < spec->n_slots; u++) {
            const int32_t unit = (int32_t)u;
            if (store_want(next->store, &unit, 1, true) == 0) break;
        }
        store_flush(next->store);
        return;
    }
}

enum ffn_result slab_product(struct pi_slab *slab, struct slab_row *rows, int n_rows, int n_threads,
                             struct ffn_scratch *scratch) {
    const bool experts = slab->spec.n_expert > 0;
    const size_t most = experts ? (size_t)n_rows : slab->store->spec.n_units;
    if (n_rows <= 0) return FFN_OK;
    struct product p = {.slab = slab, .rows = rows, .feeding = ATOMIC_FLAG_INIT};
    p.tasks = ffn_scratch_reserve(scratch, most * sizeof *p.tasks);
    if (p.tasks == NULL) return FFN_NO_MEMORY;
    if (experts) qsort(rows, (size_t)n_rows, sizeof *rows, by_expert);
    pthread_mutex_lock(&slab->model->evaluating);
    p.n_tasks = list_tasks(slab, rows, n_rows, p.tasks);
    p.n_chunks = (int32_t)((slab->unit_rows + CHUNK_ROWS - 1) / CHUNK_ROWS);
    slab->passes++;
    store_begin(slab->store);
    feed(&p);
    if (experts && slab->model->ahead) read_ahead(slab, &p);
#pragma omp parallel num_threads(n_threads)
    run_thread(&p);
    if (!experts && slab->model->ahead) read_next(slab);
    pthread_mutex_unlock(&slab->model->evaluating);
    return atomic_load(&p.failed) || flash_stale(slab->store->flash) ? FFN_READ_FAILED : FFN_OK;
}

enum ffn_result slab_get_rows(struct pi_slab *slab, const int32_t *ids, int n, float *const *out) {
    struct store *store = slab->store;
    enum ffn_result result = FFN_OK;
    for (int i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= slab->spec.n_out) return FFN_READ_FAILED;
    }
    pthread_mutex_lock(&slab->model->evaluating);
    for (int i = 0, end; i < n && result == FFN_OK; i = end) {
        store_begin(store);
        for (;;) { /* as many as there are slots for, at least one */
            end = i + store_want(store, ids + i, n - i, false);
            store_flush(store);
            if (end > i) break;
            if (!flash_wait(store->flash, flash_generation(store->flash))) store_begin(store);
        }
        for (int k = i; k < end && result == FFN_OK; k++) {
            if (store_wait(store, (uint32_t)ids[k]) != 0) result = FFN_READ_FAILED;
            else kernel_dequantize(slab->spec.type, slab->spec.n_in, store_unit(store, (uint32_t)ids[k]), out[k]);
        }
    }
    pthread_mutex_unlock(&slab->model->evaluating);
    return result;
}

enum ffn_result slab_copy(struct pi_slab *slab, uint8_t *dst) {
    struct store *store = slab->store;
    enum ffn_result result = FFN_OK;
    if (store == NULL) {
        memcpy(dst, slab->data, (size_t)slab->spec.n_out * slab->row_size);
        return result;
    }
    pthread_mutex_lock(&slab->model->evaluating);
    for (int32_t u = 0; u < (int32_t)store->spec.n_units && result == FFN_OK; u++) {
        store_begin(store);
        while (store_want(store, &u, 1, false) == 0) {
            if (!flash_wait(store->flash, flash_generation(store->flash))) store_begin(store);
        }
        store_flush(store);
        if (store_wait(store, (uint32_t)u) != 0) result = FFN_READ_FAILED;
        else memcpy(dst + (size_t)u * store->spec.unit_size, store_unit(store, (uint32_t)u), store->spec.unit_size);
    }
    pthread_mutex_unlock(&slab->model->evaluating);
    return result;
}
