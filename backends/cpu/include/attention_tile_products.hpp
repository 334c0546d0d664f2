// A list of products of tiles, taken step by step between vector instructions. See
// attention_tiles_backward.hpp.
#pragma once
#include "attention_tile_queue.hpp"

namespace {

// 32 x 32 sums c (+)= A B over `steps` steps of 32. A step of A: [part][32 rows of 64 bytes]; of B:
// [part][16 rows of 32 pairs].
struct Product {
    const char *a, *b;
    long a_step, b_step;  // bytes
    float* c;
    long ldc;
    int steps;
    bool fresh;  // whether c begins at 0
};

template <int MOST> struct Products {
    Product all[MOST];
    int count = 0, now = 0, at = 0;
    const char *a, *b;  // of the present step
    bool on;

    bool done() const { return now == count; }
    void add(const Product& p) { all[count++] = p; }

    // The share of a slot, when a step of a product is spread over `slots` of them.
    ALWAYS_INLINE void begin() {
        on = !done();
        if (!on) return;
        const Product& p = all[now];
        a = p.a + at * p.a_step, b = p.b + at * p.b_step;
        if (at > 0) return;
        if (p.fresh) {
            tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        } else {
            const float* low = p.c + TILE * p.ldc;
            const long row = p.ldc * 4;
            tile_load<0>(p.c, row), tile_load<1>(p.c + TILE, row);
            tile_load<2>(low, row), tile_load<3>(low + TILE, row);
        }
    }
    ALWAYS_INLINE void slot(int i, int slots) const {
        if (!on) return;
        auto rows = [&](int part) INLINE_LAMBDA {
            tile_load<4>(a + part * TWO_TILES, 64);
            tile_load<5>(a + part * TWO_TILES + TILE * 64, 64);
        };
        auto columns = [&](int part) INLINE_LAMBDA {
            tile_load<6>(b + part * TWO_TILES, 128);
            tile_load<7>(b + part * TWO_TILES + 64, 128);
        };
        UNROLL for (int n = 0; n < UNITS; ++n)
            if (n >= UNITS * i / slots && n < UNITS * (i + 1) / slots)
                load_parts(n, rows, columns), multiply_unit(n);
    }
    ALWAYS_INLINE void end() {
        if (!on) return;
        const Product& p = all[now];
        if (++at < p.steps) return;
        float* low = p.c + TILE * p.ldc;
        const long row = p.ldc * 4;
        tile_store<0>(p.c, row), tile_store<1>(p.c + TILE, row);
        tile_store<2>(low, row), tile_store<3>(low + TILE, row);
        at = 0;
        ++now;
    }
    __attribute__((noinline)) void step() {
        begin();
        slot(0, 1);
        end();
    }
};

}  // namespace
