// Block-sparse attention, forward: out and log-sum-exp. See attention.hpp.
#pragma once
#include "attention_out.hpp"

namespace {

struct State {
    alignas(64) float Q[PANELS][DK][PANEL];  // with PAIRS the pairs lie in its first half
    alignas(64) float O[PANELS][DV][PANEL];
    alignas(64) float S[KROWS][PANEL];
    alignas(64) pair P[PAIRS ? (KROWS + 1) / 2 : 1][PANEL];
    Mask mask;
    Rows rows;
    vf factor[PANELS][PANEL_VECTORS], m[PANELS][PANEL_VECTORS], l[PANELS][PANEL_VECTORS];
    static constexpr float UNIT = 0.0f;
    vf largest(int p, int v) const { return m[p][v]; }
};

using ready_t = std::conditional_t<PAIRS, pair, float>;
constexpr long K_ROW = PAIRS ? DK / 2 : DK;

static inline void load_queries(const Call& c, const Task& t, float scale, float cap, State& x) {
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        const io_t* q = c.q + t.b * c.q_b + t.h * c.q_h + (t.row + p * PANEL) * c.q_m;
        row_factors(c, t, p, scale, cap, x.factor[p]);
        if (n < PANEL) memset(x.Q[p], 0, sizeof x.Q[p]);
        memset(x.O[p], 0, sizeof x.O[p]);
        if constexpr (PAIRS) {
            transpose_pairs(n, DK, (const bf16*)q, c.q_m, (pair*)x.Q[p], (long)PANEL);
        } else {
            transpose_in(n, DK, q, c.q_m, x.Q[p][0], (long)PANEL);
            for (int d = 0; d < DK; ++d)
                UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
                    store(x.Q[p][d] + v * LANES, load(x.Q[p][d] + v * LANES) * x.factor[p][v]);
        }
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            x.m[p][v] = splat(HAS_SINKS ? c.sinks[t.h] : -INF);
            x.l[p][v] = HAS_SINKS ? exp2_neg(rest_of(x.m[p][v])) : vf{};
        }
    }
}

// S = K Q^T with masked scores at -inf, and the largest score of every query.
template <bool MASKED>
static inline void scores(const Call& c, const Task& t, int p, int j0, Part part, float cap,
                          const ready_t* k, State& x, vf* top) {
    using q_t = const std::conditional_t<PAIRS, pair, float>;
    vf best[PANEL_VECTORS];  // local, so that it stays in registers
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) best[v] = splat(-INF);
    auto settle = [&](int r, int v, vf s) INLINE_LAMBDA {
        if constexpr (MASKED) s = select(x.mask.at[part.first + r][v], s, splat(-INF));
        if constexpr (!SIGMOID) best[v] = vmax(s, best[v]);  // in this order a NaN is dropped
        store(x.S[r] + v * LANES, s);
    };
    gemm_tiles<PANEL_VECTORS>(part.rows, (int)K_ROW, k, K_ROW, 1L, (q_t*)x.Q[p], (long)PANEL,
                              [&](int r, int v, vf s) INLINE_LAMBDA {
                                  if constexpr (PAIRS) s *= x.factor[p][v];
                                  if constexpr (HOOKED)
                                      store(x.S[r] + v * LANES, s);
                                  else
                                      settle(r, v, s);
                              });
    if constexpr (HOOKED) {
        adjust<false>(c, t, p, j0 + part.first, part.rows, cap, x.S, nullptr);
        for (int r = 0; r < part.rows; ++r)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
                settle(r, v, load(x.S[r] + v * LANES));
    }
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) top[v] = best[v];
}

// Scores to weights, in place (or to pairs). The factor by which what is there already shrinks.
static inline void weigh(int p, Part part, const vf* top, State& x, vf* shrink) {
    const int rows = part.rows;
    const bool keep = !PAIRS || part.masked;  // hidden values that are not finite need them
    vf base[PANEL_VECTORS], sum[PANEL_VECTORS];
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        shrink[v] = splat(1.0f);
        if constexpr (!SIGMOID) {
            vf m = vmax(x.m[p][v], top[v]);
            base[v] = base_of(m);
            shrink[v] = exp2_neg(select(x.m[p][v] == -INF, x.m[p][v], base_of(x.m[p][v]) - base[v]));
            x.m[p][v] = m;
            sum[v] = x.l[p][v] * shrink[v];
        }
    }
    auto weight = [&](int r, int v) INLINE_LAMBDA {
        vf s = load(x.S[r] + v * LANES);
        if constexpr (SIGMOID) return sigmoid_(s);
        return exp2_neg(s * LOG2E - base[v]);
    };
    int r = 0;
    for (; r + 1 < rows; r += 2)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf a = weight(r, v), b = weight(r + 1, v);
            if constexpr (!SIGMOID) sum[v] += a + b;
            if constexpr (PAIRS) store((int32_t*)x.P[r / 2] + v * LANES, make_pairs(a, b));
            if (!keep) continue;
            store(x.S[r] + v * LANES, a);
            store(x.S[r + 1] + v * LANES, b);
        }
    if (r < rows) UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf a = weight(r, v);
            if constexpr (!SIGMOID) sum[v] += a;
            if constexpr (PAIRS) store((int32_t*)x.P[r / 2] + v * LANES, make_pairs(a, vf{}));
            store(x.S[r] + v * LANES, a);
        }
    if constexpr (!SIGMOID) UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) x.l[p][v] = sum[v];
}

