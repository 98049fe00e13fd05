/* ffn_tiles.c - see ffn_tiles.h. */
#include "ffn_tiles.h"

#include "kernels.h"
#include "tiles.h"

#include <string.h>

enum {
    ROWS = 64, /* neurons of a tile of gate and up: bits of a mask */
    NEURONS = 2 * TILE_PAIRS,
    AHEAD = 16, /* neurons */
    LEAST_WANTED = 5, /* measured: docs/ARCHITECTURE.md */
};

static atomic_int forced_wanted;

int ffn_tiles_least_wanted(void) {
    const int forced = atomic_load_explicit(&forced_wanted, memory_order_relaxed);
    return forced == 0 ? LEAST_WANTED : forced < 0 ? 0 : forced;
}

void ffn_tiles_force(int n) {
    atomic_store_explicit(&forced_wanted, n, memory_order_relaxed);
}

bool ffn_tiles_can(const struct pi_layer *layer) {
    const struct pi_layer_spec *spec = &layer->spec;
    const int rounding = ggml.ggml_get_type_traits_cpu(spec->down_source_type)->vec_dot_type;
    /* Where down's columns are the source's own numbers, exact answers are stock's to within float32, and stay so. */
    const bool lossless = spec->down_type == ABI_TYPE_I8 || spec->down_type == ABI_TYPE_F32 || spec->down_type == ABI_TYPE_F16 ||
                          spec->down_type == ABI_TYPE_BF16;
    if (lossless && spec->predictor == PI_PREDICT_NONE) return false;
    if (!tile_available() || spec->n_embd % 32 != 0 || spec->n_ff < TILE_PAIRS) return false; /* pairs: ffn.c's room */
    if (spec->gate_name != NULL && !tile_has_type(spec->gate_type)) return false;
    if (spec->up_name != NULL && !tile_has_type(spec->up_type)) return false;
    if (rounding == ABI_TYPE_F32 || rounding == ABI_TYPE_F16) return false; /* stock keeps more bits than bfloat16 has */
    return spec->down_type == ABI_TYPE_I8 || kernel_can_dequantize(spec->down_type);
}

static int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

int64_t ffn_tiles_pairs(const struct pi_layer *layer) {
    return round_up(layer->spec.n_ff, NEURONS) / 2;
}

int64_t ffn_tiles_outputs(const struct pi_layer *layer) {
    return round_up(layer->spec.n_embd, TILE_WIDTH);
}

/* A tile of gate or up. */
static size_t tile_size(const struct pi_layer *layer, int type) {
    return ROWS * tile_row_size(type, layer->spec.n_embd);
}

