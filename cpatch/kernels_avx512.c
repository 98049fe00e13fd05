/* kernels_avx512.c - AVX-512 (F, BW, DQ, VL); with VNNI when included from kernels_avx512vnni.c, with VNNI, VBMI,
 * BF16 and GFNI when included from kernels_avx512bf16.c. */
#include "kernels_simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>
#ifdef WITH_BF16
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,gfni,avx2,fma,f16c")
#define NAME "avx512bf16"
#define SIGNED_BIAS 128
#elif defined(WITH_VNNI)
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#define NAME "avx512vnni"
#define SIGNED_BIAS 128 /* VNNI multiplies unsigned with signed bytes */
#else
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define NAME "avx512"
#define SIGNED_BIAS 0
#endif

#define LANES 4
#define WIDTH 16
#define ROWS 8    /* as many streams of addresses as a core needs to keep its requests going */
#define COLUMNS 8 /* they save loads and stores of y, too */
#define ROW_BY_ROW /* GCC would rather begin with all of them, for which there are no registers */
#ifndef WITH_BF16
#define DOTS_ONLY
#endif
#define PRIMITIVE static inline __attribute__((always_inline, unused)) /* unused: by dot products alone */

typedef __m512i vb, vi;
typedef __m512 vf;
typedef __m512i factors;
#include "kernels_x86.h"

/* Out of the first 128 bytes of 8 blocks of 4 bits: the halves they begin with, and the bytes that MXFP4's do. */
PRIMITIVE v16 halves_18(__m512i first, __m512i middle) {
    const __m512i at = _mm512_castsi128_si512(_mm_set_epi16(63, 54, 45, 36, 27, 18, 9, 0));
    return _mm512_castsi512_si128(_mm512_permutex2var_epi16(first, at, middle));
}

/* 8 halves, stride bytes apart, times factor, out of 128 bytes at a time. */
PRIMITIVE void halves_8(const uint8_t *p, size_t stride, float factor, float *out) {
    __m128i h;
    if (stride == 18) {
        h = halves_18(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64));
    } else { /* 34 */
        const __m512i at = _mm512_castsi128_si512(_mm_set_epi16(0, 0, 0, 0, 51, 34, 17, 0));
        const __m512i a = _mm512_permutex2var_epi16(_mm512_loadu_si512(p), at, _mm512_loadu_si512(p + 64));
        const __m512i b = _mm512_permutex2var_epi16(_mm512_loadu_si512(p + 136), at, _mm512_loadu_si512(p + 200));
        h = _mm_unpacklo_epi64(_mm512_castsi512_si128(a), _mm512_castsi512_si128(b));
    }
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(factor)));
}

#ifdef WITH_BF16
PRIMITIVE v16 bytes_17(__m512i first, __m512i middle) {
    const __m512i at = _mm512_castsi128_si512(_mm_setr_epi8(0, 17, 34, 51, 68, 85, 102, 119, 0, 0, 0, 0, 0, 0, 0, 0));
    return _mm512_castsi512_si128(_mm512_permutex2var_epi8(first, at, middle));
}
#endif
PRIMITIVE void powers_8(const uint8_t *p, size_t stride, float factor, float *out) {
#ifdef WITH_BF16
    (void)stride; /* 17 */
    _mm256_storeu_ps(out, powers_of(bytes_17(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)), factor));
#else
    _mm256_storeu_ps(out, powers_of(bytes_8(p, stride), factor));
#endif
}

