/* kernels_x86.h - the primitives on 16 and 32 bytes that kernels_avx2.c and kernels_avx512.c share. */
#ifndef POWERINFER_KERNELS_X86_H
#define POWERINFER_KERNELS_X86_H

typedef __m128i v16;

PRIMITIVE v16 load_16(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
PRIMITIVE v16 low_8(uint64_t bytes) { return _mm_cvtsi64_si128((long long)bytes); }
PRIMITIVE v16 shuffle_16(v16 v, const uint8_t *order) { return _mm_shuffle_epi8(v, load_16(order)); }
PRIMITIVE v16 lookup_16(v16 table, v16 v) { return _mm_shuffle_epi8(table, v); }
PRIMITIVE v16 low_nibbles_16(v16 v) { return _mm_and_si128(v, _mm_set1_epi8(15)); }
PRIMITIVE v16 high_nibbles_16(v16 v) { return low_nibbles_16(_mm_srli_epi16(v, 4)); }
PRIMITIVE v16 add_bit_16(v16 q, v16 bits, int bit) {
    const v16 chosen = _mm_set1_epi8((char)(1 << bit));
    return _mm_or_si128(q, _mm_and_si128(_mm_cmpeq_epi8(_mm_and_si128(bits, chosen), chosen), _mm_set1_epi8(16)));
}
PRIMITIVE v16 add_two_bits_16(v16 q, v16 bits, int bit) {
    const v16 two = _mm_and_si128(_mm_srli_epi16(bits, bit), _mm_set1_epi8(3));
    return _mm_or_si128(q, _mm_slli_epi16(two, 4));
}
PRIMITIVE __m256i load_2_lanes(const uint8_t *p, size_t stride) {
    if (stride == 16) return _mm256_loadu_si256((const __m256i *)p);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(p)), load_16(p + stride), 1);
}
/* 16 products of signed bytes and 16-bit integers, in 8 sums of two. */
PRIMITIVE __m256i dot_16_ints(v16 a, const uint8_t *b) {
    return _mm256_madd_epi16(_mm256_cvtepi8_epi16(a), _mm256_loadu_si256((const __m256i *)b));
}
PRIMITIVE float half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}
/* out[0..8) = each signed byte times even or odd, by its position. */
PRIMITIVE void scale_bytes(uint64_t bytes, float even, float odd, float *out) {
    const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low_8(bytes)));
    const __m256 d = _mm256_blend_ps(_mm256_set1_ps(even), _mm256_set1_ps(odd), 0xaa);
    _mm256_storeu_ps(out, _mm256_mul_ps(v, d));
}

#endif
