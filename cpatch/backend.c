/* backend.c - see backend.h. */
#define _GNU_SOURCE
#include "backend.h"

#include "attention.h"
#include "buffer.h"
#include "kernels.h"
#include "panels.h"
#include "slab.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char DEVICE_NAME[] = "POWERINFER";

enum {
    ATTENTION_TOKENS = 16, /* more go to stock's products of matrices */
    /* Rows of the cache that are taken at a time: few keys, but all heads', which lie together; the values of a head. */
    ATTENTION_KEYS = 16,
    ATTENTION_VALUES = 128,
    ATTENTION_GROUP = 4    /* inputs that meet them together */
};

/* One per llama_context. */
struct backend_context {
    int n_threads;
    ggml_abort_callback abort;
    void *abort_data;
    const struct ggml_tensor *activated; /* the last activation computed here; guards against any computed elsewhere */
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

static bool is_f32_rows(const struct ggml_tensor *t) {
    return t->type == ABI_TYPE_F32 && t->nb[0] == sizeof(float);
}

/* relu, or the square that makes it a squared relu. */
static bool is_ungated_activation(const struct ggml_tensor *t) {
    return t->op == ggml.op_sqr || (t->op == ggml.op_unary && t->op_params[0] == ggml.unary_relu);
}

/* The weight of ours that a product multiplies with, or NULL. */
static const struct pi_weight *weight_of(const struct ggml_tensor *t) {
    return is_mul_mat(t) && buffer_is_ours(t->src[0]->buffer) ? buffer_weight(t->src[0]) : NULL;
}

/* Follows a tensor back to the product of ours it was made from, through what LoRA, biases and views put in between. */
static const struct pi_weight *product_behind(const struct ggml_tensor *t) {
    for (int hops = 0; t != NULL && hops < 8; hops++) {
        const struct pi_weight *w = weight_of(t);
        if (w != NULL) return w;
        if (!is_noop(t) && t->op != ggml.op_add && t->op != ggml.op_add_id && t->op != ggml.op_scale &&
            t->op != ggml.op_mul && !is_ungated_activation(t))
            return NULL;
        t = t->src[0];
    }
    return NULL;
}

/* The gated layer whose activation this GLU is, if it is ours to compute; else NULL. */
static const struct pi_layer *glu_layer(const struct ggml_tensor *t) {
    if (t->op != ggml.op_glu || t->src[1] == NULL || !is_f32_rows(t->src[0]) || !is_f32_rows(t->src[1]) || !is_f32_rows(t))
        return NULL;
    const struct pi_weight *up = product_behind(t->src[1]);
    return up != NULL && up->role == PI_ROLE_UP && up->layer->spec.gated && pi_activates(up->layer) ? up->layer : NULL;
}

/* The ungated layer whose up product this relu or square comes from, if that product is ours; else NULL. */
static const struct pi_layer *ungated_layer(const struct ggml_tensor *t) {
    if (!is_ungated_activation(t) || !is_f32_rows(t->src[0]) || !is_f32_rows(t)) return NULL;
    const struct pi_weight *up = product_behind(t->src[0]);
    return up != NULL && up->role == PI_ROLE_UP && !up->layer->spec.gated ? up->layer : NULL;
}

static bool supports_product(const struct ggml_tensor *op) {
    const struct ggml_tensor *w = op->src[0];
    if (w->view_src != NULL || !buffer_is_ours(w->buffer)) return false;
    if (!is_f32_rows(op->src[1]) || !is_f32_rows(op)) return false;
    if (buffer_weight(w)->role == PI_ROLE_SLAB && buffer_weight(w)->slab->spec.kind == PI_SLAB_ROWS) return false;
    if (op->op == ggml.op_mul_mat && (w->ne[2] != 1 || w->ne[3] != 1)) return false;
    if (op->op == ggml.op_mul_mat_id && op->src[2]->type != ABI_TYPE_I32) return false;
    if (op->src[1]->ne[3] != 1) return false;
    return buffer_weight(w)->role != PI_ROLE_PLAIN || ggml.ggml_get_type_traits_cpu(w->type)->vec_dot != NULL;
}

/* A look-up in an embedding that is streamed, or that is the head too and kept in panels. */
static bool is_lookup(const struct ggml_tensor *t) {
    if (t->op != ggml.op_get_rows || !buffer_is_ours(t->src[0]->buffer)) return false;
    const struct pi_weight *w = buffer_weight(t->src[0]);
    const bool rows = w->role == PI_ROLE_SLAB && w->slab->spec.kind == PI_SLAB_ROWS;
    return (rows || w->role == PI_ROLE_PANEL) && t->src[0]->ne[2] == 1 && t->src[1]->type == ABI_TYPE_I32 && is_f32_rows(t) &&
           t->src[1]->nb[0] == sizeof(int32_t) && t->ne[1] == t->src[1]->ne[0] && t->ne[2] == 1 && t->ne[3] == 1;
}

/* Is t a token's query, or what attention's weights are made from it, in a sparse model of ours with attention in panels? */
static bool is_attending(const struct ggml_tensor *t) {
    for (int hops = 0; t != NULL && hops < 16; hops++) {
        const bool product = t->op == ggml.op_mul_mat;
        if (product && buffer_is_ours(t->src[0]->buffer)) {
            return buffer_weight(t->src[0])->role == PI_ROLE_PANEL && buffer_model(t->src[0])->n_layers > 0;
        }
        if (!product && !is_noop(t) && t->op != ggml.op_rope && t->op != ggml.op_norm && t->op != ggml.op_rms_norm &&
            t->op != ggml.op_cont && t->op != ggml.op_soft_max && t->op != ggml.op_add && t->op != ggml.op_scale &&
            t->op != ggml.op_mul)
            return false;
        t = t->src[product]; /* of keys and a query: the query */
    }
    return false;
}

/* A product of a few tokens with the cache's keys or values, F16 rows in host memory. */
static bool is_attention(const struct ggml_tensor *op) {
    const struct ggml_tensor *rows = op->src[0], *x = op->src[1];
    if (op->op != ggml.op_mul_mat || rows->type != ABI_TYPE_F16 || x->ne[1] > ATTENTION_TOKENS || !panel_runs()) return false;
    const struct ggml_tensor *cache = rows->view_src != NULL ? rows->view_src : rows;
    if (cache->buffer == NULL || buffer_is_ours(cache->buffer) || !ggml.ggml_backend_buft_is_host(cache->buffer->buft))
        return false;
    return rows->nb[0] == sizeof(uint16_t) && rows->ne[3] == 1 && x->ne[3] == 1 && x->ne[2] % rows->ne[2] == 0 &&
           is_f32_rows(x) && is_f32_rows(op) && is_attending(x);
}

static bool supports_op(ggml_backend_dev_t dev, const struct ggml_tensor *op) {
    (void)dev;
    if (is_noop(op)) return buffer_is_ours(op->view_src != NULL ? op->view_src->buffer : op->buffer);
    if (is_mul_mat(op)) return supports_product(op) || is_attention(op);
    return is_lookup(op) || glu_layer(op) != NULL || ungated_layer(op) != NULL;
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
    struct slab_row *slab;
    uint8_t *xq; /* the rows of src1 in the type that dot products want; only for dense products */
    size_t xq_row;
};

/* weight_type: -1 when src1 need not be rounded here. */
static bool node_memory_reserve(struct backend_context *c, const struct ggml_tensor *node, int weight_type,
                                struct node_memory *m) {
    const size_t n = (size_t)(node->ne[1] * node->ne[2]);
    const size_t n_x = (size_t)(node->src[1]->ne[1] * node->src[1]->ne[2]);
    const int64_t n_in = node->src[1]->ne[0];
    m->xq_row = weight_type < 0 ? 0 : abi_row_size(kernel_input_type(weight_type), n_in);
    if (weight_type >= 0 && m->xq_row == 0) return false;
    m->xq_row = (m->xq_row + 63) & ~(size_t)63;
    uint8_t *p = ffn_scratch_reserve(&c->inputs, n_x * m->xq_row + n * (sizeof *m->rows + sizeof *m->ffn +
                                                                       sizeof *m->products + sizeof *m->slab));
    if (p == NULL) return false;
    m->xq = p;
    p += n_x * m->xq_row;
    m->rows = (struct product_row *)p;
    p += n * sizeof *m->rows;
    m->ffn = (struct ffn_row *)p;
    p += n * sizeof *m->ffn;
    m->products = (struct ffn_product *)p;
    p += n * sizeof *m->products;
    m->slab = (struct slab_row *)p;
    return true;
}

static void quantize_inputs(const struct backend_context *c, const struct ggml_tensor *x, int weight_type,
                            const struct node_memory *m) {
    const int type = kernel_input_type(weight_type);
    const int64_t n1 = x->ne[1], n = n1 * x->ne[2];
#pragma omp parallel for num_threads(c->n_threads) if (n > 1)
    for (int64_t r = 0; r < n; r++) {
        kernel_round_input(type, x->ne[0], row_at(x, r % n1, r / n1), m->xq + (size_t)r * m->xq_row);
    }
}

static const void *input_of(const struct ggml_tensor *node, const struct node_memory *m, const struct product_row *r) {
    return m->xq + (size_t)(r->x2 * node->src[1]->ne[1] + r->x1) * m->xq_row;
}

static int status_of(enum ffn_result result) {
    return result == FFN_OK          ? ABI_STATUS_SUCCESS
           : result == FFN_NO_MEMORY ? ABI_STATUS_ALLOC_FAILED
                                     : ABI_STATUS_FAILED;
}

/* A dense product with a segment of a layer whose bundles are streamed: neuron by neuron, each read once. */
struct streamed_product {
    const struct pi_layer *layer;
    int64_t offset;
    int type;
    const struct product_row *rows;
    const struct ffn_product *products;
    int64_t n;
};

static void streamed_neuron(int64_t unit, void *context) {
    const struct streamed_product *p = context;
    const struct pi_layer_spec *spec = &p->layer->spec;
    const int expert = (int)(unit / spec->n_ff);
    const uint8_t *row = pi_bundle(p->layer, expert, unit % spec->n_ff) + p->offset;
    for (int64_t r = 0; r < p->n; r++) {
        if (p->rows[r].expert != expert) continue;
        const struct ffn_product one = {row, p->products[r].xq, p->products[r].out + unit % spec->n_ff};
        ffn_dense(&one, 1, p->type, spec->n_embd, 1, 0, 1); /* the same routine as where everything is in memory */
    }
}

/* A product with all rows of a gate or up segment or of an ordinary tensor. */
static int compute_dense(struct backend_context *c, struct ggml_tensor *node, const struct pi_weight *w) {
    const struct ggml_tensor *src0 = node->src[0];
    const struct pi_layer *layer = w->layer; /* NULL: an ordinary tensor */
    const int64_t offset = layer == NULL ? 0 : w->role == PI_ROLE_GATE ? layer->spec.gate_offset : layer->spec.up_offset;
    const uint8_t *base = layer != NULL ? layer->data : w->slab != NULL ? w->slab->data : src0->data;
    const size_t stride = layer != NULL ? (size_t)layer->spec.stride : src0->nb[1];
    const size_t expert_stride = layer != NULL ? stride * (size_t)layer->spec.n_ff : src0->nb[2];
    struct node_memory m;
    if (!node_memory_reserve(c, node, src0->type, &m)) return ABI_STATUS_ALLOC_FAILED;
    const int64_t n = product_rows(node, m.rows);
    if (n < 0) return ABI_STATUS_FAILED;
    quantize_inputs(c, node->src[1], src0->type, &m);
    for (int64_t r = 0; r < n; r++) {
        const struct product_row *row = &m.rows[r];
        m.products[r] = (struct ffn_product){
            .weights = base == NULL ? NULL : base + (size_t)row->expert * expert_stride + offset,
            .xq = input_of(node, &m, row),
            .out = row_at(node, row->i1, row->i2)};
    }
    if (layer != NULL && layer->store != NULL) {
        struct streamed_product p = {layer, offset, src0->type, m.rows, m.products, n};
        return status_of(ffn_each_bundle(layer, streamed_neuron, &p));
    }
    ffn_dense(m.products, (int)n, src0->type, src0->ne[0], src0->ne[1], stride, c->n_threads);
    return ABI_STATUS_SUCCESS;
}

/* A product with a matrix that is kept in panels. In a mixture, rows with the same expert are computed together. */
static int compute_panels(struct backend_context *c, struct ggml_tensor *node) {
    const struct ggml_tensor *w = node->src[0], *x = node->src[1];
    struct flash *flash = buffer_model(w)->flash;
    if (flash != NULL) (void)flash_progress(flash); /* what is read ahead for a layer's FFN arrives meanwhile */
    const int64_t n_experts = w->ne[2], n_x = x->ne[1] * x->ne[2];
    const size_t n_rows = (size_t)(node->ne[1] * node->ne[2]);
    const size_t inputs_size = (panel_inputs_size(w->type, w->ne[0], (int)n_x) + 63) & ~(size_t)63;
    uint8_t *inputs = ffn_scratch_reserve(
        &c->inputs, inputs_size + (size_t)n_x * sizeof(float *) +
                        n_rows * (sizeof(struct product_row) + sizeof(struct panel_product)) +
                        (size_t)(n_experts + 1) * sizeof(int64_t));
    if (inputs == NULL) return ABI_STATUS_ALLOC_FAILED;
    const float **xs = (const float **)(inputs + inputs_size);
    struct product_row *rows = (struct product_row *)(xs + n_x);
    struct panel_product *products = (struct panel_product *)(rows + n_rows);
    int64_t *next = (int64_t *)(products + n_rows); /* where an expert's next row goes */
    const int64_t n = product_rows(node, rows);
    if (n < 0) return ABI_STATUS_FAILED;
    for (int64_t i = 0; i < n_x; i++) xs[i] = row_at(x, i % x->ne[1], i / x->ne[1]);
    memset(next, 0, (size_t)(n_experts + 1) * sizeof *next);
    for (int64_t r = 0; r < n; r++) next[rows[r].expert + 1]++;
    for (int64_t e = 1; e < n_experts; e++) next[e] += next[e - 1];
    for (int64_t r = 0; r < n; r++) {
        products[next[rows[r].expert]++] =
            (struct panel_product){.panels = (const uint8_t *)w->data + (size_t)rows[r].expert * w->nb[2],
                                   .input = (int)(rows[r].x2 * x->ne[1] + rows[r].x1),
                                   .out = row_at(node, rows[r].i1, rows[r].i2)};
    }
    panel_products(w->type, w->ne[0], w->ne[1], xs, (int)n_x, products, (int)n, inputs, c->n_threads);
    return ABI_STATUS_SUCCESS;
}

/* Queries with keys, or attention's weights with values. Several heads of x share one of the cache. */
static int compute_attention(struct backend_context *c, struct ggml_tensor *node) {
    const struct ggml_tensor *rows = node->src[0], *x = node->src[1];
    const int64_t n = rows->ne[0], n_rows = rows->ne[1], n_tokens = x->ne[1], n_x = n_tokens * x->ne[2];
    const int64_t stride = attention_stride(n);
    const int64_t most = rows->nb[2] < rows->nb[1] ? ATTENTION_KEYS : ATTENTION_VALUES, n_parts = (n_rows + most - 1) / most;
    const int64_t sharing = x->ne[2] / rows->ne[2] * n_tokens, n_groups = (sharing + ATTENTION_GROUP - 1) / ATTENTION_GROUP;
    float *rounded = ffn_scratch_reserve(&c->inputs, (size_t)(n_x * stride) * sizeof *rounded);
    if (rounded == NULL) return ABI_STATUS_ALLOC_FAILED;
#pragma omp parallel num_threads(c->n_threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_x; r++) attention_round(n, row_at(x, r % n_tokens, r / n_tokens), rounded + r * stride);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < rows->ne[2] * n_parts * n_groups; k++) {
            const int64_t head = k / n_groups % rows->ne[2], from = k / n_groups / rows->ne[2] * most;
            const int64_t first = head * sharing + k % n_groups * ATTENTION_GROUP, left = (head + 1) * sharing - first;
            const int some = (int)(left < ATTENTION_GROUP ? left : ATTENTION_GROUP);
            const float *xs[ATTENTION_GROUP];
            float *out[ATTENTION_GROUP];
            for (int i = 0; i < some; i++) {
                xs[i] = rounded + (first + i) * stride;
                out[i] = (float *)row_at(node, (first + i) % n_tokens, (first + i) / n_tokens) + from;
            }
            attention_dots(row_at(rows, from, head), rows->nb[1], n, n_rows - from < most ? n_rows - from : most, xs, some, out);
        }
    }
    return ABI_STATUS_SUCCESS;
}

