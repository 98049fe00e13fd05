/* backend.c - see backend.h. */
#define _GNU_SOURCE
#include "backend.h"

#include "buffer.h"
#include "ffn.h"
#include "kernels.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char DEVICE_NAME[] = "POWERINFER";

/* One per llama_context. */
struct backend_context {
    int n_threads;
    ggml_abort_callback abort;
    void *abort_data;
    const struct ggml_tensor *glu; /* the last GLU computed here; guards against activations computed elsewhere */
    struct ffn_scratch inputs, work;
};

/* ---- matching ------------------------------------------------------------------------------------------------ */

static bool is_noop(const struct ggml_tensor *t) {
    return t->op == ggml.op_none || t->op == ggml.op_reshape || t->op == ggml.op_view || t->op == ggml.op_permute ||
           t->op == ggml.op_transpose;
}

static bool is_mul_mat(const struct ggml_tensor *t) {
    return t->op == ggml.op_mul_mat || t->op == ggml.op_mul_mat_id;
}

/* The weight of ours that a product multiplies with, or NULL. */
static const struct pi_weight *weight_of(const struct ggml_tensor *t) {
    return is_mul_mat(t) && buffer_is_ours(t->src[0]->buffer) ? buffer_weight(t->src[0]) : NULL;
}

/* Follows a tensor back to the up product it was made from, through what LoRA, biases and views put in between. */
static const struct pi_weight *up_behind(const struct ggml_tensor *t) {
    for (int hops = 0; t != NULL && hops < 8; hops++) {
        const struct pi_weight *w = weight_of(t);
        if (w != NULL) return w->role == PI_ROLE_UP ? w : NULL;
        if (!is_noop(t) && t->op != ggml.op_add && t->op != ggml.op_add_id && t->op != ggml.op_scale &&
            t->op != ggml.op_mul)
            return NULL;
        t = t->src[0];
    }
    return NULL;
}

static bool is_f32_rows(const struct ggml_tensor *t) {
    return t->type == ABI_TYPE_F32 && t->nb[0] == sizeof(float);
}

static bool supports_product(const struct ggml_tensor *op) {
    const struct ggml_tensor *w = op->src[0];
    if (w->view_src != NULL || !buffer_is_ours(w->buffer)) return false;
    if (!is_f32_rows(op->src[1]) || !is_f32_rows(op)) return false;
    if (op->op == ggml.op_mul_mat && (w->ne[2] != 1 || w->ne[3] != 1)) return false;
    if (op->op == ggml.op_mul_mat_id && op->src[2]->type != ABI_TYPE_I32) return false;
    if (op->src[1]->ne[3] != 1) return false;
    return buffer_weight(w)->role != PI_ROLE_PLAIN || ggml.ggml_get_type_traits_cpu(w->type)->vec_dot != NULL;
}

static bool supports_op(ggml_backend_dev_t dev, const struct ggml_tensor *op) {
    (void)dev;
    if (is_noop(op)) return buffer_is_ours(op->view_src != NULL ? op->view_src->buffer : op->buffer);
    if (is_mul_mat(op)) return supports_product(op);
    if (op->op == ggml.op_glu && op->src[1] != NULL && is_f32_rows(op->src[0]) && is_f32_rows(op->src[1]) &&
        is_f32_rows(op)) {
        const struct pi_weight *up = up_behind(op->src[1]);
        return up != NULL && up->layer->model->activation != PI_ACT_NATIVE;
    }
    return false;
}

/* ---- executing ------------------------------------------------------------------------------------------------ */

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Row (i1, i2) of a tensor; dimension 3 is 1 everywhere here (supports_product). */
static void *row_at(const struct ggml_tensor *t, int64_t i1, int64_t i2) {
    return (char *)t->data + (size_t)i1 * t->nb[1] + (size_t)i2 * t->nb[2];
}

/* The products of one MUL_MAT(_ID) node: row (i1, i2) of dst takes expert `expert` and row (x1, x2) of src1. */
struct product_row {
    int64_t i1, i2, x1, x2;
    int expert;
};

/* Enumerates the rows of a product node. Returns their number, or -1 when an expert id is out of range. */
static int64_t product_rows(const struct ggml_tensor *node, struct product_row *rows) {
    const bool id = node->op == ggml.op_mul_mat_id;
    const struct ggml_tensor *x = node->src[1];
    int64_t n = 0;
    for (int64_t i2 = 0; i2 < node->ne[2]; i2++) {
        for (int64_t i1 = 0; i1 < node->ne[1]; i1++, n++) {
            int32_t expert = 0;
            if (id) { /* dst is [n_out, n_used, n_tokens], ids is [n_used, n_tokens] */
                const struct ggml_tensor *ids = node->src[2];
                memcpy(&expert, (const char *)ids->data + (size_t)i1 * ids->nb[0] + (size_t)i2 * ids->nb[1], 4);
                if (expert < 0 || expert >= node->src[0]->ne[2]) return -1;
            }
            rows[n] = (struct product_row){i1, i2, i1 % x->ne[1], i2 % x->ne[2], expert};
        }
    }
    return n;
}

