// Block-sparse attention, backward, on tile registers. See attention_backward.hpp for what is
// computed and attention_tiles.hpp for float32 numbers as sums of three bf16 numbers. Of bf16 inputs
// P and dS are rounded to bf16, sums are float32.
//
// Each of the five products takes 32 queries and some keys. Tiles of K, its transpose and V are made
// once for each KV head, those of the queries and of dO once for a task, those of P and dS by the
// vector units, while the multiplier works on the queries before and behind.
// The result is of no use where an input is not finite; the caller is told, and takes vectors.
#pragma once
#include "attention_gradients.hpp"
#include "attention_tile_products.hpp"

namespace {

static_assert(DQ_ROWS == DKP, "whole tiles");
// Numbers of a block of 32 keys: tiles of K, of its transpose, of V.
constexpr long BLOCK = 2 * K_BLOCK + V_BLOCK;
constexpr int BLOCKS = KROWS / TILE_K;             // of a tile of keys
constexpr int KS = DKP / 32, VS = DVP / 32;        // parts of a head
constexpr int BLOCK_STEPS = 3 * KS + 2 * VS;       // of the multiplier, for a block and a panel
constexpr int GATHERED = PANELS < 4 ? PANELS : 4;  // panels that add to dK and dV together
// Steps that go with four rows of a tile: one is spread among them, others come before.
constexpr int EACH_FOUR = BLOCK_STEPS <= 12 ? 1 : BLOCK_STEPS / 8;
using Operand = pair[PARTS][TILE_K][TILE];  // of a step, the first
using Pairs = pair[PARTS][TILE][PANEL];     // of a step, the second

// A panel of queries against up to KROWS keys.
struct Item {
    int p, j0;
    Part part;
    int turn;  // which of the two buffers
    int slot;  // where its weights are
    int blocks() const { return (part.rows + TILE_K - 1) / TILE_K; }
    int first_block() const { return (j0 + part.first) / TILE_K; }
};

struct State : Sums {
    // Q and dO transposed; as they lie, rows r and r + 16 in a pair.
    alignas(64) Pairs Q[PANELS][KS], G[PANELS][VS], q_rows[PANELS][KS], g_rows[PANELS][VS];
    alignas(64) float S[2][KROWS][PANEL], T[2][KROWS][PANEL];
    // P and dS as first operands, with the columns of q_rows, and dS as a second one.
    alignas(64) Operand P[2 * GATHERED][BLOCKS], D[2 * GATHERED][BLOCKS];
    alignas(64) Pairs Dp[2][BLOCKS];
    Mask mask[2];
    // Of the products of queries and keys. float32 queries carry it themselves; bf16 ones are taken
    // as they are: scores agree with those of the forward pass, and nothing is rounded twice.
    vf factor[PANELS][PANEL_VECTORS];
    vf left;  // not finite where something was not
};
using Work = Products<BLOCKS * BLOCK_STEPS>;

// 32 rows of 32 numbers as pairs of the rows STEP * r and STEP * r + GAP. What is left: `each_part`.
template <int STEP, int GAP>
static inline vf pair_rows(const float* src, long ld, Pairs& to) {
    vf left{};
    for (int r = 0; r < TILE; ++r)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            const float* at = src + r * STEP * ld + v * LANES;
            left += each_part(load(at), load(at + GAP * ld), [&](int part, vf a, vf b) INLINE_LAMBDA {
                store((int32_t*)to[part][r] + v * LANES, pairs_of(a, b));
            });
        }
    return left;
}

template <int D, int N>
static inline void load_side(int n, const io_t* src, long rs, const float* by_row, const vf* factor,
                             Pairs (&turned)[N], Pairs (&rows)[N], vf& left) {
    alignas(64) float straight[PANEL][N * 32], across[N * 32][PANEL];
    memset(straight, 0, sizeof straight);
    memset(across, 0, sizeof across);
    copy_rows(n, D, src, rs, straight[0], (long)(N * 32));
    transpose_in(n, D, straight[0], (long)(N * 32), across[0], (long)PANEL);
    for (int d = 0; factor && d < D; ++d)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v)
            store(across[d] + v * LANES, load(across[d] + v * LANES) * factor[v]);
    for (int r = 0; by_row && r < n; ++r)
        for (int d = 0; d < D; ++d) straight[r][d] *= by_row[r];
    for (int i = 0; i < N; ++i) {
        left += pair_rows<2, 1>(across[i * 32], PANEL, turned[i]);
        left += pair_rows<1, TILE>(straight[0] + i * 32, N * 32, rows[i]);
    }
}

