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

/* What the FFN computes from the deciding product g (gate, or up when ungated) and u (up; 1 when ungated). */
enum pi_activation {
    PI_ACT_NATIVE = 0, /* whatever operator stock's graph has: nothing is skipped */
    PI_ACT_RELU = 1,   /* relu(g) * u */
    PI_ACT_RELU2 = 2,  /* relu(g)^2 * u */
    PI_ACT_DRELU = 3,  /* relu(g) * relu(u), Turbo Sparse, arXiv 2406.05955 */
    PI_ACT_SILU = 4,   /* silu(g) * u: neurons are skipped only below thresholds */
    PI_ACT_GELU = 5,   /* gelu(g) * u, the tanh form */
};

enum pi_predictor {
    PI_PREDICT_NONE = 0,    /* the deciding product is given: stock computes it */
    PI_PREDICT_LOWRANK = 1, /* neuron j is computed when dot(B_j, relu(A x)) + bias_j > 0 */
    PI_PREDICT_DIRECT = 2,  /* when dot(B_j, x) + bias_j > 0: B is a coarse copy of the deciding matrix */
    PI_PREDICT_LINEAR = 3,  /* when dot(B_j, A x) + bias_j > 0 */
};

/* One FFN layer of a sparse-GGUF, docs/FORMAT.md. Sizes in bytes unless they count something; offsets within a bundle,
 * or, where their comment says so, in the file. */
struct pi_layer_spec {
    int index;             /* N of blk.N */
    bool gated;
    const char *gate_name; /* blk.N.ffn_gate.weight: the tensors of llama.cpp's whose rows are in the bundle; else NULL */
    const char *up_name;   /* blk.N.ffn_up.weight or ..._exps.weight */
    const char *down_name; /* always in the bundle */
    int64_t n_embd, n_ff;
    int64_t n_expert;      /* 0: a dense FFN */
    int64_t stride;        /* from one neuron's bundle to the next */
    int64_t gate_offset, up_offset, down_offset; /* of the segments, in this order */
    int gate_type, up_type, down_type; /* ggml types of the stored segments; down_type I8: see scale_offset */
    int down_source_type;  /* ggml type of ffn_down as llama.cpp is shown it */
    int64_t scale_offset;  /* where the table of scales begins in the file; unused unless down_type is I8.
                              [max(n_expert, 1)][n_ff / 32][n_embd] halves, by source neuron: the blocks of the source
                              run along neurons, so 32 neurons share a row. Lossless, unlike blocking columns anew. */
    const int32_t *order;  /* [max(n_expert, 1)][n_ff] stored -> source index where they differ, else NULL; copied */
    int64_t file_offset;   /* where the bundle tensor begins in the file */
    int predictor;         /* enum pi_predictor; not NONE: the deciding matrix is in the bundle, n_expert is 0 */
    int64_t rank;          /* rows of A */
    int pred_a_type, pred_b_type; /* ggml types of A, rows of n_embd, and B, n_ff rows of rank (direct: n_embd) */
    int64_t pred_a_offset, pred_b_offset, pred_bias_offset; /* in the file; bias: [n_ff] floats, stored order */
    int64_t threshold_offset; /* in the file: [max(n_expert, 1)][n_ff] floats; neuron j counts when |act(g)| is at least
                                 this much. 0: none */
    int64_t n_slots;       /* neurons of this layer that may be in memory; 0: all of them, read when loading */
    int64_t n_hot;         /* of these, the first n_hot never leave it */
    const float *frequency; /* [max(n_expert, 1)][n_ff] share of the tokens that a stored neuron fires for, or NULL; used
                               while opening */
};

enum pi_slab_kind {
    PI_SLAB_EXPERTS = 0, /* the experts of a mixture: units are experts */
    PI_SLAB_TILES = 1,   /* a dense matrix: units are tiles of rows */
    PI_SLAB_ROWS = 2,    /* an embedding: units are rows, which are looked up */
    PI_SLAB_ROUTER = 3,  /* not streamed: a router, from whose products reads are started early */
};

/* A matrix in stock's layout that is streamed, or that says what will be. */
struct pi_slab_spec {
    const char *name;      /* of the tensor, blk.N.ffn_gate_exps.weight */
    int kind;              /* enum pi_slab_kind */
    int group;             /* experts and the router of a layer have the same; in the order of evaluation */
    int type;
    int64_t n_in, n_out;   /* values of a row, rows (of one expert) */
    int64_t n_expert;      /* 0 unless units are experts */
    int64_t tile;          /* rows of a unit of a dense matrix; divides n_out */
    int file;              /* which of the files, */
    int64_t offset;        /* and where in it */
    int64_t n_slots;       /* units that may be in memory; unused for routers */
    int64_t norm_offset;   /* routers: where in the file the n_in floats are that scale the router's input, blk.N.ffn_norm;
                              0: none do */
    int64_t n_used;        /* routers: experts per token */
};

/* How to read what is not in memory. */
struct pi_flash_spec {
    int engine;   /* enum io_engine: 0 chooses */
    int depth;    /* reads in flight; 0: default */
    int64_t flight; /* bytes in flight, about; 0: no bound */
    int64_t gap;  /* bytes that are read through rather than skipped between two wanted neurons */
    int64_t run;  /* longest read of several neurons */
    int64_t transit; /* bytes of memory for neurons that are wanted once and not kept */
    int policy;   /* enum store_policy */
    bool ahead;   /* read what a router or a node of the same layer says will be wanted soon */
};

struct pi_layer_stats {
    uint64_t calls, rows, neurons, selected, fired, touched, ns;
    uint64_t verified, true_fired, missed; /* of pi_model_set_verify() */
};