/* What evaluating a product node needs besides ffn.c's scratch, carved out of context->inputs. */
struct node_memory {
    struct product_row *rows;
    struct ffn_row *ffn;
    struct ffn_product *products;
    uint8_t *xq; /* the rows of src1 in the type that vec_dot wants */
    size_t xq_row;
};

static bool node_memory_reserve(struct backend_context *c, const struct ggml_tensor *node, int weight_type,
                                struct node_memory *m) {
    const size_t n = (size_t)(node->ne[1] * node->ne[2]);
    const size_t n_x = (size_t)(node->src[1]->ne[1] * node->src[1]->ne[2]);
    const int64_t n_in = node->src[1]->ne[0];
    m->xq_row = weight_type < 0 ? 0 : abi_row_size(ggml.ggml_get_type_traits_cpu(weight_type)->vec_dot_type, n_in);
    if (weight_type >= 0 && m->xq_row == 0) return false;
    m->xq_row = (m->xq_row + 63) & ~(size_t)63;
    uint8_t *p = ffn_scratch_reserve(&c->inputs, n_x * m->xq_row + n * (sizeof *m->rows + sizeof *m->ffn +
                                                                       sizeof *m->products));
    if (p == NULL) return false;
    m->xq = p;
    p += n_x * m->xq_row;
    m->rows = (struct product_row *)p;
    p += n * sizeof *m->rows;
    m->ffn = (struct ffn_row *)p;
    p += n * sizeof *m->ffn;
    m->products = (struct ffn_product *)p;
    return true;
}

static void quantize_inputs(const struct backend_context *c, const struct ggml_tensor *x, int weight_type,
                            const struct node_memory *m) {
    const int type = ggml.ggml_get_type_traits_cpu(weight_type)->vec_dot_type;
    const int64_t n1 = x->ne[1], n = n1 * x->ne[2];
#pragma omp parallel for num_threads(c->n_threads) if (n > 1)
    for (int64_t r = 0; r < n; r++) {
        kernel_round_input(type, x->ne[0], row_at(x, r % n1, r / n1), m->xq + (size_t)r * m->xq_row);
    }
}

static const void *input_of(const struct ggml_tensor *node, const struct node_memory *m, const struct product_row *r) {
    return m->xq + (size_t)(r->x2 * node->src[1]->ne[1] + r->x1) * m->xq_row;
}

/* A product with all rows of an up segment or of an ordinary tensor. */
static int compute_dense(struct backend_context *c, struct ggml_tensor *node, const struct pi_weight *w) {
    const struct ggml_tensor *src0 = node->src[0];
    const struct pi_layer_spec *spec = w->role == PI_ROLE_UP ? &w->layer->spec : NULL;
    const uint8_t *base = spec != NULL ? w->layer->data + spec->up_offset : src0->data;
    const size_t stride = spec != NULL ? (size_t)spec->stride : src0->nb[1];
    const size_t expert_stride = spec != NULL ? stride * (size_t)spec->n_ff : src0->nb[2];
    struct node_memory m;
    if (!node_memory_reserve(c, node, src0->type, &m)) return ABI_STATUS_ALLOC_FAILED;
    const int64_t n = product_rows(node, m.rows);
    if (n < 0) return ABI_STATUS_FAILED;
    quantize_inputs(c, node->src[1], src0->type, &m);
    for (int64_t r = 0; r < n; r++) {
        m.products[r] = (struct ffn_product){base + (size_t)m.rows[r].expert * expert_stride,
                                             input_of(node, &m, &m.rows[r]), row_at(node, m.rows[r].i1, m.rows[r].i2)};
    }
    ffn_dense(m.products, (int)n, src0->type, src0->ne[0], src0->ne[1], stride, c->n_threads);
    return ABI_STATUS_SUCCESS;
}

