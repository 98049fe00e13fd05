/* model.c - loading and keeping neuron bundles. See model.h. */
#define _GNU_SOURCE
#include "model.h"

#include "backend.h"

#include <errno.h>
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
        if (model->layers[i].data != NULL) munmap(model->layers[i].data, model->layers[i].data_size);
        free(model->layers[i].order);
        free(model->layers[i].scales);
    }
    free(model);
    atomic_fetch_sub(&live_models, 1);
}

void pi_model_close(struct pi_model *model) {
    if (model != NULL) pi_model_unref(model);
}

void *pi_model_buft(struct pi_model *model) {
    return &model->buft;
}

void pi_model_set_dense(struct pi_model *model, bool dense) {
    atomic_store(&model->dense, dense);
}

struct pi_weight *pi_model_find(struct pi_model *model, const char *tensor_name) {
    for (int i = 0; i < model->n_layers; i++) {
        struct pi_layer *layer = &model->layers[i];
        if (layer->spec.up_name != NULL && strcmp(layer->up_name, tensor_name) == 0) return &layer->up;
        if (strcmp(layer->down_name, tensor_name) == 0) return &layer->down;
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
                                   .ns = c->ns};
    return 0;
}

void pi_model_reset_stats(struct pi_model *model) {
    for (int i = 0; i < model->n_layers; i++) {
        for (int phase = 0; phase < 2; phase++) {
            struct pi_counters *c = &model->layers[i].counters[phase];
            c->calls = c->rows = c->neurons = c->selected = c->fired = c->touched = c->ns = 0;
        }
    }
}

/* Bytes of the table of scales. Cannot overflow once the bundles' size has been checked: they are larger. */
static size_t scales_size(const struct pi_layer_spec *spec) {
    const size_t experts = spec->n_expert == 0 ? 1 : (size_t)spec->n_expert;
    return experts * (size_t)(spec->n_ff / PI_SCALE_GROUP) * (size_t)spec->n_embd * sizeof(uint16_t);
}

