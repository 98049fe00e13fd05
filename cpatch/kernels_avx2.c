/* kernels_avx2.c - AVX2 with FMA and F16C. */
#include "kernels_simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>
BEGIN_TARGET("avx2,fma,f16c")
#define NAME "avx2"
#define SIGNED_BIAS 0

#define LANES 2
#define WIDTH 8
#define ROWS 4
#define COLUMNS 8
#define PRIMITIVE static inline __attribute__((always_inline))

typedef __m256i vb, vi;
typedef __m256 vf;
typedef struct { __m256i half_block[2]; } factors;
#include "kernels_x86.h"

/* 4 halves, put together without the vector units, which have enough to do. */
PRIMITIVE long long words_4(const uint8_t *p, size_t stride) {
    uint16_t h[4];
    for (int i = 0; i < 4; i++) memcpy(&h[i], p + (size_t)i * stride, 2);
    return (long long)((uint64_t)(h[0] | (uint32_t)h[1] << 16) | (uint64_t)(h[2] | (uint32_t)h[3] << 16) << 32);
}
/* 8 halves, stride bytes apart, times factor. */
PRIMITIVE void halves_8(const uint8_t *p, size_t stride, float factor, float *out) {
    const __m128i h = _mm_set_epi64x(words_4(p + 4 * stride, stride), words_4(p, stride));
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(factor)));
}

PRIMITIVE void powers_8(const uint8_t *p, size_t stride, float factor, float *out) {
    _mm256_storeu_ps(out, powers_of(bytes_8(p, stride), factor));
}

PRIMITIVE vf zero_f(void) { return _mm256_setzero_ps(); }
PRIMITIVE vf same_f(float a) { return _mm256_set1_ps(a); }
PRIMITIVE vf load_f(const float *p) { return _mm256_loadu_ps(p); }
PRIMITIVE void store_f(float *p, vf v) { _mm256_storeu_ps(p, v); }
PRIMITIVE vf fma_f(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
PRIMITIVE vf mul_f(vf a, vf b) { return _mm256_mul_ps(a, b); }
PRIMITIVE vf load_f32(const uint8_t *p) { return _mm256_loadu_ps((const float *)p); }
PRIMITIVE vf load_f16(const uint8_t *p) { return _mm256_cvtph_ps(load_16(p)); }
PRIMITIVE vf load_bf16(const uint8_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16));
}
PRIMITIVE vf to_float(vi v) { return _mm256_cvtepi32_ps(v); }
PRIMITIVE vf load_i8(const uint8_t *p) {
    return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
PRIMITIVE float sum_f(vf v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

PRIMITIVE vi zero_i(void) { return _mm256_setzero_si256(); }
PRIMITIVE vi negate(vi v) { return _mm256_sub_epi32(_mm256_setzero_si256(), v); }
PRIMITIVE vb same_bytes(int b) { return _mm256_set1_epi8((char)b); }
PRIMITIVE void store_b(uint8_t *p, vb v) { _mm256_storeu_si256((__m256i *)p, v); }
PRIMITIVE vb minus(vb a, vb b) { return _mm256_sub_epi8(a, b); }
PRIMITIVE vb low_nibbles(vb v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
PRIMITIVE vb high_nibbles(vb v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
PRIMITIVE vb lookup(const uint8_t *table, vb v) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_16(table)), v);
}
PRIMITIVE vb lanes(const uint8_t *p, size_t stride) { return load_2_lanes(p, stride); }
PRIMITIVE vb lanes_of_pairs(const uint8_t *p) { return load_2_lanes(p, 16); }
PRIMITIVE vb lane_pairs(const uint8_t *p) { return load_2_lanes(p, 16); }
/* Bit first of each byte becomes bit 4 of q. */
PRIMITIVE vb add_bit(vb q, vb bits, int first, int second) {
    const vb chosen = _mm256_set1_epi8((char)(1 << first));
    const vb set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, chosen), chosen);
    (void)second;
    return _mm256_or_si256(q, _mm256_and_si256(set, _mm256_set1_epi8(16)));
}
PRIMITIVE vb add_two_bits(vb q, vb bits, int first, int second) {
    const vb two = _mm256_and_si256(_mm256_srli_epi16(bits, first), _mm256_set1_epi8(3));
    (void)second;
    return _mm256_or_si256(q, _mm256_slli_epi16(two, 4));
}

