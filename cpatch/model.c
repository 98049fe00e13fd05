/* model.c - loading and keeping neuron bundles. See model.h. */
#define _GNU_SOURCE
#include "model.h"

#include "backend.h"
#include "kernels.h"
#include "panels.h"
#include "slab.h"

#include <errno.h>
#include <fcntl.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { READ_CHUNK = 4 << 20 };

static atomic_int live_models;

int pi_model_count(void) {
    return atomic_load(&live_models);
}

void pi_model_ref(struct pi_model *model) {
    atomic_fetch_add(&model->refs, 1);
}

void pi_model_unref(struct pi_model *model) {
    if (atomic_fetch_sub(&model->refs, 1) != 1) return;
    for (int i = 0; i < model->n_layers; i++) {
        struct pi_layer *layer = &model->layers[i];
        if (layer->data != NULL) munmap(layer->data, layer->data_size);
        store_close(layer->store);
        free(layer->order);
        free(layer->scales);
        free(layer->pred_a);
        free(layer->pred_b);
        free(layer->pred_bias);
        free(layer->thresholds);
    }
    for (int i = 0; i < model->n_slabs; i++) slab_free(&model->slabs[i]);
    free(model->slabs);
    free(model->panels);
    flash_close(model->flash);
    pthread_mutex_destroy(&model->evaluating);
    free(model);
    atomic_fetch_sub(&live_models, 1);
}

void pi_model_close(struct pi_model *model) {
    if (model != NULL) pi_model_unref(model);
}

void *pi_model_buft(struct pi_model *model) {
    return &model->buft;
}

void *pi_model_panel_buft(struct pi_model *model) {
    return &model->panel_buft;
}

void pi_model_set_dense(struct pi_model *model, bool dense) {
    atomic_store(&model->dense, dense);
}

void pi_model_set_verify(struct pi_model *model, uint32_t every) {
    atomic_store_explicit(&model->verify, every, memory_order_relaxed);
}

struct pi_weight *pi_model_find(struct pi_model *model, const char *tensor_name) {
    for (int i = 0; i < model->n_layers; i++) {
        struct pi_layer *layer = &model->layers[i];
        if (layer->spec.gate_name != NULL && strcmp(layer->gate_name, tensor_name) == 0) return &layer->gate;
        if (layer->spec.up_name != NULL && strcmp(layer->up_name, tensor_name) == 0) return &layer->up;
        if (strcmp(layer->down_name, tensor_name) == 0) return &layer->down;
    }
    for (int i = 0; i < model->n_slabs; i++) {
        if (strcmp(model->slabs[i].name, tensor_name) == 0) return &model->slabs[i].weight;
    }
    return NULL;
}

int pi_model_stats(struct pi_model *model, int i, int phase, struct pi_layer_stats *out) {
    if (i < 0 || i >= model->n_layers || phase < 0 || phase > 1) return -1;
    struct pi_counters *c = &model->layers[i].counters[phase];
    *out = (struct pi_layer_stats){.calls = c->calls,
                                   .rows = c->rows,
                                   .neurons = c->neurons,
                                   .selected = c->selected,
                                   .fired = c->fired,
                                   .touched = c->touched,
                                   .ns = c->ns,
                                   .verified = c->verified,
                                   .true_fired = c->true_fired,
                                   .missed = c->missed};
    return 0;
}

int pi_model_flash_stats(struct pi_model *model, int i, struct pi_flash_stats *out) {
    if (i < 0 || i >= model->n_layers + model->n_slabs) return -1;
    *out = (struct pi_flash_stats){0};
    if (model->flash == NULL) return 0;
    struct io_stats io;
    io_get_stats(flash_io(model->flash), &io);
    out->reads = io.reads;
    out->read_bytes = io.windows;
    const struct store *store = i < model->n_layers ? model->layers[i].store : model->slabs[i - model->n_layers].store;
    if (store == NULL) return 0;
    const struct store_counters *c = &store->counters;
    out->wanted = c->wanted;
    out->missed = c->missed;
    out->bytes = c->bytes;
    out->prefetched = c->prefetched;
    out->useful = c->useful;
    out->wasted = c->wasted;
    out->wait_ns = c->wait_ns;
    return 0;
}

int pi_model_io_engine(struct pi_model *model) {
    return model->flash == NULL ? 0 : (int)io_engine(flash_io(model->flash));
}

