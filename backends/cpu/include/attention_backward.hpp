// Block-sparse attention, backward. See attention.hpp.
//
// A unit of work is a slice of the tasks of one (batch row, KV head); it adds the gradients of keys
// and values to buffers of its own, which are summed at the end. Scores are computed again:
//     P = exp(S - lse),  dP = V dO^T,  dS = P (dP - delta),  delta = sum_d dO O
//     dQ += K^T dS,  dK += dS^T Q,  dV += P^T dO          (P, S transposed throughout)
#pragma once
#include "attention.hpp"

// Every field has 8 bytes; the order is that of `block_sparse.py`.
struct Grads {
    const io_t* grad_out;
    long go_b, go_h, go_m;
    io_t *dq, *dk, *dv;          // contiguous
    float *delta, *temperature;  // (B, H, M)
    float* slopes;               // (B, H, tasks of a head)
    float* bias;                 // (1 | B, 1 | H, M, N), zeros
    long bias_b, bias_h, bias_shared;
    float *sum_k, *sum_v;  // (B, Hkv, slices, N, D); dk and dv themselves if `direct`
    long slices, direct;
};

namespace {

struct State {
    alignas(64) float Q[PANELS][DK][PANEL], G[PANELS][DV][PANEL];  // queries and dO, transposed
    alignas(64) float q_rows[QROWS][DK], g_rows[QROWS][DV];
    alignas(64) float dQ[PANELS][DK][PANEL];
    alignas(64) float P[KROWS][QROWS], D[KROWS][QROWS];
    alignas(64) float slope_of_cap[HAS_SOFTCAP ? KROWS : 1][PANEL];
    Mask mask;
    Rows rows;
    vf lse[PANELS][PANEL_VECTORS], delta[PANELS][PANEL_VECTORS];
    alignas(64) float scale[QROWS];  // of the dot products, natural units
    double slope;
};

static inline void load_rows(const Call& c, const Grads& g, const Task& t, float scale, float cap,
                             State& x) {
    memset(x.Q, 0, sizeof x.Q);
    memset(x.G, 0, sizeof x.G);
    memset(x.dQ, 0, sizeof x.dQ);
    memset(x.q_rows, 0, sizeof x.q_rows);
    memset(x.g_rows, 0, sizeof x.g_rows);
    x.slope = 0.0;
    const io_t* q = c.q + t.b * c.q_b + t.h * c.q_h + t.row * c.q_m;
    const io_t* go = g.grad_out + t.b * g.go_b + t.h * g.go_h + t.row * g.go_m;
    long first = (t.b * c.H + t.h) * c.M + t.row;
    const io_t* out = c.out + first * DV;
    copy_rows(t.rows, DK, q, c.q_m, x.q_rows[0], (long)DK);
    copy_rows(t.rows, DV, go, g.go_m, x.g_rows[0], (long)DV);
    alignas(64) float lse[QROWS], delta[QROWS];
    for (int r = 0; r < QROWS; ++r) {
        bool inside = r < t.rows;
        float f = scale;
        if (HAS_TEMPERATURE && inside) f *= c.temperature[t.h * c.M + t.row + r];
        x.scale[r] = f;
        // A row that sees nothing has lse = -inf: with +inf its weights are 0.
        float l = inside && !SIGMOID ? c.lse[first + r] : INF;
        lse[r] = l == -INF ? INF : l * LOG2E;
        float sum = 0.0f;
        for (int d = 0; inside && d < DV; ++d) sum += x.g_rows[r][d] * to_float(out[r * DV + d]);
        delta[r] = sum;
        if (inside) g.delta[first + r] = sum;
    }
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        vf factor[PANEL_VECTORS];
        row_factors(c, t, p, scale, cap, factor);
        transpose_in(n, DK, x.q_rows[p * PANEL], (long)DK, x.Q[p][0], (long)PANEL);
        transpose_in(n, DV, x.g_rows[p * PANEL], (long)DV, x.G[p][0], (long)PANEL);
        for (int d = 0; d < DK; ++d)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
                store(x.Q[p][d] + v * LANES, load(x.Q[p][d] + v * LANES) * factor[v]);
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            x.lse[p][v] = load(lse + p * PANEL + v * LANES);
            x.delta[p][v] = load(delta + p * PANEL + v * LANES);
        }
    }
    for (int r = 0; r < t.rows; ++r)
        for (int d = 0; d < DK; ++d) x.q_rows[r][d] *= x.scale[r];
}