/* One row's activations on their way through the rounding type: as floats, as that type, and in stored order. */
static size_t rounding_size(const struct pi_layer *layer) {
    return (size_t)round_up(layer->spec.n_ff, 16) * 3 * sizeof(float);
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

size_t ffn_tiles_memory(const struct pi_layer *layer) {
    const struct pi_layer_spec *spec = &layer->spec;
    const size_t up = (spec->gate_name != NULL ? tile_size(layer, spec->gate_type) : 0) +
                      (spec->up_name != NULL ? tile_size(layer, spec->up_type) : 0);
    const size_t down = (size_t)TILE_PAIRS * TILE_WIDTH * sizeof(uint32_t);
    return max_size(max_size(up, down), rounding_size(layer));
}

void ffn_tiles_clear(const struct tile_rows *t, int thread, int n_threads) {
    const int64_t begin = (int64_t)t->n_rows * thread / n_threads, n = (int64_t)t->n_rows * (thread + 1) / n_threads - begin;
    const int64_t pairs = ffn_tiles_pairs(t->layer), outputs = ffn_tiles_outputs(t->layer);
    memset(t->pairs + begin * pairs, 0, (size_t)(n * pairs) * sizeof *t->pairs);
    memset(t->sums + begin * outputs, 0, (size_t)(n * outputs) * sizeof *t->sums);
}

static bool in_wave(const struct tile_rows *t, const struct tile_wave *wave, int64_t j) {
    const int64_t unit = pi_unit(t->layer, t->expert, j);
    return j < t->layer->spec.n_ff && t->some[j] && unit >= wave->lo && unit < wave->hi;
}

/* ---- gate and up ---------------------------------------------------------------------------------------------- */

/* Rows of gate or up, packed; which of them are there, and the inputs they meet. */
struct row_tile {
    int type;
    int64_t n_embd, offset; /* offset in a bundle */
    uint8_t *packed;
    size_t row_size;
    const uint8_t *inputs;
    size_t input_size;
};

static struct row_tile make_tile(const struct tile_rows *t, int type, int64_t offset, const uint8_t *inputs, uint8_t **memory) {
    struct row_tile tile = {type,   t->layer->spec.n_embd, offset, *memory, tile_row_size(type, t->layer->spec.n_embd),
                            inputs, t->input_size};
    *memory += tile_size(t->layer, type);
    return tile;
}

/* out[i][k] = the products of the rows in masks[i] with the inputs of up to TILE_GROUP_INPUTS rows. */
static void multiply(const struct row_tile *tile, const struct ffn_row *rows, int n_rows, const uint64_t *masks,
                     float out[][ROWS]) {
    const uint8_t *inputs[TILE_GROUP_INPUTS];
    int wanted = 0;
    for (int i = 0; i < n_rows; i++) {
        inputs[i] = tile->inputs + (size_t)rows[i].input * tile->input_size;
        wanted += __builtin_popcountll(masks[i]);
    }
    if ((float)wanted >= tile_dense_share_dots() * (float)(n_rows * ROWS)) {
        tile_products(tile->type, tile->n_embd, tile->packed, ROWS, inputs, n_rows, out[0]);
        return;
    }
    for (int i = 0; i < n_rows; i++) {
        const uint8_t *some[ROWS];
        float sums[ROWS];
        int n = 0;
        for (uint64_t m = masks[i]; m != 0; m &= m - 1) some[n++] = tile->packed + (size_t)__builtin_ctzll(m) * tile->row_size;
        tile_dots(tile->type, tile->n_embd, some, n, inputs[i], sums);
        n = 0;
        for (uint64_t m = masks[i]; m != 0; m &= m - 1) out[i][__builtin_ctzll(m)] = sums[n++];
    }
}

/* The activations of the neurons in mask, from j on, from their products. */
static uint64_t activate_row(const struct tile_rows *t, int r, int64_t j, uint64_t mask, const float *g, const float *u) {
    float gs[ROWS], us[ROWS], hs[ROWS];
    uint64_t fired = 0;
    int n = 0;
    for (uint64_t m = mask; m != 0; m &= m - 1, n++) {
        const int k = __builtin_ctzll(m);
        gs[n] = g[k];
        us[n] = u != NULL ? u[k] : 1.0f;
    }
    ffn_activate(t->activation, n, gs, us, hs);
    n = 0;
    uint16_t *pairs = (uint16_t *)(t->pairs + r * ffn_tiles_pairs(t->layer));
    for (uint64_t m = mask; m != 0; m &= m - 1, n++) {
        const int64_t neuron = j + __builtin_ctzll(m);
        t->rows[r].h[neuron] = hs[n];
        if (t->predicts) pairs[neuron ^ 1] = tile_bf16(hs[n]); /* even neurons above odd ones */
        fired += hs[n] != 0.0f;
    }
    return fired;
}

/* Leaves in mask the neurons that fire. Returns how many. */
static int keep_positive(uint64_t *mask, const float *g) {
    for (uint64_t m = *mask; m != 0; m &= m - 1) {
        if (!(g[__builtin_ctzll(m)] > 0.0f)) *mask &= ~(m & -m);
    }
    return __builtin_popcountll(*mask);
}

/* A tile of neurons from j on, of which those in `here` have been packed, for all rows. */
static void up_tile(const struct tile_rows *t, int64_t j, uint64_t here, const struct row_tile *gate, const struct row_tile *up,
                    uint64_t *fired, uint64_t *positive) {
    const int64_t n_ff = t->layer->spec.n_ff;
    for (int r = 0; r < t->n_rows; r += TILE_GROUP_INPUTS) {
        const int n = t->n_rows - r < TILE_GROUP_INPUTS ? t->n_rows - r : TILE_GROUP_INPUTS;
        uint64_t masks[TILE_GROUP_INPUTS];
        float g[TILE_GROUP_INPUTS][ROWS], u[TILE_GROUP_INPUTS][ROWS];
        for (int i = 0; i < n; i++) masks[i] = tile_mask(t->wanted + (r + i) * n_ff + j) & here;
        if (gate != NULL) {
            multiply(gate, t->rows + r, n, masks, g);
            for (int i = 0; i < n; i++) {
                uint64_t left = masks[i];
                const int count = keep_positive(&left, g[i]);
                if (t->all) *positive += (uint64_t)count;
                else masks[i] = left;
            }
        }
        if (up != NULL) multiply(up, t->rows + r, n, masks, u);
        for (int i = 0; i < n; i++) {
            const float *products = gate != NULL ? g[i] : t->rows[r + i].h + j;
            *fired += activate_row(t, r + i, j, masks[i], products, up != NULL ? u[i] : NULL);
        }
    }
}

void ffn_tiles_up(const struct tile_rows *t, const struct tile_wave *wave, uint64_t *fired, uint64_t *positive) {
    const struct pi_layer_spec *spec = &t->layer->spec;
    uint8_t *memory = wave->memory;
    struct row_tile gate = {0}, up = {0}; /* an ungated layer's deciding matrix is up, but serves as gate */
    if (t->predicts) {
        const bool gated = spec->gated;
        gate = make_tile(t, gated ? spec->gate_type : spec->up_type, gated ? spec->gate_offset : spec->up_offset,
                         gated ? t->gate_inputs : t->up_inputs, &memory);
    }
    if (spec->gated) up = make_tile(t, spec->up_type, spec->up_offset, t->up_inputs, &memory);
    for (int64_t tile = wave->thread; tile * ROWS < spec->n_ff; tile += wave->n_threads) {
        uint64_t here = 0;
        for (int k = 0; k < ROWS; k++) {
            const int64_t j = tile * ROWS + k;
            if (!in_wave(t, wave, j)) continue;
            const uint8_t *own = ffn_bundle(t->layer, t->expert, j, t->failed);
            if (own == NULL) return;
            if (gate.packed != NULL) {
                tile_pack_row(gate.type, spec->n_embd, own + gate.offset, gate.packed + (size_t)k * gate.row_size);
            }
            if (up.packed != NULL) tile_pack_row(up.type, spec->n_embd, own + up.offset, up.packed + (size_t)k * up.row_size);
            here |= 1ull << k;
        }
        if (here == 0) continue;
        up_tile(t, tile * ROWS, here, gate.packed != NULL ? &gate : NULL, up.packed != NULL ? &up : NULL, fired, positive);
    }
}

/* ---- rounding ------------------------------------------------------------------------------------------------- */

void ffn_tiles_round(const struct tile_rows *t, const struct tile_wave *wave) {
    const struct pi_layer *layer = t->layer;
    const int64_t n_ff = layer->spec.n_ff, room = round_up(n_ff, 16);
    const int32_t *order = layer->order == NULL ? NULL : layer->order + pi_unit(layer, t->expert, 0);
    float *values = wave->memory, *packed = values + room, *stored = packed + room;
    for (int r = wave->thread; r < t->n_rows; r += wave->n_threads) {
        const float *h = t->rows[r].h != NULL ? t->rows[r].h : t->rows[r].g;
        if (order == NULL) memcpy(values, h, (size_t)n_ff * sizeof *values);
        for (int64_t j = 0; j < n_ff && order != NULL; j++) values[order[j]] = h[j];
        if (t->round_type != ABI_TYPE_F32) {
            kernel_round_input(t->round_type, n_ff, values, packed);
            kernel_dequantize(t->round_type, n_ff, packed, values);
        }
        for (int64_t j = 0; j < n_ff && order != NULL; j++) stored[j] = values[order[j]];
        tile_pack_activations(order != NULL ? stored : values, n_ff, t->pairs + r * ffn_tiles_pairs(layer));
    }
}

/* ---- down ----------------------------------------------------------------------------------------------------- */

/* Work is shared by outputs; where there are few of them, by rows too. */
struct share {
    int64_t n_tiles; /* of TILE_WIDTH outputs */
    int parts;       /* of the rows */
};

static struct share share_of(const struct tile_rows *t, const struct tile_wave *wave) {
    struct share share = {ffn_tiles_outputs(t->layer) / TILE_WIDTH, 1};
    const int most = t->n_rows / 64 + 1;
    while (share.n_tiles * share.parts < 2 * wave->n_threads && share.parts < most) share.parts++;
    return share;
}

/* Asks for the lines that pack_pair() will read a little later: they are few, and far from each other. */
static void fetch_ahead(const struct tile_rows *t, const struct tile_wave *wave, int64_t j, int64_t first, int width) {
    const struct pi_layer_spec *spec = &t->layer->spec;
    if (t->layer->store != NULL) return; /* it may not be there yet */
    for (int i = 0; i < 2; i++) {
        if (!in_wave(t, wave, j + i)) continue;
        const uint8_t *at = pi_bundle(t->layer, t->expert, j + i) + spec->down_offset + abi_row_size(spec->down_type, first);
        const size_t size = abi_row_size(spec->down_type, width);
        for (size_t k = 0; k < size + 64; k += 64) __builtin_prefetch(at + k);
    }
}

/* The columns of two neurons, their outputs from `first` on. False: a read failed. */
static bool pack_pair(const struct tile_rows *t, const struct tile_wave *wave, int64_t j, int64_t first, int width, uint32_t *to) {
    const struct pi_layer *layer = t->layer;
    const struct pi_layer_spec *spec = &layer->spec;
    const uint8_t *columns[2] = {NULL, NULL};
    const uint16_t *scales[2] = {NULL, NULL};
    _Alignas(64) float tmp[2 * TILE_WIDTH];
    fetch_ahead(t, wave, j + AHEAD, first, width);
    for (int i = 0; i < 2; i++) {
        if (!in_wave(t, wave, j + i)) continue;
        const uint8_t *own = ffn_bundle(t->layer, t->expert, j + i, t->failed);
        if (own == NULL) return false;
        columns[i] = own + spec->down_offset + abi_row_size(spec->down_type, first);
        if (spec->down_type == ABI_TYPE_I8) scales[i] = ffn_scales(layer, t->expert, j + i) + first;
    }
    tile_pack_pair(spec->down_type, columns[0], columns[1], scales[0], scales[1], width, to, tmp);
    return true;
}

/* Adds a tile of columns, those of neurons from j on, to the sums of rows [begin, end), which are TILE_WIDTH apart. */
static void add_tile(const struct tile_rows *t, const uint32_t *tile, int64_t j, int begin, int end, float *sums) {
    const int64_t row = ffn_tiles_pairs(t->layer);
    const float dense_from = tile_dense_share_sums() * TILE_PAIRS * TILE_GROUP_SUMS;
    for (int r = begin; r < end; r += TILE_GROUP_SUMS) {
        uint32_t which[TILE_GROUP_SUMS][TILE_PAIRS + 16], activations[TILE_GROUP_SUMS][TILE_PAIRS + 16];
        const uint32_t *pairs[TILE_GROUP_SUMS];
        int n[TILE_GROUP_SUMS], all = 0;
        const int rows = end - r < TILE_GROUP_SUMS ? end - r : TILE_GROUP_SUMS;
        for (int i = 0; i < rows; i++) {
            pairs[i] = t->pairs + (r + i) * row + j / 2;
            all += n[i] = tile_list_pairs(pairs[i], which[i], activations[i]);
        }
        if (rows == TILE_GROUP_SUMS && (float)all >= dense_from) {
            tile_sums_dense(tile, pairs, sums + (int64_t)r * TILE_WIDTH, TILE_WIDTH);
            continue;
        }
        for (int i = 0; i < rows; i++) {
            tile_sums_sparse(tile, which[i], activations[i], n[i], sums + (int64_t)(r + i) * TILE_WIDTH);
        }
    }
}

static bool any_in_wave(const struct tile_rows *t, const struct tile_wave *wave, int64_t j) {
    for (int64_t k = j; k < j + NEURONS; k++) {
        if (in_wave(t, wave, k)) return true;
    }
    return false;
}

void ffn_tiles_down(const struct tile_rows *t, const struct tile_wave *wave) {
    const int64_t n_embd = t->layer->spec.n_embd, n_ff = t->layer->spec.n_ff;
    const struct share share = share_of(t, wave);
    uint32_t *tile = wave->memory;
    for (int64_t item = wave->thread; item < share.n_tiles * share.parts; item += wave->n_threads) {
        const int part = (int)(item / share.n_tiles);
        const int begin = (int)((int64_t)t->n_rows * part / share.parts);
        const int end = (int)((int64_t)t->n_rows * (part + 1) / share.parts);
        const int64_t first = item % share.n_tiles * TILE_WIDTH;
        const int width = n_embd - first < TILE_WIDTH ? (int)(n_embd - first) : TILE_WIDTH;
        float *sums = t->sums + first * t->n_rows; /* [outputs / TILE_WIDTH][n_rows][TILE_WIDTH] */
        for (int64_t j = 0; j < n_ff; j += NEURONS) {
            if (!any_in_wave(t, wave, j)) continue;
            for (int k = 0; k < TILE_PAIRS; k++) {
                if (!pack_pair(t, wave, j + 2 * k, first, width, tile + k * TILE_WIDTH)) return;
            }
            add_tile(t, tile, j, begin, end, sums);
        }
    }
}

void ffn_tiles_write(const struct tile_rows *t, const struct tile_wave *wave) {
    const int64_t n_embd = t->layer->spec.n_embd;
    for (int r = wave->thread; r < t->n_rows; r += wave->n_threads) {
        for (int64_t first = 0; first < n_embd; first += TILE_WIDTH) {
            const int64_t width = n_embd - first < TILE_WIDTH ? n_embd - first : TILE_WIDTH;
            memcpy(t->rows[r].out + first, t->sums + first * t->n_rows + r * TILE_WIDTH, (size_t)width * sizeof(float));
        }
    }
}
