// Block-sparse attention, forward, on tile registers: out and log-sum-exp. See attention.hpp.
//
// The products of a panel of PANEL = 32 queries with 32 keys are four tiles. bf16 keys are read as
// they lie, 16 keys of 32 numbers a tile, V from tiles of 16 columns by 32 keys made once for each
// KV head; rows behind the last key are 0. The multiplication is so fast that the exponentials are
// what takes time: weights are taken from the bare products by one multiply-add, and sums shrink
// only where a maximum has moved.
// A float32 number is PARTS = 3 bf16 numbers (tiles.hpp): those of K and V are made once for each KV
// head, those of Q once for a task, those of the weights tile by tile. An infinity times a part that
// is 0 would be NaN, so blocks of 32 keys with a number that is not finite are marked, and taken in
// float32 one by one.
#pragma once
#include "attention_out.hpp"
#include "tiles.hpp"

namespace {

constexpr int DKP = (DK + TILE_K - 1) / TILE_K * TILE_K, DVP = (DV + 31) / 32 * 32;
static_assert(PANEL == 2 * TILE && KROWS % TILE_K == 0, "tiles of 16 x 16");
constexpr int PARTS = sizeof(io_t) == 4 ? 3 : 1, UNITS = PARTS == 3 ? 24 : 4;
constexpr uint8_t KEY_MARK = 1, VALUE_MARK = 2;

struct State {
    alignas(64) pair Q[PANELS][PARTS][DKP / 2][PANEL];
    alignas(64) float O[PANELS][DVP][PANEL];
    alignas(64) float S[2][KROWS][PANEL];
    alignas(64) pair P[2][PARTS][KROWS / 2][PANEL];
    Mask mask[2];
    bool odd_queries[PANELS];  // some are not finite
    Rows rows;
    vf factor[PANELS][PANEL_VECTORS], m[PANELS][PANEL_VECTORS], l[PANELS][PANEL_VECTORS];
};

// Numbers of a block of 32 keys. V: [32 columns][part][two tiles of 16 columns by 32 keys].
// K: rows of DKP numbers, with parts [32 numbers of a row][part][two tiles of 16 keys].
constexpr long V_BLOCK = (long)PARTS * DVP * TILE_K, K_BLOCK = (long)PARTS * DKP * TILE_K;
constexpr long TWO_TILES = 2048;  // bytes

static ALWAYS_INLINE vi not_finite(vi pairs) {
    return (vi)((pairs & 0x7f80) == 0x7f80) | (vi)((pairs & 0x7f800000) == 0x7f800000);
}

// The queries of a panel as pairs, their parts apart.
static inline void pack_queries(int n, const io_t* q, long rs, int p, State& x) {
    memset(x.Q[p], 0, sizeof x.Q[p]);
    x.odd_queries[p] = false;
    if constexpr (PARTS == 1) {
        transpose_pairs(n, DK / 2 * 2, (const bf16*)q, rs, x.Q[p][0][0], (long)PANEL);
        if constexpr (DK % 2 == 1)
            for (int r = 0; r < n; ++r)
                x.Q[p][0][DK / 2][r].bits = ((const bf16*)q)[r * rs + DK - 1].bits;
    } else {
        alignas(64) float turned[DKP][PANEL];
        memset(turned, 0, sizeof turned);
        transpose_in(n, DK, q, rs, turned[0], (long)PANEL);
        vi odd{};
        for (int d = 0; d < DKP; d += 2)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
                vf a = load(turned[d] + v * LANES), b = load(turned[d + 1] + v * LANES);
                UNROLL for (int part = 0; part < PARTS; ++part) {
                    vi both = make_pairs(a, b);
                    if (part == 0) odd |= not_finite(both);
                    store((int32_t*)x.Q[p][part][d / 2] + v * LANES, both);
                    a = bf16_rest(a), b = bf16_rest(b);
                }
            }
        x.odd_queries[p] = any(odd);
    }
}

