// What the backward kernels of block-sparse attention share: gradients of the rows of a task and of
// hooks, sums over slices. See attention_backward.hpp.
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

constexpr int DQ_ROWS = (DK + 31) / 32 * 32;  // whole tiles

// What belongs to the rows of a task.
struct Sums {
    alignas(64) float dQ[PANELS][DQ_ROWS][PANEL];  // transposed
    alignas(64) float slope_of_cap[HAS_SOFTCAP ? KROWS : 1][PANEL];
    Rows rows;
    vf lse[PANELS][PANEL_VECTORS], delta[PANELS][PANEL_VECTORS];
    alignas(64) float scale[QROWS];  // of the dot products, natural units
    double slope;

    void begin(const Call& c, const Grads& g, const Task& t, float factor);
};

template <int D> static inline float dot(const io_t* a, const io_t* b) {
    vf sum{};
    int d = 0;
    for (; d + LANES <= D; d += LANES) sum += load(a + d) * load(b + d);
    if (d < D) sum += load_part(a + d, D - d) * load_part(b + d, D - d);
    return sum_lanes(sum);
}

void Sums::begin(const Call& c, const Grads& g, const Task& t, float factor) {
    rows.fill(c, t);
    memset(dQ, 0, sizeof dQ);
    slope = 0.0;
    const io_t* go = g.grad_out + t.b * g.go_b + t.h * g.go_h + t.row * g.go_m;
    long first = (t.b * c.H + t.h) * c.M + t.row;
    alignas(64) float logs[QROWS], deltas[QROWS];
    for (int r = 0; r < QROWS; ++r) {
        bool inside = r < t.rows;
        float f = factor;
        if (HAS_TEMPERATURE && inside) f *= c.temperature[t.h * c.M + t.row + r];
        scale[r] = f;
        // A row that sees nothing has lse = -inf: with +inf its weights are 0.
        float l = inside && !SIGMOID ? c.lse[first + r] : INF;
        logs[r] = l == -INF ? INF : l * LOG2E;
        deltas[r] = inside ? dot<DV>(go + r * g.go_m, c.out + (first + r) * DV) : 0.0f;
        if (inside) g.delta[first + r] = deltas[r];
    }
    for (int p = 0; p < PANELS; ++p)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            lse[p][v] = load(logs + p * PANEL + v * LANES);
            delta[p][v] = load(deltas + p * PANEL + v * LANES);
        }
}

// Gradients of slopes and bias from those of the scores D, then through the soft cap.
static inline void hooks(const Call& c, const Grads& g, const Task& t, int p, int j0, Part part,
                         float* D, long ld, Sums& x) {
    if constexpr (HAS_SLOPES) {
        vf sum{};
        for (int r = 0; r < part.rows; ++r)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
                vi i = splat((int32_t)(t.row + p * PANEL + v * LANES + c.offset)) + iota();
                vf far = __builtin_convertvector(i - (j0 + part.first + r), vf);
                sum += far * load(D + r * ld + v * LANES);
            }
        x.slope -= sum_lanes(sum);
    }
    if constexpr (HAS_BIAS) {
        alignas(64) float rows[PANEL][KROWS];
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        transpose_out(n, part.rows, D, ld, rows[0], (long)KROWS);
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
                float* at = D + r * ld + v * LANES;
                store(at, load(at) * load(x.slope_of_cap[r] + v * LANES));
            }
}

// Gradients of the queries, and what else belongs to the rows of a task.
static inline void write_rows(const Call& c, const Grads& g, const Task& t, Sums& x) {
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
    if constexpr (HAS_SLOPES) {
        long per_row = (c.block_q + QROWS - 1) / QROWS;
        long at = t.schedule_row * per_row + (t.row - t.schedule_row * c.block_q) / QROWS;
        g.slopes[(t.b * c.H + t.h) * c.schedule_rows * per_row + at] = (float)x.slope;
    }
}

// Sums the slices, `rows` rows of LD numbers each, and converts. Call inside a parallel region.
template <int D, int LD>
static inline void sum_slices(const Call& c, const Grads& g, long rows, const float* sums,
                              io_t* out) {
    const long chunk = 256, chunks = (c.N + chunk - 1) / chunk;
#pragma omp for schedule(static)
    for (long x = 0; x < c.B * c.Hkv * chunks; ++x) {
        const long bh = x / chunks, n0 = x % chunks * chunk;
        const long end = c.N < n0 + chunk ? c.N : n0 + chunk;
        for (long n = n0; n < end; ++n) {
            const float* first = sums + (bh * g.slices * rows + n) * LD;
            io_t* to = out + (bh * c.N + n) * D;
            int d = 0;
            for (; d + LANES <= D; d += LANES) {
                vf sum{};
                for (long s = 0; s < g.slices; ++s) sum += load(first + s * rows * LD + d);
                store(to + d, sum);
            }
            for (; d < D; ++d) {
                float sum = 0.0f;
                for (long s = 0; s < g.slices; ++s) sum += first[s * rows * LD + d];
                to[d] = from_float<io_t>(sum);
            }
        }
    }
}

// The tasks of a unit of work: a slice of those of a (batch row, KV head).
template <class Run> static inline void each_task(const Call& c, const Grads& g, long unit, Run run) {
    const long group = c.H / c.Hkv, per_head = task_count(c) / (c.B * c.H);
    const long first = unit / g.slices * group * per_head;
    for (long x = unit % g.slices; x < group * per_head; x += g.slices)
        run(task_at(c, first + x));
}

}  // namespace
