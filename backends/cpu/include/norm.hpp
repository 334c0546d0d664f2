// Rows of RMSNorm and LayerNorm: y = (x - mean) / sqrt(mean of squares + eps) * (w + offset) + b.
//
// The type io_t of x, w, b and y is a constant of a unit; sums are float32. Every row is read from
// memory once: the second and third pass over it find it in L1.
#pragma once
#include <math.h>
#include <omp.h>
#include "vec.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Call {
    const io_t *x, *w, *b;  // w and b may be null
    io_t* y;
    long rows, width, x_row, threads;
    long centred;  // LayerNorm: the mean is taken off
    long early;    // round to io_t before the weight is applied, as some models do
    double eps, offset;
};

static ALWAYS_INLINE vf some(const io_t* p, long n) {
    return n >= LANES ? load(p) : load_part(p, int(n));
}
static ALWAYS_INLINE vf as_io(vf x) {
    return sizeof(io_t) == 2 ? (vf)((vu)round_to_bf16(x) << 16) : x;
}

template <class F> static ALWAYS_INLINE float sum_of(const io_t* x, long width, F f) {
    vf s[4] = {};
    long k = 0;
    for (; k + 4 * LANES <= width; k += 4 * LANES)
        UNROLL for (int i = 0; i < 4; ++i) s[i] += f(load(x + k + i * LANES));
    for (; k + LANES <= width; k += LANES) s[0] += f(load(x + k));
    float sum = sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
    for (; k < width; ++k) sum += f(splat(to_float(x[k])))[0];
    return sum;
}

static void row_of(const Call& c, const io_t* x, io_t* y) {
    const float width = float(c.width);
    float mean = c.centred ? sum_of(x, c.width, [](vf v) INLINE_LAMBDA { return v; }) / width : 0;
    float square =
        sum_of(x, c.width, [&](vf v) INLINE_LAMBDA { return (v - mean) * (v - mean); }) / width;
    const float factor = 1.0f / sqrtf(square + float(c.eps)), offset = float(c.offset);
    for (long k = 0; k < c.width; k += LANES) {
        const long left = c.width - k;
        vf v = (some(x + k, left) - mean) * factor;
        if (c.early) v = as_io(v);
        if (c.w) v *= some(c.w + k, left) + offset;
        if (c.b) v += some(c.b + k, left);
        if (left >= LANES)
            store(y + k, v);
        else
            store_part(y + k, v, int(left));
    }
}

EXPORT void norm(const Call* call) {
    const Call& c = *call;
#pragma omp parallel for schedule(static) num_threads(c.threads)
    for (long r = 0; r < c.rows; ++r) row_of(c, c.x + r * c.x_row, c.y + r * c.width);
}
