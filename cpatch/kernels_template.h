/* kernels_template.h - the kernels, once for every instruction set; included at the end of each kernels_LEVEL.c.
 *
 * The including file defines NAME, ROWS and COLUMNS (how many per pass), DOTS_ONLY where another level's sums of
 * columns are to be used, and primitives on
 *   vb  LANES lanes of 16 bytes     vi  4 * LANES int32     vf  WIDTH = 4 * LANES floats     v16  16 bytes
 *
 * Dot products of quantised rows are sums of 16-byte lanes: with 32 values per block, lane k of one vector holds the
 * first half of block k's values and lane k of a second one the other half, which is how 4-bit types lie in memory
 * anyway. The sums of a lane are exact integers; one multiply-add with the lane's scale turns them into floats.
 *
 * Columns are added with one multiply-add per element, column by column: of factor times scale (rounded once) with the
 * integer; what a K-quant adds to 32 values alike goes to offsets in the same way. So y does not depend on the grouping,
 * nor on the level where the level has fused multiply-adds; but for types of 4 bits, which have add_256() with two of them.
 *
 * Rows lie scattered, and the hardware's prefetching starts anew in each; so every chunk of a row also asks for the
 * same chunk of the rows that will be read in its place (struct ahead). */
#include "kernels_simd.h"

#include <string.h>

enum { CHUNK = 8, /* blocks of 32 values between prefetches; their scales are converted together */
       Q4_0_SIZE = 18, Q8_0_SIZE = 34, MXFP4_SIZE = 17, Q4_K_SIZE = 144, Q5_K_SIZE = 176, Q6_K_SIZE = 210,
       Q8_K_SIZE = 292, HALF_VECTORS = 16 / WIDTH, BLOCK_VECTORS = 32 / WIDTH };

#define INLINE static inline __attribute__((always_inline))
#define NO_UNROLL _Pragma("GCC unroll 1")
#ifndef UNROLL
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* What is in memory is read back from there: a broadcast from memory is free, one out of a vector is not, and GCC would
 * rather take the scales out of the vectors that they were stored from. */
#define IN_MEMORY __asm__ volatile("" ::: "memory")
#ifdef ROW_BY_ROW
#define IN_TURN IN_MEMORY
#else
#define IN_TURN
#endif

/* e2m1 values, doubled (gguf: MXFP4.kvalues), plus 12. */
static const uint8_t mxfp4_plus_12[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

INLINE size_t block_size(int type) {
    return type == K_Q4_0 ? Q4_0_SIZE : type == K_Q8_0 ? Q8_0_SIZE : type == K_MXFP4 ? MXFP4_SIZE
         : type == K_Q4_K ? Q4_K_SIZE : type == K_Q5_K ? Q5_K_SIZE : Q6_K_SIZE;
}

/* Rows to be asked for while a group of them is read: those of the next group and of the one after it. Each is asked for
 * twice, since the second cache level drops requests when it has too many, and little by little, since a core that cannot make
 * a request does not compute meanwhile. */
enum { ASKS = 2 };
struct ahead {
    const uint8_t *rows[ASKS][ROWS > COLUMNS ? ROWS : COLUMNS];
};

/* left: how many rows there are from rows[0] on; where there are no more, the last one is asked for. */
INLINE void look_ahead(struct ahead *ahead, const uint8_t *const *rows, int count, int left) {
    for (int i = 0; i < ASKS; i++) {
        for (int r = 0, k = (i + 1) * count; r < count; r++, k++) ahead->rows[i][r] = rows[k < left ? k : left - 1];
    }
}

/* Asks for bytes [at, at + bytes) of row r of group i: into the second cache level, as the first one takes few requests. */
INLINE void ask(const struct ahead *ahead, int i, int r, size_t at, size_t bytes) {
    UNROLL for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead->rows[i][r] + at + line, 0, 2);
}

INLINE void ask_twice(const struct ahead *ahead, int r, size_t at, size_t bytes) {
    UNROLL for (int i = 0; i < ASKS; i++) ask(ahead, i, r, at, bytes);
}

/* The scales of a chunk's blocks, as floats, times factor. */
INLINE void block_scales(int type, const uint8_t *blocks, float factor, float *out) {
    if (type == K_MXFP4) powers_8(blocks, MXFP4_SIZE, factor, out);
    else halves_8(blocks, block_size(type), factor, out);
}

/* ---- dot products: 32 values per block ---------------------------------------------------------------------- */

/* What is added to the integers of a type to make them what dot() takes. */
INLINE int block_bias(int type) {
    return type == K_Q4_0 ? 8 : type == K_MXFP4 ? 12 : SIGNED_BIAS;
}

/* The values 0..15 and 16..31 of LANES blocks of 4 bits, with the bias added. */
INLINE void nibble_values_of(int type, vb q, vb *lo, vb *hi) {
    *lo = low_nibbles(q);
    *hi = high_nibbles(q);
    if (type == K_MXFP4) {
        *lo = lookup(mxfp4_plus_12, *lo);
        *hi = lookup(mxfp4_plus_12, *hi);
    }
}

/* LANES blocks of a chunk, from b on: *lo their values 0..15, *hi 16..31, with the bias added. */
INLINE void block_values(int type, const uint8_t *chunk, int b, vb *lo, vb *hi) {
    if (type == K_Q8_0) {
        *lo = signed_weights(lanes(chunk + b * Q8_0_SIZE + 2, Q8_0_SIZE));
        *hi = signed_weights(lanes(chunk + b * Q8_0_SIZE + 18, Q8_0_SIZE));
        return;
    }
    const size_t size = block_size(type);
    nibble_values_of(type, lanes(chunk + (size_t)b * size + size - 16, size), lo, hi);
}

