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

#include <stdatomic.h>

enum pi_role {
    PI_ROLE_PLAIN, /* an ordinary tensor somebody put in our buffer (LoRA adapters do) */
    PI_ROLE_UP,
    PI_ROLE_DOWN,
};

struct pi_layer;

enum { PI_SCALE_GROUP = 32 }; /* neurons that share a row of scales */

/* What tensor->extra points to for a weight of ours. */
struct pi_weight {
    enum pi_role role;
    struct pi_layer *layer;
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
};

struct pi_layer {
    struct pi_model *model;
    struct pi_layer_spec spec; /* names are copied into up_name / down_name below */
    char up_name[ABI_MAX_NAME], down_name[ABI_MAX_NAME];
    int32_t *order; /* NULL: neurons are stored in the source's order */
    uint8_t *data;  /* n_expert (or 1) x n_ff x stride bytes, page aligned */
    size_t data_size;
    uint16_t *scales; /* the table of spec.scale_offset; NULL unless down_type is I8 */
    struct pi_weight up, down;
    struct pi_counters counters[2];
};

struct pi_model {
    struct ggml_backend_buffer_type buft;
    atomic_int refs;
    enum pi_activation activation;
    atomic_bool dense; /* compute every neuron: the reference path */
    int n_layers;
    struct pi_layer layers[];
};

void pi_model_ref(struct pi_model *model);
void pi_model_unref(struct pi_model *model);

/* Finds the layer and role that a tensor of llama.cpp's stands for, by name; NULL when it is none of ours. */
struct pi_weight *pi_model_find(struct pi_model *model, const char *tensor_name);

#endif
