// Block-sparse attention, forward, bf16 on tile registers: out and log-sum-exp. See attention.hpp.
//
// The products of a panel of PANEL = 32 queries with 32 keys are four tiles. K is read as it lies,
// 16 keys of 32 numbers a tile, V from tiles of 16 columns by 32 keys made once for each KV head;
// rows behind the last key are 0. The multiplication is so fast that the exponentials are what
// takes time: weights are taken from the bare products by one multiply-add, and sums shrink only
// where a maximum has moved.
#pragma once
#include "attention_out.hpp"
#include "tiles.hpp"

namespace {

constexpr int DKP = (DK + TILE_K - 1) / TILE_K * TILE_K, DVP = (DV + 31) / 32 * 32;
static_assert(PANEL == 2 * TILE && KROWS % TILE_K == 0, "tiles of 16 x 16");

struct State {
    alignas(64) pair Q[PANELS][DKP / 2][PANEL];
    alignas(64) float O[PANELS][DVP][PANEL];
    alignas(64) float S[2][KROWS][PANEL];
    alignas(64) pair P[2][KROWS / 2][PANEL];
    Mask mask[2];
    Rows rows;
    vf factor[PANELS][PANEL_VECTORS], m[PANELS][PANEL_VECTORS], l[PANELS][PANEL_VECTORS];
};

// Row j of V begins at tile row 0 of block j / 32; column d of it lies in tile d / 16.
constexpr long V_BLOCK = (long)DVP * TILE_K;

static inline void load_queries(const Call& c, const Task& t, float scale, float cap, State& x) {
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        const io_t* q = c.q + t.b * c.q_b + t.h * c.q_h + (t.row + p * PANEL) * c.q_m;
        row_factors(c, t, p, scale, cap, x.factor[p]);
        if (n < PANEL || DKP != DK) memset(x.Q[p], 0, sizeof x.Q[p]);
        memset(x.O[p], 0, sizeof x.O[p]);
        transpose_pairs(n, DK / 2 * 2, q, c.q_m, x.Q[p][0], (long)PANEL);
        if constexpr (DK % 2 == 1)
            for (int r = 0; r < n; ++r) x.Q[p][DK / 2][r].bits = q[r * c.q_m + DK - 1].bits;
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            // A factor that is not positive moves into the queries: then the largest product is the
            // largest score, and a hidden one stays hidden.
            vi turn = x.factor[p][v] < 0.0f, drop = x.factor[p][v] == 0.0f;
            if (any(turn | drop)) {
                for (int d = 0; d < DKP / 2; ++d) {
                    int32_t* at = (int32_t*)x.Q[p][d] + v * LANES;
                    store(at, (load(at) ^ (turn & (int32_t)0x80008000)) & ~drop);
                }
                x.factor[p][v] = select(drop, splat(1.0f), vabs(x.factor[p][v]));
            }
            x.m[p][v] = splat(HAS_SINKS ? c.sinks[t.h] : -INF);
            x.l[p][v] = HAS_SINKS ? exp2_neg(rest_of(x.m[p][v])) : vf{};
        }
    }
}

// A panel of queries against up to KROWS keys. Three of them are under way at a time: while the
// weights of one are made, the multiplier takes the products of the next with the keys and those
// of the one before with the values.
struct Item {
    int p, j0;
    Part part;
    bool by_hand;  // values that are not finite are hidden from some row
    int turn;      // which of the two buffers
};

// S = K Q^T, the bare products.
static inline TileWork key_products(const Item& i, const bf16* k, State& x) {
    const char* a = (const char*)(k + (long)(i.j0 + i.part.first) * DKP);
    constexpr long ROW = DKP * 2;
    return {a,  (const char*)x.Q[i.p], ROW, TILE * ROW, 64, 2 * TILE * ROW, sizeof x.Q[0][0], 64,
            TILE * (long)sizeof x.Q[0][0], x.S[i.turn][0], PANEL,
            (i.part.rows + TILE_K - 1) / TILE_K, DKP / TILE_K, true};
}

// O += V^T P
static inline TileWork value_products(const Item& i, const bf16* v, State& x) {
    const char* a = (const char*)(v + (i.j0 + i.part.first) / TILE_K * V_BLOCK);
    return {a, (const char*)x.P[i.turn], 64, 1024, V_BLOCK * 2, 2048, sizeof x.P[0][0], 64,
            TILE * (long)sizeof x.P[0][0], x.O[i.p][0], PANEL, DVP / 32,
            (i.part.rows + TILE_K - 1) / TILE_K, false};
}

// Scores where they are more than factor times product, -inf where hidden; and the largest.
template <bool MASKED>
static inline void settle(const Call& c, const Task& t, const Item& i, float cap, State& x,
                          vf* top) {
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
    for (; r + CHAINS <= part.rows; r += CHAINS)
        UNROLL for (int k = 0; k < CHAINS; ++k) row(r + k, k);
    for (; r < part.rows; ++r) row(r, 0);
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        vf most = vmax(vmax(best[0][v], best[1][v]), vmax(best[2][v], best[3][v]));
        top[v] = HOOKED ? most : most * x.factor[i.p][v];
    }
}