INLINE vi block_dot(int type, vi sum, vb lo, vb x_lo, vb hi, vb x_hi) {
    return type == K_Q8_0 ? dot_signed(dot_signed(sum, lo, x_lo), hi, x_hi) : dot_nibbles(sum, lo, x_lo, hi, x_hi);
}

/* acc[r * X + i] += the partial sums of a chunk of rows r and inputs i, without its first skip blocks. ahead: may be NULL. */
INLINE void dots_chunk(int type, const uint8_t *const w[], size_t w_at, int R, const uint8_t *const x[], size_t x_at, int X,
                       size_t skip, vf *acc, const struct ahead *ahead) {
    const int bias = block_bias(type);
    float dx[ROWS][CHUNK];
    vb x_lo[ROWS][CHUNK / LANES], x_hi[ROWS][CHUNK / LANES];
    vi start[ROWS][CHUNK / LANES];
    UNROLL for (int i = 0; i < X; i++) {
        block_scales(K_Q8_0, x[i] + x_at, 1.0f, dx[i]);
        for (size_t b = 0; b < skip; b++) dx[i][b] = 0.0f;
        UNROLL for (int g = 0; g < CHUNK / LANES; g++) {
            x_lo[i][g] = lanes(x[i] + x_at + g * LANES * Q8_0_SIZE + 2, Q8_0_SIZE);
            x_hi[i][g] = lanes(x[i] + x_at + g * LANES * Q8_0_SIZE + 18, Q8_0_SIZE);
            start[i][g] = zero_i();
            if (bias != 0) start[i][g] = negate(dot(dot(zero_i(), same_bytes(bias), x_lo[i][g]), same_bytes(bias), x_hi[i][g]));
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        IN_TURN;
        if (ahead != NULL) ask_twice(ahead, r, w_at, CHUNK * block_size(type));
        float dw[CHUNK], d[CHUNK];
        vb lo[CHUNK / LANES], hi[CHUNK / LANES];
        vi sums[CHUNK / LANES];
#ifdef WHOLE_CHUNKS
        if (type != K_Q8_0) {
            const struct whole_chunk chunk = whole_chunk(w[r] + w_at, block_size(type));
            chunk_scales(&chunk, block_size(type), dw);
            UNROLL for (int g = 0; g < CHUNK / LANES; g++) nibble_values_of(type, last_16(&chunk, block_size(type), g), &lo[g], &hi[g]);
        } else
#endif
        {
            block_scales(type, w[r] + w_at, 1.0f, dw);
            UNROLL for (int g = 0; g < CHUNK / LANES; g++) block_values(type, w[r] + w_at, g * LANES, &lo[g], &hi[g]);
        }
        UNROLL for (int i = 0; i < X; i++) {
            UNROLL for (int g = 0; g < CHUNK / LANES; g++) {
                sums[g] = block_dot(type, start[i][g], lo[g], x_lo[i][g], hi[g], x_hi[i][g]);
            }
            for (int b = 0; b < CHUNK; b++) d[b] = dw[b] * dx[i][b];
#ifdef CHUNK_SUMS /* a vector has room for one sum of each block: one conversion and one multiplication for all */
            acc[r * X + i] = fma_f(to_float(chunk_sums(sums)), load_f(d), acc[r * X + i]);
#else
            UNROLL for (int g = 0; g < CHUNK / LANES; g++) {
                acc[r * X + i] = fma_f(to_float(sums[g]), lane_scales(d, g * LANES), acc[r * X + i]);
            }
#endif
        }
    }
}

/* out[r * X + i]: R rows with X inputs; left: rows from w[0] on. */
INLINE void dots_blocks(int type, int64_t n, const uint8_t *const *w, int R, int left, const uint8_t *const *x, int X,
                        float *out) {
    const size_t size = block_size(type), blocks = (size_t)n / 32, rest = blocks % CHUNK;
    vf acc[ROWS];
    struct ahead ahead;
    look_ahead(&ahead, w, R, left);
    UNROLL for (int i = 0; i < R * X; i++) acc[i] = zero_f();
    for (size_t b = 0; b + CHUNK <= blocks; b += CHUNK) {
        dots_chunk(type, w, b * size, R, x, b * Q8_0_SIZE, X, 0, acc, X > 1 ? NULL : &ahead);
    }
    if (rest != 0 && blocks > CHUNK) { /* the last chunk's worth, without what the one before had of it */
        const size_t b = blocks - CHUNK;
        dots_chunk(type, w, b * size, R, x, b * Q8_0_SIZE, X, CHUNK - rest, acc, X > 1 ? NULL : &ahead);
    } else if (rest != 0) { /* with zeros behind it */
        uint8_t w_rest[ROWS][CHUNK * Q8_0_SIZE] = {{0}}, x_rest[ROWS][CHUNK * Q8_0_SIZE] = {{0}};
        const uint8_t *w_at[ROWS], *x_at[ROWS];
        for (int r = 0; r < R; r++) w_at[r] = memcpy(w_rest[r], w[r], rest * size);
        for (int i = 0; i < X; i++) x_at[i] = memcpy(x_rest[i], x[i], rest * Q8_0_SIZE);
        dots_chunk(type, w_at, 0, R, x_at, 0, X, 0, acc, NULL);
    }
    UNROLL for (int i = 0; i < R * X; i++) out[i] = sum_f(acc[i]);
}

/* ---- dot products: K-quants, 256 values per block, scales for 16 or 32 of them -------------------------------- */

/* Q4_K and Q5_K: 8 scales and 8 minima of 6 bits, packed into 12 bytes (gguf: Q4_K.get_scale_min). */
INLINE void unpack_scales(const uint8_t *packed, uint64_t *scales, uint64_t *minima) {
    uint32_t a, b, c;
    memcpy(&a, packed, 4);
    memcpy(&b, packed + 4, 4);
    memcpy(&c, packed + 8, 4);
    const uint32_t high = (c & 0x0f0f0f0f) | ((a >> 2) & 0x30303030);
    *scales = (a & 0x3f3f3f3f) | (uint64_t)high << 32;
    const uint32_t high_m = ((c >> 4) & 0x0f0f0f0f) | ((b >> 2) & 0x30303030);
    *minima = (b & 0x3f3f3f3f) | (uint64_t)high_m << 32;
}

/* Vector v of LANES lanes, of the 16 of a K-block, in the order that 4-bit bytes give them in: for each half of the
 * block, the low nibbles of 64 bytes, then their high nibbles. */
INLINE vb k_values(int type, const uint8_t *block, int v) {
    const int lane = v * LANES, half_block = lane / 8, chunk = lane % 4, high = lane % 8 / 4;
    const uint8_t *ql = block + (type == K_Q4_K ? 16 : type == K_Q5_K ? 48 : 0) + half_block * 64 + chunk * 16;
    vb q = lanes(ql, 16);
    q = high ? high_nibbles(q) : low_nibbles(q);
    if (type == K_Q5_K) { /* bit j of 32 bytes: the fifth bits of the j-th 32 values */
        const int first = half_block * 4 + chunk / 2 * 2 + high;
        const vb bits = LANES >= 2 ? lane_pairs(block + 16) : lanes(block + 16 + chunk % 2 * 16, 16);
        q = add_bit(q, bits, first, first + 2);
    }
    if (type == K_Q6_K) { /* 2 bits more for each: of 32 values at a time, in bits 0, 2, 4, 6 of 32 bytes */
        const uint8_t *qh = block + 128 + half_block * 32;
        const int first = chunk / 2 * 2 + high * 4;
        const vb bits = LANES >= 2 ? lane_pairs(qh) : lanes(qh + chunk % 2 * 16, 16);
        q = add_two_bits(q, bits, first, first + 2);
    }
    return q;
}

/* The inputs that belong to k_values(). */
INLINE vb k_inputs(int type, const uint8_t *x, int v) {
    const int lane = v * LANES, half_block = lane / 8, chunk = lane % 4, high = lane % 8 / 4;
    const uint8_t *values = x + 4 + half_block * 128;
    if (type == K_Q6_K) return lanes(values + high * 64 + chunk * 16, 16);
    return lanes_of_pairs(values + chunk / 2 * 64 + high * 32 + chunk % 2 * 16);
}

/* The scales of the 16 lanes in that order; *minima: those of the 16 groups of 16 values in their own order. */
INLINE v16 k_scales(int type, const uint8_t *block, v16 *minima) {
    static const uint8_t lane_order[16] = {0, 0, 2, 2, 1, 1, 3, 3, 4, 4, 6, 6, 5, 5, 7, 7};
    static const uint8_t twice[16] = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
    if (type == K_Q6_K) return *minima = load_16(block + 192);
    uint64_t scales, mins;
    unpack_scales(block + 4, &scales, &mins);
    *minima = shuffle_16(low_8(mins), twice);
    return shuffle_16(low_8(scales), lane_order);
}

INLINE void dots_k_step(int type, const uint8_t *const w[], int R, const uint8_t *const x[], int X, vf *acc,
                        vf *acc_min) {
    UNROLL for (int r = 0; r < R; r++) {
        v16 minima;
        const factors f = make_factors(k_scales(type, w[r], &minima));
        vi sum[ROWS];
        UNROLL for (int i = 0; i < X; i++) sum[i] = zero_i();
        UNROLL for (int v = 0; v < 16 / LANES; v++) {
            const vb q = k_values(type, w[r], v);
            UNROLL for (int i = 0; i < X; i++) sum[i] = dot_factor(sum[i], q, k_inputs(type, x[i], v), f, v);
        }
        UNROLL for (int i = 0; i < X; i++) {
            float dx;
            memcpy(&dx, x[i], 4);
            const vi offset = dot_16(minima, x[i] + 260); /* with the sums of 16 inputs each */
            const int k = r * X + i;
            if (type == K_Q6_K) { /* values are stored plus 32 */
                acc[k] = fma_f(to_float(minus_32_times(sum[i], offset)), same_f(half(w[r] + 208) * dx), acc[k]);
            } else {
                acc[k] = fma_f(to_float(sum[i]), same_f(half(w[r]) * dx), acc[k]);
                acc_min[k] = fma_f(to_float(offset), same_f(half(w[r] + 2) * dx), acc_min[k]);
            }
        }
    }
}

INLINE void dots_k(int type, int64_t n, const uint8_t *const *w, int R, int left, const uint8_t *const *x, int X,
                   float *out) {
    const size_t size = block_size(type), blocks = (size_t)n / 256;
    vf acc[ROWS], acc_min[ROWS];
    struct ahead ahead;
    look_ahead(&ahead, w, R, left);
    UNROLL for (int i = 0; i < R * X; i++) acc[i] = acc_min[i] = zero_f();
    for (size_t b = 0; b < blocks; b++) {
        const uint8_t *w_at[ROWS], *x_at[ROWS];
        UNROLL for (int r = 0; r < R; r++) {
            w_at[r] = w[r] + b * size;
            if (X == 1) ask_twice(&ahead, r, b * size, size);
        }
        UNROLL for (int i = 0; i < X; i++) x_at[i] = x[i] + b * Q8_K_SIZE;
        dots_k_step(type, w_at, R, x_at, X, acc, acc_min);
    }
    UNROLL for (int i = 0; i < R * X; i++) out[i] = sum_f(acc[i]) - (type == K_Q6_K ? 0.0f : sum_f(acc_min[i]));
}

#ifdef HEADERS
/* dots_k() for Q4_K: what is in the headers of 4 rows' blocks (of one, if R is 1) is unpacked together. */
INLINE void dots_q4_k(int64_t n, const uint8_t *const *w, int R, int left, const uint8_t *const *x, int X, float *out) {
    const size_t blocks = (size_t)n / 256;
    vf acc[ROWS], acc_min[ROWS]; /* a lane of acc_min is one row's */
    struct ahead ahead;
    look_ahead(&ahead, w, R, left);
    UNROLL for (int i = 0; i < R * X; i++) acc[i] = acc_min[i] = zero_f();
    for (size_t b = 0; b < blocks; b++) {
        _Alignas(64) float factors[ROWS][4 * LANES];
        vi sums[ROWS];
        UNROLL for (int i = 0; i < X; i++) sums[i] = sums_of_32(x[i] + b * Q8_K_SIZE + 260);
        UNROLL for (int first = 0; first < R; first += LANES) {
            const int count = R < LANES ? R : LANES;
            const uint8_t *at[LANES];
            vf d, of_minima;
            UNROLL for (int r = 0; r < count; r++) at[r] = w[first + r] + b * Q4_K_SIZE;
            const vb headers = four_headers(at, count), scales = scales_and_minima(headers);
            header_factors(headers, &d, &of_minima);
            UNROLL for (int i = 0; i < X; i++) {
                float dx;
                memcpy(&dx, x[i] + b * Q8_K_SIZE, 4);
                vf *below = &acc_min[first / LANES * X + i];
                *below = fma_f(to_float(dot_minima(scales, sums[i])), mul_f(of_minima, same_f(dx)), *below);
                store_f(factors[i], mul_f(d, same_f(dx)));
            }
            IN_MEMORY;
            UNROLL for (int r = 0; r < count; r++) {
                if (X == 1) ask_twice(&ahead, first + r, b * Q4_K_SIZE, Q4_K_SIZE);
                const vb own = same_lane(scales, r);
                vi sum[ROWS];
                UNROLL for (int i = 0; i < X; i++) sum[i] = zero_i();
                UNROLL for (int v = 0; v < 16 / LANES; v++) {
                    const vb q = k_values(K_Q4_K, at[r], v);
                    UNROLL for (int i = 0; i < X; i++) {
                        sum[i] = dot_scaled(sum[i], q, k_inputs(K_Q4_K, x[i] + b * Q8_K_SIZE, v), own, v);
                    }
                }
                UNROLL for (int i = 0; i < X; i++) {
                    vf *of = &acc[(first + r) * X + i];
                    *of = fma_f(to_float(sum[i]), same_f(factors[i][4 * r]), *of);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int i = 0; i < X; i++) {
            out[r * X + i] = sum_f(acc[r * X + i]) - sum_lane(acc_min[r / LANES * X + i], r % LANES);
        }
    }
}
#endif

/* ---- dot products: floats ------------------------------------------------------------------------------------- */

INLINE size_t float_size(int type) {
    return type == K_F32 ? 4 : 2;
}

INLINE vf load_floats(int type, const uint8_t *p) {
    return type == K_F32 ? load_f32(p) : type == K_F16 ? load_f16(p) : load_bf16(p);
}

INLINE void dots_floats(int type, int64_t n, const uint8_t *const *w, int R, int left, const uint8_t *const *x, int X,
                        float *out) {
    const size_t one = float_size(type), size = (size_t)n * one;
    const size_t step = WIDTH * one, whole = size - size % step;
    vf acc[ROWS];
    struct ahead ahead;
    look_ahead(&ahead, w, R, left);
    UNROLL for (int i = 0; i < R * X; i++) acc[i] = zero_f();
    for (size_t at = 0; at < whole;) {
        const size_t end = whole - at < 512 ? whole : at + 512;
        NO_UNROLL for (int r = 0; r < R && X == 1; r++) ask_twice(&ahead, r, at, end - at);
        for (; at < end; at += step) {
            vf xv[ROWS];
            UNROLL for (int i = 0; i < X; i++) xv[i] = load_floats(type, x[i] + at);
            UNROLL for (int r = 0; r < R; r++) {
                const vf wv = load_floats(type, w[r] + at);
                UNROLL for (int i = 0; i < X; i++) acc[r * X + i] = fma_f(wv, xv[i], acc[r * X + i]);
            }
        }
    }
    for (int r = 0; r < R && whole < size; r++) { /* the rest, with zeros behind it */
        uint8_t rest[4 * WIDTH] = {0}, input[4 * WIDTH] = {0};
        memcpy(rest, w[r] + whole, size - whole);
        for (int i = 0; i < X; i++) {
            memcpy(input, x[i] + whole, size - whole);
            acc[r * X + i] = fma_f(load_floats(type, rest), load_floats(type, input), acc[r * X + i]);
        }
    }
    UNROLL for (int i = 0; i < R * X; i++) out[i] = sum_f(acc[i]);
}

/* ---- dot products: lists -------------------------------------------------------------------------------------- */

INLINE void dots_some(int type, int64_t n, const uint8_t *const *w, int R, int left, const uint8_t *const *x, int X,
                      float *out) {
#ifdef HEADERS
    if (type == K_Q4_K) {
        dots_q4_k(n, w, R, left, x, X, out);
        return;
    }
#endif
    if (type == K_F32 || type == K_F16 || type == K_BF16) dots_floats(type, n, w, R, left, x, X, out);
    else if (type == K_Q4_0 || type == K_Q8_0 || type == K_MXFP4) dots_blocks(type, n, w, R, left, x, X, out);
    else dots_k(type, n, w, R, left, x, X, out);
}

/* As dots_some(), for n rows with one input or one row with n inputs; left: how many of them there are from the first on. */
INLINE void dots_group(int type, int64_t n, const uint8_t *const *rows, const uint8_t *const *xs, bool one_input, int count,
                       int left, float *out) {
    if (one_input) dots_some(type, n, rows, count, left, xs, 1, out);
    else dots_some(type, n, rows, 1, 1, xs, count, out);
}

INLINE void dots_list(int type, int64_t n, const uint8_t *const *rows, int n_rows, const uint8_t *const *xs, int n_xs,
                      float *out) {
    const bool one_input = n_xs == 1;
    for (int left = one_input ? n_rows : n_xs, count; left > 0; left -= count) {
        count = left >= ROWS ? ROWS : left >= 4 ? 4 : 1;
        if (count == ROWS) dots_group(type, n, rows, xs, one_input, ROWS, left, out);
        else if (count == 4) dots_group(type, n, rows, xs, one_input, 4, left, out);
        else dots_group(type, n, rows, xs, one_input, 1, left, out);
        rows += one_input ? count : 0;
        xs += one_input ? 0 : count;
        out += count;
    }
}

/* X(type) for each type. Their code is kept in functions of their own: GCC allocates registers better in those than in one
 * that has all of it. */
#define OUT_OF_LINE static __attribute__((noinline))
#define BLOCK_AND_FLOAT_TYPES(X) \
    X(K_F32) X(K_F16) X(K_BF16) X(K_Q4_0) X(K_Q8_0) X(K_MXFP4) X(K_Q4_K) X(K_Q5_K) X(K_Q6_K)

#define DOTS_OF(TYPE)                                                                                              \
    OUT_OF_LINE void dots_##TYPE(int64_t n, const uint8_t *const *rows, int n_rows, const uint8_t *const *xs,      \
                                 int n_xs, float *out) {                                                           \
        dots_list(TYPE, n, rows, n_rows, xs, n_xs, out);                                                           \
    }
BLOCK_AND_FLOAT_TYPES(DOTS_OF)

static bool dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const uint8_t *const *xs, int n_xs,
                 float *out) {
#define DOTS_CASE(TYPE) case TYPE: dots_##TYPE(n, rows, n_rows, xs, n_xs, out); return true;
    switch (type) {
        BLOCK_AND_FLOAT_TYPES(DOTS_CASE)
    default: return false;
    }
}

/* ---- sums of columns ------------------------------------------------------------------------------------------ */

#ifndef DOTS_ONLY

/* y[0..32) += factor * w[0..32) for C columns c in turn; w: BLOCK_VECTORS each. */
#define ADD_32(y, factor_of_c, C, w_of_c)                                                                              \
    do {                                                                                                             \
        vf sums[BLOCK_VECTORS];                                                                                      \
        UNROLL for (int i = 0; i < BLOCK_VECTORS; i++) sums[i] = load_f((y) + i * WIDTH);                            \
        UNROLL for (int c = 0; c < (C); c++) {                                                                       \
            vf w[BLOCK_VECTORS];                                                                                     \
            w_of_c;                                                                                                  \
            UNROLL for (int i = 0; i < BLOCK_VECTORS; i++) sums[i] = fma_f(same_f(factor_of_c), w[i], sums[i]);      \
        }                                                                                                            \
        UNROLL for (int i = 0; i < BLOCK_VECTORS; i++) store_f((y) + i * WIDTH, sums[i]);                            \
    } while (0)

/* The integers of a chunk: where those of block b begin, in halves that lie *apart bytes from each other. */
INLINE const uint8_t *block_bytes(int type, const uint8_t *chunk, const uint8_t *unpacked, int b, int *apart) {
    *apart = type == K_Q8_0 ? 16 : LANES * 16;
    if (type == K_Q8_0) return chunk + b * Q8_0_SIZE + 2;
    return unpacked + b / LANES * LANES * 32 + b % LANES * 16;
}

INLINE void unpack_chunk(int type, const uint8_t *chunk, uint8_t *unpacked) {
    UNROLL for (int b = 0; b < CHUNK && type != K_Q8_0; b += LANES) {
        vb lo, hi;
        block_values(type, chunk, b, &lo, &hi);
        store_b(unpacked + b * 32, minus(lo, same_bytes(block_bias(type))));
        store_b(unpacked + b * 32 + LANES * 16, minus(hi, same_bytes(block_bias(type))));
    }
}

INLINE void load_32(const uint8_t *bytes, int apart, vf *out) {
    UNROLL for (int i = 0; i < HALF_VECTORS; i++) out[i] = load_i8(bytes + i * WIDTH);
    UNROLL for (int i = 0; i < HALF_VECTORS; i++) out[HALF_VECTORS + i] = load_i8(bytes + apart + i * WIDTH);
}

/* The scale of each 16 values of a Q6_K block, less 32; or scale and minimum of 32: values are scale * q + minimum. */
INLINE void k_scale_floats(int type, const uint8_t *block, float *scale, float *minimum) {
    uint64_t scales, minima;
    if (type == K_Q6_K) {
        const float d = half(block + 208);
        for (int g = 0; g < 16; g += 8) {
            memcpy(&scales, block + 192 + g, 8);
            scale_bytes(scales, d, scale + g);
        }
        return;
    }
    unpack_scales(block + 4, &scales, &minima);
    scale_bytes(scales, half(block), scale);
    scale_bytes(minima, -half(block + 2), minimum);
}

#ifdef PAIRS

/* pairs[c / 2][k]: what the k-th 32 of 256 values of columns c and c + 1 are multiplied with. What has to be added for the
 * minima, and for what pair_values() adds to nibbles, goes to offsets, column after column. */
INLINE void pair_factors(int type, const uint8_t *const cols[], size_t at, int C, const float *a, uint32_t (*pairs)[8],
                         float *offsets) {
    v8 alike = load_8(offsets);
    UNROLL for (int c = 0; c < C; c += 2) {
        const int count = c + 1 < C ? 2 : 1;
        float d[2][8] = {{0}}, minimum[2][8];
        UNROLL for (int i = 0; i < count; i++) {
            if (type == K_Q4_K) {
                float scale[8];
                k_scale_floats(K_Q4_K, cols[c + i] + at, scale, minimum[i]);
                store_8(d[i], times_8(load_8(scale), a[c + i]));
            } else {
                block_scales(type, cols[c + i] + at, a[c + i], d[i]);
            }
        }
        pair_8(d[0], d[1], pairs[c / 2]);
        if (type == K_Q4_0) alike = add_pairs_8(alike, pairs[c / 2], -8 - PAIR_BIAS);
        UNROLL for (int i = 0; i < count && type == K_Q4_K; i++) { /* 8 times the factor is there as it was before it was rounded */
            const v8 own = fma_8(pair_half(pairs[c / 2], i), -8 - PAIR_BIAS, times_8(load_8(minimum[i]), a[c + i]));
            alike = add_8(alike, fma_8(load_8(d[i]), 8, own));
        }
    }
    store_8(offsets, alike);
}

#define ADDS_256(type) ((type) == K_Q4_0 || (type) == K_Q4_K || (type) == K_MXFP4)
#define ODD_256(type, i) ((type) == K_Q4_0 && (i) % 2 != 0) /* the others' columns are read alike wherever they are */
/* y[0..256) += a Q4_K block, or 8 of 32 values, at bytes into C columns, less what goes to offsets[0..8). odd: whether it is
 * one after an odd number of them. */
INLINE void add_256(int type, const uint8_t *const cols[], size_t at, bool odd, int C, const float *a, float *y, float *offsets,
                    const struct ahead *ahead) {
    const size_t bytes = type == K_Q4_K ? Q4_K_SIZE : CHUNK * block_size(type);
    _Alignas(64) uint32_t pairs[COLUMNS / 2][8];
    __asm__("" : "+r"(at)); /* or GCC keeps the sums of pointers and at on the stack */
    pair_factors(type, cols, at, C, a, pairs, offsets);
    IN_MEMORY;
    UNROLL for (int part = 0; part < 4; part += 2, y += 128) {
        vf sums[8];
        UNROLL for (int i = 0; i < 8; i++) sums[i] = load_f(y + i * WIDTH);
        UNROLL for (int c = 0; c < C; c += 2) {
            const uint8_t *first = cols[c] + at, *second = cols[c + 1 < C ? c + 1 : c] + at;
            for (int i = c; i < C && i < c + 2; i++) ask(ahead, part / 2, i, at, bytes);
            UNROLL for (int b = 0; b < 2; b++) {
                vb w[4]; /* the low and the high nibbles of 16 bytes, then of the next 16 */
                pair_values(type, first, second, part + b, odd, w);
                UNROLL for (int i = 0; i < 4; i++) {
                    /* 16 bytes have a block's 32 values, or, in Q4_K, half of 32 in low nibbles and half of 32 in high ones. */
                    vf *sum = &sums[4 * b + (type == K_Q4_K ? i % 2 * 2 + i / 2 : i)];
                    const int k = 2 * (part + b) + (type == K_Q4_K ? i % 2 : i / 2);
                    *sum = dot_pairs(*sum, w[i], &pairs[c / 2][k]);
                }
            }
        }
        UNROLL for (int i = 0; i < 8; i++) store_f(y + i * WIDTH, sums[i]);
    }
}
#endif

#ifdef NIBBLES
/* Nibbles become floats where they lie in 32 bits: times 16^k, which the sums are, too, until they are finished. So y is not
 * in its order, but for each 64 values nibble k of 8 integers of 32 bits at 8 * k: finish() puts that right. */
#define ADDS_256(type) ((type) == K_Q4_0 || (type) == K_Q4_K)
#define ODD_256(type, i) false /* all are read alike */
INLINE void add_256(int type, const uint8_t *const cols[], size_t at, bool odd, int C, const float *a, float *y, float *offsets,
                    const struct ahead *ahead) {
    (void)odd;
    float d[COLUMNS][8];
    vf alike = load_f(offsets);
    UNROLL for (int c = 0; c < C; c++) {
        if (type == K_Q4_0) {
            block_scales(type, cols[c] + at, a[c], d[c]);
            alike = fma_f(same_f(-8.0f), load_f(d[c]), alike);
        } else {
            float scale[8], minimum[8];
            k_scale_floats(type, cols[c] + at, scale, minimum);
            store_f(d[c], mul_f(same_f(a[c]), load_f(scale)));
            alike = fma_f(same_f(a[c]), load_f(minimum), alike);
        }
    }
    store_f(offsets, alike);
    IN_MEMORY;
    NO_UNROLL for (int part = 0; part < 4; part++, y += 64) {
        vf sums[8];
        UNROLL for (int k = 0; k < 8; k++) sums[k] = load_f(y + k * WIDTH);
        UNROLL for (int c = 0; c < C; c++) {
            const uint8_t *from = cols[c] + at + (type == K_Q4_0 ? part * 2 * Q4_0_SIZE + 2 : 16 + part * 32);
            ask_twice(ahead, c, at + (size_t)part * Q4_K_SIZE / 4, Q4_K_SIZE / 4); /* Q4_0 has as many bytes */
            const vb q = lanes(from, type == K_Q4_0 ? Q4_0_SIZE : 16);
            const float *two = &d[c][2 * part];
            const vf low = type == K_Q4_0 ? lane_factors(two) : same_f(two[0]), high = type == K_Q4_0 ? low : same_f(two[1]);
            UNROLL for (int k = 0; k < 8; k++) sums[k] = fma_f(nibbles(q, k), k % 2 == 0 ? low : high, sums[k]);
        }
        UNROLL for (int k = 0; k < 8; k++) store_f(y + k * WIDTH, sums[k]);
    }
}

static void finish(int type, int64_t n, float *y) {
    for (int64_t i = 0; ADDS_256(type) && i < n / 256 * 4; i++) in_order_64(y + i * 64, type == K_Q4_0);
}
#endif

/* y[0..32 * count) += the chunk at bytes into C columns, of which count blocks are there. ahead: may be NULL. */
INLINE void add_chunk(int type, const uint8_t *const cols[], size_t at, int C, int count, const float *a, float *y,
                      const struct ahead *ahead) {
    _Alignas(64) float d[COLUMNS][CHUNK];
    _Alignas(64) uint8_t unpacked[COLUMNS][CHUNK * 32];
    UNROLL for (int c = 0; c < C; c++) block_scales(type, cols[c] + at, a[c], d[c]);
    IN_MEMORY;
    UNROLL for (int c = 0; c < C; c++) unpack_chunk(type, cols[c] + at, unpacked[c]);
    for (int b = 0; b < count; b++) {
        if (ahead != NULL && b < C) ask_twice(ahead, b, at, CHUNK * block_size(type)); /* one column at each block */
        ADD_32(y + b * 32, d[c][b], C, int apart;
               const uint8_t *q = block_bytes(type, cols[c] + at, unpacked[c], b, &apart); load_32(q, apart, w));
    }
}

/* Blocks of 32 values, without the first `done` (a multiple of CHUNK). */
INLINE void axpys_blocks(int type, int64_t n, size_t done, const uint8_t *const *cols, int C, const struct ahead *ahead,
                         const float *a, float *y) {
    const size_t size = block_size(type), blocks = (size_t)n / 32, rest = blocks % CHUNK;
    for (size_t b = done; b + CHUNK <= blocks; b += CHUNK) add_chunk(type, cols, b * size, C, CHUNK, a, y + b * 32, ahead);
    if (rest == 0) return;
    uint8_t padded[COLUMNS][CHUNK * Q8_0_SIZE] = {{0}};
    const uint8_t *at[COLUMNS];
    float sums[CHUNK * 32]; /* y may end within what is added at once */
    for (int c = 0; c < C; c++) at[c] = memcpy(padded[c], cols[c] + (blocks - rest) * size, rest * size);
    memcpy(sums, y + (blocks - rest) * 32, rest * 32 * sizeof(float));
    add_chunk(type, at, 0, C, (int)rest, a, sums, NULL);
    memcpy(y + (blocks - rest) * 32, sums, rest * 32 * sizeof(float));
}

/* y[0..256) += a K-block of C columns: its integers are laid out as bytes, then each 16 become floats. */
INLINE void add_k_block(int type, const uint8_t *const cols[], size_t at, int C, const float *a, float *y, float *offsets,
                        const struct ahead *ahead) {
    _Alignas(64) uint8_t q[COLUMNS][256];
    _Alignas(64) float factor[COLUMNS][16];
    float own[8] = {0}, *const constants = offsets != NULL ? offsets : own;
    const int groups = type == K_Q6_K ? 16 : 8;
    UNROLL for (int c = 0; c < C; c++) {
        float scale[16], minimum[8] = {0};
        k_scale_floats(type, cols[c] + at, scale, minimum);
        for (int g = 0; g < groups; g++) factor[c][g] = a[c] * scale[g];
        for (int g = 0; g < 8 && type != K_Q6_K; g++) constants[g] += a[c] * minimum[g];
    }
    IN_MEMORY;
    UNROLL for (int c = 0; c < C; c++) {
        ask_twice(ahead, c, at, block_size(type));
        UNROLL for (int v = 0; v < 16 / LANES; v++) {
            const vb values = k_values(type, cols[c] + at, v);
            store_b(q[c] + v * LANES * 16, type == K_Q6_K ? minus(values, same_bytes(32)) : values);
        }
    }
    for (int lane = 0; lane < 16; lane++) { /* in the order of k_values() */
        const int half_block = lane / 8, high = lane % 8 / 4, chunk = lane % 4;
        const int group = type == K_Q6_K ? lane : half_block * 4 + chunk / 2 * 2 + high;
        float *to = y + (type == K_Q6_K ? lane * 16 : group * 32 + chunk % 2 * 16);
        vf sums[HALF_VECTORS];
        UNROLL for (int i = 0; i < HALF_VECTORS; i++) sums[i] = load_f(to + i * WIDTH);
        UNROLL for (int c = 0; c < C; c++) {
            UNROLL for (int i = 0; i < HALF_VECTORS; i++) {
                sums[i] = fma_f(same_f(factor[c][group]), load_i8(q[c] + lane * 16 + i * WIDTH), sums[i]);
            }
        }
        UNROLL for (int i = 0; i < HALF_VECTORS; i++) store_f(to + i * WIDTH, sums[i]);
    }
    for (int i = 0; i < 256 && offsets == NULL && type != K_Q6_K; i++) y[i] += own[i / 32];
}

INLINE void axpys_k(int type, int64_t n, const uint8_t *const *cols, int C, const struct ahead *ahead, const float *a, float *y,
                    float *offsets) {
    for (size_t b = 0; b < (size_t)n / 256; b++) {
        add_k_block(type, cols, b * block_size(type), C, a, y + b * 256, offsets == NULL ? NULL : offsets + b * 8, ahead);
    }
}

/* Types with one value after the other: floats, and integers with a scale each. */
INLINE void plain_floats(int type, const uint8_t *col, const uint16_t *scales, int64_t at, vf *out) {
    UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
        const size_t i = (size_t)at + (size_t)v * WIDTH;
        if (type == K_I8_SCALED) out[v] = mul_f(load_i8(col + i), load_f16((const uint8_t *)(scales + i)));
        else out[v] = load_floats(type, col + i * float_size(type));
    }
}

