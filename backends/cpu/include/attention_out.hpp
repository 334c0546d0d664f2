// The results of a task of a forward kernel, from its sums. See attention.hpp.
#pragma once
#include "attention.hpp"

// x.O are sums over keys, x.l sums of weights, both in units of exp(x.m) 2^-x.UNIT.
template <class State>
static inline void write_out(const Call& c, const Task& t, State& x) {
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        long row = (t.b * c.H + t.h) * c.M + t.row + p * PANEL;
        alignas(64) float lse[PANEL], top[PANEL];
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf l = x.l[p][v], m = x.m[p][v];
            vf inverse = SIGMOID ? splat(1.0f) : select(l == 0.0f, vf{}, 1.0f / l);
            for (int d = 0; d < DV; ++d)
                store(x.O[p][d] + v * LANES, load(x.O[p][d] + v * LANES) * inverse);
            vf sum = select(l == 0.0f, splat(-INF), m + (log2_(l) + x.UNIT - rest_of(m)) * LN2);
            sum = select(l == l, sum, l);
            store(lse + v * LANES, SIGMOID ? vf{} : sum);
            store(top + v * LANES, x.largest(p, v));
        }
        for (int r = 0; r < n; ++r) c.lse[row + r] = lse[r];
        if (c.top)
            for (int r = 0; r < n; ++r) c.top[row + r] = top[r];
        transpose_out(n, DV, x.O[p][0], (long)PANEL, c.out + row * DV, (long)DV);
    }
}