/* A router's product; what it chooses is read at once. Of many tokens nearly every expert is wanted by some. */
static int compute_router(struct backend_context *c, struct ggml_tensor *node, const struct pi_weight *w) {
    const int status = compute_dense(c, node, w);
    if (status != ABI_STATUS_SUCCESS || node->ne[1] > 4) return status;
    float *scratch = ffn_scratch_reserve(&c->work, (size_t)(2 * node->ne[0] + node->src[0]->ne[0]) * sizeof *scratch);
    for (int64_t t = 0; t < node->ne[1] && scratch != NULL; t++) { /* without memory it is only slower */
        slab_route(w->slab, row_at(node->src[1], t, 0), row_at(node, t, 0), scratch);
    }
    return status;
}

/* A product with a streamed matrix. */
static int compute_slab(struct backend_context *c, struct ggml_tensor *node, const struct pi_weight *w) {
    struct pi_slab *slab = w->slab;
    if (slab->spec.kind == PI_SLAB_ROUTER) return compute_router(c, node, w);
    struct node_memory m;
    if (!node_memory_reserve(c, node, slab->spec.type, &m)) return ABI_STATUS_ALLOC_FAILED;
    const int64_t n = product_rows(node, m.rows);
    if (n < 0) return ABI_STATUS_FAILED;
    quantize_inputs(c, node->src[1], slab->spec.type, &m);
    for (int64_t r = 0; r < n; r++) {
        m.slab[r] = (struct slab_row){
            m.rows[r].expert, input_of(node, &m, &m.rows[r]), row_at(node, m.rows[r].i1, m.rows[r].i2)};
    }
    return status_of(slab_product(slab, m.slab, (int)n, c->n_threads, &c->work));
}

