/* panels.c - see panels.h. */
#include "panels.h"

#include "ggml_abi.h"
#include "kernels.h"
#include "kernels_simd.h"
#include "powerinfer.h"

#include <omp.h>
#include <stdatomic.h>
#include <string.h>

/* ---- layout --------------------------------------------------------------------------------------------------- */

/* A field of a block, by its place there, and by its place in the panel's, which is the same: `chunk` bytes of a row are
 * followed by those of the next. Fields lie in the order in which a product first reads them, and nothing lies elsewhere:
 * processors fetch one stream of addresses ahead, and that beats all prefetching by software (Zen 4: 24 to 29 of the 31 GB/s that
 * a core can get, and two cores 92 to 99 % of what there is). */
struct panel_field {
    uint8_t at, size, chunk;
};

/* values and bytes of a block; bytes of an input's block, see round_piece(). Two of ggml's blocks of 32 are one here.
 * order: where in ggml's block each byte of ours is; a chunk's are together there too. */
struct panel_layout {
    int type, values, block, input;
    const uint8_t *order;
    int n_fields;
    struct panel_field fields[9];
};

enum { BLOCK_INPUT = 40, K_INPUT = 4 + 64 + 256 };

#define BYTES2(at) (at), (at) + 1
#define BYTES4(at) BYTES2(at), BYTES2((at) + 2)
#define BYTES16(at) BYTES4(at), BYTES4((at) + 4), BYTES4((at) + 8), BYTES4((at) + 12)
#define BYTES32(at) BYTES16(at), BYTES16((at) + 16)
#define BYTES128(at) BYTES32(at), BYTES32((at) + 32), BYTES32((at) + 64), BYTES32((at) + 96)

static const uint8_t q4_0_order[] = {BYTES2(0), BYTES2(18), BYTES16(2), BYTES16(20)};
static const uint8_t q8_0_order[] = {BYTES2(0), BYTES2(34), BYTES32(2), BYTES32(36)};
static const uint8_t q4_k_order[] = {BYTES16(0), BYTES128(16)};
static const uint8_t q5_k_order[] = {BYTES16(0), BYTES32(16), BYTES128(48)};

/* In four parts: scales of four groups of 16 values, and then four times 4 bytes of high bits and both times 4 of low bits
 * that they complete. */
#define Q6_K_BITS(half, i) BYTES4(128 + 32 * (half) + 4 * (i)), BYTES4(64 * (half) + 4 * (i)), BYTES4(64 * (half) + 32 + 4 * (i))
#define Q6_K_PART(half, odd)                                                                                              \
    192 + 8 * (half) + (odd), 194 + 8 * (half) + (odd), 196 + 8 * (half) + (odd), 198 + 8 * (half) + (odd),              \
        Q6_K_BITS(half, 4 * (odd)), Q6_K_BITS(half, 4 * (odd) + 1), Q6_K_BITS(half, 4 * (odd) + 2),                       \
        Q6_K_BITS(half, 4 * (odd) + 3)
static const uint8_t q6_k_order[] = {BYTES2(208), Q6_K_PART(0, 0), Q6_K_PART(0, 1), Q6_K_PART(1, 0), Q6_K_PART(1, 1)};

static const struct panel_layout layouts[] = {
    {K_Q4_0, 64, 36, 2 * BLOCK_INPUT, q4_0_order, 3, {{0, 2, 2}, {2, 2, 2}, {4, 32, 4}}},
    {K_Q8_0, 64, 68, 2 * BLOCK_INPUT, q8_0_order, 3, {{0, 2, 2}, {2, 2, 2}, {4, 64, 4}}},
    {K_Q4_K, 256, 144, K_INPUT, q4_k_order, 3, {{0, 4, 2}, {4, 12, 1}, {16, 128, 4}}},
    {K_Q5_K, 256, 176, K_INPUT, q5_k_order, 3, {{0, 4, 2}, {4, 12, 1}, {16, 160, 4}}},
    {K_Q6_K, 256, 210, K_INPUT, q6_k_order, 9,
     {{0, 2, 2}, {2, 4, 1}, {6, 48, 4}, {54, 4, 1}, {58, 48, 4}, {106, 4, 1}, {110, 48, 4}, {158, 4, 1}, {162, 48, 4}}},
};