static inline void add_values(int p, int rows, const ready_t* v_rows, State& x, const vf* shrink) {
    using p_t = const std::conditional_t<PAIRS, pair, float>;
    p_t* weights = PAIRS ? (p_t*)x.P[0] : (p_t*)x.S[0];
    vf f[PANEL_VECTORS];
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) f[v] = shrink[v];
    float(*O)[PANEL] = x.O[p];
    gemm_onto<PANEL_VECTORS>(
        DV, PAIRS ? (rows + 1) / 2 : rows, v_rows, 1L, (long)DV, weights, (long)PANEL,
        [=](int d, int v) INLINE_LAMBDA { return load(O[d] + v * LANES) * f[v]; },
        [=](int d, int v, vf s) INLINE_LAMBDA { store(O[d] + v * LANES, s); });
}

static inline float value_at(const float* v_rows, int j, int d) { return v_rows[(long)j * DV + d]; }
static inline float value_at(const pair* v_rows, int j, int d) {
    return to_float(bf16{(uint16_t)(v_rows[(long)(j / 2) * DV + d].bits >> (j % 2 * 16))});
}

// A weight of 0 would still turn a NaN or an infinity of a hidden value into a NaN: keys one by
// one, hidden ones left out.
static inline void add_visible_values(int p, Part part, const ready_t* v_rows, State& x,
                                      const vf* shrink) {
    for (int d = 0; d < DV; ++d)
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf o = load(x.O[p][d] + v * LANES) * shrink[v];
            for (int r = 0; r < part.rows; ++r) {
                vf term = load(x.S[r] + v * LANES) * splat(value_at(v_rows, r, d));
                o += select(x.mask.at[part.first + r][v], term, vf{});
            }
            store(x.O[p][d] + v * LANES, o);
        }
}

static inline bool finite(const float* v_rows, int n) {
    long i = 0, count = (long)n * DV;
    vf bad{};
    for (; i + LANES <= count; i += LANES) bad += load(v_rows + i) - load(v_rows + i);
    float sum = sum_lanes(bad);
    for (; i < count; ++i) sum += v_rows[i] - v_rows[i];
    return sum == 0.0f;
}
static inline bool finite(const pair* v_rows, int n) {
    int bad = 0;
    for (long i = 0; i < (long)((n + 1) / 2) * DV; ++i) {
        int32_t x = v_rows[i].bits;
        bad |= ((x & 0x7f80) == 0x7f80) | ((x & 0x7f800000) == 0x7f800000);
    }
    return !bad;
}

static void run(const Call& c, const Task& t, float scale, float cap) {
    State x;
    x.rows.fill(c, t);
    load_queries(c, t, scale, cap, x);
    const ready_t* k = (const ready_t*)c.k_ready + t.b * c.kr_b + t.kv * c.kr_h;
    const ready_t* v = (const ready_t*)c.v_ready + t.b * c.vr_b + t.kv * c.vr_h;
    walk(c, t, x.rows, [&](int j0, int n, bool full) {
        int clean = -1;  // whether all values of the tile are finite, once it is known
        for (int p = 0; p * PANEL < t.rows; ++p) {
            Part part{0, n, false};
            if (!full) part = x.mask.fill(c, t, x.rows, p, j0, n);
            if (part.rows == 0) continue;
            const ready_t* keys = k + (long)(j0 + part.first) * K_ROW;
            const ready_t* values = v + (long)(j0 + part.first) / (PAIRS ? 2 : 1) * DV;
            vf top[PANEL_VECTORS], shrink[PANEL_VECTORS];
            if (part.masked)
                scores<true>(c, t, p, j0, part, cap, keys, x, top);
            else
                scores<false>(c, t, p, j0, part, cap, keys, x, top);
            weigh(p, part, top, x, shrink);
            if (part.masked && clean < 0)
                clean = finite(v + (long)j0 / (PAIRS ? 2 : 1) * DV, n);
            if (part.masked && !clean)
                add_visible_values(p, part, values, x, shrink);
            else
                add_values(p, part.rows, values, x, shrink);
        }
    });
    write_out(c, t, x);
}

}  // namespace

EXPORT void forward(const Call* call, float scale, float cap) {
    const Call& c = *call;
#pragma omp parallel num_threads((int)c.threads)
    {
        if constexpr (PAIRS) {
            if (c.pack_k) make_ready<DK>(c, c.k, c.k_b, c.k_h, c.k_n, (io_t*)c.k_ready);
            const long chunk = 256, chunks = (c.N + chunk - 1) / chunk;
#pragma omp for schedule(static)
            for (long x = 0; x < c.B * c.Hkv * chunks; ++x) {
                long n0 = x % chunks * chunk, h = x / chunks % c.Hkv, b = x / chunks / c.Hkv;
                int n = (int)(c.N - n0 < chunk ? c.N - n0 : chunk);
                interleave_rows(n, DV, (const bf16*)c.v + b * c.v_b + h * c.v_h + n0 * c.v_n, c.v_n,
                                (pair*)c.v_ready + b * c.vr_b + h * c.vr_h + n0 / 2 * DV);
            }
        } else {
            if (c.pack_k) make_ready<DK>(c, c.k, c.k_b, c.k_h, c.k_n, (float*)c.k_ready);
            if (c.pack_v) make_ready<DV>(c, c.v, c.v_b, c.v_h, c.v_n, (float*)c.v_ready);
        }
#pragma omp for schedule(dynamic, 1)
        for (long x = 0; x < task_count(c); ++x) run(c, task_at(c, x), scale, cap);
    }
}