PRIMITIVE vf zero_f(void) { return _mm512_setzero_ps(); }
PRIMITIVE vf same_f(float a) { return _mm512_set1_ps(a); }
PRIMITIVE vf load_f(const float *p) { return _mm512_loadu_ps(p); }
PRIMITIVE void store_f(float *p, vf v) { _mm512_storeu_ps(p, v); }
PRIMITIVE vf mul_f(vf a, vf b) { return _mm512_mul_ps(a, b); }
PRIMITIVE vf fma_f(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
PRIMITIVE vf load_f32(const uint8_t *p) { return _mm512_loadu_ps(p); }
PRIMITIVE vf load_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
PRIMITIVE vf load_bf16(const uint8_t *p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
PRIMITIVE vf to_float(vi v) { return _mm512_cvtepi32_ps(v); }
PRIMITIVE vf load_i8(const uint8_t *p) {
    return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
PRIMITIVE float sum_f(vf v) { return _mm512_reduce_add_ps(v); }

PRIMITIVE vi zero_i(void) { return _mm512_setzero_si512(); }
PRIMITIVE vi negate(vi v) { return _mm512_sub_epi32(_mm512_setzero_si512(), v); }
PRIMITIVE vb same_bytes(int b) { return _mm512_set1_epi8((char)b); }
PRIMITIVE void store_b(uint8_t *p, vb v) { _mm512_storeu_si512(p, v); }
PRIMITIVE vb minus(vb a, vb b) { return _mm512_sub_epi8(a, b); }
PRIMITIVE vb low_nibbles(vb v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
PRIMITIVE vb high_nibbles(vb v) {
#ifdef WITH_BF16
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(0x1020408000000000), 0); /* shifted as bytes, in one */
#else
    return low_nibbles(_mm512_srli_epi16(v, 4));
#endif
}
PRIMITIVE vb lookup(const uint8_t *table, vb v) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_16(table)), v);
}
#ifdef WITH_BF16
#define BYTES(i) (i), (i) + 1, (i) + 2, (i) + 3, (i) + 4, (i) + 5, (i) + 6, (i) + 7
#define LANE(i) BYTES(i), BYTES((i) + 8)
static const uint8_t apart_34[64] = {LANE(0), LANE(34), LANE(64 + 14), LANE(64 + 48)};
/* For last_16(): at their places in a chunk; for blocks 4 to 7, in its bytes from 64 on and, above those, in its last 64. */
static const uint8_t ends_17[2][64] = {{LANE(1), LANE(18), LANE(35), LANE(52)}, {LANE(5), LANE(22), LANE(64 + 31), LANE(64 + 48)}};
static const uint8_t ends_18[2][64] = {{LANE(2), LANE(20), LANE(38), LANE(56)}, {LANE(10), LANE(28), LANE(64 + 30), LANE(64 + 48)}};
#endif
PRIMITIVE vb join(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
PRIMITIVE vb lanes(const uint8_t *p, size_t stride) {
    if (stride == 16) return _mm512_loadu_si512(p);
#ifdef WITH_BF16
    if (stride == 34) {
        const __m512i last = _mm512_loadu_si512(p + 3 * 34 - 48);
        return _mm512_permutex2var_epi8(_mm512_loadu_si512(p), _mm512_loadu_si512(apart_34), last);
    }
#endif
    return join(load_2_lanes(p, stride), load_2_lanes(p + 2 * stride, stride));
}
#ifdef WITH_BF16
#define WHOLE_CHUNKS /* of 8 blocks of 4 bits: the first 128 bytes, and the last 64 */
struct whole_chunk {
    __m512i first, middle, last;
};
/* A load across cache lines takes as long as two instructions on what it loads, so it is made once, and not again by each of them. */
PRIMITIVE __m512i load_once(const uint8_t *p) {
    __m512i v = _mm512_loadu_si512(p);
    __asm__("" : "+v"(v));
    return v;
}
PRIMITIVE struct whole_chunk whole_chunk(const uint8_t *p, size_t size) {
    return (struct whole_chunk){load_once(p), load_once(p + 64), load_once(p + 8 * size - 64)};
}
PRIMITIVE void chunk_scales(const struct whole_chunk *c, size_t size, float *out) {
    _mm256_storeu_ps(out, size == 18 ? _mm256_cvtph_ps(halves_18(c->first, c->middle))
                                     : powers_of(bytes_17(c->first, c->middle), 1.0f));
}
/* The last 16 bytes of blocks 0 to 3 (g 0), and of 4 to 7. */
PRIMITIVE vb last_16(const struct whole_chunk *c, size_t size, int g) {
    const __m512i at = _mm512_loadu_si512(size == 17 ? ends_17[g] : ends_18[g]);
    return _mm512_permutex2var_epi8(g == 0 ? c->first : c->middle, at, g == 0 ? c->middle : c->last);
}
#endif
PRIMITIVE vb lanes_of_pairs(const uint8_t *p) { return join(load_2_lanes(p, 16), load_2_lanes(p + 64, 16)); }
PRIMITIVE vb lane_pairs(const uint8_t *p) { return _mm512_broadcast_i64x4(load_2_lanes(p, 16)); }
/* Bit first of each byte in lanes 0 and 1, second in 2 and 3, becomes bit 4 of q. */
PRIMITIVE vb add_bit(vb q, vb bits, int first, int second) {
    const vb chosen = join(_mm256_set1_epi8((char)(1 << first)), _mm256_set1_epi8((char)(1 << second)));
    return _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(bits, chosen), q, _mm512_set1_epi8(16));
}
PRIMITIVE vb add_two_bits(vb q, vb bits, int first, int second) {
    const vb counts = join(_mm256_set1_epi16((short)first), _mm256_set1_epi16((short)second));
    const vb two = _mm512_and_si512(_mm512_srlv_epi16(bits, counts), _mm512_set1_epi8(3));
    return _mm512_or_si512(q, _mm512_slli_epi16(two, 4));
}

