/* ggml_abi.h - everything this project knows about the inside of ggml.
 *
 * We build without ggml's headers and link against none of its libraries: the plugin is compiled once and meets
 * whichever libggml the user's llama-cpp-python brought along. So the struct layouts we read or fill are mirrored
 * here, the functions we call are looked up by name, and abi_load() refuses a library that does not fit before
 * anything else is touched. tests/test_abi.py compiles a check of every mirrored offset against the dependency's
 * own headers. Nothing outside ggml_abi.[ch] may assume anything about ggml that is not declared here.
 *
 * Mirrored from ggml 0.25.3 (llama.cpp 0c1e57098, llama-cpp-python 0.3.36): ggml.h, ggml-cpu.h,
 * ggml-backend.h and ggml-backend-impl.h (GGML_BACKEND_API_VERSION 2).
 */
#ifndef POWERINFER_GGML_ABI_H
#define POWERINFER_GGML_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define ABI_BACKEND_API_VERSION 2
#define ABI_MAX_DIMS 4
#define ABI_MAX_SRC 10
#define ABI_MAX_OP_PARAMS 64
#define ABI_MAX_NAME 64
#define ABI_OP_COUNT 101 /* GGML_OP_COUNT: how far op names may be scanned */
#define ABI_UNARY_OP_COUNT 22 /* GGML_UNARY_OP_COUNT: the same for unary operators */
#define ABI_TYPE_COUNT 43

/* ggml_type, as stored in GGUF files: these numbers are a file format and never change. */
enum abi_type {
    ABI_TYPE_F32 = 0,
    ABI_TYPE_F16 = 1,
    ABI_TYPE_Q4_0 = 2,
    ABI_TYPE_Q8_0 = 8,
    ABI_TYPE_Q8_1 = 9,
    ABI_TYPE_Q8_K = 15,
    ABI_TYPE_I8 = 24,
    ABI_TYPE_I32 = 26,
    ABI_TYPE_BF16 = 30,
};

enum abi_status {
    ABI_STATUS_ALLOC_FAILED = -2,
    ABI_STATUS_FAILED = -1,
    ABI_STATUS_SUCCESS = 0,
    ABI_STATUS_ABORTED = 1,
};

enum abi_dev_type { ABI_DEVICE_TYPE_CPU = 0, ABI_DEVICE_TYPE_ACCEL = 3 };
enum abi_buffer_usage { ABI_BUFFER_USAGE_ANY = 0, ABI_BUFFER_USAGE_WEIGHTS = 1 };

typedef struct ggml_backend_buffer_type *ggml_backend_buffer_type_t;
typedef struct ggml_backend_buffer *ggml_backend_buffer_t;
typedef struct ggml_backend *ggml_backend_t;
typedef struct ggml_backend_reg *ggml_backend_reg_t;
typedef struct ggml_backend_device *ggml_backend_dev_t;
typedef struct ggml_backend_sched *ggml_backend_sched_t; /* opaque */
typedef bool (*ggml_abort_callback)(void *data);
struct ggml_cgraph;  /* opaque: only read through ggml_graph_n_nodes / ggml_graph_node */
struct ggml_context; /* opaque */

struct ggml_tensor {
    int type; /* enum ggml_type */
    struct ggml_backend_buffer *buffer;
    int64_t ne[ABI_MAX_DIMS];
    size_t nb[ABI_MAX_DIMS];
    int op; /* enum ggml_op */
    int32_t op_params[ABI_MAX_OP_PARAMS / sizeof(int32_t)];
    int32_t flags;
    struct ggml_tensor *src[ABI_MAX_SRC];
    struct ggml_tensor *view_src;
    size_t view_offs;
    void *data;
    char name[ABI_MAX_NAME];
    void *extra;
    char padding[8];
};

struct ggml_type_traits {
    const char *type_name;
    int64_t blck_size;
    int64_t blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    void (*to_float)(const void *x, float *y, int64_t k);
    void (*from_float_ref)(const float *x, void *y, int64_t k);
};

