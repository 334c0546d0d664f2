// Block-sparse attention, forward, on tile registers: out and log-sum-exp. See attention.hpp.
//
// The products of a panel of PANEL = 32 queries with 32 keys are four tiles. bf16 keys are read as
// they lie, 16 keys of 32 numbers a tile, V from tiles of 16 columns by 32 keys made once for each
// KV head; rows behind the last key are 0. The multiplication is so fast that the exponentials are
// what takes time: weights are taken from the bare products by one multiply-add, and sums shrink
// only where a maximum has moved far. Keys and values of a few heads are packed, used, packed over.
// A float32 number is PARTS = 3 bf16 numbers (tiles.hpp): those of K and V are made once for each KV
// head, those of Q once for a task, those of the weights tile by tile. An infinity times a part that
// is 0 would be NaN, so blocks of 32 keys with a number that is not finite are marked, and taken in
// float32 one by one.
#pragma once
#include "attention_out.hpp"
#include "attention_tile_weights.hpp"

namespace {

// A stretch of keys that a task has to visit; ROUND of them are taken at a time.
struct Visit {
    int j0, n;
    bool full;
};
constexpr int ROUND = (PARTS == 1 ? 2048 : 512) / KROWS;

static inline void ask_keys(const Item& i, const bf16* k, State& x, Queue& queue) {
    queue.k = (const char*)(k + (i.j0 + i.part.first) / TILE_K * K_BLOCK);
    queue.q = (const char*)x.Q[i.p];
    queue.s = x.S[i.turn][0];
    queue.k_blocks = (i.part.rows + TILE_K - 1) / TILE_K;
    queue.after = queue.k + queue.k_blocks * K_BLOCK * 2;
}
static inline void ask_values(const Item& i, const bf16* v, State& x, Queue& queue) {
    queue.v = (const char*)(v + (i.j0 + i.part.first) / TILE_K * V_BLOCK);
    queue.p = (const char*)x.P[i.turn];
    queue.o = x.O[i.p][0];
    queue.v_blocks = DVP / 32;
    queue.v_steps = (i.part.rows + TILE_K - 1) / TILE_K;
    queue.coarse = i.coarse;
}

static inline void multiply_plain(const Call& c, const Task& t, const Item& i, State& x) {
    const io_t* k = c.k + t.b * c.k_b + t.kv * c.k_h + (i.j0 + i.part.first) * c.k_n;
    for (int v = 0; v < PANEL_VECTORS; ++v) {
        vf q[DK];
        for (int d = 0; d < DK; ++d) {
            q[d] = vf{};
            for (int part = PARTS - 1; part >= 0; --part) {
                vi both = load((const int32_t*)x.Q[i.p][d / TILE_K][part][d / 2 % TILE] + v * LANES);
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

// first: the first (batch row, KV head) of those that k_ready and v_ready hold.
static void run(const Call& c, const Task& t, long first, float scale, float cap) {
    State x;
    x.rows.fill(c, t);
    load_queries(c, t, scale, cap, x);
    x.keys = 0;
    if (MAY_CUT) walk(c, t, x.rows, [&](int, int n, bool full) { x.keys += full ? n : 0; });
    const long head = t.b * c.Hkv + t.kv, slot = head - first;
    const bf16* k = (const bf16*)c.k_ready;
    k += c.pack_k ? slot * c.kr_h : t.b * c.kr_b + t.kv * c.kr_h;
    const bf16* v = (const bf16*)c.v_ready + slot * c.vr_h;
    const uint8_t* marks = c.marks + head * ((c.N + TILE_K - 1) / TILE_K);
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
            now.coarse = !now.plain_values && spread(now.p, x);
            x.seen[now.p] += now.part.rows;
            if (now.plain_values)
                weigh<true, false>(now, x, queue);
            else if (now.coarse)
                weigh<false, MAY_CUT>(now, x, queue);
            else
                weigh<false, false>(now, x, queue);
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
    int turn = 0, count = 0;
    Visit visits[ROUND];
    // All of a round for one panel before the next: its queries and sums stay in the first cache,
    // keys and values of the round in the second.
    auto sweep = [&]() {
        for (int p = 0; p * PANEL < t.rows; ++p)
            for (int at = 0; at < count; ++at) {
                const Visit& visit = visits[at];
                const int j0 = visit.j0;
                Item next{p, j0, {0, visit.n, false}, false, false, turn, false};
                if (!visit.full) next.part = x.mask[turn].fill(c, t, x.rows, p, j0, visit.n);
                if (next.part.rows == 0) continue;
                uint8_t odd = 0;
                int end = next.part.first + next.part.rows;
                for (int j = next.part.first; j < end; j += TILE_K) odd |= marks[(j0 + j) / TILE_K];
                next.plain_values = (odd & VALUE_MARK) && (PARTS > 1 || next.part.masked);
                next.plain_keys = PARTS > 1 && ((odd & KEY_MARK) || x.odd_queries[p]);
                advance(&next);
                turn ^= 1;
            }
        count = 0;
    };
    walk(c, t, x.rows, [&](int j0, int n, bool full) {
        visits[count++] = {j0, n, full};
        if (count == ROUND) sweep();
    });
    sweep();
    advance(nullptr);
    advance(nullptr);
    write_out(c, t, x);
}

// Tiles of a block of 32 keys of a (batch row, KV head).
static inline void pack_block(const Call& c, long head, long slot, long block) {
    long b = head / c.Hkv, h = head % c.Hkv, n0 = block * TILE_K;
    int n = (int)(c.N - n0 < TILE_K ? c.N - n0 : TILE_K);
    uint8_t marks = 0;
    bf16 *k = (bf16*)c.k_ready + slot * c.kr_h, *v = (bf16*)c.v_ready + slot * c.vr_h;
    const io_t* keys = c.k + b * c.k_b + h * c.k_h + n0 * c.k_n;
    const io_t* values = c.v + b * c.v_b + h * c.v_h + n0 * c.v_n;
    if (c.pack_k && pack_keys<DK>(n, keys, c.k_n, k + block * K_BLOCK)) marks |= KEY_MARK;
    if (pack_values<DV>(n, values, c.v_n, v + block * V_BLOCK)) marks |= VALUE_MARK;
    c.marks[head * ((c.N + TILE_K - 1) / TILE_K) + block] = marks;
}

}  // namespace

EXPORT void forward(const Call* call, float scale, float cap) {
    const Call& c = *call;
#pragma omp parallel num_threads((int)c.threads)
    {
        Tiles session;
        const long heads = c.B * c.Hkv, blocks = (c.N + TILE_K - 1) / TILE_K;
        const long tasks = task_count(c) / heads;
        // A few heads at a time: their keys and values are used while they are near.
        for (long first = 0; first < heads; first += c.slots) {
            const long some = heads - first < c.slots ? heads - first : c.slots;
#pragma omp for schedule(static)
            for (long x = 0; x < some * blocks; ++x)
                pack_block(c, first + x / blocks, x / blocks, x % blocks);
#pragma omp for schedule(dynamic, 1)
            for (long x = 0; x < some * tasks; ++x)
                run(c, task_at(c, first * tasks + x), first, scale, cap);
        }
    }
}
