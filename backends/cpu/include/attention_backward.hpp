// Block-sparse attention, backward. See attention.hpp.
//
// A unit of work is a slice of the tasks of one (batch row, KV head); it adds the gradients of keys
// and values to buffers of its own, which are summed at the end. Scores are computed again:
//     P = exp(S - lse),  dP = V dO^T,  dS = P (dP - delta),  delta = sum_d dO O
//     dQ += K^T dS,  dK += dS^T Q,  dV += P^T dO          (P, S transposed throughout)
#pragma once
#include "attention_gradients.hpp"

namespace {

struct State : Sums {
    alignas(64) float Q[PANELS][DK][PANEL], G[PANELS][DV][PANEL];  // queries and dO, transposed
    alignas(64) float q_rows[QROWS][DK], g_rows[QROWS][DV];
    alignas(64) float P[KROWS][QROWS], D[KROWS][QROWS];
    Mask mask;
};

static inline void load_rows(const Call& c, const Grads& g, const Task& t, float scale, float cap,
                             State& x) {
    memset(x.Q, 0, sizeof x.Q);
    memset(x.G, 0, sizeof x.G);
    memset(x.q_rows, 0, sizeof x.q_rows);
    memset(x.g_rows, 0, sizeof x.g_rows);
    const io_t* q = c.q + t.b * c.q_b + t.h * c.q_h + t.row * c.q_m;
    const io_t* go = g.grad_out + t.b * g.go_b + t.h * g.go_h + t.row * g.go_m;
    copy_rows(t.rows, DK, q, c.q_m, x.q_rows[0], (long)DK);
    copy_rows(t.rows, DV, go, g.go_m, x.g_rows[0], (long)DV);
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        vf factor[PANEL_VECTORS];
        row_factors(c, t, p, scale, cap, factor);
        transpose_in(n, DK, x.q_rows[p * PANEL], (long)DK, x.Q[p][0], (long)PANEL);
        transpose_in(n, DV, x.g_rows[p * PANEL], (long)DV, x.G[p][0], (long)PANEL);
        for (int d = 0; d < DK; ++d)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
                store(x.Q[p][d] + v * LANES, load(x.Q[p][d] + v * LANES) * factor[v]);
    }
    for (int r = 0; r < t.rows; ++r)
        for (int d = 0; d < DK; ++d) x.q_rows[r][d] *= x.scale[r];
}

// P and dS of a panel, and its share of dQ.
static inline void panel(const Call& c, const Grads& g, const Task& t, int p, int j0, Part part,
                         float cap, const float* k, const float* v_rows, State& x) {
    float* P = x.P[part.first] + p * PANEL;
    float* D = x.D[part.first] + p * PANEL;
    if constexpr (HOOKED) {
        alignas(64) float S[KROWS][PANEL];
        gemm_tiles<PANEL_VECTORS>(
            part.rows, DK, k, (long)DK, 1L, (const float*)x.Q[p][0], (long)PANEL,
            [&](int r, int v, vf s) INLINE_LAMBDA { store(S[r] + v * LANES, s); });
        adjust<true>(c, t, p, j0 + part.first, part.rows, cap, S, x.slope_of_cap);
        for (int r = 0; r < part.rows; ++r)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
                store(P + r * QROWS + v * LANES, load(S[r] + v * LANES));
    } else {
        gemm_tiles<PANEL_VECTORS>(
            part.rows, DK, k, (long)DK, 1L, (const float*)x.Q[p][0], (long)PANEL,
            [=](int r, int v, vf s) INLINE_LAMBDA { store(P + r * QROWS + v * LANES, s); });
    }
    for (int r = 0; r < part.rows; ++r)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf s = load(P + r * QROWS + v * LANES), w;
            if constexpr (SIGMOID)
                w = sigmoid_(s);
            else
                w = exp2_neg(vmin(vf{}, s * LOG2E - x.lse[p][v]));  // in this order a NaN stays
            if (part.masked) w = select(x.mask.at[part.first + r][v], w, vf{});
            store(P + r * QROWS + v * LANES, w);
        }
    vf delta[PANEL_VECTORS];
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) delta[v] = x.delta[p][v];
    gemm_tiles<PANEL_VECTORS>(part.rows, DV, v_rows, (long)DV, 1L, (const float*)x.G[p][0],
                              (long)PANEL, [=](int r, int v, vf s) INLINE_LAMBDA {
                                  vf w = load(P + r * QROWS + v * LANES);
                                  s = SIGMOID ? s * (w - w * w) : w * (s - delta[v]);
                                  store(D + r * QROWS + v * LANES, s);
                              });
    if constexpr (HOOKED) hooks(c, g, t, p, j0, part, D, (long)QROWS, x);
    float(*dQ)[PANEL] = x.dQ[p];
    gemm_onto<PANEL_VECTORS>(
        DK, part.rows, k, 1L, (long)DK, (const float*)D, (long)QROWS,
        [=](int d, int v) INLINE_LAMBDA { return load(dQ[d] + v * LANES); },
        [=](int d, int v, vf s) INLINE_LAMBDA { store(dQ[d] + v * LANES, s); });
}

