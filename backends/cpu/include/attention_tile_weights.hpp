// From dot products to weights on vectors, beside the work of the tile registers. See
// attention_tiles.hpp.
#pragma once
#include "attention_tile_queue.hpp"

namespace {

// Weights are kept as exp(s - m) 2^-HEAD_BITS, so none exceeds 1 as long as no score exceeds m by
// more than HEADROOM < HEAD_BITS ln 2. Only beyond that m moves and sums shrink, which is seldom
// after the first keys. A power of two, so that the weight of m itself is exact in bf16.
constexpr float HEAD_BITS = 3.0f, HEADROOM = 2.0f;
static ALWAYS_INLINE vf exponent_of(vf m) { return base_of(m) + HEAD_BITS; }

// A float32 weight is cut to two parts where errors of single weights average out: where the weights
// of every row add up to SPREAD times exp(m), or are on the way to it, given the keys that are still
// to come, and to SURE times already. What they are divided by is the sum of the cut weights.
constexpr float SPREAD = 64.0f, SURE = 8.0f;
constexpr bool MAY_CUT = PARTS > 1 && !SIGMOID;

struct State {
    alignas(64) Queries Q[PANELS];
    alignas(64) float O[PANELS][DVP][PANEL];
    alignas(64) float S[2][KROWS][PANEL];
    alignas(64) pair P[2][KROWS / TILE_K][PARTS][TILE][PANEL];
    Mask mask[2];
    bool odd_queries[PANELS];  // some are not finite
    Rows rows;
    // m: what weights refer to (HEAD_BITS); top: the largest score.
    vf factor[PANELS][PANEL_VECTORS], m[PANELS][PANEL_VECTORS], l[PANELS][PANEL_VECTORS];
    vf top[PANELS][PANEL_VECTORS];
    long keys, seen[PANELS];  // that all rows of the task see; that a panel has seen
    static constexpr float UNIT = SIGMOID ? 0.0f : HEAD_BITS;
    vf largest(int p, int v) const { return top[p][v]; }
};

// A panel of queries against up to KROWS keys. Three of them are under way at a time: while the
// weights of one are made, the multiplier takes the products of the next with the keys and those
// of the one before with the values.
struct Item {
    int p, j0;
    Part part;
    bool plain_keys, plain_values;  // one by one, in float32
    int turn;                       // which of the two buffers
    bool coarse;                    // weights of two parts
};

static inline void load_queries(const Call& c, const Task& t, float scale, float cap, State& x) {
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        const io_t* q = c.q + t.b * c.q_b + t.h * c.q_h + (t.row + p * PANEL) * c.q_m;
        row_factors(c, t, p, scale, cap, x.factor[p]);
        memset(x.O[p], 0, sizeof x.O[p]);
        x.seen[p] = 0;
        x.odd_queries[p] = pack_queries(n, q, c.q_m, x.Q[p]);
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            // A factor that is not positive moves into the queries: then the largest product is the
            // largest score, and a hidden one stays hidden.
            vi turn = x.factor[p][v] < 0.0f, drop = x.factor[p][v] == 0.0f;
            if (any(turn | drop)) {
                for (int d = 0; d < PARTS * DKP / 2; ++d) {
                    int32_t* at = (int32_t*)x.Q[p][0][0][d] + v * LANES;
                    store(at, (load(at) ^ (turn & (int32_t)0x80008000)) & ~drop);
                }
                x.factor[p][v] = select(drop, splat(1.0f), vabs(x.factor[p][v]));
            }
            x.m[p][v] = splat(HAS_SINKS ? c.sinks[t.h] : -INF);
            x.l[p][v] = HAS_SINKS ? exp2_neg(rest_of(x.m[p][v]) - HEAD_BITS) : vf{};
            x.top[p][v] = x.m[p][v];
        }
    }
}

// Scores where they are more than factor times product, -inf where hidden; and the largest.
template <bool MASKED>
static inline void settle(const Call& c, const Task& t, const Item& i, float cap, State& x,
                          vf* top, Queue& queue) {
    float(*S)[PANEL] = x.S[i.turn];
    const Part part = i.part;
    constexpr int CHAINS = 4;  // maxima take a few cycles each
    vf best[CHAINS][PANEL_VECTORS];
    UNROLL for (int k = 0; k < CHAINS; ++k)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) best[k][v] = splat(-INF);
    if constexpr (HOOKED) {
        for (int r = 0; r < part.rows; ++r)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
                store(S[r] + v * LANES, load(S[r] + v * LANES) * x.factor[i.p][v]);
        adjust<false>(c, t, i.p, i.j0 + part.first, part.rows, cap, S, nullptr);
    }
    auto row = [&](int r, int k) INLINE_LAMBDA {
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf s = load(S[r] + v * LANES);
            if constexpr (MASKED) {
                s = select(x.mask[i.turn].at[part.first + r][v], s, splat(-INF));
                store(S[r] + v * LANES, s);
            }
            if constexpr (!SIGMOID) best[k][v] = vmax(s, best[k][v]);  // so a NaN is dropped
        }
    };
    int r = 0;
    for (; r + 16 * CHAINS <= part.rows; r += 16 * CHAINS) {
        queue.begin();
        UNROLL for (int i = 0; i < 16; ++i) {
            queue.slot(i, 16);
            UNROLL for (int k = 0; k < CHAINS; ++k) row(r + i * CHAINS + k, k);
            pin(best[0][0]);
        }
        queue.end();
    }
    for (; r + CHAINS <= part.rows; r += CHAINS)
        UNROLL for (int k = 0; k < CHAINS; ++k) row(r + k, k);
    for (; r < part.rows; ++r) row(r, 0);
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        vf most = vmax(vmax(best[0][v], best[1][v]), vmax(best[2][v], best[3][v]));
        top[v] = HOOKED ? most : most * x.factor[i.p][v];
    }
}

