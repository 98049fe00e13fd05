/* buffer.c - see buffer.h. */
#define _GNU_SOURCE
#include "buffer.h"

#include "panels.h"
#include "slab.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGNMENT = 64 };

static const struct pi_weight plain_weight = {PI_ROLE_PLAIN, NULL, NULL}, panel_weight = {PI_ROLE_PANEL, NULL, NULL};

struct buffer_context {
    struct pi_model *model;
    void *base;
    size_t size;
};

const struct pi_weight *buffer_weight(const struct ggml_tensor *tensor) {
    return tensor->extra != NULL ? tensor->extra : &plain_weight;
}

struct pi_model *buffer_model(const struct ggml_tensor *tensor) {
    return ((struct buffer_context *)tensor->buffer->context)->model;
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    struct buffer_context *c = buffer->context;
    munmap(c->base, c->size);
    pi_model_unref(c->model);
    free(c);
}

static void *buffer_base(ggml_backend_buffer_t buffer) {
    return ((struct buffer_context *)buffer->context)->base;
}

static bool is_lora(const char *name) {
    return strstr(name, ".lora_") != NULL;
}

/* The layer whose weight a LoRA tensor adapts: "blk.0.ffn_up.weight.lora_a" -> blk.0.ffn_up.weight. */
static const struct pi_layer *lora_layer(struct pi_model *model, const char *name) {
    char base[ABI_MAX_NAME];
    const size_t n = (size_t)(strstr(name, ".lora_") - name);
    memcpy(base, name, n);
    base[n] = 0;
    const struct pi_weight *w = pi_model_find(model, base);
    return w == NULL ? NULL : w->layer;
}

/* 0 where it cannot be kept in panels. */
static size_t tensor_panel_size(const struct ggml_tensor *t) {
    return t->ne[3] == 1 ? panel_size(t->type, t->ne[0], t->ne[1], t->ne[2]) : 0;
}

static int buffer_init_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t) {
    struct buffer_context *c = buffer->context;
    if (t->view_src != NULL) return ABI_STATUS_SUCCESS;
    if (is_lora(t->name)) {
        /* An adapter knows neurons by their original number. Where they were reordered it would hit others. */
        const struct pi_layer *layer = lora_layer(c->model, t->name);
        t->extra = NULL;
        return layer != NULL && layer->order != NULL ? ABI_STATUS_FAILED : ABI_STATUS_SUCCESS;
    }
    if (buffer->buft == &c->model->panel_buft) {
        t->extra = (void *)(uintptr_t)&panel_weight; /* never written to */
        if (tensor_panel_size(t) == 0) return ABI_STATUS_FAILED;
        return pi_model_add_panels(c->model, t) == 0 ? ABI_STATUS_SUCCESS : ABI_STATUS_ALLOC_FAILED;
    }
    struct pi_weight *w = pi_model_find(c->model, t->name);
    t->extra = w;
    if (w == NULL) return ABI_STATUS_SUCCESS;
    if (w->role == PI_ROLE_SLAB) {
        const struct pi_slab_spec *slab = &w->slab->spec;
        const bool same = t->type == slab->type && t->ne[0] == slab->n_in && t->ne[1] == slab->n_out &&
                          t->ne[2] == (slab->n_expert == 0 ? 1 : slab->n_expert) && t->ne[3] == 1;
        return same ? ABI_STATUS_SUCCESS : ABI_STATUS_FAILED;
    }
    const struct pi_layer_spec *spec = &w->layer->spec;
    const bool down = w->role == PI_ROLE_DOWN;
    const int type = w->role == PI_ROLE_GATE ? spec->gate_type : down ? spec->down_source_type : spec->up_type;
    const int64_t experts = spec->n_expert == 0 ? 1 : spec->n_expert;
    const bool fits = t->type == type && t->ne[0] == (down ? spec->n_ff : spec->n_embd) &&
                      t->ne[1] == (down ? spec->n_embd : spec->n_ff) &&
                      t->ne[2] == experts && t->ne[3] == 1;
    return fits ? ABI_STATUS_SUCCESS : ABI_STATUS_FAILED;
}

static void buffer_memset_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t, uint8_t value, size_t offset,
                                 size_t size) {
    (void)buffer;
    const enum pi_role role = buffer_weight(t)->role;
    if (role == PI_ROLE_PLAIN) memset((char *)t->data + offset, value, size);
    if (role != PI_ROLE_PANEL) return;
    for (size_t at = 0; at < size; at++) panel_write(t->type, t->ne[0], t->data, &value, offset + at, 1);
}

static void buffer_set_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *t, const void *data, size_t offset,
                              size_t size) {
    (void)buffer;
    /* Everything else is a hole of the virtual file: nobody has read what llama.cpp brings (pi_model_read_panels() does). */
    if (buffer_weight(t)->role == PI_ROLE_PLAIN) memcpy((char *)t->data + offset, data, size);
}

/* Where rebuilt rows go, and from which layer they come. */
struct rebuild {
    const struct pi_layer *layer;
    enum pi_role role;
    float *matrix, *column; /* down only: [n_expert][n_embd][n_ff], one column */
    uint8_t *rows;          /* gate, up */
};

static void rebuild_neuron(int64_t unit, void *context) {
    const struct rebuild *to = context;
    const struct pi_layer_spec *spec = &to->layer->spec;
    const int64_t expert = unit / spec->n_ff, j = unit % spec->n_ff;
    if (to->role == PI_ROLE_DOWN) {
        ffn_column(to->layer, (int)expert, j, to->column);
        float *matrix = to->matrix + expert * spec->n_embd * spec->n_ff;
        for (int64_t i = 0; i < spec->n_embd; i++) matrix[i * spec->n_ff + j] = to->column[i];
    } else {
        const bool gate = to->role == PI_ROLE_GATE;
        const size_t row = abi_row_size(gate ? spec->gate_type : spec->up_type, spec->n_embd);
        memcpy(to->rows + (size_t)unit * row,
               pi_bundle(to->layer, (int)expert, j) + (gate ? spec->gate_offset : spec->up_offset), row);
    }
}