struct ggml_type_traits_cpu {
    void (*from_float)(const float *x, void *y, int64_t k);
    void (*vec_dot)(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc);
    int vec_dot_type; /* enum ggml_type the other operand has to be in */
    int64_t nrows;
};

struct ggml_backend_buffer_type_i {
    const char *(*get_name)(ggml_backend_buffer_type_t buft);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t buft, size_t size);
    size_t (*get_alignment)(ggml_backend_buffer_type_t buft);
    size_t (*get_max_size)(ggml_backend_buffer_type_t buft);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t buft, const struct ggml_tensor *tensor);
    bool (*is_host)(ggml_backend_buffer_type_t buft);
};

struct ggml_backend_buffer_type {
    struct ggml_backend_buffer_type_i iface;
    ggml_backend_dev_t device;
    void *context;
};

struct ggml_backend_buffer_i {
    void (*free_buffer)(ggml_backend_buffer_t buffer);
    void *(*get_base)(ggml_backend_buffer_t buffer);
    int (*init_tensor)(ggml_backend_buffer_t buffer, struct ggml_tensor *tensor);
    void (*memset_tensor)(ggml_backend_buffer_t buffer, struct ggml_tensor *tensor, uint8_t value, size_t offset,
                          size_t size);
    void (*set_tensor)(ggml_backend_buffer_t buffer, struct ggml_tensor *tensor, const void *data, size_t offset,
                       size_t size);
    void (*get_tensor)(ggml_backend_buffer_t buffer, const struct ggml_tensor *tensor, void *data, size_t offset,
                       size_t size);
    void (*set_tensor_2d)(ggml_backend_buffer_t buffer, struct ggml_tensor *tensor, const void *data, size_t offset,
                          size_t size, size_t n_copies, size_t stride_tensor, size_t stride_data);
    void (*get_tensor_2d)(ggml_backend_buffer_t buffer, const struct ggml_tensor *tensor, void *data, size_t offset,
                          size_t size, size_t n_copies, size_t stride_tensor, size_t stride_data);
    bool (*cpy_tensor)(ggml_backend_buffer_t buffer, const struct ggml_tensor *src, struct ggml_tensor *dst);
    void (*clear)(ggml_backend_buffer_t buffer, uint8_t value);
    void (*reset)(ggml_backend_buffer_t buffer);
};

struct ggml_backend_buffer {
    struct ggml_backend_buffer_i iface;
    ggml_backend_buffer_type_t buft;
    void *context;
    size_t size;
    int usage; /* enum ggml_backend_buffer_usage */
};

struct ggml_backend_i {
    const char *(*get_name)(ggml_backend_t backend);
    void (*free)(ggml_backend_t backend);
    void (*set_tensor_async)(ggml_backend_t, struct ggml_tensor *, const void *, size_t, size_t);
    void (*get_tensor_async)(ggml_backend_t, const struct ggml_tensor *, void *, size_t, size_t);
    void (*set_tensor_2d_async)(ggml_backend_t, struct ggml_tensor *, const void *, size_t, size_t, size_t, size_t,
                                size_t);
    void (*get_tensor_2d_async)(ggml_backend_t, const struct ggml_tensor *, void *, size_t, size_t, size_t, size_t,
                                size_t);
    bool (*cpy_tensor_async)(ggml_backend_t, ggml_backend_t, const struct ggml_tensor *, struct ggml_tensor *);
    void (*synchronize)(ggml_backend_t backend);
    void *(*graph_plan_create)(ggml_backend_t, const struct ggml_cgraph *);
    void (*graph_plan_free)(ggml_backend_t, void *);
    void (*graph_plan_update)(ggml_backend_t, void *, const struct ggml_cgraph *);
    int (*graph_plan_compute)(ggml_backend_t, void *);
    int (*graph_compute)(ggml_backend_t backend, struct ggml_cgraph *cgraph);
    void (*event_record)(ggml_backend_t, void *);
    void (*event_wait)(ggml_backend_t, void *);
    void (*graph_optimize)(ggml_backend_t, struct ggml_cgraph *, void *);
};

struct ggml_backend {
    void *guid; /* ggml_guid_t: pointer to 16 bytes */
    struct ggml_backend_i iface;
    ggml_backend_dev_t device;
    void *context;
};

