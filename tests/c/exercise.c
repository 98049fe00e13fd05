/* exercise.c - runs the C backend without Python, so that it can run under ASan and UBSan (tests/test_sanitizers.py).
 * Usage: exercise LIB_DIR SEED. Exit status 0 when everything came out right. */
#define _GNU_SOURCE
#include "kernels_bench.h"
#include "powerinfer.h"

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { N_EMBD = 256, N_FF = 192, MAX_ROWS = 70, EXPERTS = 4 };

static uint64_t state;

static uint64_t next_random(void) { /* splitmix64 */
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static float uniform(void) {
    return (float)(int32_t)(uint32_t)next_random() / 2147483648.0f;
}

static _Noreturn void die(const char *what, const char *detail) {
    fprintf(stderr, "%s: %s\n", what, detail);
    exit(1);
}

static int memory_file(const void *data, size_t size) {
    const int fd = memfd_create("exercise", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) die("memory file", "cannot be written");
    return fd;
}

/* tiles: an FFN that may be computed in tiles (with the instructions for them) is, in their sparse and dense forms. */
static void ffn_round(int type, bool gated, bool mixture, int activation, bool tiles) {
    const int experts = mixture ? EXPERTS : 1;
    const size_t values = (size_t)experts * N_FF * N_EMBD;
    float *weights = malloc(values * sizeof(float));
    uint8_t *packed = malloc(values * sizeof(float));
    uint8_t *bundles = calloc((size_t)experts * N_FF, 2048);
    if (weights == NULL || packed == NULL || bundles == NULL) die("ffn", "out of memory");
    size_t row = 0;
    for (int segment = 0; segment < 1 + gated; segment++) {
        for (size_t i = 0; i < values; i++) weights[i] = uniform();
        if (pi_quantize(type, weights, packed, (int64_t)experts * N_FF, N_EMBD) != 0) die("quantize", "refused");
        row = type == 0 ? 1024 : type == 1 || type == 30 ? 512 : type == 8 ? 272 : type == 2 ? 144 : type == 12 ? 144
              : type == 13 ? 176 : 210;
        for (size_t j = 0; j < (size_t)experts * N_FF; j++) {
            memcpy(bundles + j * 2048 + (size_t)segment * 1024, packed + j * row, row);
        }
    }
    const struct pi_layer_spec spec = {
        .index = 3, .gated = gated, .up_name = gated ? "blk.3.ffn_up.weight" : NULL, .down_name = "blk.3.ffn_down.weight",
        .n_embd = N_EMBD, .n_ff = N_FF, .n_expert = mixture ? EXPERTS : 0, .stride = 2048,
        .down_offset = gated ? 1024 : 0, .up_type = type, .down_type = type, .down_source_type = tiles ? 8 : 0};
    char err[256] = "";
    const int fd = memory_file(bundles, (size_t)experts * N_FF * 2048);
    struct pi_model *model = pi_model_open(&fd, 1, 1, &spec, 0, NULL, activation, NULL, err, sizeof err);
    if (model == NULL || pi_model_read(model, fd, 2, err, sizeof err) != 0) die("open", err);
    close(fd);
    float *x = malloc(MAX_ROWS * N_EMBD * sizeof(float)), *g = malloc(MAX_ROWS * N_FF * sizeof(float));
    float *h = malloc(MAX_ROWS * N_FF * sizeof(float)), *out = malloc(MAX_ROWS * N_EMBD * sizeof(float));
    if (x == NULL || g == NULL || h == NULL || out == NULL) die("ffn", "out of memory");
    for (int rows = 1; rows <= MAX_ROWS; rows = rows * 3 + 1) {
        int32_t expert[MAX_ROWS];
        for (int i = 0; i < rows * N_EMBD; i++) x[i] = uniform();
        for (int i = 0; i < rows * N_FF; i++) g[i] = uniform() - 0.7f;
        for (int i = 0; i < rows; i++) expert[i] = (int32_t)(next_random() % EXPERTS);
        for (int threads = 1; threads <= 3; threads++) {
            pi_model_set_dense(model, threads == 3);
            pi_tiles_force(tiles ? -1 : 0, threads == 2 ? 0 : 2);
            if (pi_ffn(model, 0, rows, mixture ? expert : NULL, gated ? x : NULL, g, gated ? h : NULL, out, threads))
                die("ffn", "failed");
            for (int i = 0; i < rows * N_EMBD; i++) {
                if (!isfinite(out[i])) die("ffn", "an output is not finite");
            }
        }
    }
    if (tiles && type == 2 && gated && !mixture && pi_tiles_available()) { /* they round differently: were they used? */
        pi_model_set_dense(model, false);
        float *without = malloc(MAX_ROWS * N_EMBD * sizeof(float));
        if (without == NULL) die("ffn", "out of memory");
        for (int least = 0; least < 2; least++) {
            pi_tiles_force(least == 0 ? -1 : 1 << 20, -1);
            for (int i = 0; i < MAX_ROWS * N_FF; i++) g[i] = (float)(i % 7) - 2.5f;
            for (int i = 0; i < MAX_ROWS * N_EMBD; i++) x[i] = (float)(i % 11) - 4.5f;
            if (pi_ffn(model, 0, MAX_ROWS, NULL, x, g, h, least == 0 ? out : without, 2) != 0) die("ffn", "failed");
        }
        if (memcmp(out, without, MAX_ROWS * N_EMBD * sizeof(float)) == 0) die("tiles", "were not used");
        free(without);
    }
    struct pi_layer_stats stats;
    if (pi_model_stats(model, 0, 1, &stats) != 0 || stats.fired > stats.neurons) die("stats", "make no sense");
    pi_model_close(model);
    free(x), free(g), free(h), free(out), free(weights), free(packed), free(bundles);
}

/* A matrix in panels, where there are the instructions for them; every buffer has exactly its size. */
static void panel_round(int type, int n_in, int n_out, int n_inputs) {
    const int block = type == 2 || type == 8 ? 32 : 256;
    const int size = type == 2 ? 18 : type == 8 ? 34 : type == 12 ? 144 : type == 13 ? 176 : 210;
    const size_t values = (size_t)n_in * (size_t)n_out, bytes = values / (size_t)block * (size_t)size;
    float *weights = malloc(values * sizeof(float)), *x = malloc((size_t)(n_in * n_inputs) * sizeof(float));
    float *out = malloc((size_t)(n_out * n_inputs) * sizeof(float));
    uint8_t *packed = malloc(bytes), *copy = malloc(bytes);
    if (weights == NULL || x == NULL || out == NULL || packed == NULL || copy == NULL) die("panels", "out of memory");
    for (size_t i = 0; i < values; i++) weights[i] = uniform();
    for (int i = 0; i < n_in * n_inputs; i++) x[i] = uniform();
    if (pi_quantize(type, weights, packed, n_out, n_in) != 0) die("quantize", "refused");
    if (pi_panel_copy(type, n_in, n_out, packed, 1 + (int64_t)(next_random() % 200), copy) != 0 ||
        memcmp(packed, copy, bytes) != 0) die("panels", "do not give back what they were given");
    const int threads = 1 + (int)(next_random() % 3);
    if (pi_panel_products(type, n_in, n_out, packed, x, n_inputs, out, threads) == 0) {
        for (int i = 0; i < n_out * n_inputs; i++) {
            if (!isfinite(out[i])) die("panels", "an output is not finite");
        }
    }
    free(weights), free(x), free(out), free(packed), free(copy);
}

/* Specs with random fields: refused or opened, never read out of bounds. */
static void fuzz_specs(int rounds) {
    static uint8_t data[1 << 16];
    const int fd = memory_file(data, sizeof data);
    const int64_t odd[] = {0, 1, -1, 32, 64, 256, 1024, 2048, 65535, 65536, INT32_MAX, INT64_MAX, INT64_MIN};
    for (int i = 0; i < rounds; i++) {
        struct pi_layer_spec spec = {.gated = true, .up_name = "blk.0.ffn_up.weight", .down_name = "blk.0.ffn_down.weight",
                                     .n_embd = 32, .n_ff = 32, .stride = 256, .down_offset = 128};
        int64_t *fields[] = {&spec.n_embd, &spec.n_ff, &spec.n_expert, &spec.stride, &spec.up_offset,
                             &spec.down_offset, &spec.file_offset};
        for (int k = 0; k < 3; k++) *fields[next_random() % 7] = odd[next_random() % 13];
        if (next_random() % 4 == 0) spec.down_type = (int)(next_random() % 60) - 5;
        if (next_random() % 4 == 0) spec.up_type = (int)(next_random() % 60) - 5;
        char err[128];
        struct pi_model *model = pi_model_open(&fd, 1, 1, &spec, 0, NULL, 1, NULL, err, sizeof err);
        if (model != NULL) (void)pi_model_read(model, fd, 1, err, sizeof err);
        pi_model_close(model);
    }
    close(fd);
}

static void fuzz_streams(int rounds) {
    static uint8_t data[1 << 16], header[1000], buffer[1 << 17];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)next_random();
    const int fd = memory_file(data, sizeof data);
    for (int i = 0; i < rounds; i++) {
        struct pi_extent extents[6];
        int64_t at = 1000;
        const int n = (int)(next_random() % 7);
        for (int k = 0; k < n; k++) {
            at += (int64_t)(next_random() % 200);
            extents[k].offset = at;
            extents[k].size = (int64_t)(next_random() % 20000);
            extents[k].file_offset = next_random() % 3 == 0 ? -1 : (int64_t)(next_random() % 50000);
            if (next_random() % 20 == 0) extents[k].size = (int64_t)next_random();
            if (next_random() % 20 == 0) extents[k].file_offset = (int64_t)next_random();
            if (__builtin_add_overflow(at, extents[k].size, &at)) break;
        }
        char err[128];
        struct pi_vgguf *v = pi_vgguf_open(&fd, 1, i % 2 == 0, header, sizeof header, extents, n, err, sizeof err);
        if (v == NULL) continue;
        FILE *file = pi_vgguf_file(v);
        for (int k = 0; k < 20; k++) {
            if (fseek(file, (long)(next_random() % 70000), SEEK_SET) == 0) {
                const size_t wanted = next_random() % sizeof buffer;
                if (fread(buffer, 1, wanted, file) > wanted) die("stream", "read too much");
            }
        }
        pi_vgguf_close(v);
    }
    close(fd);
}

int main(int argc, char **argv) {
    char path[4096], err[512] = "";
    if (argc != 3) die("usage", "exercise LIB_DIR SEED");
    state = strtoull(argv[2], NULL, 10);
    snprintf(path, sizeof path, "%s/libggml.so.0", argv[1]);
    if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == NULL) die("dlopen", dlerror());
    if (pi_init(argv[1], err, sizeof err) != 0) die("pi_init", err);
    const int types[] = {0, 1, 30, 8, 2, 12, 13, 14};
    for (size_t t = 0; t < sizeof types / sizeof types[0]; t++) {
        for (int of = 0; of < 4; of++) {
            for (int activation = 1; activation <= 3; activation++) ffn_round(types[t], true, of & 1, activation, of & 2);
            ffn_round(types[t], false, of & 1, 0, of & 2);
        }
    }
    const int panels[] = {2, 8, 12, 13, 14};
    for (int i = 0; i < 5; i++) {
        panel_round(panels[i], 512, 16, 1);
        panel_round(panels[i], 1280, 37, 5);
        panel_round(panels[i], i < 2 ? 192 : 256, 1, 17);
    }
    fuzz_specs(500);
    fuzz_streams(300);
    if (pi_model_count() != 0) die("models", "were leaked");
    return 0;
}
