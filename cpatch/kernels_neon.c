/* kernels_neon.c - NEON of 64-bit ARM: part of every such CPU. Compiled for more than ARMv8.0 it uses SDOT. */
#include "kernels_simd.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#define NAME "neon"
#define SIGNED_BIAS 0
#define LANES 1
#define WIDTH 4
#define ROWS 4
#define COLUMNS 4
#define PRIMITIVE static inline __attribute__((always_inline))

typedef uint8x16_t vb, v16;
typedef int32x4_t vi;
typedef float32x4_t vf;
typedef struct { int8_t f[16]; } factors;

PRIMITIVE float half(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
}
PRIMITIVE void halves_8(const uint8_t *p, size_t stride, float factor, float *out) {
    uint16_t bits[8];
    for (size_t i = 0; i < 8; i++) memcpy(bits + i, p + i * stride, 2);
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(bits));
    vst1q_f32(out, vmulq_n_f32(vcvt_f32_f16(vget_low_f16(h)), factor));
    vst1q_f32(out + 4, vmulq_n_f32(vcvt_high_f32_f16(h), factor));
}

PRIMITIVE vf zero_f(void) { return vdupq_n_f32(0.0f); }
PRIMITIVE vf same_f(float a) { return vdupq_n_f32(a); }
PRIMITIVE vf load_f(const float *p) { return vld1q_f32(p); }
PRIMITIVE void store_f(float *p, vf v) { vst1q_f32(p, v); }
PRIMITIVE vf fma_f(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
PRIMITIVE vf mul_f(vf a, vf b) { return vmulq_f32(a, b); }
PRIMITIVE vf load_f32(const uint8_t *p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
PRIMITIVE vf load_f16(const uint8_t *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
PRIMITIVE vf load_bf16(const uint8_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
PRIMITIVE vf to_float(vi v) { return vcvtq_f32_s32(v); }
PRIMITIVE vf load_i8(const uint8_t *p) {
    uint32_t bytes;
    memcpy(&bytes, p, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)));
    return to_float(vmovl_s16(vget_low_s16(wide)));
}
PRIMITIVE float sum_f(vf v) { return vaddvq_f32(v); }

PRIMITIVE vi zero_i(void) { return vdupq_n_s32(0); }
PRIMITIVE vi negate(vi v) { return vnegq_s32(v); }
PRIMITIVE vb same_bytes(int b) { return vdupq_n_u8((uint8_t)b); }
PRIMITIVE void store_b(uint8_t *p, vb v) { vst1q_u8(p, v); }
PRIMITIVE vb minus(vb a, vb b) { return vsubq_u8(a, b); }
PRIMITIVE vb low_nibbles(vb v) { return vandq_u8(v, vdupq_n_u8(15)); }
PRIMITIVE vb high_nibbles(vb v) { return vshrq_n_u8(v, 4); }
PRIMITIVE vb load_16(const uint8_t *p) { return vld1q_u8(p); }
PRIMITIVE vb lookup(const uint8_t *table, vb v) { return vqtbl1q_u8(vld1q_u8(table), v); }
PRIMITIVE vb lanes(const uint8_t *p, size_t stride) { (void)stride; return vld1q_u8(p); }
PRIMITIVE vb lanes_of_pairs(const uint8_t *p) { return vld1q_u8(p); }
PRIMITIVE vb lane_pairs(const uint8_t *p) { return vld1q_u8(p); }
PRIMITIVE vb shift_right(vb v, int count) { return vshlq_u8(v, vdupq_n_s8((int8_t)-count)); }
PRIMITIVE vb add_bit(vb q, vb bits, int first, int second) {
    (void)second;
    return vorrq_u8(q, vshlq_n_u8(vandq_u8(shift_right(bits, first), vdupq_n_u8(1)), 4));
}
PRIMITIVE vb add_two_bits(vb q, vb bits, int first, int second) {
    (void)second;
    return vorrq_u8(q, vshlq_n_u8(vandq_u8(shift_right(bits, first), vdupq_n_u8(3)), 4));
}
PRIMITIVE vb low_8(uint64_t bytes) { return vcombine_u8(vcreate_u8(bytes), vcreate_u8(0)); }
PRIMITIVE vb shuffle_16(vb v, const uint8_t *order) { return vqtbl1q_u8(v, vld1q_u8(order)); }

/* The sums need not be those of 4 neighbours; any 4 lanes of int32 do. */
PRIMITIVE vi dot(vi sum, vb w, vb x) {
    const int8x16_t a = vreinterpretq_s8_u8(w), b = vreinterpretq_s8_u8(x);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    return vpadalq_s16(sum, vmull_high_s8(a, b));
#endif
}
PRIMITIVE vi dot_nibbles(vi sum, vb lo, vb x_lo, vb hi, vb x_hi) { return dot(dot(sum, lo, x_lo), hi, x_hi); }
PRIMITIVE vb signed_weights(vb w) { return w; }
PRIMITIVE vi dot_signed(vi sum, vb w, vb x) { return dot(sum, w, x); }
PRIMITIVE vf lane_scales(const float *d, int b) { return vdupq_n_f32(d[b]); }
PRIMITIVE factors make_factors(v16 scales) {
    factors f;
    vst1q_u8((uint8_t *)f.f, scales);
    return f;
}
PRIMITIVE vi dot_factor(vi sum, vb w, vb x, factors f, int v) { return vmlaq_n_s32(sum, dot(zero_i(), w, x), f.f[v]); }
PRIMITIVE vi dot_16(v16 a, const uint8_t *sums) {
    const int16x8_t low = vreinterpretq_s16_u8(vld1q_u8(sums)), high = vreinterpretq_s16_u8(vld1q_u8(sums + 16));
    const int16x8_t a_low = vmovl_s8(vget_low_s8(vreinterpretq_s8_u8(a)));
    const int16x8_t a_high = vmovl_high_s8(vreinterpretq_s8_u8(a));
    vi sum = vmull_s16(vget_low_s16(a_low), vget_low_s16(low));
    sum = vmlal_high_s16(sum, a_low, low);
    sum = vmlal_s16(sum, vget_low_s16(a_high), vget_low_s16(high));
    return vmlal_high_s16(sum, a_high, high);
}
PRIMITIVE vi minus_32_times(vi a, vi b) { return vmlsq_n_s32(a, b, 32); }

/* 2 to the power of 8 bytes, stride bytes apart, minus 128, times factor; subnormals included. */
PRIMITIVE void powers_8(const uint8_t *p, size_t stride, float factor, float *out) {
    for (int i = 0; i < 8; i++) {
        const uint32_t e = p[(size_t)i * stride], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
        memcpy(out + i, &bits, 4);
        out[i] *= factor;
    }
}
/* out[0..8) = d * each signed byte. */
PRIMITIVE void scale_bytes(uint64_t bytes, float d, float *out) {
    const int16x8_t wide = vmovl_s8(vcreate_s8(bytes));
    vst1q_f32(out, vmulq_n_f32(to_float(vmovl_s16(vget_low_s16(wide))), d));
    vst1q_f32(out + 4, vmulq_n_f32(to_float(vmovl_high_s16(wide)), d));
}

#include "kernels_template.h"
const struct kernel_level *const kernel_neon = &level;
#else
const struct kernel_level *const kernel_neon = NULL;
#endif
