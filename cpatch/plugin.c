/* plugin.c - the two ways in: pi_init() from Python, ggml_backend_init() from ggml's own loader. */
#include "backend.h"
#include "selftest.h"

const char *pi_ggml_version(void) {
    return ggml.ggml_version();
}

int pi_init(const char *lib_dir, char *err, size_t err_len) {
    if (abi_load(lib_dir, err, err_len) != 0) return -1;
    ggml_backend_reg_t reg = backend_reg();
    if (selftest_run(err, err_len) != 0) return -1;
    if (ggml.ggml_backend_reg_by_name(reg->iface.get_name(reg)) == NULL) ggml.ggml_backend_register(reg);
    return 0;
}

/* Called by ggml_backend_load() and for GGML_BACKEND_PATH in stock llama.cpp programs, which have loaded libggml
 * themselves. NULL makes ggml report that the backend cannot be used and go on without it. */
__attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void);
ggml_backend_reg_t ggml_backend_init(void) {
    char err[256];
    return abi_load(NULL, err, sizeof err) == 0 ? backend_reg() : NULL;
}