// Scores to pairs of weights, and with KEEP also to weights in place, while the multiplier works.
template <bool KEEP>
static inline void weigh(const Item& i, const vf* top, State& x, vf* shrink, TileWork& keys,
                         TileWork& values) {
    const int p = i.p, rows = i.part.rows;
    float(*S)[PANEL] = x.S[i.turn];
    pair(*P)[PANEL] = x.P[i.turn];
    vf base[PANEL_VECTORS], sum[PANEL_VECTORS], slope[PANEL_VECTORS];
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        shrink[v] = splat(1.0f);
        slope[v] = HOOKED ? splat(1.0f) : x.factor[p][v];
        if constexpr (!SIGMOID) {
            vf m = vmax(x.m[p][v], top[v]);
            base[v] = base_of(m);
            slope[v] *= LOG2E;
            shrink[v] = exp2_neg(select(x.m[p][v] == -INF, x.m[p][v], base_of(x.m[p][v]) - base[v]));
            x.m[p][v] = m;
            sum[v] = x.l[p][v] * shrink[v];
        }
    }
    auto weight = [&](int r, int v) INLINE_LAMBDA {
        vf s = load(S[r] + v * LANES);
        if constexpr (SIGMOID) return sigmoid_(s * slope[v]);
        return exp2_rough(s * slope[v] - base[v]);
    };
    auto two = [&](int r) INLINE_LAMBDA {
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf a = weight(r, v), b = weight(r + 1, v);
            if constexpr (!SIGMOID) sum[v] += a + b;
            store((int32_t*)P[r / 2] + v * LANES, make_pairs(a, b));
            if constexpr (!KEEP) continue;
            store(S[r] + v * LANES, a);
            store(S[r + 1] + v * LANES, b);
        }
    };
    int r = 0;
    for (; r + 8 <= rows; r += 8) {
        if (!values.done())
            values.step();
        else if (!keys.done())
            keys.step();
        UNROLL for (int k = 0; k < 8; k += 2) two(r + k);
    }
    for (; r + 2 <= rows; r += 2) two(r);
    if (r < rows) {
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf a = weight(r, v);
            if constexpr (!SIGMOID) sum[v] += a;
            store((int32_t*)P[r / 2] + v * LANES, make_pairs(a, vf{}));
            if constexpr (KEEP) store(S[r] + v * LANES, a);
        }
        r += 2;
    }
    for (; r % TILE_K; r += 2)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) store((int32_t*)P[r / 2] + v * LANES, vi{});
    if constexpr (!SIGMOID) UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) x.l[p][v] = sum[v];
    while (!values.done()) values.step();
    while (!keys.done()) keys.step();
}

static inline void shrink_sums(int p, const vf* shrink, State& x) {
    vi moved = shrink[0] != 1.0f;
    UNROLL for (int v = 1; v < PANEL_VECTORS; ++v) moved |= shrink[v] != 1.0f;
    if (!any(moved)) return;
    for (int d = 0; d < DV; ++d)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
            store(x.O[p][d] + v * LANES, load(x.O[p][d] + v * LANES) * shrink[v]);
}

static inline float value_at(const bf16* v, int j, int d) {
    return to_float(v[j / TILE_K * V_BLOCK + d * TILE_K + j % TILE_K]);
}

// A weight of 0 would still turn a NaN or an infinity of a hidden value into a NaN: keys one by
// one, hidden ones left out.
static inline void add_visible_values(const Item& i, const bf16* v_rows, State& x) {
    const Part part = i.part;
    const bf16* values = v_rows + (i.j0 + part.first) / TILE_K * V_BLOCK;
    for (int d = 0; d < DV; ++d)
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf o = load(x.O[i.p][d] + v * LANES);
            for (int r = 0; r < part.rows; ++r) {
                vf term = load(x.S[i.turn][r] + v * LANES) * splat(value_at(values, r, d));
                o += select(x.mask[i.turn].at[part.first + r][v], term, vf{});
            }
            store(x.O[i.p][d] + v * LANES, o);
        }
}

static inline bool finite(const bf16* v, int n) {
    const int32_t* at = (const int32_t*)v;
    vi bad{};
    for (long i = 0; i < (n + TILE_K - 1) / TILE_K * V_BLOCK / 2; i += LANES) {
        vi x = load(at + i);
        bad |= (vi)((x & 0x7f80) == 0x7f80) | (vi)((x & 0x7f800000) == 0x7f800000);
    }
    return !any(bad);
}