// sums[rows x D] += W^T X, with W (n queries) x (rows keys) kept transposed and X n x D.
template <int D>
static __attribute__((noinline)) void add_keys(int rows, int n, const float* W, const float* X,
                                               float* sums) {
    gemm<Mode::Add>(rows, D, n, W, (long)QROWS, 1L, X, (long)D, sums, (long)D);
}

static void run(const Call& c, const Grads& g, const Task& t, float scale, float cap, float* dk,
                float* dv) {
    State x;
    x.begin(c, g, t, scale);
    load_rows(c, g, t, scale, cap, x);
    const float* k = (const float*)c.k_ready + t.b * c.kr_b + t.kv * c.kr_h;
    const float* v = (const float*)c.v_ready + t.b * c.vr_b + t.kv * c.vr_h;
    walk(c, t, x.rows, [&](int j0, int n, bool full) {
        for (int p = 0; p * PANEL < t.rows; ++p) {
            Part part{0, n, false};
            if (!full) part = x.mask.fill(c, t, x.rows, p, j0, n);
            if (part.rows == 0) continue;
            long j = j0 + part.first;
            panel(c, g, t, p, j0, part, cap, k + j * DK, v + j * DV, x);
            if (full) continue;
            add_keys<DV>(part.rows, PANEL, x.P[part.first] + p * PANEL, x.g_rows[p * PANEL],
                         dv + j * DV);
            add_keys<DK>(part.rows, PANEL, x.D[part.first] + p * PANEL, x.q_rows[p * PANEL],
                         dk + j * DK);
        }
        if (!full) return;
        int used = (int)((t.rows + PANEL - 1) / PANEL * PANEL);
        add_keys<DV>(n, used, x.P[0], x.g_rows[0], dv + (long)j0 * DV);
        add_keys<DK>(n, used, x.D[0], x.q_rows[0], dk + (long)j0 * DK);
    });
    write_rows(c, g, t, x);
}

}  // namespace

// Whether the result is of use: it is, whatever the inputs are.
EXPORT int backward(const Call* call, const Grads* grads, float scale, float cap) {
    const Call& c = *call;
    const Grads& g = *grads;
#pragma omp parallel num_threads((int)c.threads)
    {
        if (c.pack_k) make_ready<DK>(c, c.k, c.k_b, c.k_h, c.k_n, (float*)c.k_ready);
        if (c.pack_v) make_ready<DV>(c, c.v, c.v_b, c.v_h, c.v_n, (float*)c.v_ready);
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < c.B * c.Hkv * g.slices; ++unit) {
            float* dk = g.sum_k + unit * c.N * DK;
            float* dv = g.sum_v + unit * c.N * DV;
            memset(dk, 0, sizeof(float) * c.N * DK);
            memset(dv, 0, sizeof(float) * c.N * DV);
            each_task(c, g, unit, [&](const Task& t) { run(c, g, t, scale, cap, dk, dv); });
        }
        if (!g.direct) {
            sum_slices<DK, DK>(c, g, c.N, g.sum_k, g.dk);
            sum_slices<DV, DV>(c, g, c.N, g.sum_v, g.dv);
        }
    }
    return 1;
}