static inline void load_queries(const Call& c, const Task& t, float scale, float cap, State& x) {
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        const io_t* q = c.q + t.b * c.q_b + t.h * c.q_h + (t.row + p * PANEL) * c.q_m;
        row_factors(c, t, p, scale, cap, x.factor[p]);
        memset(x.O[p], 0, sizeof x.O[p]);
        pack_queries(n, q, c.q_m, p, x);
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            // A factor that is not positive moves into the queries: then the largest product is the
            // largest score, and a hidden one stays hidden.
            vi turn = x.factor[p][v] < 0.0f, drop = x.factor[p][v] == 0.0f;
            if (any(turn | drop)) {
                for (int d = 0; d < PARTS * DKP / 2; ++d) {
                    int32_t* at = (int32_t*)x.Q[p][0][d] + v * LANES;
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
    bool plain_keys, plain_values;  // one by one, in float32
    int turn;                       // which of the two buffers
};

// Keeps a value from being computed later than here. Multiplications of tiles have to be spread
// evenly between the vector instructions: bursts of them run at a third of the speed.
static ALWAYS_INLINE void pin(vf& x) {
#if defined(__AMX_BF16__)
    asm volatile("" : "+v"(x));
#endif
}

// What the multiplier has to do while other work is done: S = K Q^T, the bare products of an item,
// then O += V^T P of another. A step multiplies 32 rows by 32 columns over 32 numbers in UNITS
// multiplications, those of the smallest parts first, in an order that loads least.
struct Queue {
    const char *k, *q, *v, *p;
    float *s, *o;
    int k_blocks = 0, v_blocks = 0, v_steps, at = 0;
    const char *a, *b, *next;  // of the present step; a of the next one
    long row, part;     // bytes from row to row of a, from part to part of b
    bool on, fresh, last;

    static constexpr long COLUMN = PANEL * 4;  // bytes of a row of b, and of the sums
    bool done() const { return k_blocks + v_blocks == 0; }
    ALWAYS_INLINE float* sums() const { return fresh ? s : o; }
    ALWAYS_INLINE void begin() {
        on = !done();
        if (!on) return;
        fresh = k_blocks != 0;
        if (fresh) {
            row = PARTS == 1 ? DKP * 2 : 64, part = sizeof(State::Q[0][0]);
            a = k + at * (PARTS == 1 ? 64 : PARTS * TWO_TILES), b = q + at * (TILE * COLUMN);
            last = at == DKP / TILE_K - 1;
            next = last && k_blocks == 1 ? v : a + PARTS * TWO_TILES;
            if (at) return;
            tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        } else {
            row = 64, part = sizeof(State::P[0][0]);
            a = v + at * (V_BLOCK * 2), b = p + at * (TILE * COLUMN);
            last = at == v_steps - 1;
            next = last ? v + PARTS * TWO_TILES : a + V_BLOCK * 2;
            if (at) return;
            tile_load<0>(o, COLUMN), tile_load<1>(o + TILE, COLUMN);
            tile_load<2>(o + TILE * PANEL, COLUMN), tile_load<3>(o + TILE * PANEL + TILE, COLUMN);
        }
    }
    ALWAYS_INLINE void rows(int n) const {
        tile_load<4>(a + n * TWO_TILES, row), tile_load<5>(a + n * TWO_TILES + TILE * row, row);
    }
    ALWAYS_INLINE void columns(int n) const {
        tile_load<6>(b + n * part, COLUMN), tile_load<7>(b + n * part + 64, COLUMN);
    }
    ALWAYS_INLINE void unit(int n) const {
        if (n == 0) rows(PARTS - 1), columns(0);
        if (n == 4) rows(1);
        if (n == 8) columns(1);
        if (n == 12) rows(0);
        if (n == 16) columns(2);
        if (n == 20) columns(0);
        if (PARTS > 1)
            UNROLL for (int i = 0; i < 4; ++i) __builtin_prefetch(next + (4 * n + i) * 64);
        if (n % 4 == 0) tile_multiply<0, 4, 6>();
        if (n % 4 == 1) tile_multiply<1, 4, 7>();
        if (n % 4 == 2) tile_multiply<2, 5, 6>();
        if (n % 4 == 3) tile_multiply<3, 5, 7>();
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

static inline void ask_keys(const Item& i, const bf16* k, State& x, Queue& queue) {
    queue.k = (const char*)(k + (i.j0 + i.part.first) / TILE_K * K_BLOCK);
    queue.q = (const char*)x.Q[i.p];
    queue.s = x.S[i.turn][0];
    queue.k_blocks = (i.part.rows + TILE_K - 1) / TILE_K;
}
static inline void ask_values(const Item& i, const bf16* v, State& x, Queue& queue) {
    queue.v = (const char*)(v + (i.j0 + i.part.first) / TILE_K * V_BLOCK);
    queue.p = (const char*)x.P[i.turn];
    queue.o = x.O[i.p][0];
    queue.v_blocks = DVP / 32;
    queue.v_steps = (i.part.rows + TILE_K - 1) / TILE_K;
}

static inline void multiply_plain(const Call& c, const Task& t, const Item& i, State& x) {
    const io_t* k = c.k + t.b * c.k_b + t.kv * c.k_h + (i.j0 + i.part.first) * c.k_n;
    for (int v = 0; v < PANEL_VECTORS; ++v) {
        vf q[DK];
        for (int d = 0; d < DK; ++d) {
            q[d] = vf{};
            for (int part = PARTS - 1; part >= 0; --part) {
                vi both = load((const int32_t*)x.Q[i.p][part][d / 2] + v * LANES);
                q[d] += (vf)(d % 2 ? both & (int32_t)0xffff0000 : both << 16);
            }
        }
        for (int r = 0; r < i.part.rows; ++r) {
            vf sum{};
            for (int d = 0; d < DK; ++d) sum += q[d] * to_float(k[r * c.k_n + d]);
            store(x.S[i.turn][r] + v * LANES, sum);
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

// Two rows of weights, none negative, as pairs. Parts are cut, not rounded: that is enough beside
// rounded parts of V, and takes less time.
static ALWAYS_INLINE void store_weights(pair (*P)[KROWS / 2][PANEL], int row, int v, vf a, vf b) {
    int32_t* to = (int32_t*)P[0][row] + v * LANES;
    if constexpr (PARTS == 1) {
        store(to, make_pairs(a, b));
        return;
    }
    const int32_t high = (int32_t)0xffff0000;
    UNROLL for (int part = 0; part < PARTS; ++part) {
        vi x = (vi)a & high, y = (vi)b & high;
        store(to + part * (KROWS / 2 * PANEL), (vi)((vu)a >> 16) | y);
        a -= (vf)x, b -= (vf)y;
    }
}

// Takes the largest scores of an item into account: by how much what is there shrinks.
static inline void move_largest(int p, const vf* top, vf* shrink, State& x) {
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        shrink[v] = splat(1.0f);
        if constexpr (SIGMOID) continue;
        vf m = vmax(x.m[p][v], top[v]), old = x.m[p][v];
        shrink[v] = exp2_neg(select(old == -INF, old, base_of(old) - base_of(m)));
        x.m[p][v] = m;
        x.l[p][v] *= shrink[v];
    }
}

// Scores to pairs of weights, and with KEEP also to weights in place, while the multiplier works.
template <bool KEEP>
static inline void weigh(const Item& i, State& x, Queue& queue) {
    const int p = i.p, rows = i.part.rows;
    float(*S)[PANEL] = x.S[i.turn];
    pair(*P)[KROWS / 2][PANEL] = x.P[i.turn];
    vf base[PANEL_VECTORS], sum[PANEL_VECTORS], slope[PANEL_VECTORS];
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        slope[v] = HOOKED ? splat(1.0f) : x.factor[p][v];
        if constexpr (SIGMOID) continue;
        slope[v] *= LOG2E;
        base[v] = base_of(x.m[p][v]);
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
            if constexpr (!SIGMOID) sum[v] += a + b;
            store_weights(P, r / 2, v, a, b);
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
            vf a = weight(r, v);
            if constexpr (!SIGMOID) sum[v] += a;
            store_weights(P, r / 2, v, a, vf{});
            if constexpr (KEEP) store(S[r] + v * LANES, a);
        }
        r += 2;
    }
    for (; r % TILE_K; r += 2)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) store_weights(P, r / 2, v, vf{}, vf{});
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

// A weight of 0 would still turn a NaN or an infinity of a hidden value into a NaN: keys one by
// one, hidden ones left out.
static inline void add_plain_values(const Call& c, const Task& t, const Item& i, State& x) {
    const Part part = i.part;
    const io_t* values = c.v + t.b * c.v_b + t.kv * c.v_h + (i.j0 + part.first) * c.v_n;
    for (int d = 0; d < DV; ++d)
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf o = load(x.O[i.p][d] + v * LANES);
            for (int r = 0; r < part.rows; ++r) {
                vf term = load(x.S[i.turn][r] + v * LANES) * splat(to_float(values[r * c.v_n + d]));
                if (part.masked) term = select(x.mask[i.turn].at[part.first + r][v], term, vf{});
                o += term;
            }
            store(x.O[i.p][d] + v * LANES, o);
        }
}

static void run(const Call& c, const Task& t, float scale, float cap) {
    State x;
    x.rows.fill(c, t);
    load_queries(c, t, scale, cap, x);
    const bf16* k = (const bf16*)c.k_ready + t.b * c.kr_b + t.kv * c.kr_h;
    const bf16* v = (const bf16*)c.v_ready + t.b * c.vr_b + t.kv * c.vr_h;
    const uint8_t* marks = c.marks + (t.b * c.Hkv + t.kv) * ((c.N + TILE_K - 1) / TILE_K);
    Item now{}, old{};  // the item whose products with the keys are there; the one before it
    bool has_now = false, has_old = false;
    auto advance = [&](const Item* next) {
        Queue queue{};
        if (next && !next->plain_keys) ask_keys(*next, k, x, queue);
        if (has_old) ask_values(old, v, x, queue);
        has_old = false;
        if (has_now) {
            vf top[PANEL_VECTORS], shrink[PANEL_VECTORS];
            const bool apart = old.p != now.p || !queue.v_blocks;
            if (now.part.masked)
                settle<true>(c, t, now, cap, x, top, queue);
            else
                settle<false>(c, t, now, cap, x, top, queue);
            move_largest(now.p, top, shrink, x);
            if (apart) shrink_sums(now.p, shrink, x, queue);
            if (now.plain_values)
                weigh<true>(now, x, queue);
            else
                weigh<false>(now, x, queue);
            queue.finish();
            if (!apart) shrink_sums(now.p, shrink, x, queue);
            if (now.plain_values)
                add_plain_values(c, t, now, x);
            else
                old = now, has_old = true;
        }
        queue.finish();
        if (next && next->plain_keys) multiply_plain(c, t, *next, x);
        has_now = next != nullptr;
        if (next) now = *next;
    };
    int turn = 0;
    walk(c, t, x.rows, [&](int j0, int n, bool full) {
        for (int p = 0; p * PANEL < t.rows; ++p) {
            Item next{p, j0, {0, n, false}, false, false, turn};
            if (!full) next.part = x.mask[turn].fill(c, t, x.rows, p, j0, n);
            if (next.part.rows == 0) continue;
            uint8_t odd = 0;
            int end = next.part.first + next.part.rows;
            for (int j = next.part.first; j < end; j += TILE_K) odd |= marks[(j0 + j) / TILE_K];
            next.plain_values = (odd & VALUE_MARK) && (PARTS > 1 || next.part.masked);
            next.plain_keys = PARTS > 1 && ((odd & KEY_MARK) || x.odd_queries[p]);
            advance(&next);
            turn ^= 1;
        }
    });
    advance(nullptr);
    advance(nullptr);
    write_out(c, t, x);
}

static ALWAYS_INLINE vf load_some(const io_t* p, int n) {
    return n >= LANES ? load(p) : n > 0 ? load_part(p, n) : vf{};
}

// Up to 32 keys as rows of DKP numbers, or as tiles of their parts.
static inline vi pack_keys(int n, const io_t* src, long rs, bf16* dst) {
    vi odd{};
    for (int r = 0; r < TILE_K; ++r) {
        const io_t* row = src + r * rs;
        if constexpr (PARTS == 1) {
            bf16* to = dst + (long)r * DKP;
            memset(to, 0, DKP * 2);
            if (r < n) memcpy(to, row, DK * 2);
        } else {
            char* to = (char*)dst + r * 64;
            for (int d = 0; d < DKP; d += TILE_K, to += PARTS * TWO_TILES) {
                int left = r < n ? DK - d : 0;
                vf a = load_some(row + d, left), b = load_some(row + d + LANES, left - LANES);
                UNROLL for (int part = 0; part < PARTS; ++part) {
                    vf both = in_order(a, b);
                    if (part == 0) odd |= not_finite((vi)both);
                    store((float*)(to + part * TWO_TILES), both);
                    a = bf16_rest(a), b = bf16_rest(b);
                }
            }
        }
    }
    return odd;
}

// Up to 32 values as tiles of 16 columns by 32 keys.
static inline vi pack_values(int n, const io_t* src, long rs, bf16* dst) {
    vi bad{};
    for (int d = 0; d < DVP; d += TILE) {
        vf even[TILE], odd[TILE];
        int some = DV - d < TILE ? DV - d : TILE;
        for (int i = 0; i < TILE; ++i) {
            const io_t *a = src + 2 * i * rs + d, *b = a + rs;
            even[i] = odd[i] = vf{};
            if (2 * i < n && some > 0) even[i] = some == TILE ? load(a) : load_part(a, some);
            if (2 * i + 1 < n && some > 0) odd[i] = some == TILE ? load(b) : load_part(b, some);
        }
        UNROLL for (int part = 0; part < PARTS; ++part) {
            vf t[TILE];
            UNROLL for (int i = 0; i < TILE; ++i) {
                t[i] = PARTS == 1 ? (vf)((vi)((vu)even[i] >> 16) | (vi)odd[i])
                                  : (vf)make_pairs(even[i], odd[i]);
                if (part == 0) bad |= not_finite((vi)t[i]);
                if (PARTS > 1) even[i] = bf16_rest(even[i]), odd[i] = bf16_rest(odd[i]);
            }
            transpose_square(t);
            float* to = (float*)(dst + d / 32 * (PARTS * 1024) + part * 1024 + d % 32 * TILE_K);
            UNROLL for (int i = 0; i < TILE; ++i) store(to + i * TILE, t[i]);
        }
    }
    return bad;
}

}  // namespace

EXPORT void forward(const Call* call, float scale, float cap) {
    const Call& c = *call;
#pragma omp parallel num_threads((int)c.threads)
    {
        Tiles session;
        const long blocks = (c.N + TILE_K - 1) / TILE_K;
#pragma omp for schedule(static)
        for (long x = 0; x < c.B * c.Hkv * blocks; ++x) {
            long block = x % blocks, h = x / blocks % c.Hkv, b = x / blocks / c.Hkv;
            long n0 = block * TILE_K;
            int n = (int)(c.N - n0 < TILE_K ? c.N - n0 : TILE_K);
            uint8_t marks = 0;
            if (c.pack_k && any(pack_keys(n, c.k + b * c.k_b + h * c.k_h + n0 * c.k_n, c.k_n,
                                          (bf16*)c.k_ready + b * c.kr_b + h * c.kr_h +
                                              block * K_BLOCK)))
                marks |= KEY_MARK;
            if (any(pack_values(n, c.v + b * c.v_b + h * c.v_h + n0 * c.v_n, c.v_n,
                                (bf16*)c.v_ready + b * c.vr_b + h * c.vr_h + block * V_BLOCK)))
                marks |= VALUE_MARK;
            c.marks[x] = marks;
        }
#pragma omp for schedule(dynamic, 1)
        for (long x = 0; x < task_count(c); ++x) run(c, task_at(c, x), scale, cap);
    }
}