int pi_model_inject(struct pi_model *model, int64_t n, int error, uint32_t short_by) {
    if (model->flash == NULL) return -1;
    io_inject(flash_io(model->flash), n, error, short_by);
    return 0;
}

int pi_model_error(struct pi_model *model, int *file, int64_t *offset) {
    uint64_t at = 0;
    *file = 0;
    const int error = model->flash == NULL ? 0 : flash_error(model->flash, file, &at);
    *offset = (int64_t)at;
    return error;
}

void pi_model_reset_stats(struct pi_model *model) {
    for (int i = 0; i < model->n_slabs; i++) {
        if (model->slabs[i].store != NULL) store_reset_counters(model->slabs[i].store);
    }
    for (int i = 0; i < model->n_layers; i++) {
        if (model->layers[i].store != NULL) store_reset_counters(model->layers[i].store);
        for (int phase = 0; phase < 2; phase++) {
            struct pi_counters *c = &model->layers[i].counters[phase];
            c->calls = c->rows = c->neurons = c->selected = c->fired = c->touched = c->ns = 0;
            c->verified = c->true_fired = c->missed = 0;
        }
    }
}

/* Bytes of the table of scales. Cannot overflow once the bundles' size has been checked: they are larger. */
static size_t scales_size(const struct pi_layer_spec *spec) {
    const size_t experts = spec->n_expert == 0 ? 1 : (size_t)spec->n_expert;
    return experts * (size_t)(spec->n_ff / PI_SCALE_GROUP) * (size_t)spec->n_embd * sizeof(uint16_t);
}

static int64_t experts_of(const struct pi_layer_spec *spec) {
    return spec->n_expert == 0 ? 1 : spec->n_expert;
}

static bool name_fits(const char *name) {
    return name == NULL || strlen(name) < ABI_MAX_NAME;
}

/* Whether size bytes at offset are inside the file. */
static bool in_file(int64_t offset, int64_t size, int64_t file_size) {
    return offset >= 0 && size >= 0 && offset <= file_size && size <= file_size - offset;
}

/* The segments of a bundle lie one after the other within the stride. Returns the field that does not fit, or NULL. */
static const char *check_segments(const struct pi_layer_spec *spec) {
    const struct {
        bool present;
        int type;
        int64_t offset;
        const char *type_field, *offset_field;
    } segments[] = {
        {spec->gate_name != NULL, spec->gate_type, spec->gate_offset, "gate type", "gate offset"},
        {spec->up_name != NULL, spec->up_type, spec->up_offset, "up type", "up offset"},
        {true, spec->down_type, spec->down_offset, "down type", "down offset"},
    };
    int64_t end = 0;
    for (size_t i = 0; i < sizeof segments / sizeof segments[0]; i++) {
        if (!segments[i].present) continue;
        const size_t size = abi_row_size(segments[i].type, spec->n_embd);
        if (size == 0) return segments[i].type_field;
        if (segments[i].offset < end || segments[i].offset > INT32_MAX) return segments[i].offset_field;
        end = segments[i].offset + (int64_t)size;
    }
    return spec->stride > INT32_MAX || spec->stride < end ? "stride" : NULL;
}

/* The predictor's and the thresholds' arrays are inside the file. Returns the field that does not fit, or NULL. */
static const char *check_selection(const struct pi_layer_spec *spec, int64_t file_size) {
    const int64_t floats = spec->n_ff * (int64_t)sizeof(float);
    if (spec->threshold_offset != 0 && !in_file(spec->threshold_offset, floats * experts_of(spec), file_size))
        return "thresholds";
    if (spec->predictor == PI_PREDICT_NONE) return NULL;
    if (spec->predictor < PI_PREDICT_NONE || spec->predictor > PI_PREDICT_LINEAR) return "kind of predictor";
    const bool lowrank = pi_has_hidden(spec->predictor);
    const int64_t b_inputs = lowrank ? spec->rank : spec->n_embd;
    if (spec->n_expert != 0 || (spec->gated ? spec->gate_name : spec->up_name) == NULL) return "predictor";
    if (lowrank && (spec->rank <= 0 || spec->rank > 65536)) return "rank of the predictor";
    const int64_t a_row = lowrank ? (int64_t)abi_row_size(spec->pred_a_type, spec->n_embd) : 0;
    const int64_t b_row = (int64_t)abi_row_size(spec->pred_b_type, b_inputs);
    if ((lowrank && a_row == 0) || b_row == 0) return "type of the predictor";
    if (lowrank && kernel_input_type(spec->pred_a_type) < 0) return "type of the predictor";
    if (kernel_input_type(spec->pred_b_type) < 0) return "type of the predictor";
    if (lowrank && !in_file(spec->pred_a_offset, a_row * spec->rank, file_size)) return "matrix A of the predictor";
    if (!in_file(spec->pred_b_offset, b_row * spec->n_ff, file_size)) return "matrix B of the predictor";
    return in_file(spec->pred_bias_offset, floats, file_size) ? NULL : "bias of the predictor";
}

