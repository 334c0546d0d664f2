// A decode step as a list of instructions on strided float tensors of up to four dimensions.
//
// Weights are read in place; every other value lies in one arena as floats, and is rounded after
// each instruction whose result is bf16 in the model. The list holds addresses, so it belongs to one
// model and one batch size. Attention calls the kernel of `decode.hpp` that it is given.
#pragma once
#include <math.h>
#include "gemv.hpp"
#include "math.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Every field has 8 bytes; the order is that of `step_program.py`.
struct Instruction {
    long op, round;
    void* out;
    const void *a, *b, *c;
    long n[4], so[4], sa[4], sb[4];
    double s, t;
    long x[8];
};

namespace {

enum Op : long {
    // one operand
    COPY, NEG, ABS, SQUARE, SQRT, RSQRT, RECIPROCAL, EXP, LOG, COS, SIN, TANH, SIGMOID, SILU, RELU,
    GELU, GELU_TANH, POW, AFFINE, LOAD_BF16,
    // two operands
    ADD, SUB, MUL, DIV, MAX, MIN,
    // others
    MEAN, SUM, LAYER_NORM, RMS_NORM, EMBED, LINEAR, ATTEND
};

static ALWAYS_INLINE vf rounded(vf x) { return (vf)(round_to_bf16(x) << 16); }

template <class F> static ALWAYS_INLINE vf each(vf x, F f) {
    alignas(64) float t[LANES];
    store(t, x);
    for (int l = 0; l < LANES; ++l) t[l] = f(t[l]);
    return load(t);
}

// `count` numbers of a row; a stride of 0 repeats one number.
template <class T> static ALWAYS_INLINE vf fetch(const T* p, long stride, int count) {
    if (stride == 1) return count == LANES ? load(p) : load_part(p, count);
    if (stride == 0) return splat(to_float(*p));
    alignas(64) float t[LANES] = {};
    for (int l = 0; l < count; ++l) t[l] = to_float(p[l * stride]);
    return load(t);
}

static ALWAYS_INLINE void put(float* p, long stride, int count, vf x) {
    if (stride == 1 && count == LANES) return store(p, x);
    alignas(64) float t[LANES];
    store(t, x);
    for (int l = 0; l < count; ++l) p[l * stride] = t[l];
}

// out = f(a, b) over all four dimensions.
template <class T, class F> static ALWAYS_INLINE void pointwise(const Instruction& I, F f) {
    const bool two = I.b != nullptr;
    for (long i = 0; i < I.n[0]; ++i)
        for (long j = 0; j < I.n[1]; ++j)
            for (long k = 0; k < I.n[2]; ++k) {
                const T* a = (const T*)I.a + i * I.sa[0] + j * I.sa[1] + k * I.sa[2];
                const float* b =
                    two ? (const float*)I.b + i * I.sb[0] + j * I.sb[1] + k * I.sb[2] : nullptr;
                float* o = (float*)I.out + i * I.so[0] + j * I.so[1] + k * I.so[2];
                for (long x = 0; x < I.n[3]; x += LANES) {
                    const int count = I.n[3] - x < LANES ? (int)(I.n[3] - x) : LANES;
                    vf u = fetch(a + x * I.sa[3], I.sa[3], count);
                    vf w = two ? fetch(b + x * I.sb[3], I.sb[3], count) : vf{};
                    vf r = f(u, w);
                    put(o + x * I.so[3], I.so[3], count, I.round ? rounded(r) : r);
                }
            }
}

template <class F> static ALWAYS_INLINE void one(const Instruction& I, F f) {
    pointwise<float>(I, [&](vf x, vf) INLINE_LAMBDA { return f(x); });
}

// Rows of the last dimension: `f(row of a, size, row of out)`.
template <class F> static ALWAYS_INLINE void by_row(const Instruction& I, F f) {
    for (long i = 0; i < I.n[0]; ++i)
        for (long j = 0; j < I.n[1]; ++j)
            for (long k = 0; k < I.n[2]; ++k)
                f((const float*)I.a + i * I.sa[0] + j * I.sa[1] + k * I.sa[2], I.n[3],
                  (float*)I.out + i * I.so[0] + j * I.so[1] + k * I.so[2]);
}

template <class F> static ALWAYS_INLINE float sum_of(const float* a, long stride, long n, F f) {
    vf s{};
    for (long x = 0; x < n; x += LANES) {
        const int count = n - x < LANES ? (int)(n - x) : LANES;
        vf v = f(fetch(a + x * stride, stride, count));
        if (count < LANES)  // what lies behind the row does not count
            for (int l = count; l < LANES; ++l) v[l] = 0.0f;
        s += v;
    }
    return sum_lanes(s);
}

static void norm(const Instruction& I, bool centred) {
    const float* weight = (const float*)I.b;
    const float* bias = (const float*)I.c;
    by_row(I, [&](const float* a, long n, float* o) INLINE_LAMBDA {
        float mean = centred ? sum_of(a, I.sa[3], n, [](vf x) INLINE_LAMBDA { return x; }) / n : 0;
        float square =
            sum_of(a, I.sa[3], n, [&](vf x) INLINE_LAMBDA { return (x - mean) * (x - mean); }) / n;
        float factor = 1.0f / sqrtf(square + (float)I.s);
        for (long x = 0; x < n; ++x) {
            float y = (a[x * I.sa[3]] - mean) * factor;
            if (weight) y *= weight[x];
            if (bias) y += bias[x];
            o[x * I.so[3]] = gemv::rounded(y, I.round);
        }
    });
}

template <class T> static void embed(const Instruction& I) {
    const T* table = (const T*)I.b;
    const float* index = (const float*)I.a;
    for (long i = 0; i < I.n[0]; ++i) {
        const T* row = table + (long)index[i * I.sa[0]] * I.sb[0];
        float* o = (float*)I.out + i * I.n[1];
        for (long x = 0; x < I.n[1]; ++x) o[x] = to_float(row[x]);
    }
}

template <class T> static void linear(const Instruction& I, int threads) {
    gemv::linear<T>((const T*)I.b, I.sb[0], I.x[1], (const T*)I.c, (const float*)I.a,
                    (float*)I.x[2], (float*)I.out, I.n[1], I.n[0], I.n[1], I.n[2], I.round,
                    threads);
}

// Where a layer keeps its tokens: keys and values of T, strides, the columns [first, end) that the
// new token sees beside its own, which is written to column `end`.
struct Slot {
    void *k, *v;
    long k_b, k_h, k_n, v_b, v_h, v_n, first, end;
};

using Decode = void (*)(const void*, float, float);

// The new token is appended and attends: q (B, H, DK) in a, k (B, Hkv, DK) in b, v in c.
template <class T> static void attend(const Instruction& I, int threads) {
    const long B = I.n[0], H = I.n[1], Hkv = I.n[2], DK = I.n[3], DV = I.x[3];
    const Slot& slot = *(const Slot*)I.x[4];
    T *K = (T*)slot.k, *V = (T*)slot.v;
    for (long b = 0; b < B; ++b)
        for (long h = 0; h < Hkv; ++h) {
            const float* k = (const float*)I.b + b * I.sb[0] + h * I.sb[1];
            const float* v = (const float*)I.c + b * I.x[0] + h * I.x[1];
            T* to_k = K + b * slot.k_b + h * slot.k_h + slot.end * slot.k_n;
            T* to_v = V + b * slot.v_b + h * slot.v_h + slot.end * slot.v_n;
            for (long d = 0; d < DK; ++d) to_k[d] = from_float<T>(k[d * I.sb[2]]);
            for (long d = 0; d < DV; ++d) to_v[d] = from_float<T>(v[d * I.x[2]]);
        }
    float* lse = (float*)I.x[6];
    T* q = (T*)(lse + B * H);
    T* out = q + B * H * DK;
    float* scratch = (float*)I.x[6] + B * H * (1 + DK + DV);
    for (long b = 0; b < B; ++b)
        for (long h = 0; h < H; ++h)
            for (long d = 0; d < DK; ++d)
                q[(b * H + h) * DK + d] =
                    from_float<T>(((const float*)I.a)[b * I.sa[0] + h * I.sa[1] + d * I.sa[2]]);
    const long keys = slot.end + 1 - slot.first;
    long splits = 1;
    if (B * Hkv % threads != 0) {  // every thread the same number of parts, if there are keys enough
        splits = threads * ((3 * threads + B * Hkv - 1) / (B * Hkv));
        if (splits > keys / 256) splits = keys / 256 > 1 ? keys / 256 : 1;
        if (splits > I.x[7]) splits = I.x[7];
    }
    const long call[] = {
        (long)q, (long)(K + slot.first * slot.k_n), (long)(V + slot.first * slot.v_n), (long)out,
        (long)lse, 0, 0, 0, 0, (long)scratch, B, H, Hkv, 1, keys, 0, 0, H * DK, DK, DK,
        slot.k_b, slot.k_h, slot.k_n, slot.v_b, slot.v_h, slot.v_n, splits,
        keys * B * Hkv < 512 ? 1 : threads};
    ((Decode)I.x[5])(call, (float)I.s, (float)I.t);
    for (long x = 0; x < B * H * DV; ++x) ((float*)I.out)[x] = to_float(out[x]);
}

static void run(const Instruction& I, int threads) {
    const float s = (float)I.s, t = (float)I.t;
    switch (I.op) {
    case COPY: return one(I, [](vf x) INLINE_LAMBDA { return x; });
    case NEG: return one(I, [](vf x) INLINE_LAMBDA { return -x; });
    case ABS: return one(I, [](vf x) INLINE_LAMBDA { return vabs(x); });
    case SQUARE: return one(I, [](vf x) INLINE_LAMBDA { return x * x; });
    case SQRT: return one(I, [](vf x) INLINE_LAMBDA { return each(x, sqrtf); });
    case RSQRT:
        return one(I, [](vf x) INLINE_LAMBDA { return 1.0f / each(x, sqrtf); });
    case RECIPROCAL: return one(I, [](vf x) INLINE_LAMBDA { return 1.0f / x; });
    case EXP: return one(I, [](vf x) INLINE_LAMBDA { return each(x, expf); });
    case LOG: return one(I, [](vf x) INLINE_LAMBDA { return each(x, logf); });
    case COS: return one(I, [](vf x) INLINE_LAMBDA { return each(x, cosf); });
    case SIN: return one(I, [](vf x) INLINE_LAMBDA { return each(x, sinf); });
    case TANH: return one(I, [](vf x) INLINE_LAMBDA { return tanh_(x); });
    case SIGMOID: return one(I, [](vf x) INLINE_LAMBDA { return sigmoid_(x); });
    case SILU: return one(I, [](vf x) INLINE_LAMBDA { return x * sigmoid_(x); });
    case RELU: return one(I, [](vf x) INLINE_LAMBDA { return vmax(x, vf{}); });
    case GELU:
        return one(I, [](vf x) INLINE_LAMBDA {
            return 0.5f * x * (1.0f + each(x * 0.70710678118654752f, erff));
        });
    case GELU_TANH:
        return one(I, [](vf x) INLINE_LAMBDA {
            return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * (x + 0.044715f * x * x * x)));
        });
    case POW:
        return one(I, [&](vf x) INLINE_LAMBDA {
            return each(x, [&](float y) { return powf(y, s); });
        });
    case AFFINE: return one(I, [&](vf x) INLINE_LAMBDA { return x * s + t; });
    case LOAD_BF16: return pointwise<bf16>(I, [](vf x, vf) INLINE_LAMBDA { return x; });
    case ADD: return pointwise<float>(I, [&](vf x, vf y) INLINE_LAMBDA { return x + y * s; });
    case SUB: return pointwise<float>(I, [&](vf x, vf y) INLINE_LAMBDA { return x - y * s; });
    case MUL: return pointwise<float>(I, [](vf x, vf y) INLINE_LAMBDA { return x * y; });
    case DIV: return pointwise<float>(I, [](vf x, vf y) INLINE_LAMBDA { return x / y; });
    case MAX: return pointwise<float>(I, [](vf x, vf y) INLINE_LAMBDA { return vmax(x, y); });
    case MIN: return pointwise<float>(I, [](vf x, vf y) INLINE_LAMBDA { return vmin(x, y); });
    case MEAN:
    case SUM:
        return by_row(I, [&](const float* a, long n, float* o) INLINE_LAMBDA {
            float sum = sum_of(a, I.sa[3], n, [](vf x) INLINE_LAMBDA { return x; });
            *o = gemv::rounded(I.op == MEAN ? sum / n : sum, I.round);
        });
    case LAYER_NORM: return norm(I, true);
    case RMS_NORM: return norm(I, false);
    case EMBED: return I.x[0] ? embed<bf16>(I) : embed<float>(I);
    case LINEAR: return I.x[0] ? linear<bf16>(I, threads) : linear<float>(I, threads);
    case ATTEND: return I.round ? attend<bf16>(I, threads) : attend<float>(I, threads);
    }
}

}  // namespace

EXPORT void step(const Instruction* list, long count, long threads) {
    for (long i = 0; i < count; ++i) run(list[i], (int)threads);
}