static inline void load_rows(const Call& c, const Grads& g, const Task& t, float scale, float cap,
                             State& x) {
    for (int p = 0; p * PANEL < t.rows; ++p) {
        int n = (int)(t.rows - p * PANEL < PANEL ? t.rows - p * PANEL : PANEL);
        long row = t.row + p * PANEL;
        const io_t* q = c.q + t.b * c.q_b + t.h * c.q_h + row * c.q_m;
        const io_t* go = g.grad_out + t.b * g.go_b + t.h * g.go_h + row * g.go_m;
        row_factors(c, t, p, scale, cap, x.factor[p]);
        const bool bare = PARTS == 1;
        load_side<DK>(n, q, c.q_m, bare ? nullptr : x.scale + p * PANEL,
                      bare ? nullptr : x.factor[p], x.Q[p], x.q_rows[p], x.left);
        load_side<DV>(n, go, g.go_m, nullptr, nullptr, x.G[p], x.g_rows[p], x.left);
    }
}

// S = K Q^T and dP = V dO^T.
static inline void ask_scores(const Item& i, const bf16* packed, State& x, Work& work) {
    const char* at = (const char*)(packed + i.first_block() * BLOCK);
    for (int k = 0; k < i.blocks(); ++k, at += BLOCK * 2) {
        work.add({at, (const char*)x.Q[i.p], PARTS * TWO_TILES, sizeof(Pairs),
                  x.S[i.turn][k * TILE_K], PANEL, KS, true});
        work.add({at + 4 * K_BLOCK, (const char*)x.G[i.p], PARTS * TWO_TILES, sizeof(Pairs),
                  x.T[i.turn][k * TILE_K], PANEL, VS, true});
    }
}

// dQ += K^T dS.
static inline void ask_queries(const Item& i, const bf16* packed, State& x, Work& work) {
    const char* turned = (const char*)(packed + i.first_block() * BLOCK + K_BLOCK);
    for (int d = 0; d < KS; ++d)
        work.add({turned + d * PARTS * TWO_TILES, (const char*)x.Dp[i.turn], BLOCK * 2,
                  sizeof(Pairs), x.dQ[i.p][d * 32], PANEL, i.blocks(), false});
}
// dV += P^T dO, dK += dS^T Q, over `count` panels from that of i on.
static inline void ask_keys(const Item& i, int count, float* dk, float* dv, State& x, Work& work) {
    const long j = (long)i.first_block() * TILE_K;
    for (int k = 0; k < i.blocks(); ++k) {
        for (int d = 0; d < VS; ++d)
            work.add({(const char*)x.P[i.slot][k], (const char*)x.g_rows[i.p][d], sizeof x.P[0],
                      sizeof x.g_rows[0], dv + (j + k * TILE_K) * DVP + d * 32, DVP, count, false});
        for (int d = 0; d < KS; ++d)
            work.add({(const char*)x.D[i.slot][k], (const char*)x.q_rows[i.p][d], sizeof x.D[0],
                      sizeof x.q_rows[0], dk + (j + k * TILE_K) * DKP + d * 32, DKP, count, false});
    }
}

// Three parts of two vectors as pairs, cut, not rounded: 24 bits are kept all the same.
struct Cut {
    vf rest;
    vi head;
    explicit ALWAYS_INLINE Cut(vf x) : rest(x), head((vi)x & (int32_t)0xffff0000) {}
    ALWAYS_INLINE void next() {
        rest -= (vf)head;
        head = (vi)rest & (int32_t)0xffff0000;
    }
};
static ALWAYS_INLINE void put(pair* to, const Cut& even, const Cut& odd) {
    store((int32_t*)to, (vi)((vu)even.rest >> 16) | odd.head);
}

// Rows r and r + 1 of P and dS to tiles.
static ALWAYS_INLINE void put_weights(int slot, int r, const vf (&a)[2], const vf (&b)[2], State& x) {
    const int block = r / TILE_K, row = r % TILE_K;
    if constexpr (PARTS == 1) {
        store((int32_t*)x.P[slot][block][0][row], make_pairs(a[0], a[1]));
        store((int32_t*)x.P[slot][block][0][row + 1], make_pairs(b[0], b[1]));
        return;
    }
    Cut cut[] = {Cut(a[0]), Cut(a[1]), Cut(b[0]), Cut(b[1])};
    UNROLL for (int part = 0; part < PARTS; ++part) {
        put(x.P[slot][block][part][row], cut[0], cut[1]);
        put(x.P[slot][block][part][row + 1], cut[2], cut[3]);
        UNROLL for (int n = 0; n < 4; ++n) cut[n].next();
    }
}
static ALWAYS_INLINE void put_slopes(const Item& i, int r, const vf (&a)[2], const vf (&b)[2], State& x) {
    const int block = r / TILE_K, row = r % TILE_K;
    if constexpr (PARTS == 1) {
        const float* scale = x.scale + i.p * PANEL;
        const vf low = load(scale), high = load(scale + LANES);
        store((int32_t*)x.D[i.slot][block][0][row], make_pairs(a[0] * low, a[1] * high));
        store((int32_t*)x.D[i.slot][block][0][row + 1], make_pairs(b[0] * low, b[1] * high));
        int32_t* to = (int32_t*)x.Dp[i.turn][block][0][row / 2];
        store(to, make_pairs(a[0], b[0]));
        store(to + LANES, make_pairs(a[1], b[1]));
        return;
    }
    Cut cut[] = {Cut(a[0]), Cut(a[1]), Cut(b[0]), Cut(b[1])};
    UNROLL for (int part = 0; part < PARTS; ++part) {
        put(x.D[i.slot][block][part][row], cut[0], cut[1]);
        put(x.D[i.slot][block][part][row + 1], cut[2], cut[3]);
        put(x.Dp[i.turn][block][part][row / 2], cut[0], cut[2]);
        put(x.Dp[i.turn][block][part][row / 2] + LANES, cut[1], cut[3]);
        UNROLL for (int n = 0; n < 4; ++n) cut[n].next();
    }
}