/* Everything about a spec that could lead outside the file or a buffer. Returns the field that does not fit, or NULL;
 * *total receives the bytes of all bundles. */
static const char *check_spec(const struct pi_layer_spec *spec, int64_t file_size, int64_t *total) {
    *total = 0;
    if (spec->down_name == NULL || !name_fits(spec->down_name)) return "name of ffn_down";
    if (!name_fits(spec->up_name)) return "name of ffn_up";
    if (!name_fits(spec->gate_name) || (spec->gate_name != NULL && (!spec->gated || spec->up_name == NULL)))
        return "name of ffn_gate";
    if (spec->n_embd <= 0 || spec->n_embd > INT32_MAX) return "n_embd";
    if (spec->n_ff <= 0 || spec->n_ff > INT32_MAX / (int64_t)sizeof(float)) return "n_ff";
    if (spec->n_expert < 0 || spec->n_expert > 65536) return "n_expert";
    if (abi_row_size(spec->down_source_type, spec->n_ff) == 0) return "down source type";
    const char *field = check_segments(spec);
    if (field != NULL) return field;
    if (spec->up_name != NULL && kernel_input_type(spec->up_type) < 0) return "up type";
    if (spec->gate_name != NULL && kernel_input_type(spec->gate_type) < 0) return "gate type";
    /* What decides is either stock's (and then not in the bundle), or named by a predictor. */
    const bool decider_inside = spec->gated ? spec->gate_name != NULL : spec->up_name != NULL;
    if (decider_inside != (spec->predictor != PI_PREDICT_NONE) || (spec->gated && spec->up_name == NULL))
        return "list of segments";
    if (__builtin_mul_overflow(spec->stride, spec->n_ff, total) ||
        __builtin_mul_overflow(*total, experts_of(spec), total))
        return "size";
    if (!in_file(spec->file_offset, *total, file_size)) return "extent (it reaches past the end of the file)";
    if (spec->down_type == ABI_TYPE_I8 && (spec->n_ff % PI_SCALE_GROUP != 0 ||
                                           !in_file(spec->scale_offset, (int64_t)scales_size(spec), file_size)))
        return "table of scales";
    if (spec->n_slots < 0 || spec->n_slots > spec->n_ff * experts_of(spec) || spec->n_ff * experts_of(spec) > INT32_MAX ||
        spec->n_hot < 0 || (spec->n_slots > 0 && spec->n_hot >= spec->n_slots))
        return "number of slots";
    return check_selection(spec, file_size);
}

static void set_name(struct pi_weight *weight, enum pi_role role, struct pi_layer *layer, char *name,
                     const char **source) {
    if (*source == NULL) return;
    strcpy(name, *source);
    *source = name;
    *weight = (struct pi_weight){role, layer, NULL};
}

static int copy_order(struct pi_layer *layer, const int32_t *order, char *err, size_t err_len) {
    const size_t n = (size_t)(experts_of(&layer->spec) * layer->spec.n_ff);
    layer->order = malloc(n * sizeof(int32_t));
    if (layer->order == NULL) {
        snprintf(err, err_len, "layer %d: no memory for the neuron order", layer->spec.index);
        return -1;
    }
    for (size_t j = 0; j < n; j++) {
        if (order[j] < 0 || order[j] >= layer->spec.n_ff) {
            snprintf(err, err_len, "layer %d: the neuron order names neuron %d", layer->spec.index, order[j]);
            return -1;
        }
        layer->order[j] = order[j];
    }
    return 0;
}

