// A whole gated block on tiles: Y = (f(X G^T + c) * (X U^T + b)) D^T + d, hidden numbers in L2 only.
//
// A thread takes a band of rows of X as tiles. Its hidden numbers are written as the tiles that the
// last product reads; neither they nor sums go to memory. All three matrices are packed once for a
// call and come from the last-level cache for every band, 32 columns at a time: each such panel is
// fetched into L2 while the one before it is multiplied, and used in parts that stay in L1.
// Hidden numbers are rounded once, as they are written. bfloat16 only.
#pragma once
#include "linear_tiles.hpp"

constexpr long NEAR = 18;  // steps of a panel that stay in L1, 36 KB

// Rows of hidden numbers, from sums of both projections to tiles.
template <int F> struct Hidden {
    const Call& c;
    const float *up = nullptr, *gate = nullptr;
    char* to = nullptr;
    long n = 0;
    int next = BLOCK;

    ALWAYS_INLINE void row() {
        vf h[2];
        UNROLL for (int v = 0; v < 2; ++v) {
            const long first = n + v * TILE, left = c.N - first, at = next * BLOCK + v * TILE;
            vf g = load(gate + at), u = load(up + at);
            if (c.gate_bias) g += load_some(c.gate_bias + first, left);
            if (c.bias) u += load_some(c.bias + first, left);
            h[v] = activated<F>(g) * u;
        }
        store((float*)(to + next / TILE * 1024 + next % TILE * 64), in_order(h[0], h[1]));
        ++next;
    }
    ALWAYS_INLINE bool more() const { return next < BLOCK; }
};
// Rows of the output.
struct Output {
    const Call& c;
    Finished f{};
    ALWAYS_INLINE void row() { write_row<0>(c, f); }
    ALWAYS_INLINE bool more() const { return f.next < f.rows; }
};
// Lines that are wanted soon, some with every step.
struct Ahead {
    const char *at, *end;
    ALWAYS_INLINE void fetch(int lines) {
        for (int i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// 32 x 32 sums over some steps, as `sums_of`; rows of the block before are written meanwhile.
template <class Write>
static ALWAYS_INLINE void near_sums(const char* a, const char* b, long steps, float* c, bool first,
                                    Write& write, Ahead& ahead, int lines) {
    begin_sums(c, first);
    const int each = int((BLOCK + steps - 1) / steps);
    for (long s = 0; s < steps; ++s, a += STEP, b += STEP) {
        load_two_tiles<4>(a), load_two_tiles<6>(b), multiply_four();
        ahead.fetch(lines);
        for (int i = 0; i < each && write.more(); ++i) write.row();
    }
    while (write.more()) write.row();
    store_sums(c);
}

template <int F> static void gated_block(const Call& in, const Call& out) {
    const long in_steps = (in.K + TILE_K - 1) / TILE_K, in_panel = in_steps * STEP;
    const long out_steps = (out.K + TILE_K - 1) / TILE_K, out_panel = out_steps * STEP;
    const long panels = (out.N + BLOCK - 1) / BLOCK, band = in.band, blocks = band / BLOCK;
    const long bands = (in.M + band - 1) / band;
    const long own = blocks * (in_panel + out_panel) + 2 * band * BLOCK * 4;
#pragma omp parallel num_threads(in.threads)
    {
        Tiles session;
        char* first = (char*)in.scratch;                      // of every panel: up, gate
        char* last = first + out_steps * 2 * in_panel;
        char* x = last + panels * out_panel + omp_get_thread_num() * own;
        char* hidden = x + blocks * in_panel;
        float* sums = (float*)(hidden + blocks * out_panel);
#pragma omp for schedule(static) nowait
        for (long i = 0; i < 2 * out_steps; ++i)
            pack_columns(in, i % 2 ? in.gate : in.w, i / 2 * BLOCK, in_steps, first + i * in_panel);
#pragma omp for schedule(static)
        for (long i = 0; i < panels; ++i)
            pack_columns(out, out.w, i * BLOCK, out_steps, last + i * out_panel);
#pragma omp for schedule(dynamic, 1)
        for (long b = 0; b < bands; ++b) {
            const long m0 = b * band, end = in.M - m0 < band ? in.M - m0 : band;
            for (long m = 0; m < end; m += BLOCK)
                pack_rows(in, m0 + m, int(end - m < BLOCK ? end - m : BLOCK), in_steps,
                          x + m / BLOCK * in_panel);
            const int lines = int(NEAR * STEP / 64 * BLOCK / (NEAR * end)) + 1;
            auto part_of = [](long k, long steps) { return steps - k < NEAR ? steps - k : NEAR; };
            Hidden<F> rows{in};
            for (long i = 0; i < 2 * out_steps; ++i)
                for (long k = 0; k < in_steps; k += NEAR) {
                    const long some = part_of(k, in_steps);
                    const char* w = first + i * in_panel + k * STEP;
                    Ahead ahead{w + some * STEP, w + some * STEP + NEAR * STEP};
                    float* to = sums + i % 2 * band * BLOCK;
                    for (long m = 0; m < end; m += BLOCK) {
                        near_sums(x + m / BLOCK * in_panel + k * STEP, w, some, to + m * BLOCK,
                                  k == 0, rows, ahead, lines);
                        if (i % 2 && k + some == in_steps)
                            rows.up = sums + m * BLOCK, rows.gate = to + m * BLOCK, rows.next = 0,
                            rows.to = hidden + m / BLOCK * out_panel + i / 2 * STEP,
                            rows.n = i / 2 * BLOCK;
                    }
                }
            while (rows.more()) rows.row();
            Output done{out};
            for (long i = 0; i < panels; ++i)
                for (long k = 0; k < out_steps; k += NEAR) {
                    const long some = part_of(k, out_steps);
                    const char* w = last + i * out_panel + k * STEP;
                    Ahead ahead{w + some * STEP, w + some * STEP + NEAR * STEP};
                    for (long m = 0; m < end; m += BLOCK) {
                        near_sums(hidden + m / BLOCK * out_panel + k * STEP, w, some,
                                  sums + m * BLOCK, k == 0, done, ahead, lines);
                        if (k + some == out_steps)
                            done.f = {sums + m * BLOCK, nullptr, m0 + m, i * BLOCK,
                                      int(end - m < BLOCK ? end - m : BLOCK), 0};
                    }
                }
            while (done.more()) done.row();
        }
    }
}

EXPORT void gated_tiles(const Call* calls) {
    switch (calls[0].gated) {
    case 1: return gated_block<1>(calls[0], calls[1]);
    case 2: return gated_block<2>(calls[0], calls[1]);
    case 3: return gated_block<3>(calls[0], calls[1]);
    case 4: return gated_block<4>(calls[0], calls[1]);
    default: return gated_block<5>(calls[0], calls[1]);
    }
}