/* The sparse path. With glu: up, glu and down of one layer at once; without: only down, whose input holds zeros. */
static int compute_sparse(struct backend_context *c, struct ggml_tensor *up, struct ggml_tensor *glu,
                          struct ggml_tensor *down, const struct pi_weight *w) {
    const uint64_t start = now_ns();
    struct pi_layer *layer = w->layer;
    const bool fused = glu != NULL;
    const struct ggml_tensor *first = fused ? up : down;
    struct node_memory m;
    if (!node_memory_reserve(c, first, fused ? layer->spec.up_type : -1, &m)) return ABI_STATUS_ALLOC_FAILED;
    const int64_t n = product_rows(first, m.rows);
    if (n < 0) return ABI_STATUS_FAILED;
    if (fused) quantize_inputs(c, up->src[1], layer->spec.up_type, &m);
    for (int64_t r = 0; r < n; r++) {
        const struct product_row *p = &m.rows[r];
        m.ffn[r] = (struct ffn_row){
            .expert = p->expert,
            .xq = fused ? input_of(up, &m, p) : NULL,
            .g = fused ? row_at(glu->src[0], p->i1, p->i2) : row_at(down->src[1], p->x1, p->x2),
            .h = fused ? row_at(glu, p->i1, p->i2) : NULL,
            .out = row_at(down, p->i1, p->i2),
        };
    }
    const int64_t n_tokens = down->op == ggml.op_mul_mat_id ? down->ne[2] : n;
    struct pi_counters *counters = &layer->counters[n_tokens > 1];
    const bool dense = atomic_load_explicit(&layer->model->dense, memory_order_relaxed);
    if (ffn_sparse(layer, m.ffn, (int)n, dense, c->n_threads, &c->work, counters) != 0) return ABI_STATUS_ALLOC_FAILED;
    counters->ns += now_ns() - start;
    return ABI_STATUS_SUCCESS;
}

static int compute_glu(struct ggml_tensor *node) {
    const struct pi_weight *up = up_behind(node->src[1]);
    if (up == NULL) return ABI_STATUS_FAILED;
    for (int64_t i3 = 0; i3 < node->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < node->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < node->ne[1]; i1++) {
                ffn_activate(up->layer->model->activation, node->ne[0],
                             (float *)((char *)row_at(node->src[0], i1, i2) + (size_t)i3 * node->src[0]->nb[3]),
                             (float *)((char *)row_at(node->src[1], i1, i2) + (size_t)i3 * node->src[1]->nb[3]),
                             (float *)((char *)row_at(node, i1, i2) + (size_t)i3 * node->nb[3]));
            }
        }
    }
    return ABI_STATUS_SUCCESS;
}

/* The next node that computes something, or NULL. */
static struct ggml_tensor *next_node(struct ggml_cgraph *graph, int *i) {
    const int n = ggml.ggml_graph_n_nodes(graph);
    while (++*i < n) {
        struct ggml_tensor *node = ggml.ggml_graph_node(graph, *i);
        if (!is_noop(node) && node->ne[0] > 0 && node->ne[1] > 0 && node->ne[2] > 0 && node->ne[3] > 0) return node;
    }
    return NULL;
}

/* Whether the nodes after `up` are the GLU and the down product of the same layer, straight from one another. */
static bool matches_fused(const struct ggml_tensor *up, const struct pi_weight *w, const struct ggml_tensor *glu,
                          const struct ggml_tensor *down) {
    if (glu == NULL || down == NULL || glu->op != ggml.op_glu || glu->src[1] != up || down->src[1] != glu) return false;
    const struct pi_weight *d = weight_of(down);
    return d != NULL && d->role == PI_ROLE_DOWN && d->layer == w->layer && up->op == down->op &&
           up->src[2] == down->src[2] && supports_op(NULL, glu);
}

static int graph_compute(ggml_backend_t backend, struct ggml_cgraph *graph) {
    struct backend_context *c = backend->context;
    int i = -1;
    for (struct ggml_tensor *node; (node = next_node(graph, &i)) != NULL;) {
        int status;
        if (c->abort != NULL && c->abort(c->abort_data)) return ABI_STATUS_ABORTED;
        if (node->op == ggml.op_glu) {
            status = compute_glu(node);
            c->glu = node;
        } else {
            const struct pi_weight *w = weight_of(node);
            if (w == NULL) return ABI_STATUS_FAILED;
            int ahead = i;
            struct ggml_tensor *glu = w->role == PI_ROLE_UP ? next_node(graph, &ahead) : NULL;
            struct ggml_tensor *down = glu != NULL ? next_node(graph, &ahead) : NULL;
            if (w->role == PI_ROLE_UP && matches_fused(node, w, glu, down)) {
                status = compute_sparse(c, node, glu, down, w);
                i = ahead;
            } else if (w->role == PI_ROLE_DOWN) {
                /* A gated layer with an activation of its own must have got it from us: stock's graph may well
                 * say SwiGLU where the model is dReLU. Better no answer than a wrong one. */
                const bool ours = w->layer->spec.up_name != NULL && w->layer->model->activation != PI_ACT_NATIVE;
                if (ours && node->src[1] != c->glu) return ABI_STATUS_FAILED;
                c->glu = NULL; /* addresses are reused from graph to graph */
                status = compute_sparse(c, NULL, NULL, node, w);
            } else {
                status = compute_dense(c, node, w);
            }
        }
        if (status != ABI_STATUS_SUCCESS) return status;
    }
    return ABI_STATUS_SUCCESS;
}