INLINE void add_one_32(int type, const uint8_t *col, const uint16_t *scales, float a, float *y) {
    ADD_32(y, a, 1, (void)c; plain_floats(type, col, scales, 0, w));
}

INLINE void axpys_plain(int type, int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, int C,
                        const struct ahead *ahead, const float *a, float *y) {
    const size_t one = type == K_I8_SCALED ? 1 : float_size(type);
    int64_t at = 0;
    for (; at + 32 <= n; at += 32) {
        for (int c = 0; c < C && at % 128 == 0; c++) ask_twice(ahead, c, (size_t)at * one, 128 * one);
        ADD_32(y + at, a[c], C, plain_floats(type, cols[c], type == K_I8_SCALED ? scales[c] : NULL, at, w));
    }
    if (at == n) return;
    float rest[32] = {0}; /* fewer than 32 elements, with zeros behind them */
    memcpy(rest, y + at, (size_t)(n - at) * sizeof(float));
    for (int c = 0; c < C; c++) {
        uint8_t values[32 * 4] = {0};
        uint16_t halves[32] = {0};
        memcpy(values, cols[c] + (size_t)at * one, (size_t)(n - at) * one);
        if (type == K_I8_SCALED) memcpy(halves, scales[c] + at, (size_t)(n - at) * sizeof(uint16_t));
        add_one_32(type, values, halves, a[c], rest);
    }
    memcpy(y + at, rest, (size_t)(n - at) * sizeof(float));
}