static const struct panel_layout *layout_of(int type) {
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        if (layouts[i].type == type) return &layouts[i];
    }
    return NULL;
}

/* Copies a block of a row out of, or into, the panel's block that it belongs to. */
static void copy_block(const struct panel_layout *layout, uint8_t *panel, int64_t row, uint8_t *block, bool write) {
    for (int i = 0; i < layout->n_fields; i++) {
        const struct panel_field f = layout->fields[i];
        for (int at = f.at; at < f.at + f.size; at += f.chunk) {
            uint8_t *p = panel + PANEL_ROWS * at + row * f.chunk, *own = block + layout->order[at];
            if (write) memcpy(p, own, f.chunk);
            else memcpy(own, p, f.chunk);
        }
    }
}

/* panel_write() and panel_read(); `data` is only written to by the latter. */
static void copy(int type, int64_t n_in, uint8_t *panels, uint8_t *data, size_t offset, size_t size, bool write) {
    const struct panel_layout *layout = layout_of(type);
    const size_t block = (size_t)layout->block;
    const int64_t n_blocks = n_in / layout->values;
    while (size > 0) {
        const size_t at = offset % block, part = block - at < size ? block - at : size;
        const int64_t b = (int64_t)(offset / block) % n_blocks, row = (int64_t)(offset / block) / n_blocks;
        uint8_t *panel = panels + (size_t)(row / PANEL_ROWS * n_blocks + b) * PANEL_ROWS * block;
        uint8_t whole[256];
        if (part < block || !write) copy_block(layout, panel, row % PANEL_ROWS, whole, false);
        if (write) {
            memcpy(whole + at, data, part);
            copy_block(layout, panel, row % PANEL_ROWS, whole, true);
        } else {
            memcpy(data, whole + at, part);
        }
        data += part;
        offset += part;
        size -= part;
    }
}

void panel_write(int type, int64_t n_in, uint8_t *panels, const uint8_t *data, size_t offset, size_t size) {
    copy(type, n_in, panels, (uint8_t *)(uintptr_t)data, offset, size, true);
}

void panel_read(int type, int64_t n_in, const uint8_t *panels, uint8_t *data, size_t offset, size_t size) {
    copy(type, n_in, (uint8_t *)(uintptr_t)panels, data, offset, size, false);
}

size_t panel_size(int type, int64_t n_in, int64_t n_out, int64_t n_expert) {
    const struct panel_layout *layout = layout_of(type);
    if (layout == NULL || n_in <= 0 || n_in % layout->values != 0 || n_out <= 0 || n_expert < 1) return 0;
    if (n_expert > 1 && n_out % PANEL_ROWS != 0) return 0; /* experts lie one after the other */
    const size_t rows = (size_t)((n_out + PANEL_ROWS - 1) / PANEL_ROWS) * PANEL_ROWS * (size_t)n_expert;
    return rows * (size_t)(n_in / layout->values) * (size_t)layout->block;
}

bool pi_panel_has_type(int type, int64_t n_in, int64_t n_out, int64_t n_expert) {
    return panel_size(type, n_in, n_out, n_expert) > 0;
}

size_t panel_inputs_size(int type, int64_t n_in, int n_inputs) {
    const struct panel_layout *layout = layout_of(type);
    return (size_t)n_inputs * (size_t)(n_in / layout->values) * (size_t)layout->input;
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,popcnt")

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

bool panel_runs(void) {
    const char *level = kernel_level();
    return strcmp(level, "avx512vnni") == 0 || strcmp(level, "avx512bf16") == 0;
}

bool panel_available(void) {
    unsigned eax, ebx, ecx, edx = 0; /* clang 14 does not know "amx-int8" */
    const bool amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & 1u << 25) != 0;
    return panel_runs() && !amx;
}