/* ---- the device ----------------------------------------------------------------------------------------------- */

static struct ggml_backend_device device;

static const char *backend_name(ggml_backend_t backend) {
    (void)backend;
    return DEVICE_NAME;
}

static void backend_free(ggml_backend_t backend) {
    struct backend_context *c = backend->context;
    ffn_scratch_free(&c->inputs);
    ffn_scratch_free(&c->work);
    free(c);
    free(backend);
}

ggml_backend_t backend_new(void) {
    static uint8_t guid[16] = "powerinfer-ext\0\1";
    ggml_backend_t backend = calloc(1, sizeof *backend);
    struct backend_context *c = calloc(1, sizeof *c);
    if (backend == NULL || c == NULL) {
        free(backend);
        free(c);
        return NULL;
    }
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    c->n_threads = cpus > 0 ? (int)cpus : 1;
    *backend = (struct ggml_backend){
        .guid = guid,
        .iface = {.get_name = backend_name, .free = backend_free, .graph_compute = graph_compute},
        .device = &device,
        .context = c,
    };
    return backend;
}

static void set_n_threads(ggml_backend_t backend, int n_threads) {
    struct backend_context *c = backend->context;
    c->n_threads = n_threads < 1 ? 1 : n_threads;
}

static void set_abort_callback(ggml_backend_t backend, ggml_abort_callback abort, void *data) {
    struct backend_context *c = backend->context;
    c->abort = abort;
    c->abort_data = data;
}

static const char *dev_name(ggml_backend_dev_t dev) {
    (void)dev;
    return DEVICE_NAME;
}

static const char *dev_description(ggml_backend_dev_t dev) {
    (void)dev;
    return "sparse FFN (powerinfer-ext)";
}

static void dev_memory(ggml_backend_dev_t dev, size_t *free_bytes, size_t *total) {
    (void)dev;
    *free_bytes = *total = 0; /* as BLAS does: it is the CPU's memory, and the CPU device reports that */
}

static int dev_type(ggml_backend_dev_t dev) {
    (void)dev;
    return ABI_DEVICE_TYPE_ACCEL;
}

static void dev_props(ggml_backend_dev_t dev, struct ggml_backend_dev_props *props) {
    *props = (struct ggml_backend_dev_props){
        .name = dev_name(dev), .description = dev_description(dev), .type = ABI_DEVICE_TYPE_ACCEL};
}

static ggml_backend_t dev_init(ggml_backend_dev_t dev, const char *params) {
    (void)dev;
    (void)params;
    return backend_new();
}

/* The default buffer type is the CPU's own, so that activations stay where stock puts them and no split copies. */
static ggml_backend_buffer_type_t dev_buft(ggml_backend_dev_t dev) {
    (void)dev;
    return ggml.ggml_backend_cpu_buffer_type();
}

static bool dev_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    (void)dev;
    return buffer_type_is_ours(buft) || ggml.ggml_backend_buft_is_host(buft);
}

void backend_buft_init(struct ggml_backend_buffer_type *buft, struct pi_model *model) {
    buffer_type_init(buft, &device, model);
}

static const char *reg_name(ggml_backend_reg_t reg) {
    (void)reg;
    return DEVICE_NAME;
}

static size_t reg_count(ggml_backend_reg_t reg) {
    (void)reg;
    return 1;
}

static ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t index) {
    (void)reg;
    return index == 0 ? &device : NULL;
}

static void *reg_proc(ggml_backend_reg_t reg, const char *name) {
    (void)reg;
    void *result = NULL;
    void (*threads)(ggml_backend_t, int) = set_n_threads;
    void (*abort)(ggml_backend_t, ggml_abort_callback, void *) = set_abort_callback;
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) memcpy(&result, &threads, sizeof result);
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) memcpy(&result, &abort, sizeof result);
    return result;
}

ggml_backend_reg_t backend_reg(void) {
    static struct ggml_backend_reg reg = {
        .api_version = ABI_BACKEND_API_VERSION,
        .iface = {.get_name = reg_name,
                  .get_device_count = reg_count,
                  .get_device = reg_device,
                  .get_proc_address = reg_proc},
    };
    device = (struct ggml_backend_device){
        .iface = {.get_name = dev_name,
                  .get_description = dev_description,
                  .get_memory = dev_memory,
                  .get_type = dev_type,
                  .get_props = dev_props,
                  .init_backend = dev_init,
                  .get_buffer_type = dev_buft,
                  .supports_op = supports_op,
                  .supports_buft = dev_supports_buft},
        .reg = &reg,
    };
    return &reg;
}