/* Memory for all bundles, or slots for some. */
static int bundle_memory(struct pi_layer *layer, int64_t total, char *err, size_t err_len) {
    const struct pi_layer_spec *spec = &layer->spec;
    if (spec->n_slots > 0) {
        const struct store_spec store = {.offset = (uint64_t)spec->file_offset,
                                         .unit_size = (uint64_t)spec->stride,
                                         .n_units = (uint32_t)(spec->n_ff * experts_of(spec)),
                                         .n_slots = (uint32_t)spec->n_slots,
                                         .n_pinned = (uint32_t)spec->n_hot,
                                         .policy = layer->model->policy,
                                         .transit = true,
                                         .frequency = spec->frequency};
        char why[128];
        layer->store = store_open(layer->model->flash, &store, why, sizeof why);
        if (layer->store == NULL) snprintf(err, err_len, "layer %d: %s", spec->index, why);
        return layer->store == NULL ? -1 : 0;
    }
    void *data = mmap(NULL, (size_t)total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) {
        snprintf(err, err_len, "layer %d: no memory for %lld bytes of bundles", spec->index, (long long)total);
        return -1;
    }
    /* Neurons are read at random: huge pages save a TLB miss for each. Advice only, so the result is not checked. */
    (void)madvise(data, (size_t)total, MADV_HUGEPAGE);
    layer->data = data;
    layer->data_size = (size_t)total;
    return 0;
}

/* Copies a spec into the layer and checks it against the types and the file. Returns 0, or -1 with a sentence. */
static int layer_init(struct pi_layer *layer, struct pi_model *model, const struct pi_layer_spec *spec,
                      int64_t file_size, char *err, size_t err_len) {
    int64_t total;
    const char *field = check_spec(spec, file_size, &total);
    if (field == NULL && spec->n_slots > 0 && model->flash == NULL) field = "number of slots";
    if (field != NULL) {
        snprintf(err, err_len, "layer %d: the bundle's %s does not fit", spec->index, field);
        return -1;
    }
    layer->model = model;
    layer->spec = *spec;
    layer->spec.order = NULL; /* the caller's memory */
    set_name(&layer->gate, PI_ROLE_GATE, layer, layer->gate_name, &layer->spec.gate_name);
    set_name(&layer->up, PI_ROLE_UP, layer, layer->up_name, &layer->spec.up_name);
    set_name(&layer->down, PI_ROLE_DOWN, layer, layer->down_name, &layer->spec.down_name);
    if (spec->order != NULL && copy_order(layer, spec->order, err, err_len) != 0) return -1;
    const int result = bundle_memory(layer, total, err, err_len);
    layer->spec.frequency = NULL; /* the caller's memory too */
    return result;
}

static int no_memory(const struct pi_layer *layer, size_t size, const char *what, char *err, size_t err_len) {
    snprintf(err, err_len, "layer %d: no memory for %zu bytes of %s", layer->spec.index, size, what);
    return -1;
}

static int not_read(const struct pi_layer *layer, int64_t offset, int code, const char *what, char *err, size_t err_len) {
    snprintf(err, err_len, "layer %d: reading the %s at offset %lld failed: %s", layer->spec.index, what,
             (long long)offset, code == EIO ? "the file ended early or the device failed" : strerror(code));
    return -1;
}

/* Frees what the pointer at `array` points to, and has it point to memory. */
static void replace(void *array, void *memory) {
    void *old;
    memcpy(&old, array, sizeof old);
    free(old);
    memcpy(array, &memory, sizeof memory);
}

/* Fills *array, which may have been filled before, with size bytes of the file at offset. -1 with a sentence. */
static int read_array(const struct pi_layer *layer, int fd, int64_t offset, size_t size, const char *what, void *array,
                      char *err, size_t err_len) {
    void *memory = aligned_alloc(64, (size + 63) & ~(size_t)63);
    if (memory == NULL) return no_memory(layer, size, what, err, err_len);
    const int code = io_read_now(fd, memory, size, offset);
    if (code != 0) {
        free(memory);
        return not_read(layer, offset, code, what, err, err_len);
    }
    replace(array, memory);
    return 0;
}

enum { PANEL_CHUNK = 1 << 20 };