// From scores and dP to P and dS.
static inline void weigh(const Call& c, const Grads& g, const Task& t, const Item& i, float cap,
                         State& x, Work& work) {
    float(*S)[PANEL] = x.S[i.turn], (*T)[PANEL] = x.T[i.turn];
    const Part part = i.part;
    const bool bare = PARTS == 1 && !HOOKED;
    if constexpr (HOOKED) {
        for (int r = 0; PARTS == 1 && r < part.rows; ++r)
            UNROLL for (int v = 0; v < 2; ++v)
                store(S[r] + v * LANES, load(S[r] + v * LANES) * x.factor[i.p][v]);
        adjust<true>(c, t, i.p, i.j0 + part.first, part.rows, cap, S, x.slope_of_cap);
    }
    vf unit[2];
    UNROLL for (int v = 0; v < 2; ++v) {
        unit[v] = bare ? x.factor[i.p][v] : splat(1.0f);
        if constexpr (!SIGMOID) unit[v] *= LOG2E;
    }
    vf lse[2] = {x.lse[i.p][0], x.lse[i.p][1]}, delta[2] = {x.delta[i.p][0], x.delta[i.p][1]};
    auto row = [&](int r, vf (&w)[2], vf (&d)[2]) INLINE_LAMBDA {
        UNROLL for (int v = 0; v < 2; ++v) {
            w[v] = d[v] = vf{};
            if (r >= part.rows) continue;
            vf s = load(S[r] + v * LANES), slope = load(T[r] + v * LANES);
            if constexpr (SIGMOID)
                w[v] = sigmoid_(s * unit[v]);
            else if constexpr (PARTS == 1)
                w[v] = exp2_rough(vmin(vf{}, s * unit[v] - lse[v]));  // in this order a NaN stays
            else
                w[v] = exp2_neg(vmin(vf{}, s * unit[v] - lse[v]));
            if (part.masked) w[v] = select(x.mask[i.turn].at[part.first + r][v], w[v], vf{});
            d[v] = SIGMOID ? slope * (w[v] - w[v] * w[v]) : w[v] * (slope - delta[v]);
        }
    };
    auto two = [&](int r, auto slot) INLINE_LAMBDA {
        vf a[2], b[2], da[2], db[2];
        row(r, a, da);
        pin(a[0]), pin(a[1]);
        slot(0);
        row(r + 1, b, db);
        pin(b[0]), pin(b[1]);
        slot(1);
        put_weights(i.slot, r, a, b, x);
        slot(2);
        if constexpr (HOOKED) {
            UNROLL for (int v = 0; v < 2; ++v)
                store(T[r] + v * LANES, da[v]), store(T[r + 1] + v * LANES, db[v]);
        } else {
            put_slopes(i, r, da, db, x);
        }
        slot(3);
    };
    for (int r = 0; r < i.blocks() * TILE_K; r += 4) {
        for (int n = 1; n < EACH_FOUR; ++n) work.step();
        work.begin();
        UNROLL for (int k = 0; k < 2; ++k)
            two(r + 2 * k, [&](int at) INLINE_LAMBDA { work.slot(4 * k + at, 8); });
        work.end();
    }
    if constexpr (HOOKED) {
        hooks(c, g, t, i.p, i.j0, part, T[0], (long)PANEL, x);
        for (int r = 0; r < i.blocks() * TILE_K; r += 2) {
            vf a[2], b[2];
            UNROLL for (int v = 0; v < 2; ++v)
                a[v] = load(T[r] + v * LANES), b[v] = load(T[r + 1] + v * LANES);
            put_slopes(i, r, a, b, x);
        }
    }
}