INLINE void axpys_some(int type, int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, int C, int left,
                       const float *a, float *y, float *offsets) {
    struct ahead ahead;
    size_t done = 0; /* blocks of 32 values */
    look_ahead(&ahead, cols, C, left);
#ifdef ADDS_256
    if (ADDS_256(type) && offsets != NULL) {
        const size_t size = type == K_Q4_K ? Q4_K_SIZE : CHUNK * block_size(type);
        for (size_t i = 0; i < (size_t)n / 256; i++, done += 8) {
            if (ODD_256(type, i)) add_256(type, cols, i * size, true, C, a, y + i * 256, offsets + i * 8, &ahead);
            else add_256(type, cols, i * size, false, C, a, y + i * 256, offsets + i * 8, &ahead);
        }
        if (done == (size_t)n / 32) return;
    }
#endif
    if (type == K_Q4_0 || type == K_Q8_0 || type == K_MXFP4) axpys_blocks(type, n, done, cols, C, &ahead, a, y);
    else if (type == K_Q4_K || type == K_Q5_K || type == K_Q6_K) axpys_k(type, n, cols, C, &ahead, a, y, offsets);
    else axpys_plain(type, n, cols, scales, C, &ahead, a, y);
}

INLINE void axpys_list(int type, int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, const float *a,
                       int n_cols, float *y, float *offsets) {
    int k = 0;
    for (; k + COLUMNS <= n_cols; k += COLUMNS) {
        axpys_some(type, n, cols + k, scales == NULL ? NULL : scales + k, COLUMNS, n_cols - k, a + k, y, offsets);
    }
    for (; k + 2 <= n_cols && COLUMNS > 2; k += 2) {
        axpys_some(type, n, cols + k, scales == NULL ? NULL : scales + k, 2, n_cols - k, a + k, y, offsets);
    }
    for (; k < n_cols; k++) axpys_some(type, n, cols + k, scales == NULL ? NULL : scales + k, 1, n_cols - k, a + k, y, offsets);
}

#define AXPYS_OF(TYPE)                                                                                             \
    OUT_OF_LINE void axpys_##TYPE(int64_t n, const uint8_t *const *cols, const uint16_t *const *scales,            \
                                  const float *a, int n_cols, float *y, float *offsets) {                          \
        axpys_list(TYPE, n, cols, scales, a, n_cols, y, offsets);                                                  \
    }
BLOCK_AND_FLOAT_TYPES(AXPYS_OF)
AXPYS_OF(K_I8_SCALED)

static bool axpys(int type, int64_t n, const uint8_t *const *cols, const uint16_t *const *scales, const float *a,
                  int n_cols, float *y, float *offsets) {
#define AXPYS_CASE(TYPE) case TYPE: axpys_##TYPE(n, cols, scales, a, n_cols, y, offsets); return true;
    switch (type) {
        BLOCK_AND_FLOAT_TYPES(AXPYS_CASE)
        AXPYS_CASE(K_I8_SCALED)
    default: return false;
    }
}

#ifdef NIBBLES
static const struct kernel_level level = {NAME, dots, axpys, finish};
#else
static const struct kernel_level level = {NAME, dots, axpys, NULL};
#endif

#else
static const struct kernel_level level = {NAME, dots, NULL, NULL};
#endif
