/* tiles.c - see tiles.h. */
#define _GNU_SOURCE
#include "tiles.h"

#include "ggml_abi.h"
#include "kernels.h"
#include "kernels_simd.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,popcnt")

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

enum { BLOCKS = 16, Q4_0_SIZE = 18, Q8_0_SIZE = 34, Q4_K_SIZE = 144, Q5_K_SIZE = 176, Q8_K_SIZE = 292,
       INPUT_STEP = 640 };

bool tile_available(void) {
    const char *level = kernel_level();
    const bool vnni = strcmp(level, "avx512vnni") == 0 || strcmp(level, "avx512bf16") == 0;
    return vnni && __builtin_cpu_supports("avx512bf16");
}

bool tile_has_type(int type) {
    return type == K_Q4_0 || type == K_Q8_0 || type == K_Q4_K || type == K_Q5_K;
}

/* 4-bit types stay packed: byte vector i of 4 has value vector i in its low halves, i + 4 in its high ones. */
INLINE bool has_nibbles(int type) {
    return type == K_Q4_0 || type == K_Q4_K;
}

INLINE bool has_minima(int type) {
    return type == K_Q4_K || type == K_Q5_K;
}

INLINE size_t bytes_of_values(int type) {
    return has_nibbles(type) ? 256 : 512;
}

/* Of TILE_VALUES weights. */
INLINE size_t packed_step(int type) {
    return bytes_of_values(type) + 64 + (has_minima(type) ? 64 : 0);
}

size_t tile_row_size(int type, int64_t n) {
    return (size_t)((n + TILE_VALUES - 1) / TILE_VALUES) * packed_step(type);
}

size_t tile_input_size(int64_t n) {
    return (size_t)((n + TILE_VALUES - 1) / TILE_VALUES) * INPUT_STEP;
}

/* ---- packing rows and inputs ---------------------------------------------------------------------------------- */

/* 16 bytes of each of 16 blocks, stride bytes apart: vector i gets bytes 4 i to 4 i + 3 of every block. */
INLINE void transpose(const uint8_t *p, size_t stride, __m512i out[4]) {
    __m512i z[4];
    UNROLL for (int k = 0; k < 4; k++) {
        __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(p + (size_t)k * stride)));
        v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + (size_t)(k + 4) * stride)), 1);
        v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + (size_t)(k + 8) * stride)), 2);
        z[k] = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + (size_t)(k + 12) * stride)), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpacklo_epi32(z[2], z[3]);
    const __m512i c = _mm512_unpackhi_epi32(z[0], z[1]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0] = _mm512_unpacklo_epi64(a, b);
    out[1] = _mm512_unpackhi_epi64(a, b);
    out[2] = _mm512_unpacklo_epi64(c, d);
    out[3] = _mm512_unpackhi_epi64(c, d);
}

/* Halves stride bytes apart, one of each of 16 blocks. */
INLINE __m512 block_scales(const uint8_t *p, size_t stride) {
    uint16_t halves[BLOCKS];
    UNROLL for (int b = 0; b < BLOCKS; b++) memcpy(&halves[b], p + (size_t)b * stride, 2);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
}

INLINE void pack_q4_0(const uint8_t *blocks, uint8_t *packed) {
    __m512i v[4];
    transpose(blocks + 2, Q4_0_SIZE, v);
    UNROLL for (int i = 0; i < 4; i++) _mm512_store_si512(packed + i * 64, v[i]);
    _mm512_store_ps(packed + 256, block_scales(blocks, Q4_0_SIZE));
}

INLINE void pack_q8_0(const uint8_t *blocks, uint8_t *packed, int bias) {
    const __m512i flip = _mm512_set1_epi8((char)bias);
    __m512i v[4];
    for (int half = 0; half < 2; half++) {
        transpose(blocks + 2 + half * 16, Q8_0_SIZE, v);
        UNROLL for (int i = 0; i < 4; i++) {
            _mm512_store_si512(packed + (half * 4 + i) * 64, _mm512_xor_si512(v[i], flip));
        }
    }
    _mm512_store_ps(packed + 512, block_scales(blocks, Q8_0_SIZE));
}