/* Through one buffer per thread: a budget may have no room for the matrix twice. 0 or an errno, with the position. */
static int panel_fill(const struct pi_panel_tensor *panel, int fd, int64_t offset, bool drop, int n_threads, int64_t *where) {
    const size_t row = abi_row_size(panel->type, panel->n_in);
    const size_t step = row < PANEL_CHUNK ? PANEL_CHUNK / row * row : row; /* threads may not share a block */
    const int64_t n_chunks = (int64_t)((panel->size + step - 1) / step);
    int failed = 0;
#pragma omp parallel num_threads(n_threads)
    {
        uint8_t *chunk = malloc(step);
#pragma omp for schedule(dynamic)
        for (int64_t c = 0; c < n_chunks; c++) {
            const size_t begin = (size_t)c * step;
            const size_t size = panel->size - begin < step ? panel->size - begin : step;
            const int code = chunk == NULL ? ENOMEM : io_read_now(fd, chunk, size, offset + (int64_t)begin);
            if (drop) (void)posix_fadvise(fd, (off_t)(offset + (int64_t)begin), (off_t)size, POSIX_FADV_DONTNEED);
            if (code == 0) panel_write(panel->type, panel->n_in, panel->data, chunk, begin, size);
            if (code != 0) {
#pragma omp critical
                {
                    failed = code;
                    *where = offset + (int64_t)begin;
                }
            }
        }
        free(chunk);
    }
    return failed;
}

/* read_array() for a matrix of n_out rows of n_in weights, which is put into panels. */
static int read_into_panels(const struct pi_layer *layer, int fd, int64_t offset, int type, int64_t n_in, int64_t n_out,
                            const char *what, void *array, char *err, size_t err_len) {
    const size_t size = panel_size(type, n_in, n_out, 1);
    uint8_t *memory = aligned_alloc(64, (size + 63) & ~(size_t)63);
    if (memory == NULL) return no_memory(layer, size, what, err, err_len);
    memset(memory, 0, size); /* the last panel may have rows that the matrix has not */
    const struct pi_panel_tensor panel = {
        .type = type, .n_in = n_in, .data = memory, .size = abi_row_size(type, n_in) * (size_t)n_out};
    const int code = panel_fill(&panel, fd, offset, false, 1, &offset);
    if (code != 0) {
        free(memory);
        return not_read(layer, offset, code, what, err, err_len);
    }
    replace(array, memory);
    return 0;
}

/* The small arrays beside the bundles: scales, thresholds, predictor. */
static int arrays_read(struct pi_layer *layer, int fd, char *err, size_t err_len) {
    const struct pi_layer_spec *s = &layer->spec;
    const bool lowrank = pi_has_hidden(s->predictor), predicts = s->predictor != PI_PREDICT_NONE;
    const size_t floats = (size_t)s->n_ff * sizeof(float);
    layer->pred_panels = lowrank && panel_available() && panel_size(s->pred_b_type, s->rank, s->n_ff, 1) > 0;
    const struct {
        bool present;
        int64_t offset;
        size_t size;
        const char *what;
        void *array;
    } arrays[] = {
        {s->down_type == ABI_TYPE_I8, s->scale_offset, scales_size(s), "scales", &layer->scales},
        {s->threshold_offset != 0, s->threshold_offset, floats * (size_t)experts_of(s), "thresholds", &layer->thresholds},
        {lowrank, s->pred_a_offset, lowrank ? (size_t)s->rank * abi_row_size(s->pred_a_type, s->n_embd) : 0,
         "predictor's matrix A", &layer->pred_a},
        {predicts && !layer->pred_panels, s->pred_b_offset,
         predicts ? (size_t)s->n_ff * abi_row_size(s->pred_b_type, lowrank ? s->rank : s->n_embd) : 0,
         "predictor's matrix B", &layer->pred_b},
        {predicts, s->pred_bias_offset, floats, "predictor's bias", &layer->pred_bias},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        if (arrays[i].present && read_array(layer, fd, arrays[i].offset, arrays[i].size, arrays[i].what, arrays[i].array,
                                            err, err_len) != 0)
            return -1;
    }
    if (!layer->pred_panels) return 0;
    return read_into_panels(layer, fd, s->pred_b_offset, s->pred_b_type, s->rank, s->n_ff, "predictor's matrix B",
                            &layer->pred_b, err, err_len);
}