// Two rows of weights, none negative, as pairs. Three parts are cut, not rounded: that is enough
// beside rounded parts of V, and takes less time. Two are rounded, and become the weights.
template <bool COARSE>
static ALWAYS_INLINE void store_weights(pair (*P)[PARTS][TILE][PANEL], int row, int v, vf& a, vf& b) {
    int32_t* to = (int32_t*)P[row / TILE][0][row % TILE] + v * LANES;
    if constexpr (PARTS == 1) {
        store(to, make_pairs(a, b));
        return;
    }
    const int32_t high = (int32_t)0xffff0000, half = COARSE ? 0x8000 : 0;
    vf rest_a = a, rest_b = b;
    UNROLL for (int part = 0; part < (COARSE ? 2 : PARTS); ++part) {
        vi x = ((vi)rest_a + half) & high, y = ((vi)rest_b + half) & high;
        store(to + part * (TILE * PANEL), (vi)((vu)x >> 16) | y);
        rest_a -= (vf)x, rest_b -= (vf)y;
        if (COARSE && part == 0) a = (vf)x, b = (vf)y;
        if (COARSE && part > 0) a += (vf)x, b += (vf)y;
    }
}

// Whether the weights of all rows of a panel are spread over many keys.
static inline bool spread(int p, const State& x) {
    if (!MAY_CUT) return false;
    const float share = x.seen[p] < x.keys ? (float)x.seen[p] / (float)x.keys : 1.0f;
    const float least = SPREAD * share > SURE ? SPREAD * share : SURE;
    vi few{};
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
        few |= (vi)(x.l[p][v] < least / (1 << (int)HEAD_BITS));
    return !any(few);
}

// Takes the largest scores of an item into account: by how much what is there shrinks.
static inline void move_largest(int p, const vf* top, vf* shrink, State& x) {
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        shrink[v] = splat(1.0f);
        if constexpr (SIGMOID) continue;
        vf old = x.m[p][v], m = select(top[v] > old + HEADROOM, top[v], old);
        shrink[v] = exp2_neg(select(old == -INF, old, base_of(old) - base_of(m)));
        x.top[p][v] = vmax(x.top[p][v], top[v]);
        x.m[p][v] = m;
        x.l[p][v] *= shrink[v];
    }
}

// Scores to pairs of weights, and with KEEP also to weights in place, while the multiplier works.
template <bool KEEP, bool COARSE>
static inline void weigh(const Item& i, State& x, Queue& queue) {
    const int p = i.p, rows = i.part.rows;
    float(*S)[PANEL] = x.S[i.turn];
    pair(*P)[PARTS][TILE][PANEL] = x.P[i.turn];
    vf base[PANEL_VECTORS], sum[PANEL_VECTORS], slope[PANEL_VECTORS];
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        slope[v] = HOOKED ? splat(1.0f) : x.factor[p][v];
        if constexpr (SIGMOID) continue;
        slope[v] *= LOG2E;
        base[v] = exponent_of(x.m[p][v]);
        sum[v] = x.l[p][v];
    }
    auto weight = [&](int r, int v) INLINE_LAMBDA {
        vf s = load(S[r] + v * LANES);
        if constexpr (SIGMOID) return sigmoid_(s * slope[v]);
        if constexpr (PARTS == 1) return exp2_rough(s * slope[v] - base[v]);
        return exp2_neg(s * slope[v] - base[v]);
    };
    auto two = [&](int r, auto slot) INLINE_LAMBDA {
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            slot(3 * v);
            vf a = weight(r, v);
            pin(a);
            slot(3 * v + 1);
            vf b = weight(r + 1, v);
            pin(b);
            slot(3 * v + 2);
            store_weights<COARSE>(P, r / 2, v, a, b);
            if constexpr (!SIGMOID) sum[v] += a + b;
            if constexpr (!KEEP) continue;
            store(S[r] + v * LANES, a);
            store(S[r + 1] + v * LANES, b);
        }
    };
    int r = 0;
    for (; r + GROUP <= rows; r += GROUP) {
        for (int n = 1; n < EACH; ++n) queue.step();
        queue.begin();
        UNROLL for (int k = 0; k < GROUP / 2; ++k)
            two(r + 2 * k, [&](int at) INLINE_LAMBDA { queue.slot(6 * k + at, 3 * GROUP); });
        queue.end();
    }
    for (; r + 2 <= rows; r += 2) two(r, [](int) INLINE_LAMBDA {});
    if (r < rows) {
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf a = weight(r, v), none{};
            store_weights<COARSE>(P, r / 2, v, a, none);
            if constexpr (!SIGMOID) sum[v] += a;
            if constexpr (KEEP) store(S[r] + v * LANES, a);
        }
        r += 2;
    }
    for (; r % TILE_K; r += 2)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf none[2] = {};
            store_weights<COARSE>(P, r / 2, v, none[0], none[1]);
        }
    if constexpr (!SIGMOID) UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) x.l[p][v] = sum[v];
}

static inline void shrink_sums(int p, const vf* shrink, State& x, Queue& queue) {
    vi moved = shrink[0] != 1.0f;
    UNROLL for (int v = 1; v < PANEL_VECTORS; ++v) moved |= shrink[v] != 1.0f;
    if (!any(moved)) return;
    for (int d = 0; d < DVP; d += 32) {
        queue.begin();
        UNROLL for (int r = 0; r < 32; ++r) {
            queue.slot(r, 32);
            float* o = x.O[p][d + r];
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
                store(o + v * LANES, load(o + v * LANES) * shrink[v]);
        }
        queue.end();
    }
}

}  // namespace