/* Q4_K and Q5_K: two blocks of 256, each 8 groups of 32 with 6-bit scales and minima (as in kernels_template.h). */
static void pack_k(int type, const uint8_t *blocks, int n_blocks, uint8_t *packed) {
    uint8_t values[BLOCKS][32];
    float scales[BLOCKS] = {0}, minima[BLOCKS] = {0};
    memset(values, 0, sizeof values);
    for (int b = 0; b < n_blocks; b++) {
        const uint8_t *block = blocks + (size_t)b * (type == K_Q4_K ? Q4_K_SIZE : Q5_K_SIZE);
        const uint8_t *low = block + (type == K_Q4_K ? 16 : 48), *s = block + 4;
        uint16_t halves[2];
        memcpy(halves, block, 4);
        const float d = _cvtsh_ss(halves[0]), dmin = _cvtsh_ss(halves[1]);
        for (int g = 0; g < 8; g++) {
            const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6 << 4);
            const int minimum = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6 << 4);
            scales[b * 8 + g] = d * (float)scale;
            minima[b * 8 + g] = dmin * (float)minimum;
            for (int i = 0; i < 32; i++) {
                const int q = low[g / 2 * 32 + i] >> (g % 2 * 4) & 15;
                values[b * 8 + g][i] = (uint8_t)(type == K_Q4_K ? q : q | (block[16 + i] >> g & 1) << 4);
            }
        }
    }
    __m512i lo[4], hi[4];
    transpose(values[0], 32, lo);
    transpose(values[0] + 16, 32, hi);
    UNROLL for (int i = 0; i < 4; i++) {
        if (type == K_Q4_K) {
            _mm512_store_si512(packed + i * 64, _mm512_or_si512(lo[i], _mm512_slli_epi16(hi[i], 4)));
        } else {
            _mm512_store_si512(packed + i * 64, lo[i]);
            _mm512_store_si512(packed + (i + 4) * 64, hi[i]);
        }
    }
    memcpy(packed + bytes_of_values(type), scales, sizeof scales);
    memcpy(packed + bytes_of_values(type) + 64, minima, sizeof minima);
}

void tile_pack_row(int type, int64_t n, const uint8_t *row, uint8_t *packed) {
    if (has_minima(type)) {
        const size_t size = type == K_Q4_K ? Q4_K_SIZE : Q5_K_SIZE;
        for (int64_t at = 0; at < n; at += TILE_VALUES, packed += packed_step(type)) {
            pack_k(type, row + (size_t)(at / 256) * size, n - at < TILE_VALUES ? 1 : 2, packed);
        }
        return;
    }
    const size_t size = type == K_Q4_0 ? Q4_0_SIZE : Q8_0_SIZE;
    for (int64_t at = 0; at < n; at += TILE_VALUES, packed += packed_step(type)) {
        const uint8_t *blocks = row + (size_t)(at / 32) * size;
        uint8_t rest[BLOCKS * Q8_0_SIZE];
        if (n - at < TILE_VALUES) { /* blocks of zeros behind the last */
            memset(rest, 0, sizeof rest);
            blocks = memcpy(rest, blocks, (size_t)((n - at) / 32) * size);
        }
        if (type == K_Q4_0) pack_q4_0(blocks, packed);
        else pack_q8_0(blocks, packed, 128);
    }
}

/* The negated sums of 16 packed blocks. */
INLINE __m512i negated_sums(const uint8_t *packed) {
    __m512i sum = _mm512_setzero_si512();
    UNROLL for (int i = 0; i < 8; i++) {
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_load_si512(packed + i * 64));
    }
    return _mm512_sub_epi32(_mm512_setzero_si512(), sum);
}

