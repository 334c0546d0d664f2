// The work of the tile registers, taken bit by bit between vector instructions. See
// attention_tiles.hpp.
#pragma once
#include "attention_tile_pack.hpp"

namespace {

// Keeps a value from being computed later than here. Multiplications of tiles have to be spread
// evenly between the vector instructions: bursts of them run at a third of the speed.
static ALWAYS_INLINE void pin(vf& x) {
#if defined(__AMX_BF16__)
    asm volatile("" : "+v"(x));
#endif
}

// A step multiplies 32 rows by 32 columns over 32 numbers in UNITS multiplications, those of the
// smallest parts first, in an order that loads least: what has to be loaded before unit n.
template <class Rows, class Columns>
static ALWAYS_INLINE void load_parts(int n, Rows rows, Columns columns) {
    if (n == 0) rows(PARTS - 1), columns(0);
    if (n == 4) rows(1);
    if (n == 8) columns(1);
    if (n == 12) rows(0);
    if (n == 16) columns(2);
    if (n == 20) columns(0);
}
static ALWAYS_INLINE void multiply_unit(int n) {
    if (n % 4 == 0) tile_multiply<0, 4, 6>();
    if (n % 4 == 1) tile_multiply<1, 4, 7>();
    if (n % 4 == 2) tile_multiply<2, 5, 6>();
    if (n % 4 == 3) tile_multiply<3, 5, 7>();
}

// What the multiplier has to do while other work is done: S = K Q^T, the bare products of an item,
// then O += V^T P of another.
struct Queue {
    const char *k, *q, *v, *p, *after;  // after: the keys of a queue that may follow
    float *s, *o;
    int k_blocks = 0, v_blocks = 0, v_steps, at = 0;
    const char *a, *b, *next_a;  // of the present step; of the next one
    long row;                    // bytes from row to row of a
    bool on, fresh, last;
    bool coarse = false;  // whether weights have two parts only

    static constexpr long COLUMN = PANEL * 4;  // bytes of a row of b, and of the sums
    static constexpr long B_STEP = PARTS * TILE * COLUMN;
    static constexpr long K_STEP = PARTS == 1 ? 64 : PARTS * TWO_TILES;
    bool done() const { return k_blocks + v_blocks == 0; }
    ALWAYS_INLINE float* sums() const { return fresh ? s : o; }
    ALWAYS_INLINE void begin() {
        on = !done();
        if (!on) return;
        fresh = k_blocks != 0;
        if (fresh) {
            row = PARTS == 1 ? DKP * 2 : 64;
            a = k + at * K_STEP, b = q + at * B_STEP;
            last = at == DKP / TILE_K - 1;
            next_a = last && k_blocks == 1 ? v : a + K_STEP;
            if (at) return;
            tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        } else {
            row = 64;
            a = v + at * (V_BLOCK * 2), b = p + at * B_STEP;
            last = at == v_steps - 1;
            next_a = !last ? a + V_BLOCK * 2 : v_blocks == 1 ? after : v + PARTS * TWO_TILES;
            if (at) return;
            tile_load<0>(o, COLUMN), tile_load<1>(o + TILE, COLUMN);
            tile_load<2>(o + TILE * PANEL, COLUMN), tile_load<3>(o + TILE * PANEL + TILE, COLUMN);
        }
    }
    ALWAYS_INLINE void rows(int n) const {
        tile_load<4>(a + n * TWO_TILES, row), tile_load<5>(a + n * TWO_TILES + TILE * row, row);
    }
    ALWAYS_INLINE void columns(int n) const {
        const char* at = b + n * (TILE * COLUMN);
        tile_load<6>(at, COLUMN), tile_load<7>(at + 64, COLUMN);
    }
    ALWAYS_INLINE void unit(int n) const {
        if (PARTS > 1 && n >= 16 && n < 20 && !fresh && coarse) return;  // the third of the weights
        load_parts(n, [&](int part) INLINE_LAMBDA { rows(part); },
                   [&](int part) INLINE_LAMBDA { columns(part); });
        if (PARTS > 1)
            UNROLL for (int i = 0; i < 4; ++i) __builtin_prefetch(next_a + (4 * n + i) * 64);
        multiply_unit(n);
    }
    // The share of a slot, when a step is spread over `slots` of them.
    ALWAYS_INLINE void slot(int at, int slots) const {
        if (!on) return;
        UNROLL for (int n = 0; n < UNITS; ++n)
            if (n >= UNITS * at / slots && n < UNITS * (at + 1) / slots) unit(n);
    }
    ALWAYS_INLINE void end() {
        if (!on) return;
        ++at;
        if (!last) return;
        float* c = sums();
        tile_store<0>(c, COLUMN), tile_store<1>(c + TILE, COLUMN);
        tile_store<2>(c + TILE * PANEL, COLUMN), tile_store<3>(c + TILE * PANEL + TILE, COLUMN);
        at = 0;
        if (fresh)
            k += K_BLOCK * 2, s += 2 * TILE * PANEL, --k_blocks;
        else
            v += PARTS * TWO_TILES, o += 2 * TILE * PANEL, --v_blocks;
    }
    ALWAYS_INLINE void step() {
        begin();
        slot(0, 1);
        end();
    }
    __attribute__((noinline)) void finish() {
        while (!done()) step();
    }
};
// One step, or more, goes with every GROUP rows of a tile, so that they end with its rows.
constexpr int STEPS = (DKP + DVP) / TILE_K;  // of 32 rows
constexpr int GROUP = STEPS <= 4 ? 8 : STEPS <= 8 ? 4 : 2, EACH = (STEPS * GROUP + 31) / 32;

}  // namespace