static void run(const Call& c, const Task& t, float scale, float cap) {
    State x;
    x.rows.fill(c, t);
    load_queries(c, t, scale, cap, x);
    const bf16* k = (const bf16*)c.k_ready + t.b * c.kr_b + t.kv * c.kr_h;
    const bf16* v = (const bf16*)c.v_ready + t.b * c.vr_b + t.kv * c.vr_h;
    const TileWork none{};
    Item now{}, old{};  // the item whose products with the keys are there; the one before it
    bool has_now = false, has_old = false;
    auto advance = [&](const Item* next) {
        TileWork keys = next ? key_products(*next, k, x) : none;
        TileWork values = has_old ? value_products(old, v, x) : none;
        has_old = false;
        if (has_now) {
            vf top[PANEL_VECTORS], shrink[PANEL_VECTORS];
            if (now.part.masked)
                settle<true>(c, t, now, cap, x, top);
            else
                settle<false>(c, t, now, cap, x, top);
            if (now.by_hand)
                weigh<true>(now, top, x, shrink, keys, values);
            else
                weigh<false>(now, top, x, shrink, keys, values);
            shrink_sums(now.p, shrink, x);
            if (now.by_hand)
                add_visible_values(now, v, x);
            else
                old = now, has_old = true;
        }
        while (!keys.done()) keys.step();
        while (!values.done()) values.step();
        has_now = next != nullptr;
        if (next) now = *next;
    };
    int turn = 0;
    walk(c, t, x.rows, [&](int j0, int n, bool full) {
        int clean = -1;  // whether all values of the tile are finite, once it is known
        for (int p = 0; p * PANEL < t.rows; ++p) {
            Item next{p, j0, {0, n, false}, false, turn};
            if (!full) next.part = x.mask[turn].fill(c, t, x.rows, p, j0, n);
            if (next.part.rows == 0) continue;
            if (next.part.masked && clean < 0) clean = finite(v + j0 / TILE_K * V_BLOCK, n);
            next.by_hand = next.part.masked && !clean;
            advance(&next);
            turn ^= 1;
        }
    });
    advance(nullptr);
    advance(nullptr);
    write_out(c, t, x);
}

// Keys to rows of DKP numbers, 32 n of them.
static inline void pack_keys(int n, const bf16* src, long rs, bf16* dst) {
    for (int r = 0; r < n; ++r) {
        memcpy(dst + (long)r * DKP, src + r * rs, DK * 2);
        if (DKP != DK) memset(dst + (long)r * DKP + DK, 0, (DKP - DK) * 2);
    }
    int whole = (n + TILE_K - 1) / TILE_K * TILE_K;
    memset(dst + (long)n * DKP, 0, (long)(whole - n) * DKP * 2);
}

// Values to tiles of 16 columns by 32 keys.
static inline void pack_values(int n, const bf16* src, long rs, bf16* dst) {
    for (int j = 0; j < n; j += TILE_K)
        for (int d = 0; d < DVP; d += TILE) {
            vf t[TILE];
            for (int i = 0; i < TILE; ++i) {
                int row = j + 2 * i, some = DV - d < TILE ? DV - d : TILE;
                const bf16 *a = src + row * rs + d, *b = a + rs;
                vi even{}, odd{};
                if (row < n && some > 0)
                    even = (vi)(some == TILE ? load(a) : load_part(a, some));
                if (row + 1 < n && some > 0)
                    odd = (vi)(some == TILE ? load(b) : load_part(b, some));
                t[i] = (vf)((vi)((vu)even >> 16) | odd);
            }
            transpose_square(t);
            float* to = (float*)(dst + j / TILE_K * V_BLOCK + d * TILE_K);
            UNROLL for (int i = 0; i < TILE; ++i) store(to + i * TILE, t[i]);
        }
}

}  // namespace

EXPORT void forward(const Call* call, float scale, float cap) {
    const Call& c = *call;
#pragma omp parallel num_threads((int)c.threads)
    {
        Tiles session;
        const long chunk = 256, chunks = (c.N + chunk - 1) / chunk;
#pragma omp for schedule(static)
        for (long x = 0; x < c.B * c.Hkv * chunks; ++x) {
            long n0 = x % chunks * chunk, h = x / chunks % c.Hkv, b = x / chunks / c.Hkv;
            int n = (int)(c.N - n0 < chunk ? c.N - n0 : chunk);
            if (c.pack_k)
                pack_keys(n, c.k + b * c.k_b + h * c.k_h + n0 * c.k_n, c.k_n,
                          (bf16*)c.k_ready + b * c.kr_b + h * c.kr_h + n0 * DKP);
            pack_values(n, c.v + b * c.v_b + h * c.v_h + n0 * c.v_n, c.v_n,
                        (bf16*)c.v_ready + b * c.vr_b + h * c.vr_h + n0 / TILE_K * V_BLOCK);
        }
#pragma omp for schedule(dynamic, 1)
        for (long x = 0; x < task_count(c); ++x) run(c, task_at(c, x), scale, cap);
    }
}
