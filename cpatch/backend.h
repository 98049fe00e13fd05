/* backend.h - the POWERINFER device of ggml: buffer type, operator matching, graph execution.
 *
 * How a decode step reaches us: llama_context puts our backend into its scheduler because the device has type ACCEL;
 * the scheduler gives us the nodes that supports_op() claims, one split per FFN layer:
 *   gated, exact mode   [up MUL_MAT, GLU, down MUL_MAT]          gate was computed by stock's kernels
 *   ungated             [down MUL_MAT]                           up and the activation were computed by stock
 *   mixtures            the same with MUL_MAT_ID
 * Only the exact chain up -> GLU -> down of one layer inside one split is fused; anything else (LoRA adds between
 * them, an eval callback that asks for a node in between) is computed node by node, densely and correctly.
 * Details and how they were verified: docs/SEAM.md. */
#ifndef POWERINFER_BACKEND_H
#define POWERINFER_BACKEND_H

#include "model.h"

/* The registry entry of the device, created on first use. */
ggml_backend_reg_t backend_reg(void);

/* A new backend instance, as ggml's init_backend returns it; NULL when out of memory. */
ggml_backend_t backend_new(void);

/* Fills the buffer type through which llama.cpp allocates this model's FFN tensors. */
void backend_buft_init(struct ggml_backend_buffer_type *buft, struct pi_model *model);

#endif
