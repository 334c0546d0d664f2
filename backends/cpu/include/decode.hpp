// Attention of a few new tokens to a cache, bound by memory bandwidth: every key and value is read
// once for all query heads of its group. Work is split over batch rows, KV heads and ranges of keys;
// ranges are merged by their log-sum-exp.
//
// bf16 keys are multiplied on tile registers (TILED) and bf16 values in pairs of keys (PAIRED), with
// weights rounded to bf16; sums are float.
//
// Constants of the unit: DK, DV, HAS_SOFTCAP, HAS_SINKS, PAGED, GATHERED, TILED (if 32 divides DK),
// PAIRED (if 32 divides DV); type io_t.
#pragma once
#include "math.hpp"
#include "pack.hpp"
#include "tiles.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Every field has 8 bytes; the order is that of `decode.py`.
struct Call {
    const io_t *q, *k, *v;
    io_t* out;
    float* lse;
    const float* sinks;
    const int32_t *lengths, *pages, *index;
    float* scratch;
    long B, H, Hkv, n;
    long slots;  // of a batch row; of a page
    long ring, table;  // table: entries of `pages` or `index` in a row
    long q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n;  // k_b, v_b: of a page if PAGED
    long splits, threads;
};

namespace {

constexpr float INF = __builtin_inff();
constexpr int BLOCK = GATHERED ? 64 : 256;   // keys at a time
constexpr int HALF = BLOCK / 2, GRAIN = 64;  // ranges of keys are multiples of GRAIN
// Rows that are asked for before they are needed, into the first cache and into the second.
constexpr int NEAR = sizeof(io_t) == 2 ? 16 : 4, FAR = NEAR == 16 ? 24 : 8;
constexpr int AT_ONCE = sizeof(io_t) == 2 ? 8 : 4;
constexpr int GROUP = LANES == 16 ? 4 : 3;   // query rows at a time
constexpr int KEYS = 4;                      // keys of a step of the dot products

// A row of D numbers is KV vectors; the last one overlaps the one before it where LANES does not
// divide D, so that nothing outside the row is read.
template <int D> struct Row {
    static constexpr int VECTORS = (D + LANES - 1) / LANES, WIDTH = VECTORS * LANES;
    static ALWAYS_INLINE int at(int v) {
        return D < LANES ? 0 : v * LANES < D - LANES ? v * LANES : D - LANES;
    }
    template <class T> static ALWAYS_INLINE vf get(const T* p, int v) {
        if constexpr (D < LANES)
            return load_part(p, D);
        else
            return load(p + at(v));
    }
};
using KRow = Row<DK>;
using VRow = Row<DV>;

// Four query rows are columns of a tile: numbers 2i and 2i + 1 of each follow those of 2i - 2.
constexpr int COLUMNS = 4, QWIDTH = TILED ? DK / 2 * COLUMNS : KRow::WIDTH;

// What one item has accumulated: O in units of its largest score m, and the sum l of weights.
struct Partial {
    float *q, *O, *m, *l;
    static long floats(long rows) { return rows * (QWIDTH + VRow::WIDTH + 2); }
    Partial(const Call& c, long item, long rows) {
        q = c.scratch + item * floats(rows);
        O = q + rows * QWIDTH;
        m = O + rows * VRow::WIDTH;
        l = m + rows;
    }
};

struct Block {
    const io_t *k, *v;
    long ks, vs;
    int n;
};

// Neighbours summed: (a0 + a1, a2 + a3, b0 + b1, b2 + b3) in each group of four lanes.
template <int... L>
static ALWAYS_INLINE vf sum_pairs(vf a, vf b, std::integer_sequence<int, L...>) {
    return SHUFFLE(a, b, ((L & ~3) + (L & 1) * 2 + (L & 2) / 2 * LANES)...) +
           SHUFFLE(a, b, ((L & ~3) + (L & 1) * 2 + (L & 2) / 2 * LANES + 1)...);
}

// Sums of four vectors in the first four lanes.
static ALWAYS_INLINE vf sum_four(const vf* x) {
    std::make_integer_sequence<int, LANES> all;
    vf s = sum_pairs(sum_pairs(x[0], x[1], all), sum_pairs(x[2], x[3], all), all);
    if constexpr (LANES >= 16) s += detail::exchange<LANES / 2>(s);
    if constexpr (LANES >= 8) s += detail::exchange<4>(s);
    return s;
}

// A whole block is read as two streams, its halves: a core has more reads under way so than with one.
// Step t, in steps of STEP keys, is at key ordered(t).
template <int STEP> static ALWAYS_INLINE int ordered(int t, int n) {
    return n == BLOCK ? t / STEP % 2 * HALF + t / (2 * STEP) * STEP : t;
}

// At rows j ... j + AT_ONCE - 1 of a matrix of rows of D numbers: what is wanted soon, rows ahead in
// the same half or, behind its end, rows of the matrix that is read next.
template <int D> struct Ahead {
    const io_t *near, *far;
    long near_s, far_s;
    ALWAYS_INLINE Ahead(const io_t* now, long ns, const io_t* next, long next_s, int j) {
        const bool a = j % HALF + NEAR < HALF, b = j % HALF + FAR < HALF;
        near = a ? now + (j + NEAR) * ns : next + (j + NEAR - HALF) * next_s;
        far = b ? now + (j + FAR) * ns : next + (j + FAR - HALF) * next_s;
        near_s = a ? ns : next_s;
        far_s = b ? ns : next_s;
    }
    ALWAYS_INLINE void ask(int row) const {
        UNROLL for (int b = 0; b < D * (int)sizeof(io_t); b += 64) {
            __builtin_prefetch((const char*)(near + row * near_s) + b);
            __builtin_prefetch((const char*)(far + row * far_s) + b, 0, 2);
        }
    }
};

// S[r][j] = q_r . k_j
template <int R>
static ALWAYS_INLINE void dots(const Block& x, const float* q, float (*S)[BLOCK + LANES]) {
    for (int t = 0; t < x.n; t += KEYS) {
        const int j = ordered<KEYS>(t, x.n);
        Ahead<DK> ahead(x.k, x.ks, x.v, x.vs, j);
        vf acc[R][KEYS] = {};
        const io_t* k[KEYS];
        UNROLL for (int i = 0; i < KEYS; ++i) {
            int row = j + i < x.n ? j + i : x.n - 1;
            k[i] = x.k + row * x.ks;
            ahead.ask(i);
        }
        for (int c = 0; c < KRow::VECTORS; ++c) {
            vf z[R];
            UNROLL for (int r = 0; r < R; ++r) z[r] = load(q + r * KRow::WIDTH + c * LANES);
            UNROLL for (int i = 0; i < KEYS; ++i) {
                vf y = KRow::get(k[i], c);
                UNROLL for (int r = 0; r < R; ++r) acc[r][i] += z[r] * y;
            }
        }
        UNROLL for (int r = 0; r < R; ++r) {
            vf four = sum_four(acc[r]);
            memcpy(S[r] + j, &four, KEYS * sizeof(float));
        }
    }
}

#if defined(__AMX_BF16__)
// Tiles 4 and 5: 16 keys by 32 numbers; 6 and 7: 32 numbers by 4 queries; 0: 16 keys by 4 queries.
struct DecodeTiles {
    DecodeTiles() {
        alignas(64) uint8_t config[64] = {1};
        for (int t : {0, 4, 5, 6, 7}) {
            config[16 + 2 * t] = t == 4 || t == 5 ? 64 : 4 * COLUMNS;
            config[48 + t] = TILE;
        }
        asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~DecodeTiles() { asm volatile("tilerelease" ::: "memory"); }
    DecodeTiles(const DecodeTiles&) = delete;
};
#else
using DecodeTiles = Tiles;
#endif

template <int Q, int... L>
static ALWAYS_INLINE vf column_pair(const float* s, std::integer_sequence<int, L...>) {
    // Columns Q and Q + 1 of 8 keys: lanes of (keys 0 ... 3, keys 4 ... 7).
    return SHUFFLE(load(s), load(s + 16), (L % 8 * 4 + L / 8 + Q)...);
}
template <int... L>
static ALWAYS_INLINE void two_columns(vf a, vf b, float* x, float* y, float factor,
                                      std::integer_sequence<int, L...>) {
    store(x, SHUFFLE(a, b, (L % 8 + L / 8 * 16)...) * factor);
    store(y, SHUFFLE(a, b, (L % 8 + L / 8 * 16 + 8)...) * factor);
}

// The same on tile registers: S[r][j] = factor q_r . k_j, q as pairs.
template <int R>
static ALWAYS_INLINE void dots_tiled(const Block& x, const void* q, float factor,
                                     float (*S)[BLOCK + LANES]) {
    constexpr int CHUNKS = DK / TILE_K;
    constexpr long Q_TILE = TILE * COLUMNS * 4;  // bytes
    std::make_integer_sequence<int, 16> all;
    const char* qs = (const char*)q;
    tile_load<6>(qs, COLUMNS * 4);
    if (CHUNKS > 1) tile_load<7>(qs + Q_TILE, COLUMNS * 4);
    for (int t = 0; t < x.n; t += TILE) {
        const int j = ordered<TILE>(t, x.n);
        UNROLL for (int i = 0; i < TILE; i += AT_ONCE) {
            Ahead<DK> ahead(x.k, x.ks, x.v, x.vs, j + i);
            UNROLL for (int e = 0; e < AT_ONCE; ++e) ahead.ask(e);
        }
        alignas(64) io_t rest[TILED ? TILE * DK : 1];
        const io_t* k = x.k + j * x.ks;
        long ks = x.ks;
        if (x.n - j < TILE) {  // nothing behind the last key is read
            memset(rest, 0, sizeof rest);
            for (int i = j; i < x.n; ++i)
                memcpy(rest + (i - j) * DK, x.k + i * x.ks, DK * sizeof(io_t));
            k = rest;
            ks = DK;
        }
        tile_zero<0>();
        for (int c = 0; c < CHUNKS; c += 2) {
            if (CHUNKS > 2) {
                tile_load<6>(qs + c * Q_TILE, COLUMNS * 4);
                if (c + 1 < CHUNKS) tile_load<7>(qs + (c + 1) * Q_TILE, COLUMNS * 4);
            }
            tile_load<4>(k + c * TILE_K, ks * 2);
            tile_multiply<0, 4, 6>();
            if (c + 1 < CHUNKS) {
                tile_load<5>(k + (c + 1) * TILE_K, ks * 2);
                tile_multiply<0, 5, 7>();
            }
        }
        alignas(64) float s[TILE * COLUMNS + 16];
        tile_store<0>(s, COLUMNS * 4);
        two_columns(column_pair<0>(s, all), column_pair<0>(s + 32, all), S[0] + j,
                    S[R > 1 ? 1 : R] + j, factor, all);
        if (R > 2)
            two_columns(column_pair<2>(s, all), column_pair<2>(s + 32, all), S[R > 2 ? 2 : R] + j,
                        S[R > 3 ? 3 : R] + j, factor, all);
    }
}

// exp(s - m) is taken as 2^(s log2(e) - base), one multiply-add, base rounded once.
static ALWAYS_INLINE float base_of(float m) { return m == -INF ? 0.0f : m * LOG2E; }
static ALWAYS_INLINE float shrinkage(float m, float base) {
    return exp2_neg(splat(m == -INF ? m : base_of(m) - base))[0];
}

// Scores of a row to weights; what is there already shrinks by the result.
static ALWAYS_INLINE float weigh(float* S, int n, float cap, float& m, float& l) {
    for (int j = n; j < (n + LANES - 1) / LANES * LANES; ++j) S[j] = -INF;
    vf top = splat(-INF);
    for (int j = 0; j < n; j += LANES) {
        vf s = load(S + j);
        if constexpr (HAS_SOFTCAP) {
            s = select(s == -INF, s, tanh_(s) * cap);
            store(S + j, s);
        }
        top = vmax(s, top);
    }
    float larger = max_lanes(top);
    larger = larger > m ? larger : m;
    float base = base_of(larger);
    vf sum{};
    for (int j = 0; j < n; j += LANES) {
        vf w = exp2_neg(load(S + j) * LOG2E - base);
        sum += w;
        store(S + j, w);
    }
    float shrink = shrinkage(m, base);
    m = larger;
    l = l * shrink + sum_lanes(sum);
    return shrink;
}

// O_r = shrink_r O_r + sum_j S[r][j] v_j
template <int R, int NV>
static ALWAYS_INLINE void values_part(const Block& x, int n, int first, float* O,
                                      const float (*S)[BLOCK + LANES], const float* shrink) {
    const io_t* v = x.v;
    const long vs = x.vs;
    vf acc[R][NV];
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int c = 0; c < NV; ++c)
            acc[r][c] = load(O + r * VRow::WIDTH + (first + c) * LANES) * shrink[r];
    for (int t = 0; t < n; t += AT_ONCE) {
        const int j = ordered<AT_ONCE>(t, n);
        Ahead<DV> ahead(v, vs, x.k + BLOCK * x.ks, x.ks, j);
        for (int i = 0; i < AT_ONCE && t + i < n; ++i) {
            if (first == 0) ahead.ask(i);
            vf w[R];
            UNROLL for (int r = 0; r < R; ++r) w[r] = splat(S[r][j + i]);
            UNROLL for (int c = 0; c < NV; ++c) {
                vf y = VRow::get(v + (j + i) * vs, first + c);
                UNROLL for (int r = 0; r < R; ++r) acc[r][c] += w[r] * y;
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int c = 0; c < NV; ++c)
            store(O + r * VRow::WIDTH + (first + c) * LANES, acc[r][c]);
}

// The same with two bf16 keys in a product: O holds even and odd numbers of 32 apart.
template <int R, int NC>
static ALWAYS_INLINE void values_paired_part(const Block& x, int n, int first, float* O,
                                             const pair (*W)[BLOCK / 2], const float* shrink) {
    vf acc[R][2 * NC];
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int c = 0; c < 2 * NC; ++c)
            acc[r][c] = load(O + r * VRow::WIDTH + (2 * first + c) * LANES) * shrink[r];
    auto two = [&](int j, bool odd) INLINE_LAMBDA {
        const int32_t* a = (const int32_t*)(x.v + j * x.vs) + first * LANES;
        const int32_t* b = (const int32_t*)(x.v + (j + 1) * x.vs) + first * LANES;
        UNROLL for (int c = 0; c < NC; ++c) {
            vi u = load(a + c * LANES), w = odd ? vi{} : load(b + c * LANES);
            vi low = (u & 0xffff) | (w << 16);
            vi high = (vi)((vu)u >> 16) | (w & (int32_t)0xffff0000);
            UNROLL for (int r = 0; r < R; ++r) {
                vi weight = splat(W[r][j / 2].bits);
                acc[r][2 * c] = detail::multiply_add(weight, low, acc[r][2 * c]);
                acc[r][2 * c + 1] = detail::multiply_add(weight, high, acc[r][2 * c + 1]);
            }
        }
    };
    for (int t = 0; t < n; t += AT_ONCE) {
        const int j = ordered<AT_ONCE>(t, n);
        Ahead<DV> ahead(x.v, x.vs, x.k + BLOCK * x.ks, x.ks, j);
        for (int i = 0; i < AT_ONCE && t + i < n; i += 2) {
            if (first == 0) {
                ahead.ask(i);
                ahead.ask(i + 1);
            }
            two(j + i, t + i + 1 == n);
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int c = 0; c < 2 * NC; ++c)
            store(O + r * VRow::WIDTH + (2 * first + c) * LANES, acc[r][c]);
}

template <int R>
static ALWAYS_INLINE void values_paired(const Block& x, int n, float* O,
                                        const float (*S)[BLOCK + LANES], const float* shrink) {
    alignas(64) pair W[R][BLOCK / 2];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < n; j += 2 * LANES)
            store((float*)(W[r] + j / 2),
                  in_order(load(S[r] + j), j + LANES < n ? load(S[r] + j + LANES) : vf{}));
    constexpr int CHUNKS = DV / 32, NC = CHUNKS < 2 ? 1 : 2;
    int c = 0;
    for (; c + NC <= CHUNKS; c += NC) values_paired_part<R, NC>(x, n, c, O, W, shrink);
    for (; c < CHUNKS; ++c) values_paired_part<R, 1>(x, n, c, O, W, shrink);
}

template <int R>
static ALWAYS_INLINE void values(const Block& x, int n, float* O, const float (*S)[BLOCK + LANES],
                                 const float* shrink) {
    if constexpr (PAIRED) return values_paired<R>(x, n, O, S, shrink);
    constexpr int NV = VRow::VECTORS < 4 ? VRow::VECTORS : 4;
    int c = 0;
    for (; c + NV <= VRow::VECTORS; c += NV) values_part<R, NV>(x, n, c, O, S, shrink);
    for (; c < VRow::VECTORS; ++c) values_part<R, 1>(x, n, c, O, S, shrink);
}

// R query rows against a block; row r sees its first seen[r] keys.
template <int R>
static __attribute__((noinline)) void rows_of(const Block& x, long row, const int* seen,
                                              float factor, float cap, Partial& part) {
    alignas(64) float S[R + (TILED ? 1 : 0)][BLOCK + LANES];  // tiles have one column more
    float shrink[R];
    if constexpr (TILED)
        dots_tiled<R>(x, part.q + row * QWIDTH, factor, S);
    else
        dots<R>(x, part.q + row * QWIDTH, S);
    bool whole = true;
    for (int r = 0; r < R; ++r) {
        whole = whole && seen[r] >= x.n;
        int n = seen[r] < x.n ? seen[r] : x.n;
        shrink[r] = n > 0 ? weigh(S[r], n, cap, part.m[row + r], part.l[row + r]) : 1.0f;
    }
    float* O = part.O + row * VRow::WIDTH;
    if (whole) {
        values<R>(x, x.n, O, S, shrink);
        return;
    }
    // A hidden value may be NaN: it is not multiplied by 0 but left out.
    for (int r = 0; r < R; ++r)
        if (seen[r] > 0)
            values<1>(x, seen[r] < x.n ? seen[r] : x.n, O + r * VRow::WIDTH, S + r, shrink + r);
}

static inline void serve(const Call& c, const Block& x, long rows, const int* seen, float factor,
                         float cap, Partial& part) {
    long r = 0;
    for (; rows - r >= 2 * GROUP || rows - r == GROUP; r += GROUP)
        rows_of<GROUP>(x, r, seen + r, factor, cap, part);
    while (r < rows) {
        // Two even parts rather than a full one and a single row.
        int left = (int)(rows - r), take = left > GROUP ? (left + 1) / 2 : left;
        if (take == 1)
            rows_of<1>(x, r, seen + r, factor, cap, part);
        else if (take == 2)
            rows_of<2>(x, r, seen + r, factor, cap, part);
        else if (take == 3)
            rows_of<3>(x, r, seen + r, factor, cap, part);
        else
            rows_of<GROUP>(x, r, seen + r, factor, cap, part);
        r += take;
    }
}

// Keys that row b of the batch has.
static inline long count_keys(const Call& c, long b, long kv) {
    if constexpr (GATHERED) {
        const int32_t* index = c.index + (b * c.Hkv + kv) * c.table;
        long n = 0;
        while (n < c.table && index[n] >= 0) ++n;
        return n;
    }
    long most = PAGED ? c.table * c.slots : c.slots;
    long n = c.lengths ? c.lengths[b] : most;
    return n < 0 ? 0 : n < most ? n : most;
}

static void run(const Call& c, long item, float scale, float cap) {
    long split = item % c.splits, kv = item / c.splits % c.Hkv, b = item / c.splits / c.Hkv;
    long group = c.H / c.Hkv, rows = group * c.n;
    Partial part(c, item, rows);
    float factor = HAS_SOFTCAP ? scale / cap : scale;
    memset(part.q, 0, sizeof(float) * rows * (QWIDTH + VRow::WIDTH));
    auto query = [&](long r) {
        return c.q + b * c.q_b + (kv * group + r / c.n) * c.q_h + r % c.n * c.q_n;
    };
    for (long r = 0; r < rows; ++r) {
        const io_t* q = query(r);
        // The columns of a tile that begins at row r; the group may be shorter.
        if constexpr (TILED)
            for (int i = 0; i < COLUMNS && r + i < rows; ++i)
                for (int d = 0; d < DK / 2; ++d)
                    memcpy((pair*)(part.q + r * QWIDTH) + d * COLUMNS + i, query(r + i) + 2 * d, 4);
        else for (int d = 0; d < DK; ++d) {
            int at = d / LANES * LANES + d % LANES;
            if (DK > LANES && d >= DK / LANES * LANES) at = d - (DK - LANES) + DK / LANES * LANES;
            part.q[r * KRow::WIDTH + at] = to_float(q[d]) * factor;
        }
        part.m[r] = -INF;
        part.l[r] = 0.0f;
    }
    long keys = count_keys(c, b, kv);
    long share = (keys + c.splits - 1) / c.splits;
    share = (share + GRAIN - 1) / GRAIN * GRAIN;
    long begin = split * share, end = begin + share < keys ? begin + share : keys;
    alignas(64) io_t gathered_k[GATHERED ? BLOCK * DK : 1], gathered_v[GATHERED ? BLOCK * DV : 1];
    int seen[4 * 1024];
    for (long at = begin; at < end;) {
        Block x{c.k + kv * c.k_h, c.v + kv * c.v_h, c.k_n, c.v_n, 0};
        x.n = (int)(end - at < BLOCK ? end - at : BLOCK);
        if constexpr (PAGED) {
            long page = c.pages[b * c.table + at / c.slots], row = at % c.slots;
            if (c.slots - row < x.n) x.n = (int)(c.slots - row);
            x.k += page * c.k_b + row * c.k_n;
            x.v += page * c.v_b + row * c.v_n;
        } else if constexpr (GATHERED) {
            const int32_t* index = c.index + (b * c.Hkv + kv) * c.table + at;
            for (int j = 0; j < x.n; ++j) {
                memcpy(gathered_k + j * DK, x.k + b * c.k_b + index[j] * c.k_n, DK * sizeof(io_t));
                memcpy(gathered_v + j * DV, x.v + b * c.v_b + index[j] * c.v_n, DV * sizeof(io_t));
            }
            x = {gathered_k, gathered_v, DK, DV, x.n};
        } else {
            x.k += b * c.k_b + at * c.k_n;
            x.v += b * c.v_b + at * c.v_n;
        }
        // Of n new tokens, token r sees the keys up to keys - n + r.
        for (long r = 0; r < rows; ++r) {
            long last = GATHERED || c.ring ? keys : keys - c.n + r % c.n + 1;
            seen[r] = (int)(last - at < 0 ? 0 : last - at < x.n ? last - at : x.n);
        }
        serve(c, x, rows, seen, factor, cap, part);
        at += x.n;
    }
}

struct NoTiles {};
using Session = std::conditional_t<TILED, DecodeTiles, NoTiles>;

// The row of a head from its parts.
static void merge(const Call& c, long b, long h, long t) {
    long group = c.H / c.Hkv, rows = group * c.n, kv = h / group, row = h % group * c.n + t;
    float m = HAS_SINKS ? c.sinks[h] : -INF;
    float l = HAS_SINKS ? exp2_neg(splat(m * LOG2E) - base_of(m))[0] : 0.0f;
    alignas(64) float O[VRow::WIDTH] = {};
    for (long s = 0; s < c.splits; ++s) {
        Partial part(c, (b * c.Hkv + kv) * c.splits + s, rows);
        float mine = part.m[row], larger = mine > m ? mine : m;
        float base = base_of(larger), old = shrinkage(m, base), now = shrinkage(mine, base);
        for (int d = 0; d < VRow::WIDTH; ++d)
            O[d] = O[d] * old + part.O[row * VRow::WIDTH + d] * now;
        l = l * old + part.l[row] * now;
        m = larger;
    }
    float inverse = l == 0.0f ? 0.0f : 1.0f / l;
    long at = (b * c.H + h) * c.n + t;
    for (int v = 0; v < VRow::VECTORS; ++v)
        for (int i = 0; i < LANES && VRow::at(v) + i < DV; ++i)
            c.out[at * DV + (PAIRED ? v / 2 * 32 + 2 * i + v % 2 : VRow::at(v) + i)] =
                from_float<io_t>(O[v * LANES + i] * inverse);
    c.lse[at] = l == 0.0f ? -INF : m + (__builtin_log2f(l) - (m * LOG2E - base_of(m))) * LN2;
}

}  // namespace

EXPORT void decode(const Call* call, float scale, float cap) {
    const Call& c = *call;
    long items = c.B * c.Hkv * c.splits;
    if (c.threads == 1) {
        [[maybe_unused]] Session session;
        for (long x = 0; x < items; ++x) run(c, x, scale, cap);
        for (long x = 0; x < c.B * c.H * c.n; ++x)
            merge(c, x / c.n / c.H, x / c.n % c.H, x % c.n);
        return;
    }
#pragma omp parallel num_threads((int)c.threads)
    {
        [[maybe_unused]] Session session;
#pragma omp for schedule(dynamic, 1)
        for (long x = 0; x < items; ++x) run(c, x, scale, cap);
#pragma omp for schedule(static)
        for (long x = 0; x < c.B * c.H * c.n; ++x)
            merge(c, x / c.n / c.H, x / c.n % c.H, x % c.n);
    }
}