struct ggml_backend_dev_caps {
    bool async, host_buffer, buffer_from_host_ptr, events, mmap_support;
};

struct ggml_backend_dev_props {
    const char *name, *description;
    size_t memory_free, memory_total;
    int type; /* enum ggml_backend_dev_type */
    const char *device_id;
    struct ggml_backend_dev_caps caps;
};

struct ggml_backend_device_i {
    const char *(*get_name)(ggml_backend_dev_t dev);
    const char *(*get_description)(ggml_backend_dev_t dev);
    void (*get_memory)(ggml_backend_dev_t dev, size_t *free, size_t *total);
    int (*get_type)(ggml_backend_dev_t dev);
    void (*get_props)(ggml_backend_dev_t dev, struct ggml_backend_dev_props *props);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t dev, const char *params);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t dev);
    ggml_backend_buffer_type_t (*get_host_buffer_type)(ggml_backend_dev_t dev);
    ggml_backend_buffer_t (*buffer_from_host_ptr)(ggml_backend_dev_t dev, void *ptr, size_t size, size_t max);
    bool (*supports_op)(ggml_backend_dev_t dev, const struct ggml_tensor *op);
    bool (*supports_buft)(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft);
    bool (*offload_op)(ggml_backend_dev_t dev, const struct ggml_tensor *op);
    void *(*event_new)(ggml_backend_dev_t dev);
    void (*event_free)(ggml_backend_dev_t dev, void *event);
    void (*event_synchronize)(ggml_backend_dev_t dev, void *event);
};

struct ggml_backend_device {
    struct ggml_backend_device_i iface;
    ggml_backend_reg_t reg;
    void *context;
};

struct ggml_backend_reg_i {
    const char *(*get_name)(ggml_backend_reg_t reg);
    size_t (*get_device_count)(ggml_backend_reg_t reg);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t reg, size_t index);
    void *(*get_proc_address)(ggml_backend_reg_t reg, const char *name);
};

struct ggml_backend_reg {
    int api_version;
    struct ggml_backend_reg_i iface;
    void *context;
};

struct ggml_init_params {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
};