/* ---- inputs --------------------------------------------------------------------------------------------------- */

/* What is taken off weights to make them unsigned bytes. */
INLINE int bias_of(int type) {
    return type == K_Q4_0 ? 8 : type == K_Q8_0 ? 128 : type == K_Q6_K ? 32 : 0;
}

enum { PIECE = 1024 }; /* values that are rounded at a time */

/* n values as ggml rounds them, with their sums: for types of 32, a float scale, the block's sum times -bias, 32 bytes;
 * for types of 256, a float scale, the sums of 16 values each times -bias (Q4_K, Q5_K: of 32, as they are), 256 bytes. */
static void round_piece(int type, int64_t n, const float *x, uint8_t *out) {
    uint8_t rounded[PIECE / 256 * 292 > PIECE / 32 * 34 ? PIECE / 256 * 292 : PIECE / 32 * 34];
    const int bias = bias_of(type);
    kernel_round_input(kernel_input_type(type), n, x, rounded);
    if (bias == 8 || bias == 128) {
        for (int64_t b = 0; b < n / 32; b++, out += BLOCK_INPUT) {
            const uint8_t *block = rounded + b * 34;
            uint16_t half;
            memcpy(&half, block, 2);
            const float scale = _cvtsh_ss(half);
            int32_t sum = 0;
            for (int i = 0; i < 32; i++) sum += (int8_t)block[2 + i];
            sum *= -bias;
            memcpy(out, &scale, 4);
            memcpy(out + 4, &sum, 4);
            memcpy(out + 8, block + 2, 32);
        }
        return;
    }
    for (int64_t b = 0; b < n / 256; b++, out += K_INPUT) {
        const uint8_t *block = rounded + b * 292; /* float scale, 256 bytes, 16 sums of 16 */
        int16_t of16[16];
        int32_t sums[16] = {0};
        memcpy(of16, block + 260, 32);
        for (int i = 0; i < 16; i++) {
            if (bias != 0) sums[i] = -bias * of16[i];
            else sums[i / 2] += of16[i];
        }
        memcpy(out, block, 4);
        memcpy(out + 4, sums, 64);
        memcpy(out + 68, block + 4, 256);
    }
}

/* ---- products ------------------------------------------------------------------------------------------------- */

