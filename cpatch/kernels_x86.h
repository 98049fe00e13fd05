/* kernels_x86.h - the primitives on 16 and 32 bytes that kernels_avx2.c and kernels_avx512.c share. */
#ifndef POWERINFER_KERNELS_X86_H
#define POWERINFER_KERNELS_X86_H

typedef __m128i v16;

PRIMITIVE v16 load_16(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
PRIMITIVE v16 low_8(uint64_t bytes) { return _mm_cvtsi64_si128((long long)bytes); }
PRIMITIVE v16 shuffle_16(v16 v, const uint8_t *order) { return _mm_shuffle_epi8(v, load_16(order)); }
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
/* 2 to the power of 8 bytes minus 128, times factor; subnormals included. */
PRIMITIVE __m256 powers_of(v16 bytes, float factor) {
    const __m256i e = _mm256_cvtepu8_epi32(bytes);
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    const __m256i bits = _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e));
    return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(factor));
}
PRIMITIVE v16 bytes_8(const uint8_t *p, size_t stride) {
    return _mm_setr_epi8((char)p[0], (char)p[stride], (char)p[2 * stride], (char)p[3 * stride], (char)p[4 * stride],
                         (char)p[5 * stride], (char)p[6 * stride], (char)p[7 * stride], 0, 0, 0, 0, 0, 0, 0, 0);
}
/* out[0..8) = d * each signed byte. */
PRIMITIVE void scale_bytes(uint64_t bytes, float d, float *out) {
    const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low_8(bytes)));
    _mm256_storeu_ps(out, _mm256_mul_ps(v, _mm256_set1_ps(d)));
}

#endif
