/* attention.c - see attention.h. */
#include "attention.h"

#include "kernels_simd.h"

#include <string.h>

enum { LANES = 16 };

int64_t attention_stride(int64_t n) {
    return (n + LANES - 1) / LANES * LANES;
}

#if defined(__x86_64__)
#include <immintrin.h>
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define UNROLL _Pragma("GCC unroll 16")

static __mmask16 lanes_of(int64_t left) {
    return left >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
}

void attention_round(int64_t n, const float *x, float *rounded) {
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512 v = _mm512_maskz_loadu_ps(lanes_of(n - i), x + i);
        _mm512_storeu_ps(rounded + i, _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
    }
}

/* The sums over the lanes of 16 vectors. */
static inline __m512 sums(const __m512 *v) {
    __m512 pairs[8], fours[4], halves[2];
    for (int i = 0; i < 8; i++) {
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++) {
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

/* Rows that are fetched ahead: they lie too far apart for the processor to do it, often in a page each. */
enum { AHEAD = 16 };

/* R rows at a time with each of X inputs: R * X is LANES, so that the sums of all fill one vector. */
static inline __attribute__((always_inline)) void dots(const uint8_t *rows, size_t stride, int64_t n, int64_t n_rows,
                                                       const float *const *xs, int X, float *const *out) {
    const int R = LANES / X;
    const int64_t whole = n / LANES * LANES;
    const __mmask16 rest = lanes_of(n - whole);
    for (int64_t j = 0; j < n_rows; j += R) {
        const int64_t left = n_rows - j < R ? n_rows - j : R;
        const uint8_t *row[LANES];
        __m512 sum[LANES], v[4];
        UNROLL for (int k = 0; k < R; k++) row[k] = rows + (size_t)(j + (k < left ? k : left - 1)) * stride; /* the last twice */
        UNROLL for (int k = 0; k < LANES; k++) sum[k] = _mm512_setzero_ps();
        for (int64_t i = 0; i < whole; i += LANES) {
            UNROLL for (int x = 0; x < X; x++) v[x] = _mm512_loadu_ps(xs[x] + i);
            UNROLL for (int k = 0; k < R; k++) {
                _mm_prefetch((const char *)row[k] + 2 * i + AHEAD * stride, _MM_HINT_T1);
                const __m512 w = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(row[k] + 2 * i)));
                UNROLL for (int x = 0; x < X; x++) sum[x * R + k] = _mm512_fmadd_ps(w, v[x], sum[x * R + k]);
            }
        }
        if (rest != 0) {
            UNROLL for (int x = 0; x < X; x++) v[x] = _mm512_loadu_ps(xs[x] + whole);
            UNROLL for (int k = 0; k < R; k++) {
                const __m512 w = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, row[k] + 2 * whole));
                UNROLL for (int x = 0; x < X; x++) sum[x * R + k] = _mm512_fmadd_ps(w, v[x], sum[x * R + k]);
            }
        }
        float all[LANES];
        _mm512_storeu_ps(all, sums(sum));
        UNROLL for (int x = 0; x < X; x++) memcpy(out[x] + j, all + x * R, (size_t)left * sizeof *all);
    }
}

void attention_dots(const uint8_t *rows, size_t stride, int64_t n, int64_t n_rows, const float *const *xs, int n_x,
                    float *const *out) {
    for (; n_x >= 4; n_x -= 4, xs += 4, out += 4) dots(rows, stride, n, n_rows, xs, 4, out);
    if (n_x >= 2) dots(rows, stride, n, n_rows, xs, 2, out);
    if (n_x % 2 == 1) dots(rows, stride, n, n_rows, xs + n_x / 2 * 2, 1, out + n_x / 2 * 2);
}

END_TARGET
#else

/* Nobody calls these: panel_runs() says no. */
void attention_round(int64_t n, const float *x, float *rounded) {
    memcpy(rounded, x, (size_t)n * sizeof *x);
    memset(rounded + n, 0, (size_t)(attention_stride(n) - n) * sizeof *x);
}

void attention_dots(const uint8_t *rows, size_t stride, int64_t n, int64_t n_rows, const float *const *xs, int n_x,
                    float *const *out) {
    (void)rows, (void)stride, (void)n, (void)xs;
    for (int x = 0; x < n_x; x++) memset(out[x], 0, (size_t)n_rows * sizeof **out);
}
#endif