INLINE __m512i four_bytes(const uint8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

INLINE __m512 one_float(const uint8_t *p) {
    float v;
    memcpy(&v, p, 4);
    return _mm512_set1_ps(v);
}

INLINE __m512 halves(const uint8_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

INLINE __m512i bytes(const uint8_t *p) {
    return _mm512_loadu_si512(p);
}

/* Nibbles: the low ones (half 0) or the high ones. */
INLINE __m512i nibbles(__m512i q, int half) {
    return _mm512_and_si512(half ? _mm512_srli_epi16(q, 4) : q, _mm512_set1_epi8(15));
}

/* Q4_0, Q8_0: adds the products with T inputs to their sums. */
INLINE void panel_blocks(int type, int64_t n_blocks, const uint8_t *panel, const uint8_t *const *xs, int T, __m512 *sum) {
    const int n_vectors = type == K_Q4_0 ? 4 : 8, size = 64 + 2 * n_vectors * 64;
    for (int64_t b = 0; b < 2 * n_blocks; b++) {
        const uint8_t *scales = panel + b % 2 * 32, *q = panel + 64 + b % 2 * n_vectors * 64;
        __m512i w[8];
        UNROLL for (int i = 0; i < n_vectors; i++) {
            const __m512i v = bytes(q + i * 64);
            if (type == K_Q4_0) {
                w[i] = nibbles(v, 0);
                w[i + 4] = nibbles(v, 1);
            } else {
                w[i] = _mm512_xor_si512(v, _mm512_set1_epi8((char)128));
            }
        }
        const __m512 d = halves(scales);
        UNROLL for (int t = 0; t < T; t++) {
            const uint8_t *x = xs[t] + b * BLOCK_INPUT;
            __m512i acc = four_bytes(x + 4);
            UNROLL for (int i = 0; i < 8; i++) acc = _mm512_dpbusd_epi32(acc, w[i], four_bytes(x + 8 + i * 4));
            sum[t] = _mm512_fmadd_ps(_mm512_mul_ps(d, one_float(x)), _mm512_cvtepi32_ps(acc), sum[t]);
        }
        if (b % 2 == 1) panel += size;
    }
}

/* The 6-bit scales and minima of 8 groups of 32 values, of 16 rows. */
INLINE void k_scales(const uint8_t *p, __m128i scale[8], __m128i minimum[8]) {
    const __m128i low6 = _mm_set1_epi8(63), low4 = _mm_set1_epi8(15), top2 = _mm_set1_epi8(48);
    __m128i s[12];
    UNROLL for (int i = 0; i < 12; i++) s[i] = _mm_loadu_si128((const __m128i *)(p + i * 16));
    UNROLL for (int g = 0; g < 4; g++) {
        scale[g] = _mm_and_si128(s[g], low6);
        minimum[g] = _mm_and_si128(s[g + 4], low6);
        scale[g + 4] = _mm_or_si128(_mm_and_si128(s[g + 8], low4), _mm_and_si128(_mm_srli_epi16(s[g], 2), top2));
        minimum[g + 4] = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(s[g + 8], 4), low4),
                                      _mm_and_si128(_mm_srli_epi16(s[g + 4], 2), top2));
    }
}

/* q with those bits of h that the mask has. */
INLINE __m512i with_bits(__m512i q, __m512i h, int mask) {
    return _mm512_ternarylogic_epi32(q, h, _mm512_set1_epi8((char)mask), 0xf8); /* q | h & mask */
}

/* Q4_K, Q5_K. */
INLINE void panel_k(int type, int64_t n_blocks, const uint8_t *panel, const uint8_t *const *xs, int T, __m512 *sum) {
    const int high_size = type == K_Q5_K ? 512 : 0, size = 256 + high_size + 2048;
    for (int64_t b = 0; b < n_blocks; b++, panel += size) {
        const uint8_t *d = panel, *dmin = d + 32, *s = dmin + 32, *high = s + 192, *q = high + high_size;
        __m128i scale[8], minimum[8];
        __m512i total[4], below[4];
        /* Every quarter of q wants all of high: from memory it has to come before, or there are two streams of addresses. */
        for (int at = 0; at < 256 + high_size && type == K_Q5_K; at += 64) _mm_prefetch((const char *)panel + at, _MM_HINT_T0);
        k_scales(s, scale, minimum);
        UNROLL for (int t = 0; t < T; t++) total[t] = below[t] = _mm512_setzero_si512();
        UNROLL for (int k = 0; k < 4; k++) { /* the low bits of 32 bytes, then their high bits */
            __m512i w[2][8];
            UNROLL for (int i = 0; i < 8; i++) {
                const __m512i v = bytes(q + (k * 8 + i) * 64);
                w[0][i] = nibbles(v, 0);
                w[1][i] = nibbles(v, 1);
                if (type == K_Q5_K) {
                    const __m512i h = bytes(high + i * 64);
                    w[0][i] = with_bits(w[0][i], k < 2 ? _mm512_slli_epi16(h, 4 - 2 * k) : _mm512_srli_epi16(h, 2 * k - 4), 16);
                    w[1][i] = with_bits(w[1][i], k < 2 ? _mm512_slli_epi16(h, 3 - 2 * k) : _mm512_srli_epi16(h, 2 * k - 3), 16);
                }
            }
            UNROLL for (int j = 0; j < 2; j++) {
                const int g = 2 * k + j;
                const __m512i by = _mm512_cvtepu8_epi32(scale[g]), off = _mm512_cvtepu8_epi32(minimum[g]);
                UNROLL for (int t = 0; t < T; t++) {
                    const uint8_t *x = xs[t] + b * K_INPUT;
                    __m512i acc = _mm512_setzero_si512();
                    UNROLL for (int i = 0; i < 8; i++) acc = _mm512_dpbusd_epi32(acc, w[j][i], four_bytes(x + 68 + g * 32 + i * 4));
                    total[t] = _mm512_add_epi32(total[t], _mm512_mullo_epi32(acc, by));
                    below[t] = _mm512_add_epi32(below[t], _mm512_mullo_epi32(four_bytes(x + 4 + g * 4), off));
                }
            }
        }
        const __m512 by = halves(d), off = halves(dmin);
        UNROLL for (int t = 0; t < T; t++) {
            const __m512 dx = one_float(xs[t] + b * K_INPUT);
            sum[t] = _mm512_fmadd_ps(_mm512_mul_ps(by, dx), _mm512_cvtepi32_ps(total[t]), sum[t]);
            sum[t] = _mm512_fnmadd_ps(_mm512_mul_ps(off, dx), _mm512_cvtepi32_ps(below[t]), sum[t]);
        }
    }
}

