// Vector functions. No function here sees a positive exponent: exp2_neg and exp_neg take x <= 0.
//
//   exp2_neg(x)   2^x for x <= 0, relative error about 1e-7; exactly 0 below -126.5 (-126 with
//                 AVX-512); NaN stays NaN
//   exp2_rough(x) likewise, relative error about 3e-6: for weights that become bf16
//   exp_neg(x)    e^x likewise, with the argument reduced in two steps so that the error does not
//                 grow with |x|
//   tanh_(x), sigmoid_(x), log2_(x) for normal x > 0
#pragma once
#include "vec.hpp"

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

namespace detail {
// Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
constexpr float ROUND = 12582912.0f;
// 2^-127 has the bits of 0 when it is built from its exponent, so clamping there gives exact zeros.
constexpr float ZERO = -127.0f;

static ALWAYS_INLINE vf two_to(vf rounded) { return (vf)(((vi)rounded << 23) + (127 << 23)); }
}  // namespace detail

#if LANES == 16 && defined(__AVX512F__)
// 2^x = 2^floor(x) 2^f with two instructions for the parts, so no clamp. Below the smallest normal
// number the result is made 0: what follows would be slow on others.
static ALWAYS_INLINE vf exp2_neg(vf x) {
    __m512 f = _mm512_reduce_ps((__m512)x, 9);  // x - floor(x)
    vf p = (vf)f * 2.161292068e-4f + 1.246784464e-3f;
    p = p * (vf)f + 9.675451554e-3f;
    p = p * (vf)f + 5.548528209e-2f;
    p = p * (vf)f + 0.2402293086f;
    p = p * (vf)f + 0.6931470633f;
    p = p * (vf)f + 1.0f;
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
}
static ALWAYS_INLINE vf exp2_rough(vf x) {
    __m512 f = _mm512_reduce_ps((__m512)x, 9);
    vf p = (vf)f * 1.342668943e-2f + 5.224246532e-2f;
    p = p * (vf)f + 0.241280213f;
    p = p * (vf)f + 0.6930448413f;
    p = p * (vf)f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
static ALWAYS_INLINE vf exp2_neg(vf x) {
    x = vmax(splat(detail::ZERO), x);  // a NaN passes
    vf t = x + detail::ROUND;
    vf f = x - (t - detail::ROUND);
    vf p = f * 0.0001534581242594868f + 0.0013399930903688073f;
    p = p * f + 0.009618489071726799f;
    p = p * f + 0.05550328642129898f;
    p = p * f + 0.24022646248340607f;
    p = p * f + 0.6931471824645996f;
    p = p * f + 1.0f;
    return p * detail::two_to(t);
}
static ALWAYS_INLINE vf exp2_rough(vf x) { return exp2_neg(x); }
#endif

static ALWAYS_INLINE vf exp_neg(vf x) {
    x = vmax(splat(detail::ZERO * LN2), x);
    vf t = x * LOG2E + detail::ROUND;
    vf n = t - detail::ROUND;
    vf f = x - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    vf p = f * 0.001383683760650456f + 0.008374822326004505f;
    p = p * f + 0.04166822507977486f;
    p = p * f + 0.16666419804096222f;
    p = p * f + 0.49999991059303284f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return p * detail::two_to(t);
}

static ALWAYS_INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }

static ALWAYS_INLINE vf tanh_(vf x) {
    vf a = vabs(x);
    vf e = exp_neg(a * -2.0f);
    vf big = (1.0f - e) / (1.0f + e);
    // Near 0 the quotient cancels; an odd polynomial does not.
    vf s = x * x;
    vf p = s * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    vf small = a + a * s * p;
    vf r = select(a < 0.625f, small, big);
    return (vf)((vi)r | ((vi)x & (int32_t)0x80000000));
}

static ALWAYS_INLINE vf sigmoid_(vf x) {
    vf e = exp_neg((vf)((vi)x | (int32_t)0x80000000));  // -|x|
    vf d = 1.0f / (1.0f + e);
    return select(x < 0.0f, e * d, d);
}

static ALWAYS_INLINE vf log2_(vf x) {
    vi b = (vi)x - 0x3f3504f3;  // mantissa around 1: [sqrt(1/2), sqrt(2))
    vf n = __builtin_convertvector(b >> 23, vf);
    vf m = (vf)((b & 0x007fffff) + 0x3f3504f3) - 1.0f;
    vf p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    vf s = m * m;
    return n + (m - 0.5f * s + m * s * p) * LOG2E;
}
