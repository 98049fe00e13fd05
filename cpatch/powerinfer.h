/* powerinfer.h - the C interface that Python sees (through cffi, see build.py).
 *
 * Conventions: functions that can fail return NULL or -1 and write one sentence into err, at most err_len bytes
 * with the terminating zero. Nothing here aborts the process or prints. All functions may be called without the
 * GIL; a pi_model may be shared by threads, a pi_vgguf may not.
 */
#ifndef POWERINFER_H
#define POWERINFER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* What the FFN computes from the deciding product g (gate, or up when ungated) and u (up). */
enum pi_activation {
    PI_ACT_NATIVE = 0, /* whatever operator stock's graph has (silu, gelu): nothing is skipped */
    PI_ACT_RELU = 1,   /* relu(g) * u */
    PI_ACT_RELU2 = 2,  /* relu(g)^2 * u */
    PI_ACT_DRELU = 3,  /* relu(g) * relu(u), Turbo Sparse, arXiv 2406.05955 */
};

/* One FFN layer of a sparse-GGUF, docs/FORMAT.md. Sizes in bytes unless they count something. */
struct pi_layer_spec {
    int index;             /* N of blk.N */
    const char *up_name;   /* blk.N.ffn_up.weight or ..._exps.weight; NULL when up is not in the bundle (ungated) */
    const char *down_name; /* blk.N.ffn_down.weight or ..._exps.weight */
    int64_t n_embd, n_ff;
    int64_t n_expert;      /* 0: a dense FFN */
    int64_t stride;        /* from one neuron's bundle to the next */
    int64_t up_offset;     /* of the up row in the bundle; unused when up_name is NULL */
    int64_t down_offset;   /* of the down column in the bundle */
    int up_type;           /* ggml types of the stored segments */
    int down_type;         /* I8: columns of integers whose scales are in a table, see scale_offset */
    int down_source_type;  /* ggml type of ffn_down as llama.cpp is shown it */
    int64_t scale_offset;  /* where the table of scales begins in the file; unused unless down_type is I8.
                              [max(n_expert, 1)][n_ff / 32][n_embd] halves, by source neuron: the blocks of the source
                              run along neurons, so 32 neurons share a row. Lossless, unlike blocking columns anew. */
    const int32_t *order;  /* [max(n_expert, 1)][n_ff] stored -> source index where they differ, else NULL; copied */
    int64_t file_offset;   /* where the bundle tensor begins in the file */
};

struct pi_layer_stats {
    uint64_t calls, rows, neurons, selected, fired, touched, ns;
};

struct pi_model;

/* Finds and checks libggml (ggml_abi.h), registers the POWERINFER device with it, and runs the self-test: a small
 * FFN through ggml's scheduler and our backend, compared with plain C. Call once. Returns 0 or -1. */
int pi_init(const char *lib_dir, char *err, size_t err_len);

/* ggml_version() of the library in use; only after pi_init. */
const char *pi_ggml_version(void);

/* Checks every offset and size of the specs against the file and the types, and reserves memory for the bundles.
 * NULL on bad specs or lack of memory. */
struct pi_model *pi_model_open(int fd, int n_layers, const struct pi_layer_spec *specs, int activation, char *err,
                               size_t err_len);

/* Reads the bundles of all layers from the same fd; before that, nothing may be computed. Can go on beside llama.cpp's
 * own loading. n_threads: how many reads run side by side. -1 on short or failed reads or lack of memory. */
int pi_model_read(struct pi_model *model, int fd, int n_threads, char *err, size_t err_len);
void pi_model_close(struct pi_model *model); /* drops the opener's reference */

/* The ggml_backend_buffer_type_t to name in llama_model_params.tensor_buft_overrides. */
void *pi_model_buft(struct pi_model *model);

/* true: compute all neurons (the dense reference path); false: only those that fire. Takes effect at once. */
void pi_model_set_dense(struct pi_model *model, bool dense);

/* Copies the counters of layer i (0-based position, not blk index); phase 0: decode, 1: larger ubatches. */
int pi_model_stats(struct pi_model *model, int i, int phase, struct pi_layer_stats *out);
void pi_model_reset_stats(struct pi_model *model);

/* Evaluates layer i on plain arrays, without llama.cpp: for tests and kernel benchmarks.
 * expert: [n_rows], NULL for a dense FFN; x: [n_rows][n_embd] input of up, NULL when ungated; g: [n_rows][n_ff] the
 * deciding product (ungated: the activation itself); h: [n_rows][n_ff] receives the activation, NULL when ungated, may
 * be g; out: [n_rows][n_embd]. Counts into phase n_rows > 1. Returns 0, or -1: bad arguments or out of memory. */
int pi_ffn(struct pi_model *model, int i, int n_rows, const int32_t *expert, const float *x, const float *g, float *h,
           float *out, int n_threads);

/* Live models in the process: for leak tests. */
int pi_model_count(void);

/* A GGUF that exists only as a stream: header bytes, then extents that are either ranges of a real file or holes.
 * Holes read as "whatever the caller's buffer held": their bytes are never wanted (our buffer type ignores what
 * llama.cpp hands to set_tensor) and cost nothing. */
struct pi_extent {
    int64_t offset;      /* in the stream; ascending, not overlapping, not before the header's end */
    int64_t size;
    int64_t file_offset; /* in fd, or -1 for a hole */
};

struct pi_vgguf;

/* Opens the stream. fd is duplicated. NULL on bad extents. */
struct pi_vgguf *pi_vgguf_open(int fd, const void *header, int64_t header_size, const struct pi_extent *extents,
                               int n_extents, char *err, size_t err_len);
/* The FILE* to hand to llama_model_load_from_file_ptr; owned by the stream. */
void *pi_vgguf_file(struct pi_vgguf *v);
/* 0, or the errno of the first read that failed; *offset is then the position in the real file. */
int pi_vgguf_error(struct pi_vgguf *v, int64_t *offset);
void pi_vgguf_close(struct pi_vgguf *v);

/* Quantised rows at y from n_rows x n floats at x, through ggml's own routines. -1: unknown type or a row length that
 * its block does not divide. For tests. */
int pi_quantize(int type, const float *x, void *y, int64_t n_rows, int64_t n);

#endif