void tile_pack_input(int type, int64_t n, const uint8_t *xq, uint8_t *packed) {
    const bool k_quant = has_minima(type);
    for (int64_t at = 0; at < n; at += TILE_VALUES, packed += INPUT_STEP) {
        uint8_t blocks[BLOCKS * Q8_0_SIZE] = {0};
        const int n_blocks = (int)(n - at < TILE_VALUES ? n - at : TILE_VALUES) / 32;
        if (!k_quant) {
            memcpy(blocks, xq + (size_t)(at / 32) * Q8_0_SIZE, (size_t)n_blocks * Q8_0_SIZE);
            pack_q8_0(blocks, packed, 0);
        } else { /* Q8_K: a float for 256 values, the values, their sums */
            float scales[BLOCKS] = {0};
            for (int b = 0; b < n_blocks; b++) {
                const uint8_t *block = xq + (size_t)(at / 256 + b / 8) * Q8_K_SIZE;
                memcpy(blocks + b * Q8_0_SIZE + 2, block + 4 + b % 8 * 32, 32);
                memcpy(&scales[b], block, sizeof(float));
            }
            pack_q8_0(blocks, packed, 0);
            memcpy(packed + 512, scales, sizeof scales);
        }
        _mm512_store_si512(packed + 576, negated_sums(packed));
    }
}

/* ---- dot products --------------------------------------------------------------------------------------------- */

/* The sums of the lanes of four vectors, each in the same order. */
INLINE __m128 sums_of_4(const __m512 *v) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* out[i * stride + r] = dot(w[r], x[i]), r < R, a multiple of 4, i < X. */
INLINE void dots_group(int type, int64_t n, const uint8_t *const *w, int R, const uint8_t *const *x, int X, float *out,
                       int64_t stride) {
    enum { MOST = TILE_GROUP_ROWS * TILE_GROUP_INPUTS };
    const bool minima = has_minima(type);
    const int shift = type == K_Q4_0 ? 3 : 7; /* the bias is 8 or 128 */
    const size_t values = bytes_of_values(type), step = packed_step(type), steps = tile_input_size(n) / INPUT_STEP;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 acc[MOST];
    UNROLL for (int k = 0; k < R * X; k++) acc[k] = _mm512_setzero_ps();
    for (size_t s = 0; s < steps; s++) {
        const size_t at = s * step, x_at = s * INPUT_STEP;
        __m512i sum[MOST];
        UNROLL for (int i = 0; i < X; i++) {
            const __m512i start = minima ? _mm512_setzero_si512()
                                         : _mm512_slli_epi32(_mm512_load_si512(x[i] + x_at + 576), (unsigned)shift);
            UNROLL for (int r = 0; r < R; r++) sum[i * R + r] = start;
        }
        UNROLL for (int v = 0; v < 8; v++) { /* of 4-bit types: vectors 0, 4, 1, 5, ... */
            const int vector = has_nibbles(type) ? v / 2 + v % 2 * 4 : v;
            __m512i wv[8];
            UNROLL for (int r = 0; r < R; r++) {
                wv[r] = _mm512_load_si512(w[r] + at + vector % (int)(values / 64) * 64);
                if (has_nibbles(type)) wv[r] = _mm512_and_si512(v % 2 ? _mm512_srli_epi16(wv[r], 4) : wv[r], low);
            }
            UNROLL for (int i = 0; i < X; i++) {
                const __m512i xv = _mm512_load_si512(x[i] + x_at + vector * 64);
                UNROLL for (int r = 0; r < R; r++) sum[i * R + r] = _mm512_dpbusd_epi32(sum[i * R + r], wv[r], xv);
            }
        }
        UNROLL for (int i = 0; i < X; i++) {
            const __m512 dx = _mm512_load_ps(x[i] + x_at + 512);
            const __m512 sums = _mm512_mul_ps(dx, _mm512_cvtepi32_ps(_mm512_load_si512(x[i] + x_at + 576)));
            UNROLL for (int r = 0; r < R; r++) {
                const __m512 d = _mm512_mul_ps(dx, _mm512_load_ps(w[r] + at + values));
                acc[i * R + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i * R + r]), d, acc[i * R + r]);
                if (minima) acc[i * R + r] = _mm512_fmadd_ps(sums, _mm512_load_ps(w[r] + at + values + 64), acc[i * R + r]);
            }
        }
    }
    UNROLL for (int i = 0; i < X; i++) {
        UNROLL for (int r = 0; r < R; r += 4) _mm_storeu_ps(out + i * stride + r, sums_of_4(&acc[i * R + r]));
    }
}