static int compute_panel_rows(struct backend_context *c, struct ggml_tensor *node) {
    const struct ggml_tensor *w = node->src[0];
    const int32_t *ids = node->src[1]->data;
    uint8_t *row = ffn_scratch_reserve(&c->inputs, w->nb[1]);
    if (row == NULL) return ABI_STATUS_ALLOC_FAILED;
    for (int64_t i = 0; i < node->ne[1]; i++) {
        if (ids[i] < 0 || ids[i] >= w->ne[1]) return ABI_STATUS_FAILED;
        panel_read(w->type, w->ne[0], w->data, row, (size_t)ids[i] * w->nb[1], w->nb[1]);
        kernel_dequantize(w->type, w->ne[0], row, row_at(node, i, 0));
    }
    return ABI_STATUS_SUCCESS;
}

static int compute_lookup(struct backend_context *c, struct ggml_tensor *node) {
    if (buffer_weight(node->src[0])->role == PI_ROLE_PANEL) return compute_panel_rows(c, node);
    const int n = (int)node->ne[1];
    float **out = ffn_scratch_reserve(&c->inputs, (size_t)n * sizeof *out);
    if (out == NULL) return ABI_STATUS_ALLOC_FAILED;
    for (int i = 0; i < n; i++) out[i] = row_at(node, i, 0);
    return status_of(slab_get_rows(buffer_weight(node->src[0])->slab, node->src[1]->data, n, out));
}

