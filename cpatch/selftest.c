/* selftest.c - see selftest.h. */
#define _GNU_SOURCE
#include "selftest.h"

#include "backend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { N_EMBD = 64, N_FF = 96, N_TOKENS = 3, STRIDE = 2 * N_EMBD * (int)sizeof(float) };

struct weights {
    float gate[N_FF][N_EMBD], x[N_TOKENS][N_EMBD];
    float bundle[N_FF][2][N_EMBD]; /* up row, down column */
    float expected[N_TOKENS][N_EMBD];
};

static void fill(struct weights *w) {
    uint32_t state = 12345;
    float *all = &w->gate[0][0];
    for (size_t i = 0; i < offsetof(struct weights, expected) / sizeof(float); i++) {
        state = state * 1664525u + 1013904223u;
        all[i] = (float)(int32_t)state / 2147483648.0f;
    }
    memset(w->expected, 0, sizeof w->expected);
    for (int t = 0; t < N_TOKENS; t++) {
        for (int j = 0; j < N_FF; j++) {
            float g = 0, u = 0;
            for (int i = 0; i < N_EMBD; i++) {
                g += w->gate[j][i] * w->x[t][i];
                u += w->bundle[j][0][i] * w->x[t][i];
            }
            for (int i = 0; i < N_EMBD && g > 0; i++) w->expected[t][i] += g * u * w->bundle[j][1][i];
        }
    }
}

static struct pi_model *open_model(const struct weights *w, char *err, size_t err_len) {
    const struct pi_layer_spec spec = {
        .gated = true,
        .up_name = "blk.0.ffn_up.weight",
        .down_name = "blk.0.ffn_down.weight",
        .n_embd = N_EMBD,
        .n_ff = N_FF,
        .stride = STRIDE,
        .down_offset = STRIDE / 2,
        .up_type = ABI_TYPE_F32,
        .down_type = ABI_TYPE_F32,
        .down_source_type = ABI_TYPE_F32,
    };
    const int fd = memfd_create("powerinfer-selftest", MFD_CLOEXEC);
    if (fd < 0 || write(fd, w->bundle, sizeof w->bundle) != (ssize_t)sizeof w->bundle) {
        snprintf(err, err_len, "self-test: no memory file");
        if (fd >= 0) close(fd);
        return NULL;
    }
    struct pi_model *model = pi_model_open(&fd, 1, 1, &spec, 0, NULL, PI_ACT_RELU, NULL, err, err_len);
    if (model != NULL && pi_model_read(model, fd, 1, err, err_len) != 0) {
        pi_model_close(model);
        model = NULL;
    }
    close(fd);
    return model;
}