INLINE void dots_list(int type, int64_t n, const uint8_t *const *rows, int n_rows, const uint8_t *x, float *out) {
    int k = 0;
    for (; k + 8 <= n_rows; k += 8) dots_group(type, n, rows + k, 8, &x, 1, out + k, 0);
    while (k < n_rows) { /* the rest, with one of them again in place of what is missing */
        const uint8_t *some[4];
        float sums[4];
        const int left = n_rows - k < 4 ? n_rows - k : 4;
        for (int r = 0; r < 4; r++) some[r] = rows[k + (r < left ? r : 0)];
        dots_group(type, n, some, 4, &x, 1, sums, 0);
        memcpy(out + k, sums, (size_t)left * sizeof *out);
        k += left;
    }
}

void tile_dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const uint8_t *x, float *out) {
    switch (type) {
    case K_Q4_0: dots_list(K_Q4_0, n, rows, n_rows, x, out); break;
    case K_Q8_0: dots_list(K_Q8_0, n, rows, n_rows, x, out); break;
    case K_Q5_K: dots_list(K_Q5_K, n, rows, n_rows, x, out); break;
    default: dots_list(K_Q4_K, n, rows, n_rows, x, out); break;
    }
}

INLINE void products(int type, int64_t n, const uint8_t *rows, int n_rows, const uint8_t *const *xs, int n_xs, float *out) {
    const size_t size = tile_row_size(type, n);
    for (int k = 0; k < n_rows; k += TILE_GROUP_ROWS) {
        const uint8_t *w[TILE_GROUP_ROWS];
        UNROLL for (int r = 0; r < TILE_GROUP_ROWS; r++) w[r] = rows + (size_t)(k + r) * size;
        switch (n_xs) {
        case 3: dots_group(type, n, w, TILE_GROUP_ROWS, xs, 3, out + k, n_rows); break;
        case 2: dots_group(type, n, w, TILE_GROUP_ROWS, xs, 2, out + k, n_rows); break;
        default: dots_group(type, n, w, TILE_GROUP_ROWS, xs, 1, out + k, n_rows); break;
        }
    }
}

void tile_products(int type, int64_t n, const uint8_t *rows, int n_rows, const uint8_t *const *xs, int n_xs, float *out) {
    switch (type) {
    case K_Q4_0: products(K_Q4_0, n, rows, n_rows, xs, n_xs, out); break;
    case K_Q8_0: products(K_Q8_0, n, rows, n_rows, xs, n_xs, out); break;
    case K_Q5_K: products(K_Q5_K, n, rows, n_rows, xs, n_xs, out); break;
    default: products(K_Q4_K, n, rows, n_rows, xs, n_xs, out); break;
    }
}

uint64_t tile_mask(const uint8_t bytes[64]) {
    const __m512i v = _mm512_loadu_si512(bytes);
    return _mm512_test_epi8_mask(v, v);
}

/* ---- packing columns ------------------------------------------------------------------------------------------ */

/* 16 values of the even column, 16 of the odd one: as bfloat16, one of each in 4 bytes, the even one on top, since the
 * instruction adds the upper halves' product first. */
INLINE void store_pairs(__m512 even, __m512 odd, uint32_t *to) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(even, odd); /* odd ones first */
    _mm512_store_si512(to, _mm512_permutexvar_epi16(order, both));
}

INLINE float half_at(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    return _cvtsh_ss(half);
}

/* The 32 values of a block. */
INLINE void block_floats(int type, const uint8_t *block, __m512 out[2]) {
    const __m512 d = _mm512_set1_ps(half_at(block));
    __m128i lo = _mm_loadu_si128((const __m128i *)(block + 2)), hi;
    if (type == K_Q4_0) {
        hi = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(lo, 4), _mm_set1_epi8(15)), _mm_set1_epi8(8));
        lo = _mm_sub_epi8(_mm_and_si128(lo, _mm_set1_epi8(15)), _mm_set1_epi8(8));
    } else {
        hi = _mm_loadu_si128((const __m128i *)(block + 18));
    }
    out[0] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(lo)));
    out[1] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(hi)));
}