static int layer_read(struct pi_layer *layer, int fd, int n_threads, char *err, size_t err_len) {
    const int64_t n_chunks = (int64_t)((layer->data_size + READ_CHUNK - 1) / READ_CHUNK);
    int failed = 0;
    if (arrays_read(layer, fd, err, err_len) != 0) return -1;
    if (layer->store != NULL) {
        if (store_fill(layer->store) == 0) return 0;
        int file;
        uint64_t offset;
        const int code = flash_error(layer->model->flash, &file, &offset);
        snprintf(err, err_len, "layer %d: reading bundles at offset %llu failed: %s", layer->spec.index,
                 (unsigned long long)offset, code == ENODATA ? "the file ended early" : strerror(code));
        return -1;
    }
    int64_t failed_at = 0;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
    for (int64_t c = 0; c < n_chunks; c++) {
        const size_t begin = (size_t)c * READ_CHUNK;
        const size_t size = layer->data_size - begin < READ_CHUNK ? layer->data_size - begin : READ_CHUNK;
        const int code = io_read_now(fd, layer->data + begin, size, layer->spec.file_offset + (int64_t)begin);
        if (code != 0) {
#pragma omp critical
            {
                failed = code;
                failed_at = layer->spec.file_offset + (int64_t)begin;
            }
        }
    }
    if (failed != 0) {
        snprintf(err, err_len, "layer %d: reading bundles at offset %lld failed: %s", layer->spec.index,
                 (long long)failed_at, failed == EIO ? "the file ended early or the device failed" : strerror(failed));
        return -1;
    }
    return 0;
}

int pi_model_add_panels(struct pi_model *model, const struct ggml_tensor *tensor) {
    if (model->n_panels == model->panels_room) {
        const int room = model->panels_room == 0 ? 64 : 2 * model->panels_room;
        struct pi_panel_tensor *panels = realloc(model->panels, (size_t)room * sizeof *panels);
        if (panels == NULL) return -1;
        model->panels = panels;
        model->panels_room = room;
    }
    struct pi_panel_tensor *panel = &model->panels[model->n_panels++];
    *panel = (struct pi_panel_tensor){
        .type = tensor->type, .n_in = tensor->ne[0], .data = tensor->data, .size = ggml.ggml_nbytes(tensor)};
    memcpy(panel->name, tensor->name, sizeof panel->name);
    return 0;
}

static const struct pi_panel_tensor *find_panel(const struct pi_model *model, const char *name) {
    for (int i = 0; i < model->n_panels; i++) {
        if (strcmp(model->panels[i].name, name) == 0) return &model->panels[i];
    }
    return NULL;
}

int pi_model_read_panels(struct pi_model *model, const int *fds, int n_files, int n, const struct pi_panel_source *sources,
                         bool drop, int n_threads, char *err, size_t err_len) {
    for (int i = 0; i < n; i++) {
        const struct pi_panel_source *s = &sources[i];
        const struct pi_panel_tensor *panel = find_panel(model, s->name);
        if (panel == NULL) continue; /* not every loading allocates tensors */
        int64_t where = s->offset;
        const int code = s->file < 0 || s->file >= n_files || s->offset < 0 || n_threads < 1
                             ? EINVAL
                             : panel_fill(panel, fds[s->file], s->offset, drop, n_threads, &where);
        if (code != 0) {
            snprintf(err, err_len, "reading %s at offset %lld failed: %s", s->name, (long long)where,
                     code == EIO ? "the file ended early or the device failed" : strerror(code));
            return -1;
        }
    }
    return 0;
}

static struct flash *open_flash(const int *fds, int n_files, const struct pi_flash_spec *spec, size_t largest, char *err,
                                size_t err_len) {
    const struct flash_options options = {.engine = (enum io_engine)spec->engine,
                                          .depth = spec->depth,
                                          .flight = spec->flight < 0 ? 0 : (size_t)spec->flight,
                                          .gap = spec->gap < 0 ? 0 : (size_t)spec->gap,
                                          .run = spec->run < 0 ? 0 : (size_t)spec->run,
                                          .transit = spec->transit < 0 ? 0 : (size_t)spec->transit,
                                          .transit_slot = largest};
    if (spec->engine < IO_AUTO || spec->engine > IO_THREADS || spec->depth < 0 || spec->depth > 4096 ||
        spec->run > 64 << 20 || spec->transit > 1 << 30 || spec->policy < STORE_LFU || spec->policy > STORE_LRU) {
        snprintf(err, err_len, "bad settings for reading from flash");
        return NULL;
    }
    return flash_open(fds, n_files, &options, err, err_len);
}