// Gradients of slopes and bias from those of the scores, then through the soft cap.
static inline void hooks(const Call& c, const Grads& g, const Task& t, int p, int j0, Part part,
                         State& x) {
    float* D = x.D[part.first] + p * PANEL;
    if constexpr (HAS_SLOPES) {
        vf sum{};
        for (int r = 0; r < part.rows; ++r)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
                vi i = splat((int32_t)(t.row + p * PANEL + v * LANES + c.offset)) + iota();
                vf far = __builtin_convertvector(i - (j0 + part.first + r), vf);
                sum += far * load(D + r * QROWS + v * LANES);
            }
        x.slope -= sum_lanes(sum);
    }
    if constexpr (HAS_BIAS) {
        alignas(64) float rows[PANEL][KROWS];
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        transpose_out(n, part.rows, D, (long)QROWS, rows[0], (long)KROWS);
        for (int r = 0; r < n; ++r) {
            float* to = g.bias + t.b * g.bias_b + t.h * g.bias_h +
                        (t.row + p * PANEL + r) * c.N + j0 + part.first;
            if (g.bias_shared) {
                for (int j = 0; j < part.rows; ++j) {
#pragma omp atomic
                    to[j] += rows[r][j];
                }
            } else {
                for (int j = 0; j < part.rows; ++j) to[j] += rows[r][j];
            }
        }
    }
    if constexpr (HAS_SOFTCAP)
        for (int r = 0; r < part.rows; ++r)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
                float* at = D + r * QROWS + v * LANES;
                store(at, load(at) * load(x.slope_of_cap[r] + v * LANES));
            }
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
    if constexpr (HOOKED) hooks(c, g, t, p, j0, part, x);
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

static inline void write_rows(const Call& c, const Grads& g, const Task& t, State& x) {
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        long row = (t.b * c.H + t.h) * c.M + t.row + p * PANEL;
        if constexpr (HAS_TEMPERATURE) {
            // q_rows carry the temperature, so the product with bare queries is taken anew.
            const io_t* q = c.q + t.b * c.q_b + t.h * c.q_h + (t.row + p * PANEL) * c.q_m;
            for (int r = 0; r < n; ++r) {
                float sum = 0.0f;
                for (int d = 0; d < DK; ++d) sum += to_float(q[r * c.q_m + d]) * x.dQ[p][d][r];
                g.temperature[row + r] = sum;
            }
        }
        for (int d = 0; d < DK; ++d)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
                store(x.dQ[p][d] + v * LANES,
                      load(x.dQ[p][d] + v * LANES) * load(x.scale + p * PANEL + v * LANES));
        transpose_out(n, DK, x.dQ[p][0], (long)PANEL, g.dq + row * DK, (long)DK);
    }
}

static void run(const Call& c, const Grads& g, const Task& t, float scale, float cap, float* dk,
                float* dv) {
    State x;
    x.rows.fill(c, t);
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
    if constexpr (HAS_SLOPES) {
        long per_row = (c.block_q + QROWS - 1) / QROWS;
        long at = t.schedule_row * per_row + (t.row - t.schedule_row * c.block_q) / QROWS;
        g.slopes[(t.b * c.H + t.h) * c.schedule_rows * per_row + at] = (float)x.slope;
    }
}

// Sums the slices of rows n0 ... and converts.
template <int D>
static inline void sum_slices(const Call& c, const Grads& g, long bh, long n0, long n,
                              const float* sums, io_t* out) {
    const float* first = sums + (bh * g.slices * c.N + n0) * D;
    io_t* to = out + (bh * c.N + n0) * D;
    for (long i = 0; i < n * D; ++i) {
        float sum = 0.0f;
        for (long s = 0; s < g.slices; ++s) sum += first[s * c.N * D + i];
        to[i] = from_float<io_t>(sum);
    }
}

}  // namespace

EXPORT void backward(const Call* call, const Grads* grads, float scale, float cap) {
    const Call& c = *call;
    const Grads& g = *grads;
    long group = c.H / c.Hkv, per_head = task_count(c) / (c.B * c.H);
#pragma omp parallel num_threads((int)c.threads)
    {
        if (c.pack_k) make_ready<DK>(c, c.k, c.k_b, c.k_h, c.k_n, (float*)c.k_ready);
        if (c.pack_v) make_ready<DV>(c, c.v, c.v_b, c.v_h, c.v_n, (float*)c.v_ready);
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < c.B * c.Hkv * g.slices; ++unit) {
            long slice = unit % g.slices, kv = unit / g.slices % c.Hkv;
            long b = unit / g.slices / c.Hkv;
            float* dk = g.sum_k + unit * c.N * DK;
            float* dv = g.sum_v + unit * c.N * DV;
            memset(dk, 0, sizeof(float) * c.N * DK);
            memset(dv, 0, sizeof(float) * c.N * DV);
            for (long x = slice; x < group * per_head; x += g.slices) {
                long head = b * c.H + kv * group + x / per_head;
                run(c, g, task_at(c, head * per_head + x % per_head), scale, cap, dk, dv);
            }
        }
        if (!g.direct) {
            const long chunk = 256, chunks = (c.N + chunk - 1) / chunk;
#pragma omp for schedule(static)
            for (long x = 0; x < c.B * c.Hkv * chunks; ++x) {
                long n0 = x % chunks * chunk, n = c.N - n0 < chunk ? c.N - n0 : chunk;
                sum_slices<DK>(c, g, x / chunks, n0, n, g.sum_k, g.dk);
                sum_slices<DV>(c, g, x / chunks, n0, n, g.sum_v, g.dv);
            }
        }
    }
}