/* The nodes of one layer that are computed at once. */
struct fused {
    struct ggml_tensor *gate; /* the product with gate, only where a predictor selects */
    struct ggml_tensor *up;   /* NULL: only down is ours */
    struct ggml_tensor *act;  /* what makes the activation from them: GLU, or the last of relu and square */
    struct ggml_tensor *down;
};

/* The sparse path. With only down: its input is an activation that was computed before, and selects. */
static int compute_sparse(struct backend_context *c, const struct fused *f, const struct pi_weight *w) {
    const uint64_t start = now_ns();
    struct pi_layer *layer = w->layer;
    const struct ggml_tensor *first = f->up != NULL ? f->up : f->down;
    const bool predicts = layer->spec.predictor != PI_PREDICT_NONE;
    struct node_memory m;
    if (!node_memory_reserve(c, first, -1, &m)) return ABI_STATUS_ALLOC_FAILED;
    const int64_t n = product_rows(first, m.rows);
    if (n < 0) return ABI_STATUS_FAILED;
    for (int64_t r = 0; r < n; r++) {
        const struct product_row *p = &m.rows[r];
        m.ffn[r] = (struct ffn_row){
            .expert = p->expert,
            .x = f->up != NULL ? row_at(f->up->src[1], p->x1, p->x2) : NULL,
            .g = f->up == NULL ? row_at(f->down->src[1], p->x1, p->x2)
                 : predicts    ? NULL
                               : row_at(f->act->src[0], p->i1, p->i2),
            .h = f->up != NULL ? row_at(f->act, p->i1, p->i2) : NULL,
            .out = row_at(f->down, p->i1, p->i2),
        };
    }
    const int64_t n_tokens = f->down->op == ggml.op_mul_mat_id ? f->down->ne[2] : n;
    struct pi_counters *counters = &layer->counters[n_tokens > 1];
    const bool dense = atomic_load_explicit(&layer->model->dense, memory_order_relaxed);
    const int status = status_of(ffn_sparse(layer, m.ffn, (int)n, dense, c->n_threads, &c->work, counters));
    counters->ns += now_ns() - start;
    return status;
}