struct pi_model *pi_model_open(const int *fds, int n_files, int n_layers, const struct pi_layer_spec *specs, int n_slabs,
                               const struct pi_slab_spec *slabs, int activation, const struct pi_flash_spec *flash,
                               char *err, size_t err_len) {
    struct stat st;
    if (activation < PI_ACT_NATIVE || activation > PI_ACT_GELU || n_layers < 0 || n_layers > 65536 || n_slabs < 0 ||
        n_slabs > 1 << 20 || n_files < 1 || n_files > 65536 || (n_slabs > 0 && flash == NULL)) {
        snprintf(err, err_len, "unknown activation %d or bad counts of layers (%d), matrices (%d) or files (%d)", activation,
                 n_layers, n_slabs, n_files);
        return NULL;
    }
    if (fstat(fds[0], &st) != 0) {
        snprintf(err, err_len, "cannot stat the model file: %s", strerror(errno));
        return NULL;
    }
    struct pi_model *model = calloc(1, sizeof *model + (size_t)n_layers * sizeof model->layers[0]);
    if (model == NULL) {
        snprintf(err, err_len, "no memory for %d layers", n_layers);
        return NULL;
    }
    atomic_init(&model->refs, 1);
    atomic_fetch_add(&live_models, 1);
    pthread_mutex_init(&model->evaluating, NULL);
    model->activation = (enum pi_activation)activation;
    model->n_layers = n_layers;
    backend_buft_init(&model->buft, model);
    backend_buft_init(&model->panel_buft, model);
    bool ok = true;
    if (flash != NULL) {
        int64_t largest = 0; /* bundle that is streamed */
        for (int i = 0; i < n_layers; i++) {
            if (specs[i].n_slots > 0 && specs[i].stride > largest) largest = specs[i].stride;
        }
        model->flash = open_flash(fds, n_files, flash, (size_t)largest, err, err_len);
        model->policy = (enum store_policy)flash->policy;
        model->ahead = flash->ahead;
        ok = model->flash != NULL;
    }
    model->slabs = calloc((size_t)n_slabs + 1, sizeof *model->slabs);
    if (model->slabs == NULL) {
        snprintf(err, err_len, "no memory for %d matrices", n_slabs);
        ok = false;
    }
    for (int i = 0; ok && i < n_layers; i++) {
        ok = layer_init(&model->layers[i], model, &specs[i], (int64_t)st.st_size, err, err_len) == 0;
    }
    for (; ok && model->n_slabs < n_slabs; model->n_slabs++) {
        ok = slab_init(&model->slabs[model->n_slabs], model, &slabs[model->n_slabs], err, err_len) == 0;
        if (!ok) break;
    }
    if (ok) return model;
    pi_model_unref(model);
    return NULL;
}

int pi_model_read(struct pi_model *model, int fd, int n_threads, char *err, size_t err_len) {
    for (int i = 0; i < model->n_layers; i++) {
        if (layer_read(&model->layers[i], fd, n_threads < 1 ? 1 : n_threads, err, err_len) != 0) return -1;
    }
    for (int i = 0; i < model->n_slabs; i++) {
        struct pi_slab *slab = &model->slabs[i];
        if (slab->spec.kind == PI_SLAB_ROUTER) {
            if (slab_read(slab, flash_fd(model->flash, slab->spec.file), err, err_len) != 0) return -1;
            continue;
        }
        if (slab->spec.kind == PI_SLAB_ROWS || store_fill(slab->store) == 0) continue;
        int file;
        uint64_t offset;
        const int code = flash_error(model->flash, &file, &offset);
        snprintf(err, err_len, "%s: reading file %d at offset %llu failed: %s", model->slabs[i].name, file,
                 (unsigned long long)offset, code == ENODATA ? "the file ended early" : strerror(code));
        return -1;
    }
    return 0;
}

int pi_quantize(int type, const float *x, void *y, int64_t n_rows, int64_t n) {
    const size_t row = abi_row_size(type, n);
    if (row == 0 || n_rows < 0 || ggml.ggml_quantize_requires_imatrix(type)) return -1;
    if (type != ABI_TYPE_F32 && ggml.ggml_get_type_traits(type)->from_float_ref == NULL) return -1;
    return ggml.ggml_quantize_chunk(type, x, y, 0, n_rows, n, NULL) == (size_t)n_rows * row ? 0 : -1;
}