/* Rebuilds a matrix as llama.cpp was shown it: down goes back from columns to rows, into the source's type. 0 or -1. */
static int rebuild(const struct pi_weight *w, uint8_t *dst) {
    if (w->role == PI_ROLE_SLAB) return slab_copy(w->slab, dst) == FFN_OK ? 0 : -1;
    const struct pi_layer_spec *spec = &w->layer->spec;
    const int64_t rows = spec->n_embd * (spec->n_expert == 0 ? 1 : spec->n_expert);
    struct rebuild to = {.layer = w->layer, .role = w->role, .rows = dst};
    int result = -1;
    if (w->role == PI_ROLE_DOWN) {
        if (ggml.ggml_quantize_requires_imatrix(spec->down_source_type)) return -1;
        to.matrix = malloc((size_t)(rows * spec->n_ff) * sizeof(float));
        to.column = malloc((size_t)spec->n_embd * sizeof(float));
        if (to.matrix == NULL || to.column == NULL) goto done;
    }
    if (ffn_each_bundle(w->layer, rebuild_neuron, &to) != FFN_OK) goto done;
    result = 0;
    if (w->role != PI_ROLE_DOWN) return result;
    if (spec->down_source_type == ABI_TYPE_F32) memcpy(dst, to.matrix, (size_t)(rows * spec->n_ff) * sizeof(float));
    else ggml.ggml_quantize_chunk(spec->down_source_type, to.matrix, dst, 0, rows, spec->n_ff, NULL);
done:
    free(to.matrix);
    free(to.column);
    return result;
}

/* Rarely called (saving a loaded model, copying a weight for an operator we do not know): correct, not fast. */
static void buffer_get_tensor(ggml_backend_buffer_t buffer, const struct ggml_tensor *t, void *data, size_t offset,
                              size_t size) {
    const struct pi_weight *w = buffer_weight(t);
    (void)buffer;
    if (w->role == PI_ROLE_PLAIN) {
        memcpy(data, (const char *)t->data + offset, size);
        return;
    }
    if (w->role == PI_ROLE_PANEL) {
        panel_read(t->type, t->ne[0], t->data, data, offset, size);
        return;
    }
    const size_t whole = ggml.ggml_nbytes(t);
    uint8_t *copy = offset == 0 && size == whole ? data : malloc(whole);
    int failed = copy == NULL;
    if (!failed) failed = rebuild(w, copy);
    if (failed) {
        memset(data, 0xff, size); /* the interface has no way to fail; NaNs at least are not mistaken for weights */
    } else if (copy != data) {
        memcpy(data, copy + offset, size);
    }
    if (copy != data) free(copy);
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    (void)buffer;
    (void)value; /* only KV caches and compute buffers are ever cleared, and those never lie here */
}

/* llama.cpp takes buffer types of the same name for the same one. */
static const char *buft_name(ggml_backend_buffer_type_t buft) {
    const struct pi_model *model = buft->context;
    return buft == &model->panel_buft ? "POWERINFER_PANELS" : "POWERINFER";
}

static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    struct pi_model *model = buft->context;
    struct buffer_context *c = calloc(1, sizeof *c);
    if (c == NULL) return NULL;
    c->model = model;
    c->size = size + ALIGNMENT;
    /* Address space, not memory: pages of bundled tensors are never touched. */
    c->base = mmap(NULL, c->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (c->base == MAP_FAILED) {
        free(c);
        return NULL;
    }
    /* Panels are read whole for every token. Where bundled tensors lie between them, this would cost memory. */
    if (buft == &model->panel_buft) (void)madvise(c->base, c->size, MADV_HUGEPAGE);
    pi_model_ref(model);
    const struct ggml_backend_buffer_i iface = {
        .free_buffer = buffer_free,
        .get_base = buffer_base,
        .init_tensor = buffer_init_tensor,
        .memset_tensor = buffer_memset_tensor,
        .set_tensor = buffer_set_tensor,
        .get_tensor = buffer_get_tensor,
        .clear = buffer_clear,
    };
    return ggml.ggml_backend_buffer_init(buft, iface, c, size);
}

static size_t buft_alignment(ggml_backend_buffer_type_t buft) {
    (void)buft;
    return ALIGNMENT;
}

/* Panels may need more than the tensor has; llama.cpp asks about every tensor before it allocates a buffer. */
static size_t buft_alloc_size(ggml_backend_buffer_type_t buft, const struct ggml_tensor *t) {
    const struct pi_model *model = buft->context;
    const size_t plain = ggml.ggml_nbytes(t), panels = tensor_panel_size(t);
    return buft == &model->panel_buft && panels > plain ? panels : plain;
}

void buffer_type_init(struct ggml_backend_buffer_type *buft, ggml_backend_dev_t device, struct pi_model *model) {
    *buft = (struct ggml_backend_buffer_type){
        .iface = {.get_name = buft_name, .alloc_buffer = buft_alloc, .get_alignment = buft_alignment,
                  .get_alloc_size = buft_alloc_size},
        .device = device,
        .context = model,
    };
}

bool buffer_type_is_ours(ggml_backend_buffer_type_t buft) {
    return buft != NULL && buft->iface.get_name == buft_name;
}

bool buffer_is_ours(ggml_backend_buffer_t buffer) {
    return buffer != NULL && buffer->iface.free_buffer == buffer_free;
}
