// Rotary embedding of heads: y = x * cos + (-second half of x, first half of x) * sin.
//
// The type io_t of all tensors is a constant of a unit. Both products are rounded to io_t, as by a
// model that writes each of them. A block of tokens is taken for all heads, so that its cosines and
// sines are read from memory once and x, whose heads may lie side by side, in order.
#pragma once
#include <omp.h>
#include "vec.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Call {
    const io_t *x, *cos, *sin;  // rows of `width` numbers
    io_t* y;                    // (batch, heads, tokens, width)
    long batch, heads, tokens, width, threads;
    long x_batch, x_head, x_token, cos_batch, cos_token, sin_batch, sin_token;
};

constexpr long TOKENS = 32;  // of a block

static ALWAYS_INLINE vf some(const io_t* p, long n) {
    return n >= LANES ? load(p) : load_part(p, int(n));
}
static ALWAYS_INLINE void put(io_t* p, vf x, long n) {
    if (n >= LANES)
        store(p, x);
    else
        store_part(p, x, int(n));
}
static ALWAYS_INLINE vf as_io(vf x) {
    return sizeof(io_t) == 2 ? (vf)((vu)round_to_bf16(x) << 16) : x;
}

static void turn(const io_t* x, const io_t* cos, const io_t* sin, io_t* y, long half) {
    for (long d = 0; d < half; d += LANES) {
        const long n = half - d;
        const vf a = some(x + d, n), b = some(x + half + d, n);
        put(y + d, as_io(a * some(cos + d, n)) - as_io(b * some(sin + d, n)), n);
        put(y + half + d, as_io(b * some(cos + half + d, n)) + as_io(a * some(sin + half + d, n)),
            n);
    }
}

EXPORT void rotary(const Call* call) {
    const Call& c = *call;
    const long blocks = (c.tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel for schedule(static) collapse(2) num_threads(c.threads)
    for (long b = 0; b < c.batch; ++b)
        for (long block = 0; block < blocks; ++block) {
            const long from = block * TOKENS, to = from + TOKENS < c.tokens ? from + TOKENS : c.tokens;
            for (long h = 0; h < c.heads; ++h)
                for (long t = from; t < to; ++t)
                    turn(c.x + b * c.x_batch + h * c.x_head + t * c.x_token,
                         c.cos + b * c.cos_batch + t * c.cos_token,
                         c.sin + b * c.sin_batch + t * c.sin_token,
                         c.y + ((b * c.heads + h) * c.tokens + t) * c.width, c.width / 2);
        }
}