INLINE void pack_blocks(int type, const uint8_t *even, const uint8_t *odd, int width, uint32_t *packed) {
    const size_t size = type == K_Q4_0 ? Q4_0_SIZE : Q8_0_SIZE;
    for (int b = 0; b < width / 32; b++) {
        __m512 e[2], o[2];
        block_floats(type, even + (size_t)b * size, e);
        block_floats(type, odd + (size_t)b * size, o);
        store_pairs(e[0], o[0], packed + b * 32);
        store_pairs(e[1], o[1], packed + b * 32 + 16);
    }
}

void tile_pack_pair(int type, const uint8_t *even, const uint8_t *odd, const uint16_t *even_scales,
                    const uint16_t *odd_scales, int width, uint32_t *packed, float *tmp) {
    memset(packed + width, 0, (size_t)(TILE_WIDTH - width) * sizeof *packed);
    if (width % 32 == 0 && (type == K_Q4_0 || type == K_Q8_0)) {
        static const uint8_t zeros[TILE_WIDTH / 32 * Q8_0_SIZE]; /* scales of zero */
        if (even == NULL) even = zeros;
        if (odd == NULL) odd = zeros;
        if (type == K_Q4_0) pack_blocks(K_Q4_0, even, odd, width, packed);
        else pack_blocks(K_Q8_0, even, odd, width, packed);
        return;
    }
    const uint8_t *columns[2] = {even, odd};
    const uint16_t *scales[2] = {even_scales, odd_scales};
    for (int c = 0; c < 2; c++) {
        float *to = tmp + c * TILE_WIDTH;
        if (columns[c] == NULL) memset(to, 0, (size_t)width * sizeof *to);
        else if (type == ABI_TYPE_I8) kernel_dequantize_scaled(width, (const int8_t *)columns[c], scales[c], to);
        else kernel_dequantize(type, width, columns[c], to);
    }
    for (int i = 0; i < width; i += 16) {
        store_pairs(_mm512_loadu_ps(tmp + i), _mm512_loadu_ps(tmp + TILE_WIDTH + i), packed + i);
    }
}

/* ---- sums of columns ------------------------------------------------------------------------------------------ */

uint16_t tile_bf16(float value) {
    const __m128i v = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(value));
    return (uint16_t)_mm_extract_epi16(v, 0);
}

void tile_pack_activations(const float *values, int64_t n, uint32_t *pairs) {
    for (int64_t i = 0; i < n; i += 16, pairs += 8) {
        const __mmask16 there = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        const __m256i v = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, values + i));
        const __m256i swapped = _mm256_rol_epi32(v, 16);
        _mm256_mask_storeu_epi16(pairs, n - i < 16 ? (__mmask16)((1u << ((n - i + 1) / 2 * 2)) - 1) : 0xffff, swapped);
    }
}

