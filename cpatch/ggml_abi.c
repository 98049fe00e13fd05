/* ggml_abi.c - finding libggml and checking that it is the one we mirror. See ggml_abi.h. */
#define _GNU_SOURCE
#include "ggml_abi.h"

#include <dlfcn.h>
#include <string.h>

struct abi_functions ggml;

static void *open_ggml(const char *lib_dir, char *err, size_t err_len) {
    char path[4096];
    if (lib_dir == NULL) return RTLD_DEFAULT;
    /* The .so.0 name matters: the wheel holds three copies of each library, and libllama was linked to this one.
     * NOLOAD makes sure that we get the copy libllama uses and never open a second registry. */
    int n = snprintf(path, sizeof path, "%s/libggml.so.0", lib_dir);
    if (n < 0 || (size_t)n >= sizeof path) {
        snprintf(err, err_len, "the path of the llama_cpp library folder is too long");
        return NULL;
    }
    void *handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (handle == NULL) snprintf(err, err_len, "%s is not loaded: import llama_cpp first", path);
    return handle;
}

static int find_ops(char *err, size_t err_len) {
    const struct {
        const char *name;
        int *slot;
    } wanted[] = {
        {"NONE", &ggml.op_none},       {"MUL_MAT", &ggml.op_mul_mat}, {"MUL_MAT_ID", &ggml.op_mul_mat_id},
        {"GLU", &ggml.op_glu},         {"RESHAPE", &ggml.op_reshape}, {"VIEW", &ggml.op_view},
        {"PERMUTE", &ggml.op_permute}, {"ADD", &ggml.op_add},         {"TRANSPOSE", &ggml.op_transpose},
        {"ADD_ID", &ggml.op_add_id},   {"SCALE", &ggml.op_scale},     {"MUL", &ggml.op_mul},
        {"UNARY", &ggml.op_unary},     {"SQR", &ggml.op_sqr},         {"GET_ROWS", &ggml.op_get_rows},
        {"ROPE", &ggml.op_rope},       {"NORM", &ggml.op_norm},       {"RMS_NORM", &ggml.op_rms_norm},
        {"CONT", &ggml.op_cont},       {"SOFT_MAX", &ggml.op_soft_max},
    };
    for (size_t w = 0; w < sizeof wanted / sizeof wanted[0]; w++) {
        *wanted[w].slot = -1;
        for (int op = 0; op < ABI_OP_COUNT; op++) {
            if (strcmp(ggml.ggml_op_name(op), wanted[w].name) == 0) *wanted[w].slot = op;
        }
        if (*wanted[w].slot < 0) {
            snprintf(err, err_len, "libggml has no operator named %s", wanted[w].name);
            return -1;
        }
    }
    ggml.unary_relu = -1;
    for (int op = 0; op < ABI_UNARY_OP_COUNT && ggml.unary_relu < 0; op++) {
        if (strcmp(ggml.ggml_unary_op_name(op), "RELU") == 0) ggml.unary_relu = op;
    }
    if (ggml.unary_relu < 0) snprintf(err, err_len, "libggml has no unary operator named RELU");
    return ggml.unary_relu < 0 ? -1 : 0;
}

int abi_load(const char *lib_dir, char *err, size_t err_len) {
    void *handle = open_ggml(lib_dir, err, err_len);
    if (handle == NULL && lib_dir != NULL) return -1;
#define X(ret, name, args)                                                                                           \
    do {                                                                                                             \
        void *symbol = dlsym(handle, #name);                                                                         \
        if (symbol == NULL) {                                                                                        \
            snprintf(err, err_len, "libggml has no function " #name);                                                \
            return -1;                                                                                               \
        }                                                                                                            \
        memcpy(&ggml.name, &symbol, sizeof symbol);                                                                  \
    } while (0);
    ABI_FUNCTIONS(X)
#undef X
    /* ggml_tensor_overhead() is sizeof(struct ggml_object) + sizeof(struct ggml_tensor); the object header is
     * two size_t, a pointer, an enum and padding: 32 bytes. */
    const size_t expected = 32 + sizeof(struct ggml_tensor);
    if (ggml.ggml_tensor_overhead() != expected) {
        snprintf(err, err_len, "struct ggml_tensor takes %zu bytes in libggml %s, %zu were expected",
                 ggml.ggml_tensor_overhead() - 32, ggml.ggml_version(), sizeof(struct ggml_tensor));
        return -1;
    }
    const int api = ggml.ggml_backend_cpu_reg()->api_version;
    if (api != ABI_BACKEND_API_VERSION) {
        snprintf(err, err_len, "libggml %s has backend API version %d, this build speaks version %d",
                 ggml.ggml_version(), api, ABI_BACKEND_API_VERSION);
        return -1;
    }
    const struct ggml_type_traits *q8 = ggml.ggml_get_type_traits(ABI_TYPE_Q8_0);
    const struct ggml_type_traits_cpu *q8_cpu = ggml.ggml_get_type_traits_cpu(ABI_TYPE_Q8_0);
    /* Q8_1 and Q8_K exist in memory only, so nothing but ggml's sources fixes their layout (kernels.c reads them). */
    if (q8->blck_size != 32 || q8->type_size != 34 || q8_cpu->vec_dot_type != ABI_TYPE_Q8_0 ||
        ggml.ggml_get_type_traits(ABI_TYPE_Q8_1)->type_size != 36 ||
        ggml.ggml_get_type_traits(ABI_TYPE_Q8_K)->type_size != 292) {
        snprintf(err, err_len, "the type traits of libggml %s have another layout than expected",
                 ggml.ggml_version());
        return -1;
    }
    return find_ops(err, err_len);
}

size_t abi_row_size(int type, int64_t n) {
    if (type < 0 || type >= ABI_TYPE_COUNT || n <= 0) return 0;
    const struct ggml_type_traits *traits = ggml.ggml_get_type_traits(type);
    if (traits->blck_size <= 0 || n % traits->blck_size != 0) return 0;
    return ggml.ggml_row_size(type, n);
}