/* Q6_K: of 128 values, bytes l of 64 have the low bits of values l and l + 64, and byte l of 32 the two high ones of values
 * l, l + 32, l + 64 and l + 96: after its four steps, four groups of a part are complete. */
INLINE void panel_q6_k(int64_t n_blocks, const uint8_t *panel, const uint8_t *const *xs, int T, __m512 *sum) {
    for (int64_t b = 0; b < n_blocks; b++) {
        const __m512 by = halves(panel);
        __m512i total[4];
        panel += 32;
        UNROLL for (int t = 0; t < T; t++) total[t] = _mm512_setzero_si512();
        UNROLL for (int part = 0; part < 4; part++, panel += 832) {
            const int first = part / 2 * 8 + part % 2; /* of its groups, which are every second one from there on */
            __m512i acc[4][4];
            UNROLL for (int t = 0; t < T; t++) {
                UNROLL for (int g = 0; g < 4; g++) acc[t][g] = four_bytes(xs[t] + b * K_INPUT + 4 + (first + 2 * g) * 4);
            }
            UNROLL for (int i = 0; i < 4; i++) {
                const uint8_t *at = panel + 64 + i * 192;
                const __m512i high = bytes(at), low = bytes(at + 64), low32 = bytes(at + 128); /* low32: of values 32 further on */
                const __m512i w[4] = {with_bits(nibbles(low, 0), _mm512_slli_epi16(high, 4), 48),
                                      with_bits(nibbles(low32, 0), _mm512_slli_epi16(high, 2), 48),
                                      with_bits(nibbles(low, 1), high, 48),
                                      with_bits(nibbles(low32, 1), _mm512_srli_epi16(high, 2), 48)};
                UNROLL for (int t = 0; t < T; t++) {
                    const uint8_t *x = xs[t] + b * K_INPUT + 68 + first * 16 + i * 4;
                    UNROLL for (int g = 0; g < 4; g++) acc[t][g] = _mm512_dpbusd_epi32(acc[t][g], w[g], four_bytes(x + g * 32));
                }
            }
            UNROLL for (int g = 0; g < 4; g++) {
                const __m512i by = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(panel + g * 16)));
                UNROLL for (int t = 0; t < T; t++) total[t] = _mm512_add_epi32(total[t], _mm512_mullo_epi32(acc[t][g], by));
            }
        }
        UNROLL for (int t = 0; t < T; t++) {
            const __m512 scale = _mm512_mul_ps(by, one_float(xs[t] + b * K_INPUT));
            sum[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(total[t]), sum[t]);
        }
    }
}