int tile_list_pairs(const uint32_t *pairs, uint32_t *which, uint32_t *activations) {
    __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    int n = 0;
    UNROLL for (int i = 0; i < TILE_PAIRS; i += 16) {
        const __m512i v = _mm512_loadu_si512(pairs + i);
        const __mmask16 some = _mm512_test_epi32_mask(v, _mm512_set1_epi32(0x7fff7fff));
        _mm512_storeu_si512(which + n, _mm512_maskz_compress_epi32(some, at));
        _mm512_storeu_si512(activations + n, _mm512_maskz_compress_epi32(some, v));
        n += __builtin_popcount(some);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
    return n;
}

void tile_sums_sparse(const uint32_t *tile, const uint32_t *which, const uint32_t *activations, int n, float *y) {
    enum { VECTORS = TILE_WIDTH / 16 };
    __m512 acc[VECTORS];
    UNROLL for (int i = 0; i < VECTORS; i++) acc[i] = _mm512_loadu_ps(y + i * 16);
    for (int k = 0; k < n; k++) {
        const __m512bh a = (__m512bh)_mm512_set1_epi32((int)activations[k]);
        const uint32_t *columns = tile + (size_t)which[k] * TILE_WIDTH;
        UNROLL for (int i = 0; i < VECTORS; i++) {
            acc[i] = _mm512_dpbf16_ps(acc[i], a, (__m512bh)_mm512_load_si512(columns + i * 16));
        }
    }
    UNROLL for (int i = 0; i < VECTORS; i++) _mm512_storeu_ps(y + i * 16, acc[i]);
}

void tile_sums_dense(const uint32_t *tile, const uint32_t *const *pairs, float *y, int64_t stride) {
    enum { VECTORS = 4, TOKENS = TILE_GROUP_SUMS };
    for (int at = 0; at < TILE_WIDTH; at += VECTORS * 16) {
        __m512 acc[TOKENS][VECTORS];
        UNROLL for (int t = 0; t < TOKENS; t++) {
            UNROLL for (int i = 0; i < VECTORS; i++) acc[t][i] = _mm512_loadu_ps(y + t * stride + at + i * 16);
        }
        for (int k = 0; k < TILE_PAIRS; k++) {
            __m512bh w[VECTORS];
            UNROLL for (int i = 0; i < VECTORS; i++) {
                w[i] = (__m512bh)_mm512_load_si512(tile + (size_t)k * TILE_WIDTH + at + i * 16);
            }
            UNROLL for (int t = 0; t < TOKENS; t++) {
                const __m512bh a = (__m512bh)_mm512_set1_epi32((int)pairs[t][k]);
                UNROLL for (int i = 0; i < VECTORS; i++) acc[t][i] = _mm512_dpbf16_ps(acc[t][i], a, w[i]);
            }
        }
        UNROLL for (int t = 0; t < TOKENS; t++) {
            UNROLL for (int i = 0; i < VECTORS; i++) _mm512_storeu_ps(y + t * stride + at + i * 16, acc[t][i]);
        }
    }
}

/* ---- which form is faster -------------------------------------------------------------------------------------- */

enum { MEASURED_VALUES = 2048, MEASURED_ROWS = 64, REPEATS = 5 };

static _Atomic float forced_share = -1.0f, measured_dots, measured_sums; /* 0: not yet */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* How long the dense form takes over how long the sparse one takes for everything: the best of a few tries each. */
static float measure(void (*form)(bool dense, void *memory), size_t size) {
    void *memory = aligned_alloc(64, size);
    double best[2] = {1e9, 1e9};
    if (memory == NULL) return 1.0f;
    memset(memory, 0, size);
    for (int i = 0; i < 2 * REPEATS + 2; i++) {
        const double start = seconds();
        form(i % 2 == 0, memory);
        const double took = seconds() - start;
        if (i >= 2 && took < best[i % 2]) best[i % 2] = took;
    }
    free(memory);
    return (float)(best[0] / best[1]);
}

static void measured_dots_form(bool dense, void *memory) {
    const size_t row = tile_row_size(K_Q4_0, MEASURED_VALUES), input = tile_input_size(MEASURED_VALUES);
    const uint8_t *rows = memory, *inputs = rows + MEASURED_ROWS * row, *xs[TILE_GROUP_INPUTS], *list[MEASURED_ROWS];
    float out[TILE_GROUP_INPUTS * MEASURED_ROWS];
    for (int k = 0; k < MEASURED_ROWS; k++) list[k] = rows + (size_t)k * row;
    for (int i = 0; i < TILE_GROUP_INPUTS; i++) xs[i] = inputs + (size_t)i * input;
    for (int again = 0; again < 4; again++) {
        if (dense) tile_products(K_Q4_0, MEASURED_VALUES, rows, MEASURED_ROWS, xs, TILE_GROUP_INPUTS, out);
        for (int i = 0; i < TILE_GROUP_INPUTS && !dense; i++) {
            tile_dots(K_Q4_0, MEASURED_VALUES, list, MEASURED_ROWS, xs[i], out);
        }
    }
}

static void measured_sums_form(bool dense, void *memory) {
    uint32_t *tile = memory, *pairs = tile + TILE_PAIRS * TILE_WIDTH;
    float *sums = (float *)(pairs + TILE_GROUP_SUMS * TILE_PAIRS);
    const uint32_t *of[TILE_GROUP_SUMS];
    uint32_t which[TILE_PAIRS + 16], activations[TILE_PAIRS + 16];
    for (int i = 0; i < TILE_GROUP_SUMS * TILE_PAIRS; i++) pairs[i] = 0x3f803f80;
    for (int t = 0; t < TILE_GROUP_SUMS; t++) of[t] = pairs + t * TILE_PAIRS;
    for (int again = 0; again < 4; again++) {
        if (dense) tile_sums_dense(tile, of, sums, TILE_WIDTH);
        for (int t = 0; t < TILE_GROUP_SUMS && !dense; t++) {
            const int n = tile_list_pairs(of[t], which, activations);
            tile_sums_sparse(tile, which, activations, n, sums + t * TILE_WIDTH);
        }
    }
}

static float dense_share(_Atomic float *measured, void (*form)(bool, void *), size_t size) {
    const float forced = atomic_load_explicit(&forced_share, memory_order_relaxed);
    if (forced >= 0.0f) return forced;
    float share = atomic_load_explicit(measured, memory_order_relaxed);
    if (share == 0.0f) { /* two threads may both measure: either will do */
        share = measure(form, size);
        atomic_store_explicit(measured, share, memory_order_relaxed);
    }
    return share;
}

float tile_dense_share_dots(void) {
    return dense_share(&measured_dots, measured_dots_form,
                       MEASURED_ROWS * tile_row_size(K_Q4_0, MEASURED_VALUES) +
                           TILE_GROUP_INPUTS * tile_input_size(MEASURED_VALUES));
}

float tile_dense_share_sums(void) {
    return dense_share(&measured_sums, measured_sums_form,
                       (TILE_PAIRS * TILE_WIDTH + TILE_GROUP_SUMS * (TILE_PAIRS + TILE_WIDTH)) * sizeof(float));
}

void tile_force_dense_share(float share) {
    atomic_store_explicit(&forced_share, share, memory_order_relaxed);
}

END_TARGET
#else /* another architecture: tile_available() says no, and nothing else is ever called */

bool tile_available(void) { return false; }
bool tile_has_type(int type) { (void)type; return false; }
size_t tile_row_size(int type, int64_t n) { (void)type, (void)n; return 0; }
size_t tile_input_size(int64_t n) { (void)n; return 0; }
void tile_pack_row(int type, int64_t n, const uint8_t *row, uint8_t *packed) { (void)type, (void)n, (void)row, (void)packed; }
void tile_pack_input(int type, int64_t n, const uint8_t *xq, uint8_t *packed) { (void)type, (void)n, (void)xq, (void)packed; }
void tile_dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const uint8_t *x, float *out) {
    (void)type, (void)n, (void)rows, (void)n_rows, (void)x, (void)out;
}
void tile_products(int type, int64_t n, const uint8_t *rows, int n_rows, const uint8_t *const *xs, int n_xs, float *out) {
    (void)type, (void)n, (void)rows, (void)n_rows, (void)xs, (void)n_xs, (void)out;
}
uint64_t tile_mask(const uint8_t bytes[64]) { (void)bytes; return 0; }
void tile_pack_pair(int type, const uint8_t *even, const uint8_t *odd, const uint16_t *even_scales,
                    const uint16_t *odd_scales, int width, uint32_t *packed, float *tmp) {
    (void)type, (void)even, (void)odd, (void)even_scales, (void)odd_scales, (void)width, (void)packed, (void)tmp;
}
uint16_t tile_bf16(float value) { (void)value; return 0; }
void tile_pack_activations(const float *values, int64_t n, uint32_t *pairs) { (void)values, (void)n, (void)pairs; }
int tile_list_pairs(const uint32_t *pairs, uint32_t *which, uint32_t *activations) {
    (void)pairs, (void)which, (void)activations;
    return 0;
}
void tile_sums_sparse(const uint32_t *tile, const uint32_t *which, const uint32_t *activations, int n, float *y) {
    (void)tile, (void)which, (void)activations, (void)n, (void)y;
}
void tile_sums_dense(const uint32_t *tile, const uint32_t *const *pairs, float *y, int64_t stride) {
    (void)tile, (void)pairs, (void)y, (void)stride;
}
float tile_dense_share_dots(void) { return 1.0f; }
float tile_dense_share_sums(void) { return 1.0f; }
void tile_force_dense_share(float share) { (void)share; }
#endif