#ifdef WITH_VNNI
PRIMITIVE vi dot(vi sum, vb w, vb x) { return _mm512_dpbusd_epi32(sum, w, x); }
PRIMITIVE vb signed_weights(vb w) { return _mm512_xor_si512(w, _mm512_set1_epi8((char)128)); }
PRIMITIVE vi dot_signed(vi sum, vb w, vb x) { return dot(sum, w, x); }
#else
PRIMITIVE vi dot(vi sum, vb w, vb x) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
}
PRIMITIVE vb signed_weights(vb w) { return w; }
PRIMITIVE vi dot_signed(vi sum, vb w, vb x) {
    return dot(sum, _mm512_abs_epi8(w), _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x));
}
#endif

PRIMITIVE vi dot_nibbles(vi sum, vb lo, vb x_lo, vb hi, vb x_hi) { return dot(dot(sum, lo, x_lo), hi, x_hi); }
/* 4 of 8 factors, from b on, each in its lane. */
PRIMITIVE vf lane_scales(const float *d, int b) {
    const __m512i each = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(_mm512_add_epi32(each, _mm512_set1_epi32(b)), _mm512_castps256_ps512(_mm256_loadu_ps(d)));
}

/* Sums of 4 products fit 16 bits, so that multiplying 16-bit halves does, once the scales' upper halves are zero. */
PRIMITIVE factors make_factors(v16 scales) {
    return _mm512_and_si512(_mm512_cvtepi8_epi32(scales), _mm512_set1_epi32(0xffff));
}
PRIMITIVE vi dot_factor(vi sum, vb w, vb x, factors f, int v) {
    const __m512i lanes_of_ints = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i each = _mm512_permutexvar_epi32(_mm512_add_epi32(lanes_of_ints, _mm512_set1_epi32(4 * v)), f);
#ifdef WITH_VNNI
    return _mm512_dpwssd_epi32(sum, dot(zero_i(), w, x), each);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(dot(zero_i(), w, x), each));
#endif
}
PRIMITIVE vi dot_16(v16 a, const uint8_t *sums) { return _mm512_zextsi256_si512(dot_16_ints(a, sums)); }
PRIMITIVE vi minus_32_times(vi a, vi b) { return _mm512_sub_epi32(a, _mm512_slli_epi32(b, 5)); }

#define HEADERS /* four blocks of Q4_K at a time: their scales */
/* The first 16 bytes of 4 blocks, of which `count` are there. */
PRIMITIVE vb four_headers(const uint8_t *const blocks[], int count) {
    if (count == 1) return _mm512_broadcast_i32x4(load_16(blocks[0]));
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(blocks[0])), load_16(blocks[1]), 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(blocks[2])), load_16(blocks[3]), 1);
    return join(a, b);
}
/* In each lane the 8 scales, then the 8 minima (unpack_scales() in kernels_template.h). */
PRIMITIVE vb scales_and_minima(vb headers) {
    const __m512i low_order = _mm512_broadcast_i32x4(_mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i high_order = _mm512_broadcast_i32x4(_mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11));
    const __m512i shifts = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0, 0, 4));
    const __m512i low_bits = _mm512_broadcast_i32x4(_mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
    const __m512i low = _mm512_and_si512(_mm512_srlv_epi32(_mm512_shuffle_epi8(headers, low_order), shifts), low_bits);
    const __m512i high = _mm512_srli_epi32(_mm512_shuffle_epi8(headers, high_order), 2);
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(0x30), 0xf8); /* low | high & 0x30 */
}
/* In each lane 4 times its block's factor d, and 4 times the one of its minima. */
PRIMITIVE void header_factors(vb headers, vf *d, vf *of_minima) {
    const __m512i order = _mm512_set_epi16(25, 25, 25, 25, 17, 17, 17, 17, 9, 9, 9, 9, 1, 1, 1, 1, 24, 24, 24, 24, 16, 16, 16, 16,
                                           8, 8, 8, 8, 0, 0, 0, 0);
    const __m512i both = _mm512_permutexvar_epi16(order, headers);
    *d = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    *of_minima = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}