/* The functions we call, looked up by name when loading. Every one is part of ggml's exported interface. */
#define ABI_FUNCTIONS(X)                                                                                             \
    X(const char *, ggml_version, (void))                                                                            \
    X(const char *, ggml_op_name, (int op))                                                                          \
    X(const char *, ggml_unary_op_name, (int op))                                                                    \
    X(size_t, ggml_tensor_overhead, (void))                                                                          \
    X(size_t, ggml_nbytes, (const struct ggml_tensor *))                                                             \
    X(size_t, ggml_row_size, (int type, int64_t ne))                                                                 \
    X(const struct ggml_type_traits *, ggml_get_type_traits, (int type))                                             \
    X(size_t, ggml_quantize_chunk,                                                                                   \
      (int type, const float *src, void *dst, int64_t start, int64_t nrows, int64_t n_per_row, const float *imatrix)) \
    X(bool, ggml_quantize_requires_imatrix, (int type))                                                              \
    X(int, ggml_graph_n_nodes, (struct ggml_cgraph *))                                                               \
    X(struct ggml_tensor *, ggml_graph_node, (struct ggml_cgraph *, int i))                                          \
    X(ggml_backend_buffer_t, ggml_backend_buffer_init,                                                               \
      (ggml_backend_buffer_type_t, struct ggml_backend_buffer_i, void *context, size_t size))                        \
    X(ggml_backend_buffer_type_t, ggml_backend_cpu_buffer_type, (void))                                              \
    X(bool, ggml_backend_buft_is_host, (ggml_backend_buffer_type_t))                                                 \
    X(void, ggml_backend_register, (ggml_backend_reg_t))                                                             \
    X(ggml_backend_reg_t, ggml_backend_reg_by_name, (const char *name))                                              \
    X(const struct ggml_type_traits_cpu *, ggml_get_type_traits_cpu, (int type))                                     \
    X(void, ggml_cpu_fp16_to_fp32, (const uint16_t *, float *, int64_t))                                             \
    X(void, ggml_cpu_bf16_to_fp32, (const uint16_t *, float *, int64_t))                                             \
    X(ggml_backend_reg_t, ggml_backend_cpu_reg, (void))                                                              \
    /* from here on: only for the self-test */                                                                       \
    X(ggml_backend_t, ggml_backend_cpu_init, (void))                                                                 \
    X(struct ggml_context *, ggml_init, (struct ggml_init_params))                                                   \
    X(void, ggml_free, (struct ggml_context *))                                                                      \
    X(struct ggml_tensor *, ggml_new_tensor_2d, (struct ggml_context *, int type, int64_t ne0, int64_t ne1))         \
    X(struct ggml_tensor *, ggml_set_name, (struct ggml_tensor *, const char *))                                     \
    X(struct ggml_tensor *, ggml_mul_mat, (struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *))       \
    X(struct ggml_tensor *, ggml_reglu_split, (struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *))   \
    X(void, ggml_set_input, (struct ggml_tensor *))                                                                  \
    X(void, ggml_set_output, (struct ggml_tensor *))                                                                 \
    X(struct ggml_cgraph *, ggml_new_graph, (struct ggml_context *))                                                 \
    X(void, ggml_build_forward_expand, (struct ggml_cgraph *, struct ggml_tensor *))                                 \
    X(size_t, ggml_graph_overhead, (void))                                                                           \
    X(ggml_backend_buffer_t, ggml_backend_alloc_ctx_tensors_from_buft,                                               \
      (struct ggml_context *, ggml_backend_buffer_type_t))                                                           \
    X(void, ggml_backend_buffer_set_usage, (ggml_backend_buffer_t, int usage))                                       \
    X(void, ggml_backend_buffer_free, (ggml_backend_buffer_t))                                                       \
    X(void, ggml_backend_tensor_set, (struct ggml_tensor *, const void *, size_t offset, size_t size))               \
    X(void, ggml_backend_tensor_get, (const struct ggml_tensor *, void *, size_t offset, size_t size))               \
    X(void, ggml_backend_free, (ggml_backend_t))                                                                     \
    X(ggml_backend_sched_t, ggml_backend_sched_new,                                                                  \
      (ggml_backend_t *, ggml_backend_buffer_type_t *, int n, size_t graph_size, bool parallel, bool op_offload))    \
    X(bool, ggml_backend_sched_alloc_graph, (ggml_backend_sched_t, struct ggml_cgraph *))                            \
    X(int, ggml_backend_sched_graph_compute, (ggml_backend_sched_t, struct ggml_cgraph *))                           \
    X(int, ggml_backend_sched_get_n_splits, (ggml_backend_sched_t))                                                  \
    X(void, ggml_backend_sched_free, (ggml_backend_sched_t))

struct abi_functions {
#define X(ret, name, args) ret(*name) args;
    ABI_FUNCTIONS(X)
#undef X
    /* Numbers of the ops we handle, found by name: their order is no promise of ggml's. */
    int op_none, op_mul_mat, op_mul_mat_id, op_glu, op_reshape, op_view, op_permute, op_transpose, op_add, op_add_id,
        op_scale, op_mul, op_unary, op_sqr, op_get_rows, op_rope, op_norm, op_rms_norm, op_cont, op_soft_max;
    int unary_relu; /* the unary operator, which is in op_params[0] */
};

/* Filled by abi_load(); read-only afterwards. */
extern struct abi_functions ggml;

/* Finds libggml's functions and checks that layouts and version are those mirrored above.
 * lib_dir: the directory that holds libggml.so.0, libggml-base.so.0 and libggml-cpu.so.0 (llama_cpp/lib), or NULL
 *          to use the libraries already loaded into the process (a stock llama.cpp program).
 * Returns 0, or -1 with a sentence in err saying what does not fit. Not thread-safe; call it once. */
int abi_load(const char *lib_dir, char *err, size_t err_len);

/* Bytes of a row of n elements, or 0 when the type is unknown or n is no multiple of its block. */
size_t abi_row_size(int type, int64_t n);

#endif