INLINE void panel_inputs(int type, int64_t n_blocks, const uint8_t *panel, const uint8_t *const *xs, int T,
                         float *const *out, __mmask16 rows) {
    __m512 sum[4];
    UNROLL for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    if (type == K_Q4_0 || type == K_Q8_0) panel_blocks(type, n_blocks, panel, xs, T, sum);
    else if (type == K_Q6_K) panel_q6_k(n_blocks, panel, xs, T, sum);
    else panel_k(type, n_blocks, panel, xs, T, sum);
    UNROLL for (int t = 0; t < T; t++) _mm512_mask_storeu_ps(out[t], rows, sum[t]);
}

/* One panel with n inputs; the type is a constant in each of its uses. */
INLINE void panel_all(int type, int64_t n_blocks, const uint8_t *panel, const uint8_t *const *xs, int n, float *const *out,
                      __mmask16 rows) {
    for (; n >= 4; n -= 4, xs += 4, out += 4) panel_inputs(type, n_blocks, panel, xs, 4, out, rows);
    if (n == 3) panel_inputs(type, n_blocks, panel, xs, 3, out, rows);
    if (n == 2) panel_inputs(type, n_blocks, panel, xs, 2, out, rows);
    if (n == 1) panel_inputs(type, n_blocks, panel, xs, 1, out, rows);
}

static void panel_any(int type, int64_t n_blocks, const uint8_t *panel, const uint8_t *const *xs, int n, float *const *out,
                      __mmask16 rows) {
    switch (type) {
    case K_Q4_0: panel_all(K_Q4_0, n_blocks, panel, xs, n, out, rows); return;
    case K_Q8_0: panel_all(K_Q8_0, n_blocks, panel, xs, n, out, rows); return;
    case K_Q4_K: panel_all(K_Q4_K, n_blocks, panel, xs, n, out, rows); return;
    case K_Q5_K: panel_all(K_Q5_K, n_blocks, panel, xs, n, out, rows); return;
    case K_Q6_K: panel_all(K_Q6_K, n_blocks, panel, xs, n, out, rows); return;
    }
}

void panel_round(int type, int64_t n_in, const float *x, uint8_t *rounded) {
    const struct panel_layout *layout = layout_of(type);
    for (int64_t at = 0; at < n_in; at += PIECE) {
        round_piece(type, n_in - at < PIECE ? n_in - at : PIECE, x + at,
                    rounded + (size_t)(at / layout->values) * (size_t)layout->input);
    }
}

/* Which rows of panel p the matrix has. */
INLINE __mmask16 rows_of(int64_t n_out, int64_t p) {
    const int64_t rows = n_out - p * PANEL_ROWS;
    return rows < PANEL_ROWS ? (__mmask16)((1 << rows) - 1) : (__mmask16)0xffff;
}

void panel_rows(int type, int64_t n_in, int64_t n_out, const uint8_t *panels, const uint8_t *rounded, int64_t lo, int64_t hi,
                float *out) {
    const struct panel_layout *layout = layout_of(type);
    const int64_t n_blocks = n_in / layout->values;
    const size_t size = PANEL_ROWS * (size_t)n_blocks * (size_t)layout->block;
    for (int64_t p = lo; p < hi; p++, out += PANEL_ROWS)
        panel_any(type, n_blocks, panels + (size_t)p * size, &rounded, 1, &out, rows_of(n_out, p));
}

enum { TOGETHER = 64 }; /* inputs that a panel meets before the next panel does: they stay in the second cache level */