/* Builds and runs gate -> up -> GLU -> down. Every resource is freed by the caller through *_out. */
static int run(struct weights *w, struct pi_model *model, ggml_backend_t ours, ggml_backend_t cpu, char *err,
               size_t err_len) {
    const struct ggml_init_params params = {64 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead(), NULL, true};
    struct ggml_context *cpu_ctx = ggml.ggml_init(params), *our_ctx = ggml.ggml_init(params),
                        *graph_ctx = ggml.ggml_init(params);
    ggml_backend_buffer_t cpu_buffer = NULL, our_buffer = NULL;
    ggml_backend_sched_t sched = NULL;
    int result = -1;
    snprintf(err, err_len, "self-test: out of memory");
    if (cpu_ctx == NULL || our_ctx == NULL || graph_ctx == NULL) goto done;

    struct ggml_tensor *gate = ggml.ggml_new_tensor_2d(cpu_ctx, ABI_TYPE_F32, N_EMBD, N_FF);
    struct ggml_tensor *up = ggml.ggml_new_tensor_2d(our_ctx, ABI_TYPE_F32, N_EMBD, N_FF);
    struct ggml_tensor *down = ggml.ggml_new_tensor_2d(our_ctx, ABI_TYPE_F32, N_FF, N_EMBD);
    ggml.ggml_set_name(up, "blk.0.ffn_up.weight");
    ggml.ggml_set_name(down, "blk.0.ffn_down.weight");
    cpu_buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(cpu_ctx, ggml.ggml_backend_cpu_buffer_type());
    our_buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(our_ctx, pi_model_buft(model));
    if (cpu_buffer == NULL || our_buffer == NULL) goto done;
    ggml.ggml_backend_buffer_set_usage(cpu_buffer, ABI_BUFFER_USAGE_WEIGHTS);
    ggml.ggml_backend_buffer_set_usage(our_buffer, ABI_BUFFER_USAGE_WEIGHTS);
    ggml.ggml_backend_tensor_set(gate, w->gate, 0, sizeof w->gate);

    struct ggml_tensor *x = ggml.ggml_new_tensor_2d(graph_ctx, ABI_TYPE_F32, N_EMBD, N_TOKENS);
    ggml.ggml_set_input(x);
    struct ggml_tensor *g = ggml.ggml_mul_mat(graph_ctx, gate, x), *u = ggml.ggml_mul_mat(graph_ctx, up, x);
    struct ggml_tensor *y = ggml.ggml_mul_mat(graph_ctx, down, ggml.ggml_reglu_split(graph_ctx, g, u));
    ggml.ggml_set_output(y);
    struct ggml_cgraph *graph = ggml.ggml_new_graph(graph_ctx);
    ggml.ggml_build_forward_expand(graph, y);

    ggml_backend_t backends[] = {ours, cpu};
    sched = ggml.ggml_backend_sched_new(backends, NULL, 2, 64, false, true);
    if (sched == NULL || !ggml.ggml_backend_sched_alloc_graph(sched, graph)) goto done;
    ggml.ggml_backend_tensor_set(x, w->x, 0, sizeof w->x);
    const int status = ggml.ggml_backend_sched_graph_compute(sched, graph);
    if (status != ABI_STATUS_SUCCESS) {
        snprintf(err, err_len, "self-test: the scheduler answered with status %d", status);
        goto done;
    }
    float got[N_TOKENS][N_EMBD];
    ggml.ggml_backend_tensor_get(y, got, 0, sizeof got);
    for (int t = 0; t < N_TOKENS; t++) {
        for (int i = 0; i < N_EMBD; i++) {
            if (!(fabsf(got[t][i] - w->expected[t][i]) <= 1e-3f)) {
                snprintf(err, err_len, "self-test: output %d of token %d is %g where %g is right", i, t,
                         (double)got[t][i], (double)w->expected[t][i]);
                goto done;
            }
        }
    }
    struct pi_layer_stats stats;
    if (pi_model_stats(model, 0, 1, &stats) != 0 || stats.calls != 1 || stats.selected >= stats.neurons) {
        snprintf(err, err_len, "self-test: the scheduler did not hand up, GLU and down to us in one split");
        goto done;
    }
    result = 0;
done:
    if (sched != NULL) ggml.ggml_backend_sched_free(sched);
    if (cpu_buffer != NULL) ggml.ggml_backend_buffer_free(cpu_buffer);
    if (our_buffer != NULL) ggml.ggml_backend_buffer_free(our_buffer);
    if (cpu_ctx != NULL) ggml.ggml_free(cpu_ctx);
    if (our_ctx != NULL) ggml.ggml_free(our_ctx);
    if (graph_ctx != NULL) ggml.ggml_free(graph_ctx);
    return result;
}

int selftest_run(char *err, size_t err_len) {
    struct weights *w = malloc(sizeof *w);
    struct pi_model *model = NULL;
    ggml_backend_t ours = backend_new(), cpu = ggml.ggml_backend_cpu_init();
    int result = -1;
    snprintf(err, err_len, "self-test: out of memory");
    if (w != NULL && ours != NULL && cpu != NULL) {
        fill(w);
        model = open_model(w, err, err_len);
        if (model != NULL) result = run(w, model, ours, cpu, err, err_len);
    }
    pi_model_close(model);
    if (ours != NULL) ggml.ggml_backend_free(ours);
    if (cpu != NULL) ggml.ggml_backend_free(cpu);
    free(w);
    return result;
}