/* Counters of what was streamed, docs in store.h. */
struct pi_flash_stats {
    uint64_t wanted, missed, bytes, prefetched, useful, wasted, wait_ns;
    uint64_t reads, read_bytes; /* of the io, alignment and gaps included; for the whole model */
};

struct pi_model;

/* Finds and checks libggml (ggml_abi.h), registers the POWERINFER device with it, and runs the self-test: a small
 * FFN through ggml's scheduler and our backend, compared with plain C. Call once. Returns 0 or -1. */
int pi_init(const char *lib_dir, char *err, size_t err_len);

/* ggml_version() of the library in use; only after pi_init. */
const char *pi_ggml_version(void);

/* Checks every offset and size of the specs against the files and the types, and reserves memory for the bundles, which
 * are in the first file. flash: NULL when no layer has n_slots and there are no slabs. NULL on bad specs or lack of
 * memory. */
struct pi_model *pi_model_open(const int *fds, int n_files, int n_layers, const struct pi_layer_spec *specs, int n_slabs,
                               const struct pi_slab_spec *slabs, int activation, const struct pi_flash_spec *flash,
                               char *err, size_t err_len);

/* Reads the bundles of all layers from the same fd (those with n_slots: as many as have a slot); before that, nothing may
 * be computed. Can go on beside llama.cpp's own loading. n_threads: how many reads run side by side. -1 on short or
 * failed reads or lack of memory. */
int pi_model_read(struct pi_model *model, int fd, int n_threads, char *err, size_t err_len);

/* Where the bytes of a matrix are that is kept in panels: name as llama.cpp knows it, which file, where in it. */
struct pi_panel_source {
    const char *name;
    int file;
    int64_t offset;
};

/* Fills the panels that llama.cpp has allocated by now, piece by piece: at no time is a matrix in memory twice. drop: read
 * bytes leave the page cache. -1 on failed reads. */
int pi_model_read_panels(struct pi_model *model, const int *fds, int n_files, int n, const struct pi_panel_source *sources,
                         bool drop, int n_threads, char *err, size_t err_len);

/* The first read that failed since the last call: 0, or its errno (ESTALE: the file has changed), with the position. */
int pi_model_error(struct pi_model *model, int *file, int64_t *offset);
/* enum io_engine: what it reads with; 0 when nothing is streamed. */
int pi_model_io_engine(struct pi_model *model);
/* For tests: has a read fail, see io_inject(). -1 when nothing is streamed. */
int pi_model_inject(struct pi_model *model, int64_t n, int error, uint32_t short_by);
void pi_model_close(struct pi_model *model); /* drops the opener's reference */

/* The ggml_backend_buffer_type_t to name in llama_model_params.tensor_buft_overrides. */
void *pi_model_buft(struct pi_model *model);

/* The one to name for matrices that are kept in memory as panels and multiplied by our own kernels (panels.h): of the types
 * that pi_panel_has_type() knows, used by MUL_MAT, MUL_MAT_ID and GET_ROWS alone. Their bytes
 * are read afterwards, by pi_model_read_panels(). */
void *pi_model_panel_buft(struct pi_model *model);

/* Can a matrix of n_out rows (of each of n_expert experts, else 1) of n_in values be kept as panels? */
bool pi_panel_has_type(int type, int64_t n_in, int64_t n_out, int64_t n_expert);

/* true: compute all neurons (the dense reference path); false: only those that fire. Takes effect at once. */
void pi_model_set_dense(struct pi_model *model, bool dense);

/* Has one of every so many evaluations of each predicted layer looked at again, for one of its rows: which neurons fire in
 * truth, and which of them the predictor missed. Reads all bundles of the layer, by one thread. 0: none (the default). */
void pi_model_set_verify(struct pi_model *model, uint32_t every);

/* Copies the counters of layer i (0-based position, not blk index); phase 0: decode, 1: larger ubatches. */
int pi_model_stats(struct pi_model *model, int i, int phase, struct pi_layer_stats *out);
/* Of layer i, or, from n_layers on, of slab i - n_layers. */
int pi_model_flash_stats(struct pi_model *model, int i, struct pi_flash_stats *out);
void pi_model_reset_stats(struct pi_model *model);

/* Evaluates layer i on plain arrays, without llama.cpp: for tests and kernel benchmarks.
 * expert: [n_rows], NULL for a dense FFN; x: [n_rows][n_embd] input of the FFN, NULL where only down is in the bundle;
 * g: [n_rows][n_ff] the deciding product (ungated: the activation itself), NULL where a predictor decides; h:
 * [n_rows][n_ff] receives the activation, NULL where only down is in the bundle, may be g; out: [n_rows][n_embd]. Counts
 * into phase n_rows > 1. Returns 0, or -1: bad arguments, out of memory, or a read that failed. */
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
    int64_t file_offset; /* in the file, or -1 for a hole */
    int file;            /* which of the files */
};

struct pi_vgguf;

/* Opens the stream. fds are duplicated. drop: read bytes leave the page cache, which a memory limit may count. NULL on bad
 * extents. */
struct pi_vgguf *pi_vgguf_open(const int *fds, int n_files, bool drop, const void *header, int64_t header_size, const struct pi_extent *extents,
                               int n_extents, char *err, size_t err_len);
/* The FILE* to hand to llama_model_load_from_file_ptr; owned by the stream. */
void *pi_vgguf_file(struct pi_vgguf *v);
/* 0, or the errno of the first read that failed; *file and *offset are then where. */
int pi_vgguf_error(struct pi_vgguf *v, int *file, int64_t *offset);
void pi_vgguf_close(struct pi_vgguf *v);

/* Quantised rows at y from n_rows x n floats at x, through ggml's own routines. -1: unknown type or a row length that
 * its block does not divide. For tests. */
int pi_quantize(int type, const float *x, void *y, int64_t n_rows, int64_t n);

#endif