/* Copies a spec into the layer and checks it against the types and the file. Returns 0, or -1 with a sentence. */
static int layer_init(struct pi_layer *layer, struct pi_model *model, const struct pi_layer_spec *spec,
                      int64_t file_size, char *err, size_t err_len) {
    const char *field = NULL;
    const bool gated = spec->up_name != NULL;
    const size_t up_size = gated ? abi_row_size(spec->up_type, spec->n_embd) : 0;
    const size_t down_size = abi_row_size(spec->down_type, spec->n_embd);
    const int64_t experts = spec->n_expert == 0 ? 1 : spec->n_expert;
    const bool scaled = spec->down_type == ABI_TYPE_I8;
    int64_t total = 0;

    if (spec->down_name == NULL || strlen(spec->down_name) >= ABI_MAX_NAME) field = "name of ffn_down";
    else if (gated && strlen(spec->up_name) >= ABI_MAX_NAME) field = "name of ffn_up";
    else if (spec->n_embd <= 0 || spec->n_embd > INT32_MAX) field = "n_embd";
    else if (spec->n_ff <= 0 || spec->n_ff > INT32_MAX) field = "n_ff";
    else if (spec->n_expert < 0 || spec->n_expert > 65536) field = "n_expert";
    else if (down_size == 0) field = "down type";
    else if (abi_row_size(spec->down_source_type, spec->n_ff) == 0) field = "down source type";
    else if (gated && up_size == 0) field = "up type";
    else if (gated && (spec->up_offset < 0 || spec->up_offset > INT32_MAX)) field = "up offset";
    else if (spec->down_offset < (gated ? spec->up_offset + (int64_t)up_size : 0) || spec->down_offset > INT32_MAX)
        field = "down offset";
    else if (spec->stride > INT32_MAX || spec->stride < spec->down_offset + (int64_t)down_size) field = "stride";
    else if (__builtin_mul_overflow(spec->stride, spec->n_ff, &total) ||
             __builtin_mul_overflow(total, experts, &total))
        field = "size";
    else if (spec->file_offset < 0 || spec->file_offset > file_size || total > file_size - spec->file_offset)
        field = "extent (it reaches past the end of the file)";
    else if (scaled && (spec->n_ff % PI_SCALE_GROUP != 0 || spec->scale_offset < 0 || spec->scale_offset > file_size ||
                        (int64_t)scales_size(spec) > file_size - spec->scale_offset))
        field = "table of scales";
    if (field != NULL) {
        snprintf(err, err_len, "layer %d: the bundle's %s does not fit", spec->index, field);
        return -1;
    }
    layer->model = model;
    layer->spec = *spec;
    strcpy(layer->down_name, spec->down_name);
    layer->spec.down_name = layer->down_name;
    layer->down = (struct pi_weight){PI_ROLE_DOWN, layer};
    if (gated) {
        strcpy(layer->up_name, spec->up_name);
        layer->spec.up_name = layer->up_name;
        layer->up = (struct pi_weight){PI_ROLE_UP, layer};
    }
    if (spec->order != NULL) {
        const size_t n = (size_t)(experts * spec->n_ff);
        layer->order = malloc(n * sizeof(int32_t));
        for (size_t j = 0; layer->order != NULL && j < n; j++) {
            if (spec->order[j] < 0 || spec->order[j] >= spec->n_ff) {
                snprintf(err, err_len, "layer %d: the neuron order names neuron %d", spec->index, spec->order[j]);
                return -1;
            }
            layer->order[j] = spec->order[j];
        }
        if (layer->order == NULL) {
            snprintf(err, err_len, "layer %d: no memory for the neuron order", spec->index);
            return -1;
        }
    }
    layer->spec.order = NULL; /* the caller's memory */
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

/* Reads size bytes at offset. Returns 0, EIO at the end of the file, or the errno. */
static int read_fully(int fd, uint8_t *dst, size_t size, off_t offset) {
    while (size > 0) {
        const ssize_t n = pread(fd, dst, size, offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno;
        if (n == 0) return EIO;
        dst += n;
        size -= (size_t)n;
        offset += n;
    }
    return 0;
}

static int scales_read(struct pi_layer *layer, int fd, char *err, size_t err_len) {
    const size_t size = scales_size(&layer->spec);
    if (layer->scales == NULL) layer->scales = malloc(size);
    if (layer->scales == NULL) {
        snprintf(err, err_len, "layer %d: no memory for %zu bytes of scales", layer->spec.index, size);
        return -1;
    }
    if (read_fully(fd, (uint8_t *)layer->scales, size, (off_t)layer->spec.scale_offset) != 0) {
        snprintf(err, err_len, "layer %d: reading scales at offset %lld failed", layer->spec.index,
                 (long long)layer->spec.scale_offset);
        return -1;
    }
    return 0;
}

static int layer_read(struct pi_layer *layer, int fd, int n_threads, char *err, size_t err_len) {
    const int64_t n_chunks = (int64_t)((layer->data_size + READ_CHUNK - 1) / READ_CHUNK);
    int failed = 0;
    int64_t failed_at = 0;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
    for (int64_t c = 0; c < n_chunks; c++) {
        const size_t begin = (size_t)c * READ_CHUNK;
        const size_t size = layer->data_size - begin < READ_CHUNK ? layer->data_size - begin : READ_CHUNK;
        const int code = read_fully(fd, layer->data + begin, size, (off_t)(layer->spec.file_offset + (int64_t)begin));
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
    return layer->spec.down_type == ABI_TYPE_I8 ? scales_read(layer, fd, err, err_len) : 0;
}

struct pi_model *pi_model_open(int fd, int n_layers, const struct pi_layer_spec *specs, int activation, char *err,
                               size_t err_len) {
    struct stat st;
    if (activation < PI_ACT_NATIVE || activation > PI_ACT_DRELU || n_layers < 0 || n_layers > 65536) {
        snprintf(err, err_len, "unknown activation %d or bad layer count %d", activation, n_layers);
        return NULL;
    }
    if (fstat(fd, &st) != 0) {
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
    model->activation = (enum pi_activation)activation;
    model->n_layers = n_layers;
    backend_buft_init(&model->buft, model);
    for (int i = 0; i < n_layers; i++) {
        if (layer_init(&model->layers[i], model, &specs[i], (int64_t)st.st_size, err, err_len) != 0) {
            pi_model_unref(model);
            return NULL;
        }
    }
    return model;
}

int pi_model_read(struct pi_model *model, int fd, int n_threads, char *err, size_t err_len) {
    for (int i = 0; i < model->n_layers; i++) {
        if (layer_read(&model->layers[i], fd, n_threads < 1 ? 1 : n_threads, err, err_len) != 0) return -1;
    }
    return 0;
}

int pi_quantize(int type, const float *x, void *y, int64_t n_rows, int64_t n) {
    const size_t row = abi_row_size(type, n);
    if (row == 0 || n_rows < 0 || ggml.ggml_quantize_requires_imatrix(type)) return -1;
    if (type != ABI_TYPE_F32 && ggml.ggml_get_type_traits(type)->from_float_ref == NULL) return -1;
    return ggml.ggml_quantize_chunk(type, x, y, 0, n_rows, n, NULL) == (size_t)n_rows * row ? 0 : -1;
}