/* Panels lo to hi - 1 of the matrix that n products share. */
static void panel_range(const struct panel_layout *layout, int64_t n_blocks, int64_t n_out,
                        const struct panel_product *products, int n, const uint8_t *inputs, size_t input_size, int64_t lo,
                        int64_t hi) {
    const size_t panel_size = PANEL_ROWS * (size_t)n_blocks * (size_t)layout->block;
    for (int at = 0; at < n; at += TOGETHER) {
        const int some = n - at < TOGETHER ? n - at : TOGETHER;
        const uint8_t *xs[TOGETHER];
        float *out[TOGETHER];
        for (int i = 0; i < some; i++) {
            xs[i] = inputs + (size_t)products[at + i].input * input_size;
            out[i] = products[at + i].out + lo * PANEL_ROWS;
        }
        for (int64_t p = lo; p < hi; p++) {
            panel_any(layout->type, n_blocks, products[at].panels + (size_t)p * panel_size, xs, some, out, rows_of(n_out, p));
            for (int i = 0; i < some; i++) out[i] += PANEL_ROWS;
        }
    }
}

/* How many products from the first on have its matrix. */
static int run_length(const struct panel_product *products, int n) {
    int k = 1;
    while (k < n && products[k].panels == products[0].panels) k++;
    return k;
}

void panel_products(int type, int64_t n_in, int64_t n_out, const float *const *xs, int n_inputs,
                    const struct panel_product *products, int n, uint8_t *scratch, int n_threads) {
    const struct panel_layout *layout = layout_of(type);
    const int64_t n_blocks = n_in / layout->values, n_panels = (n_out + PANEL_ROWS - 1) / PANEL_ROWS;
    const int64_t n_pieces = (n_in + PIECE - 1) / PIECE;
    const size_t input_size = (size_t)n_blocks * (size_t)layout->input;
    int n_runs = 0;
    for (int i = 0; i < n; i += run_length(products + i, n - i)) n_runs++;
    /* Small parts, taken by whoever is free: a core that is held up takes fewer. */
    const int64_t all = n_runs * n_panels, part = all / (n_threads * 16) + 1;
    atomic_llong next = 0;
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp for schedule(static)
        for (int64_t k = 0; k < n_inputs * n_pieces; k++) {
            const int64_t i = k / n_pieces, lo = k % n_pieces * PIECE, values = n_in - lo < PIECE ? n_in - lo : PIECE;
            round_piece(type, values, xs[i] + lo,
                        scratch + (size_t)i * input_size + (size_t)(lo / layout->values) * (size_t)layout->input);
        }
        for (int64_t lo; (lo = atomic_fetch_add_explicit(&next, part, memory_order_relaxed)) < all;) {
            const int64_t hi = lo + part < all ? lo + part : all;
            int64_t run = 0;
            for (int i = 0, length; i < n && run * n_panels < hi; i += length, run++) {
                length = run_length(products + i, n - i);
                const int64_t from = run * n_panels > lo ? 0 : lo - run * n_panels;
                const int64_t to = hi - run * n_panels < n_panels ? hi - run * n_panels : n_panels;
                if (from < to) panel_range(layout, n_blocks, n_out, products + i, length, scratch, input_size, from, to);
            }
        }
    }
}

END_TARGET
#else

bool panel_runs(void) {
    return false;
}

bool panel_available(void) {
    return false;
}

void panel_products(int type, int64_t n_in, int64_t n_out, const float *const *xs, int n_inputs,
                    const struct panel_product *products, int n, uint8_t *scratch, int n_threads) {
    (void)type, (void)n_in, (void)n_out, (void)xs, (void)n_inputs, (void)products, (void)n, (void)scratch, (void)n_threads;
}

void panel_round(int type, int64_t n_in, const float *x, uint8_t *rounded) {
    (void)type, (void)n_in, (void)x, (void)rounded;
}

void panel_rows(int type, int64_t n_in, int64_t n_out, const uint8_t *panels, const uint8_t *rounded, int64_t lo, int64_t hi,
                float *out) {
    (void)type, (void)n_in, (void)n_out, (void)panels, (void)rounded, (void)lo, (void)hi, (void)out;
}

#endif
