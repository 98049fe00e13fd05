/* model.h - the FFN weights of one model, stored as neuron bundles.
 *
 * A bundle is what one neuron needs besides the deciding product: its row of up (gated FFNs) and its column of
 * down, contiguous (row-column bundling, LLM in a flash, arXiv 2312.11514). Stock llama.cpp is told that the
 * tensors ffn_up and ffn_down of a layer exist and live in a buffer type of ours; their bytes are here.
 *
 * Life time: pi_model is reference counted. The opener holds one reference, every ggml buffer that llama.cpp
 * allocates from the model's buffer type holds another, so the weights live until both are gone, in any order.
 */
#ifndef POWERINFER_MODEL_H
#define POWERINFER_MODEL_H

#include "ggml_abi.h"
#include "powerinfer.h"
#include "store.h"

#include <pthread.h>
#include <stdatomic.h>

enum pi_role {
    PI_ROLE_PLAIN, /* an ordinary tensor somebody put in our buffer (LoRA adapters do) */
    PI_ROLE_GATE,
    PI_ROLE_UP,
    PI_ROLE_DOWN,
    PI_ROLE_SLAB,  /* a whole matrix in stock's layout, streamed: slab.h */
    PI_ROLE_PANEL, /* a whole matrix in memory, in panels: panels.h */
};

struct pi_layer;
struct pi_slab;

enum { PI_SCALE_GROUP = 32 }; /* neurons that share a row of scales */

/* What tensor->extra points to for a weight of ours. */
struct pi_weight {
    enum pi_role role;
    struct pi_layer *layer; /* NULL for PLAIN, SLAB and PANEL */
    struct pi_slab *slab;   /* NULL for the others */
};

/* Counters of one layer; [0] counts ubatches of one token (decode), [1] larger ones (prefill, batches).
 * Relaxed atomics: several contexts may run the same model. */
struct pi_counters {
    _Atomic uint64_t calls;    /* FFN evaluations */
    _Atomic uint64_t rows;     /* tokens, times experts routed to in a mixture */
    _Atomic uint64_t neurons;  /* rows x neurons per row: what a dense FFN would compute */
    _Atomic uint64_t selected; /* (row, neuron) pairs that the deciding product lets through */
    _Atomic uint64_t fired;    /* (row, neuron) pairs whose activation is not zero */
    _Atomic uint64_t touched;  /* bundles read: the union over the rows computed together */
    _Atomic uint64_t ns;       /* time spent in graph_compute on this layer */
    _Atomic uint64_t verified; /* rows of a predicted layer for which all neurons were looked at afterwards: */
    _Atomic uint64_t true_fired, missed; /* neurons that fire in truth, and those of them that were not selected */
};

struct pi_layer {
    struct pi_model *model;
    struct pi_layer_spec spec; /* names are copied into the arrays below */
    char gate_name[ABI_MAX_NAME], up_name[ABI_MAX_NAME], down_name[ABI_MAX_NAME];
    int32_t *order; /* NULL: neurons are stored in the source's order */
    uint8_t *data;  /* n_expert (or 1) x n_ff x stride bytes, page aligned; NULL when there is a store */
    size_t data_size;
    struct store *store; /* NULL: everything is in data */
    uint16_t *scales; /* the table of spec.scale_offset; NULL unless down_type is I8 */
    uint8_t *pred_a, *pred_b;   /* the predictor's matrices, NULL where there are none; */
    bool pred_panels;           /* is pred_b in panels (panels.h)? */
    float *pred_bias, *thresholds;
    struct pi_weight gate, up, down;
    struct pi_counters counters[2];
};

/* A tensor that llama.cpp has put into a buffer of panels, to be filled by pi_model_read_panels(). */
struct pi_panel_tensor {
    char name[ABI_MAX_NAME];
    int type;
    int64_t n_in;
    uint8_t *data;
    size_t size; /* in ggml's layout */
};

struct pi_model {
    struct ggml_backend_buffer_type buft, panel_buft;
    atomic_int refs;
    enum pi_activation activation;
    atomic_bool dense; /* compute every neuron: the reference path */
    atomic_uint verify; /* one of so many evaluations of a predicted layer is verified; 0: none */
    struct flash *flash; /* NULL: nothing is streamed */
    enum store_policy policy;
    bool ahead; /* pi_flash_spec.ahead */
    pthread_mutex_t evaluating; /* held while a layer with a store is evaluated: its rounds are for one at a time */
    int n_slabs;
    struct pi_slab *slabs;
    int n_panels, panels_room; /* appended to while llama.cpp loads, by one thread */
    struct pi_panel_tensor *panels;
    int n_layers;
    struct pi_layer layers[];
};

/* Where neuron j (as stored) of an expert lies in a bundle tensor. */
static inline int64_t pi_unit(const struct pi_layer *layer, int expert, int64_t j) {
    return expert * layer->spec.n_ff + j;
}

/* A neuron's bundle; in a store it must be there (store_ready). */
static inline const uint8_t *pi_bundle(const struct pi_layer *layer, int expert, int64_t j) {
    const int64_t unit = pi_unit(layer, expert, j);
    return layer->store != NULL ? store_unit(layer->store, (uint32_t)unit) : layer->data + unit * layer->spec.stride;
}

/* Has the predictor a hidden layer, A x? */
static inline bool pi_has_hidden(int predictor) {
    return predictor == PI_PREDICT_LOWRANK || predictor == PI_PREDICT_LINEAR;
}

/* Does the backend compute the activation itself, or is it stock's (PI_ACT_NATIVE)? */
static inline bool pi_activates(const struct pi_layer *layer) {
    return layer->model->activation >= PI_ACT_RELU &&
           (layer->model->activation <= PI_ACT_DRELU || layer->thresholds != NULL);
}

void pi_model_ref(struct pi_model *model);
void pi_model_unref(struct pi_model *model);

/* Notes a tensor of panels. -1: out of memory. */
int pi_model_add_panels(struct pi_model *model, const struct ggml_tensor *tensor);

/* Finds the layer and role that a tensor of llama.cpp's stands for, by name; NULL when it is none of ours. */
struct pi_weight *pi_model_find(struct pi_model *model, const char *tensor_name);

#endif
