/* kernels_portable.c - plain C, for CPUs that nothing better serves. The compiler makes of it what it can. */
#include "kernels_simd.h"

#include <string.h>

#define NAME "portable"
#define SIGNED_BIAS 0
#define LANES 1
#define WIDTH 4
#define ROWS 1
#define COLUMNS 1
#define UNROLL /* small rather than fast */
#define PRIMITIVE static inline __attribute__((always_inline))
#define EACH(n) for (int i = 0; i < (n); i++)

typedef struct { uint8_t b[16]; } vb;
typedef vb v16;
typedef struct { int32_t i[4]; } vi;
typedef struct { float f[4]; } vf;
typedef struct { int8_t f[16]; } factors;

/* Half to single; subnormals, infinities and NaN included. */
PRIMITIVE float half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f; /* moves the exponent's bias from 15 to 127 */
    memcpy(&bits, &f, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
    bits |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&f, &bits, 4);
    return f;
}
PRIMITIVE void halves_8(const uint8_t *p, size_t stride, float factor, float *out) {
    EACH(8) out[i] = half(p + (size_t)i * stride) * factor;
}

/* 2 to the power of 8 bytes, stride bytes apart, minus 128, times factor; subnormals included. */
PRIMITIVE void powers_8(const uint8_t *p, size_t stride, float factor, float *out) {
    for (int i = 0; i < 8; i++) {
        const uint32_t e = p[(size_t)i * stride], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
        memcpy(out + i, &bits, 4);
        out[i] *= factor;
    }
}
PRIMITIVE void scale_bytes(uint64_t bytes, float d, float *out) { EACH(8) out[i] = d * (float)(int8_t)(bytes >> 8 * i); }

PRIMITIVE vf zero_f(void) { return (vf){{0}}; }
PRIMITIVE vf same_f(float a) { return (vf){{a, a, a, a}}; }
PRIMITIVE vf load_f(const float *p) { vf v; memcpy(v.f, p, 16); return v; }
PRIMITIVE void store_f(float *p, vf v) { memcpy(p, v.f, 16); }
PRIMITIVE vf mul_f(vf a, vf b) { EACH(4) a.f[i] *= b.f[i]; return a; }
/* Not fused: without the instruction that would be a call for each element. */
PRIMITIVE vf fma_f(vf a, vf b, vf c) { EACH(4) c.f[i] += a.f[i] * b.f[i]; return c; }
PRIMITIVE vf load_f32(const uint8_t *p) { vf v; memcpy(v.f, p, 16); return v; }
PRIMITIVE vf load_f16(const uint8_t *p) { vf v; EACH(4) v.f[i] = half(p + 2 * i); return v; }
PRIMITIVE vf load_bf16(const uint8_t *p) {
    vf v;
    EACH(4) {
        const uint32_t bits = (uint32_t)p[2 * i] << 16 | (uint32_t)p[2 * i + 1] << 24;
        memcpy(&v.f[i], &bits, 4);
    }
    return v;
}
PRIMITIVE vf load_i8(const uint8_t *p) { vf v; EACH(4) v.f[i] = (float)(int8_t)p[i]; return v; }
PRIMITIVE vf to_float(vi a) { vf v; EACH(4) v.f[i] = (float)a.i[i]; return v; }
PRIMITIVE float sum_f(vf v) { return (v.f[0] + v.f[2]) + (v.f[1] + v.f[3]); }

PRIMITIVE vi zero_i(void) { return (vi){{0}}; }
PRIMITIVE vi negate(vi v) { EACH(4) v.i[i] = -v.i[i]; return v; }
PRIMITIVE vb same_bytes(int b) { vb v; EACH(16) v.b[i] = (uint8_t)b; return v; }
PRIMITIVE void store_b(uint8_t *p, vb v) { memcpy(p, v.b, 16); }
PRIMITIVE vb minus(vb a, vb b) { EACH(16) a.b[i] = (uint8_t)(a.b[i] - b.b[i]); return a; }
PRIMITIVE vb low_nibbles(vb v) { EACH(16) v.b[i] &= 15; return v; }
PRIMITIVE vb high_nibbles(vb v) { EACH(16) v.b[i] >>= 4; return v; }
PRIMITIVE vb load_16(const uint8_t *p) { vb v; memcpy(v.b, p, 16); return v; }
PRIMITIVE vb lookup(const uint8_t *table, vb v) { EACH(16) v.b[i] = table[v.b[i]]; return v; }
PRIMITIVE vb lanes(const uint8_t *p, size_t stride) { (void)stride; return load_16(p); }
PRIMITIVE vb lanes_of_pairs(const uint8_t *p) { return load_16(p); }
PRIMITIVE vb lane_pairs(const uint8_t *p) { return load_16(p); }
PRIMITIVE vb add_bit(vb q, vb bits, int first, int second) {
    (void)second;
    EACH(16) q.b[i] |= (bits.b[i] >> first & 1) << 4;
    return q;
}
PRIMITIVE vb add_two_bits(vb q, vb bits, int first, int second) {
    (void)second;
    EACH(16) q.b[i] |= (bits.b[i] >> first & 3) << 4;
    return q;
}
PRIMITIVE vb low_8(uint64_t bytes) { vb v = {{0}}; EACH(8) v.b[i] = (uint8_t)(bytes >> 8 * i); return v; }
PRIMITIVE vb shuffle_16(vb v, const uint8_t *order) { vb s; EACH(16) s.b[i] = v.b[order[i]]; return s; }

PRIMITIVE vi dot(vi sum, vb w, vb x) { EACH(16) sum.i[i % 4] += (int8_t)w.b[i] * (int8_t)x.b[i]; return sum; }
PRIMITIVE vi dot_nibbles(vi sum, vb lo, vb x_lo, vb hi, vb x_hi) { return dot(dot(sum, lo, x_lo), hi, x_hi); }
PRIMITIVE vb signed_weights(vb w) { return w; }
PRIMITIVE vi dot_signed(vi sum, vb w, vb x) { return dot(sum, w, x); }
PRIMITIVE vf lane_scales(const float *d, int b) { return same_f(d[b]); }
PRIMITIVE factors make_factors(v16 scales) { factors f; memcpy(f.f, scales.b, 16); return f; }
PRIMITIVE vi dot_factor(vi sum, vb w, vb x, factors f, int v) {
    const vi one = dot(zero_i(), w, x);
    EACH(4) sum.i[i] += f.f[v] * one.i[i];
    return sum;
}
PRIMITIVE vi dot_16(v16 a, const uint8_t *sums) {
    int16_t b[16];
    memcpy(b, sums, 32);
    vi sum = zero_i();
    EACH(16) sum.i[i % 4] += (int8_t)a.b[i] * b[i];
    return sum;
}
PRIMITIVE vi minus_32_times(vi a, vi b) { EACH(4) a.i[i] -= 32 * b.i[i]; return a; }

#include "kernels_template.h"
const struct kernel_level *const kernel_portable = &level;