/* A node's rows, one after the other: dst = activation of src[0] and, unless it is NULL, src[1]. */
static void activate_rows(enum pi_activation activation, struct ggml_tensor *node, const struct ggml_tensor *g,
                          const struct ggml_tensor *u) {
    for (int64_t i3 = 0; i3 < node->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < node->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < node->ne[1]; i1++) {
                ffn_activate(activation, node->ne[0], (float *)((char *)row_at(g, i1, i2) + (size_t)i3 * g->nb[3]),
                             u == NULL ? NULL : (float *)((char *)row_at(u, i1, i2) + (size_t)i3 * u->nb[3]),
                             (float *)((char *)row_at(node, i1, i2) + (size_t)i3 * node->nb[3]));
            }
        }
    }
}

/* An activation whose graph did not match. Of relu followed by a square each does its part; the square of what is not
 * negative is a squared relu. */
static int compute_activation(struct ggml_tensor *node) {
    const struct pi_layer *layer = glu_layer(node);
    if (layer != NULL) {
        activate_rows(layer->model->activation, node, node->src[0], node->src[1]);
    } else {
        activate_rows(node->op == ggml.op_sqr ? PI_ACT_RELU2 : PI_ACT_RELU, node, node->src[0], NULL);
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

static bool is_product_of(const struct ggml_tensor *t, const struct pi_layer *layer, enum pi_role role) {
    const struct pi_weight *w = t == NULL ? NULL : weight_of(t);
    return w != NULL && w->layer == layer && w->role == role;
}

/* Whether the nodes from `first` on, a product with a gate or up of ours, are exactly one FFN of its layer, each straight
 * from the one before. Fills f and moves *i to the last of them. */
static bool match(struct ggml_cgraph *graph, int *i, struct ggml_tensor *first, const struct pi_layer *layer,
                  struct fused *f) {
    int ahead = *i;
    *f = (struct fused){0};
    struct ggml_tensor *node = first;
    for (int k = 0; k < 2 && node != NULL; k++) { /* gate and up, in either order */
        if (f->gate == NULL && is_product_of(node, layer, PI_ROLE_GATE)) f->gate = node;
        else if (f->up == NULL && is_product_of(node, layer, PI_ROLE_UP)) f->up = node;
        else break;
        node = next_node(graph, &ahead);
    }
    if (node == NULL || f->up == NULL || (layer->spec.gate_name != NULL) != (f->gate != NULL)) return false;
    if (layer->spec.gated) {
        if (glu_layer(node) != layer || node->src[1] != f->up) return false;
        if (f->gate != NULL && (node->src[0] != f->gate || f->gate->src[1] != f->up->src[1])) return false;
        f->act = node;
    } else {
        const bool squared = layer->model->activation == PI_ACT_RELU2;
        if (node->op != ggml.op_unary || !is_ungated_activation(node) || node->src[0] != f->up) return false;
        struct ggml_tensor *square = squared ? next_node(graph, &ahead) : node;
        if (square == NULL || (squared && (square->op != ggml.op_sqr || square->src[0] != node))) return false;
        f->act = square;
    }
    f->down = next_node(graph, &ahead);
    if (!is_product_of(f->down, layer, PI_ROLE_DOWN) || f->down->src[1] != f->act || f->up->op != f->down->op ||
        f->up->src[2] != f->down->src[2])
        return false;
    *i = ahead;
    return true;
}

static int compute_product(struct backend_context *c, struct ggml_cgraph *graph, int *i, struct ggml_tensor *node,
                           const struct pi_weight *w) {
    struct fused f;
    switch (w->role) {
    case PI_ROLE_GATE:
    case PI_ROLE_UP: return match(graph, i, node, w->layer, &f) ? compute_sparse(c, &f, w) : compute_dense(c, node, w);
    case PI_ROLE_DOWN:
        /* A gated layer with an activation of its own must have got it from us: stock's graph may well say SwiGLU where
         * the model is dReLU. Better no answer than a wrong one. */
        if (w->layer->spec.gated && pi_activates(w->layer) && node->src[1] != c->activated) return ABI_STATUS_FAILED;
        c->activated = NULL; /* addresses are reused from graph to graph */
        f = (struct fused){.down = node};
        return compute_sparse(c, &f, w);
    case PI_ROLE_SLAB: return compute_slab(c, node, w);
    case PI_ROLE_PANEL: return compute_panels(c, node);
    default: return compute_dense(c, node, w);
    }
}

static int graph_compute(ggml_backend_t backend, struct ggml_cgraph *graph) {
    struct backend_context *c = backend->context;
    int i = -1;
    for (struct ggml_tensor *node; (node = next_node(graph, &i)) != NULL;) {
        int status = ABI_STATUS_FAILED;
        if (c->abort != NULL && c->abort(c->abort_data)) return ABI_STATUS_ABORTED;
        const struct pi_weight *w = weight_of(node);
        if (w != NULL) {
            status = compute_product(c, graph, &i, node, w);
        } else if (is_lookup(node)) {
            status = compute_lookup(c, node);
        } else if (node->op == ggml.op_mul_mat) {
            status = compute_attention(c, node);
        } else if (supports_op(NULL, node)) {
            status = compute_activation(node);
            c->activated = node;
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