/* Pairs of products fit 16 bits: weights are at most 63 here, or 128 next to inputs of at most 127. */
PRIMITIVE vi dot(vi sum, vb w, vb x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
/* Weights are at most 24, so that 4 products fit 16 bits. */
PRIMITIVE vi dot_nibbles(vi sum, vb lo, vb x_lo, vb hi, vb x_hi) {
    const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(lo, x_lo), _mm256_maddubs_epi16(hi, x_hi));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
}
PRIMITIVE vb signed_weights(vb w) { return w; }
PRIMITIVE vi dot_signed(vi sum, vb w, vb x) {
    return dot(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}

#define CHUNK_SUMS
/* The sums of 8 blocks, each of which has a lane of 4 vectors. */
PRIMITIVE vi chunk_sums(const vi *v) {
    const vi a = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
    const vi b = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
    const vi all = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)); /* 0, 2, 4, 6, 1, 3, 5, 7 */
    return _mm256_permutevar8x32_epi32(all, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
}

PRIMITIVE factors make_factors(v16 scales) {
    const __m256i f = _mm256_cvtepi8_epi16(scales);
    return (factors){{_mm256_permute2x128_si256(f, f, 0x00), _mm256_permute2x128_si256(f, f, 0x11)}};
}
PRIMITIVE vi dot_factor(vi sum, vb w, vb x, factors f, int v) {
    const int low = 2 * (v % 4) * 0x202 + 0x100, high = low + 0x202; /* the bytes of a 16-bit factor */
    const __m256i each = _mm256_set_m128i(_mm_set1_epi16((short)high), _mm_set1_epi16((short)low));
    const __m256i factor = _mm256_shuffle_epi8(f.half_block[v / 4], each);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), factor));
}
PRIMITIVE vi dot_16(v16 a, const uint8_t *sums) { return dot_16_ints(a, sums); }
PRIMITIVE vi minus_32_times(vi a, vi b) { return _mm256_sub_epi32(a, _mm256_slli_epi32(b, 5)); }

#define NIBBLES
/* Nibble k of 8 integers, times 16^k; the last one as it is, as it would be negative. */
PRIMITIVE vf nibbles(vb q, int k) {
    return to_float(k == 7 ? _mm256_srli_epi32(q, 28) : _mm256_and_si256(q, _mm256_set1_epi32((int)(15u << (4 * k)))));
}
/* One factor in lane 0, the next in lane 1. */
PRIMITIVE vf lane_factors(const float *two) {
    double both;
    memcpy(&both, two, 8);
    return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
}
/* 64 sums of nibbles: of blocks of 32 values, with the first half in low nibbles, or of 32 values in low ones. */
PRIMITIVE void in_order_64(float *y, bool blocks) {
    __m256 v[8];
    for (int k = 0; k < 8; k++) {
        const float scale = k == 7 ? 1.0f : 1.0f / (float)(1 << (4 * k));
        v[k] = _mm256_mul_ps(_mm256_loadu_ps(y + 8 * k), _mm256_set1_ps(scale));
    }
    for (int high = 0; high < 2; high++) {
        const __m256 a = _mm256_unpacklo_ps(v[high], v[2 + high]), b = _mm256_unpackhi_ps(v[high], v[2 + high]);
        const __m256 c = _mm256_unpacklo_ps(v[4 + high], v[6 + high]), d = _mm256_unpackhi_ps(v[4 + high], v[6 + high]);
        const __m256d ac[2] = {_mm256_castps_pd(a), _mm256_castps_pd(c)}, bd[2] = {_mm256_castps_pd(b), _mm256_castps_pd(d)};
        const __m256d fours[4] = {_mm256_unpacklo_pd(ac[0], ac[1]), _mm256_unpackhi_pd(ac[0], ac[1]),
                                  _mm256_unpacklo_pd(bd[0], bd[1]), _mm256_unpackhi_pd(bd[0], bd[1])};
        for (int i = 0; i < 4; i++) {
            const __m256 four = _mm256_castpd_ps(fours[i]);
            float *to = y + (blocks ? 16 * high : 32 * high) + 4 * i;
            _mm_storeu_ps(to, _mm256_castps256_ps128(four));
            _mm_storeu_ps(to + (blocks ? 32 : 16), _mm256_extractf128_ps(four, 1));
        }
    }
}

#include "kernels_template.h"
const struct kernel_level *const kernel_avx2 = &level;
END_TARGET
#else
const struct kernel_level *const kernel_avx2 = NULL;
#endif
