/* buffer.h - the buffer type in which llama.cpp believes a model's FFN tensors to lie.
 *
 * It is not host memory for ggml, so nobody but our backend computes with it. The tensors of bundled layers get
 * addresses but no memory: what llama.cpp writes to them is ignored, the bundles were read by pi_model_open().
 * Any other tensor put here (LoRA adapters follow the buffer type of the weight they adapt) is stored faithfully. */
#ifndef POWERINFER_BUFFER_H
#define POWERINFER_BUFFER_H

#include "model.h"

void buffer_type_init(struct ggml_backend_buffer_type *buft, ggml_backend_dev_t device, struct pi_model *model);
bool buffer_type_is_ours(ggml_backend_buffer_type_t buft);
bool buffer_is_ours(ggml_backend_buffer_t buffer); /* NULL: no */

/* What a tensor in a buffer of ours stands for; never NULL. */
const struct pi_weight *buffer_weight(const struct ggml_tensor *tensor);

/* The model that a tensor in a buffer of ours belongs to. */
struct pi_model *buffer_model(const struct ggml_tensor *tensor);

#endif