// Whether everything was finite.
static bool run(const Call& c, const Grads& g, const Task& t, const bf16* packed, float scale,
                float cap, float* dk, float* dv) {
    State x;
    x.begin(c, g, t, scale);
    x.left = vf{};
    load_rows(c, g, t, scale, cap, x);
    Item now{}, old{};  // the item whose scores are there; the one before it
    Item begun{};       // the first of `count` panels that are to be added to dK and dV together
    bool has_now = false, has_old = false;
    int count = 0, turn = 0;
    auto advance = [&](const Item* next) {
        Work work;
        if (next) ask_scores(*next, packed, x, work);
        if (has_old) {
            ask_queries(old, packed, x, work);
            if (count++ == 0) begun = old;
            const bool more = has_now && now.slot == old.slot + 1 && now.slot % GATHERED != 0;
            if (!more) ask_keys(begun, count, dk, dv, x, work), count = 0;
        }
        if (has_now) weigh(c, g, t, now, cap, x, work);
        while (!work.done()) work.step();
        old = now, has_old = has_now;
        has_now = next != nullptr;
        if (next) now = *next;
    };
    walk(c, t, x.rows, [&](int j0, int n, bool full) {
        for (int p = 0; p * PANEL < t.rows; ++p) {
            Item next{p, j0, {0, n, false}, turn, 0};
            if (!full) next.part = x.mask[turn].fill(c, t, x.rows, p, j0, n);
            if (next.part.rows == 0) continue;
            // Side by side with the one before it, if they have the same keys.
            const bool same = has_now && now.j0 == j0 && now.part.first == next.part.first &&
                              now.blocks() == next.blocks() && now.p + 1 == p;
            next.slot = (same ? now.slot + 1 : now.slot / GATHERED * GATHERED + GATHERED);
            next.slot %= 2 * GATHERED;
            advance(&next);
            turn ^= 1;
        }
    });
    advance(nullptr);
    advance(nullptr);
    write_rows(c, g, t, x);
    return !odd_left(x.left);
}

// Tiles of a block of 32 keys of a (batch row, KV head). Whether all is finite.
static inline bool pack_block(const Call& c, long head, bf16* to, long block) {
    long b = head / c.Hkv, h = head % c.Hkv, n0 = block * TILE_K;
    long end = c.key_lengths && c.key_lengths[b] < c.N ? c.key_lengths[b] : c.N;
    int n = (int)(end < n0 ? 0 : end - n0 < TILE_K ? end - n0 : TILE_K);
    const io_t* keys = c.k + b * c.k_b + h * c.k_h + n0 * c.k_n;
    const io_t* values = c.v + b * c.v_b + h * c.v_h + n0 * c.v_n;
    to += block * BLOCK;
    bool odd = pack_keys<DK, false>(n, keys, c.k_n, to);
    pack_values<DK>(n, keys, c.k_n, to + K_BLOCK);
    odd |= pack_keys<DV, false>(n, values, c.v_n, to + 2 * K_BLOCK);
    return !odd;
}

}  // namespace

// Whether all inputs were finite; otherwise what was written means nothing.
EXPORT int backward(const Call* call, const Grads* grads, float scale, float cap) {
    const Call& c = *call;
    const Grads& g = *grads;
    int finite = 1;
#pragma omp parallel num_threads((int)c.threads) reduction(&& : finite)
    {
        Tiles session;
        const long heads = c.B * c.Hkv, blocks = (c.N + TILE_K - 1) / TILE_K;
        const long rows = blocks * TILE_K;
        // A few heads at a time: their tiles are used while they are near.
        for (long first = 0; first < heads; first += c.slots) {
            const long some = heads - first < c.slots ? heads - first : c.slots;
            bf16* packed = (bf16*)c.k_ready;
#pragma omp for schedule(static)
            for (long x = 0; x < some * blocks; ++x)
                finite &= pack_block(c, first + x / blocks, packed + x / blocks * c.kr_h, x % blocks);
#pragma omp for schedule(dynamic, 1)
            for (long x = 0; x < some * g.slices; ++x) {
                const long unit = first * g.slices + x;
                float *dk = g.sum_k + unit * rows * DKP, *dv = g.sum_v + unit * rows * DVP;
                memset(dk, 0, sizeof(float) * rows * DKP);
                memset(dv, 0, sizeof(float) * rows * DVP);
                each_task(c, g, unit, [&](const Task& t) {
                    finite &= run(c, g, t, packed + x / g.slices * c.kr_h, scale, cap, dk, dv);
                });
            }
        }
        if (!g.direct) {
            sum_slices<DK, DKP>(c, g, rows, g.sum_k, g.dk);
            sum_slices<DV, DVP>(c, g, rows, g.sum_v, g.dv);
        }
    }
    return finite;
}