/* The sums of 32 inputs each, in every lane: out of a Q8_K block's 16 sums of 16. */
PRIMITIVE vi sums_of_32(const uint8_t *sums) {
    const __m256i both = _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)sums), _mm256_set1_epi16(1));
    return _mm512_broadcast_i32x4(_mm256_cvtepi32_epi16(both));
}
PRIMITIVE vi dot_minima(vb scales, vi sums) {
    return _mm512_madd_epi16(_mm512_unpackhi_epi8(scales, _mm512_setzero_si512()), sums);
}
/* One row's, in every lane. */
PRIMITIVE vb same_lane(vb v, int lane) {
    switch (lane) {
    case 0: return _mm512_shuffle_i32x4(v, v, 0x00);
    case 1: return _mm512_shuffle_i32x4(v, v, 0x55);
    case 2: return _mm512_shuffle_i32x4(v, v, 0xaa);
    default: return _mm512_shuffle_i32x4(v, v, 0xff);
    }
}
/* sum += the products of vector v of the block (k_values()), times its scales, which every lane has. */
PRIMITIVE vi dot_scaled(vi sum, vb w, vb x, vb scales, int v) {
    const int first = v / 2 * 4 + v % 2; /* for 32 values; 2 more for the others; nothing (the top bit) in other bytes */
    const vb order = join(_mm256_set1_epi32((int)(0x80808000u + (unsigned)first)), _mm256_set1_epi32((int)(0x80808002u + (unsigned)first)));
    const vb each = _mm512_shuffle_epi8(scales, order);
#ifdef WITH_VNNI
    return _mm512_dpwssd_epi32(sum, dot(zero_i(), w, x), each);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(dot(zero_i(), w, x), each));
#endif
}
/* The sum of one lane. */
PRIMITIVE float sum_lane(vf v, int lane) {
    float f[16];
    _mm512_storeu_ps(f, v);
    return (f[4 * lane] + f[4 * lane + 1]) + (f[4 * lane + 2] + f[4 * lane + 3]);
}

#ifdef WITH_BF16
#define PAIRS /* two columns at a time, by products of pairs of bfloat16 */
#define PAIR_BIAS 16 /* what pair_values() adds to nibbles */

/* Where byte i of 16-byte pieces x and y of the first column (f), and of the second, is put: [sx sy fx fy] in int32 i. */
#define QUAD(i, x, y) 64 + (x) + (i), 64 + (y) + (i), (x) + (i), (y) + (i)
#define QUADS(i, x, y) QUAD(i, x, y), QUAD(i + 1, x, y), QUAD(i + 2, x, y), QUAD(i + 3, x, y)
/* The same as [sx fx] for four i, then [sy fy] for these. */
#define TWO(i, x) 64 + (x) + (i), (x) + (i)
#define TWOS(i, x) TWO(i, x), TWO(i + 1, x), TWO(i + 2, x), TWO(i + 3, x)
#define ORDER(of, x, y) {of(0, x, y), of(4, x, y), of(8, x, y), of(12, x, y)}
#define APART(i, x, y) TWOS(i, x), TWOS(i, y)
/* MXFP4's values (gguf: MXFP4.kvalues) as bfloat16, doubled. */
#define VALUES(sign) \
    0x0000 + (sign), 0x3f80 + (sign), 0x4000 + (sign), 0x4040 + (sign), 0x4080 + (sign), 0x40c0 + (sign), 0x4100 + (sign), 0x4140 + (sign)
/* Of a Q4_K block, or of 8 of 32 values, pieces 2 * part and 2 * part + 1 of 16 bytes, as pairs of bfloat16: the low and the
 * high nibbles of the first piece, then of the other. */
PRIMITIVE void pair_values(int type, const uint8_t *first, const uint8_t *second, int part, bool odd, vb *out) {
    if (type == K_MXFP4) { /* looked up; twice, as the index has a fifth bit, which is another nibble's */
        static const uint16_t values[32] = {VALUES(0), VALUES(0x8000), VALUES(0), VALUES(0x8000)};
        static const uint8_t order[4][64] = {ORDER(QUADS, 1, 18), ORDER(QUADS, 3, 20), ORDER(QUADS, 5, 22), ORDER(QUADS, 31, 48)};
        const vb at = _mm512_loadu_si512(order[part]), table = _mm512_loadu_si512(values);
        const size_t window = part < 3 ? 32 * (size_t)part : 8 * 17 - 64;
        const vb q = _mm512_permutex2var_epi8(_mm512_loadu_si512(first + window), at, _mm512_loadu_si512(second + window));
        out[0] = _mm512_permutexvar_epi16(q, table);
        out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4), table);
        out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 8), table);
        out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 12), table);
        return;
    }
    /* 16 + n is 0x4180 + 8 * n as bfloat16: its lower byte is made of the nibble by one instruction. */
    const vb upper = _mm512_set1_epi8(0x41);
    vb q;
    if (type == K_Q4_K) {
        static const uint8_t order[64] = ORDER(APART, 0, 16);
        const __m512i f = _mm512_castsi256_si512(load_2_lanes(first + 16 + 32 * part, 16));
        q = _mm512_permutex2var_epi8(f, _mm512_loadu_si512(order), _mm512_castsi256_si512(load_2_lanes(second + 16 + 32 * part, 16)));
    } else { /* all but the last parts begin within 32 bytes from a multiple of 32 on, where loads take half the time */
        static const uint8_t order[2][4][64] = {
            {ORDER(APART, 2, 20), ORDER(APART, 6, 24), ORDER(APART, 10, 28), ORDER(APART, 30, 48)},
            {ORDER(APART, 18, 36), ORDER(APART, 22, 40), ORDER(APART, 26, 44), ORDER(APART, 30, 48)}};
        const ptrdiff_t window = part == 3 ? 8 * 18 - 64 : 32 * part - 16 * odd;
        const __m512i at = _mm512_loadu_si512(order[odd][part]);
        q = _mm512_permutex2var_epi8(_mm512_loadu_si512(first + window), at, _mm512_loadu_si512(second + window));
    }
    const vb low = _mm512_gf2p8affine_epi64_epi8(q, _mm512_set1_epi64(0x0000000102040800), 0x80);
    const vb high = _mm512_gf2p8affine_epi64_epi8(q, _mm512_set1_epi64(0x0000001020408000), 0x80);
    out[0] = _mm512_unpacklo_epi8(low, upper);
    out[1] = _mm512_unpacklo_epi8(high, upper);
    out[2] = _mm512_unpackhi_epi8(low, upper);
    out[3] = _mm512_unpackhi_epi8(high, upper);
}
/* sum += first factor * first column's weight, then the second's. */
PRIMITIVE vf dot_pairs(vf sum, vb w, const uint32_t *factors) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)*factors));
}
typedef __m256 v8;
PRIMITIVE v8 load_8(const float *p) { return _mm256_loadu_ps(p); }
PRIMITIVE void store_8(float *p, v8 v) { _mm256_storeu_ps(p, v); }
PRIMITIVE v8 add_8(v8 a, v8 b) { return _mm256_add_ps(a, b); }
PRIMITIVE v8 times_8(v8 v, float a) { return _mm256_mul_ps(v, _mm256_set1_ps(a)); }
/* sum += weight * the first factors of 8 pairs, then the second ones'; weight: one of few bits. */
PRIMITIVE v8 add_pairs_8(v8 sum, const uint32_t *pairs, int weight) {
    const float f = (float)weight;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const __m256i upper = _mm256_set1_epi16((short)(bits >> 16));
    return _mm256_dpbf16_ps(sum, (__m256bh)_mm256_loadu_si256((const __m256i *)pairs), (__m256bh)upper);
}
PRIMITIVE v8 fma_8(v8 v, float a, v8 b) { return _mm256_fmadd_ps(v, _mm256_set1_ps(a), b); }
/* out[0..8) = pairs of factors, the first one in the upper half, since it is added first. */
PRIMITIVE void pair_8(const float *first, const float *second, uint32_t *out) {
    const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    const __m256i both = (__m256i)_mm256_cvtne2ps_pbh(_mm256_loadu_ps(first), _mm256_loadu_ps(second));
    _mm256_storeu_si256((__m256i *)out, _mm256_permutexvar_epi16(order, both));
}
/* The first factors of 8 pairs (which 0), or the second ones. */
PRIMITIVE v8 pair_half(const uint32_t *pairs, int which) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)pairs);
    return _mm256_castsi256_ps(which == 0 ? _mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000u)) : _mm256_slli_epi32(both, 16));
}
#endif

#include "kernels_template.h"
#if defined(WITH_BF16)
const struct kernel_level *const kernel_avx512bf16 = &level;
#elif defined(WITH_VNNI)
const struct kernel_level *const kernel_avx512vnni = &level;
#else
const struct kernel_level *const kernel_avx512 = &level;
#endif
END_TARGET
#else
#if defined(WITH_BF16)
const struct kernel_level *const kernel_avx512bf16 = NULL;
#elif defined(WITH_VNNI)
const struct kernel_level *const kernel_avx512vnni = NULL;
#else
const struct kernel_level *const kernel_avx512 = NULL;
#endif
#endif
