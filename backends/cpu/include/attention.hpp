// What the forward and backward kernels of block-sparse attention share: the call, visible keys,
// masks of tiles, the walk over a schedule.
//
// Constants of the unit: DK, DV, QROWS (rows of a task), KROWS (keys of a tile), HAS_SOFTCAP,
// SIGMOID, HAS_SINKS, HAS_SLOPES, HAS_BIAS, HAS_TEMPERATURE, LISTS, KEY_STEP (keys are
// taken in multiples of it, a power of 2); types io_t, bias_t; the function `allowed`
// (predicate.hpp).
//
// Everything is computed transposed: a vector holds LANES queries, a row of a tile is a key. So K
// and V are broadcast from where they lie (A of a GEMM may have any strides), sums over keys are
// plain vector sums, and only Q is transposed, once for each query block.
#pragma once
#include "pack.hpp"
#include "predicate.hpp"

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr float INF = __builtin_inff();
constexpr int PANELS = QROWS / PANEL;
constexpr bool HOOKED = HAS_SOFTCAP || HAS_SLOPES || HAS_BIAS;

// Every field has 8 bytes; the order is that of `block_sparse.py`.
struct Call {
    const io_t *q, *k, *v;
    io_t* out;
    float* lse;
    float* top;  // the largest score of every row, or null
    const float *sinks, *slopes, *temperature;
    const bias_t* bias;
    const int32_t *key_lengths, *cu_seqlens, *lists;
    const int32_t *starts, *blocks;
    const uint8_t* full;
    const uint8_t* const* tables;
    void *k_ready, *v_ready;  // rows of DK and DV without gaps, float or pairs, or tiles
    uint8_t* marks;           // of tiles: which blocks of 32 keys hold numbers that are not finite
    long pack_k, pack_v;      // whether they have to be filled first
    long slots;               // of tiles: heads whose keys and values they hold at a time
    long B, H, Hkv, M, N;
    long q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n;
    long kr_b, kr_h, vr_b, vr_h;  // strides of k_ready and v_ready in their elements
    long bias_b, bias_h, bias_m;
    long sequences, list_length;
    long schedule_heads, schedule_rows, block_q, block_k, offset;
    long threads;
};

// Exponents are taken as exp(s - m) = 2^(s log2(e) - base), one multiply-add, base = m log2(e)
// rounded once: so differences of large scores stay exact.
static ALWAYS_INLINE vf base_of(vf m) { return select(m == -INF, vf{}, m * LOG2E); }
// By how much (in powers of two) the rounded base is below the true one.
static ALWAYS_INLINE vf rest_of(vf m) { return m * LOG2E - base_of(m); }

// One task: up to QROWS query rows of a head.
struct Task {
    long b, h, kv, row, rows, schedule_row;
};

struct Interval {
    int lo, hi;
};

static inline Task task_at(const Call& c, long index) {
    long per_row = (c.block_q + QROWS - 1) / QROWS;
    long count = c.schedule_rows * per_row;
    // Later rows of a causal mask have more work: they go first.
    long r = count - 1 - index % count, bh = index / count;
    Task t;
    t.b = bh / c.H;
    t.h = bh % c.H;
    t.kv = t.h / (c.H / c.Hkv);
    t.schedule_row = r / per_row;
    t.row = t.schedule_row * c.block_q + r % per_row * QROWS;
    long end = (t.schedule_row + 1) * c.block_q;
    end = end < c.M ? end : c.M;
    t.rows = end - t.row < QROWS ? end - t.row : QROWS;
    return t;
}

static inline long task_count(const Call& c) {
    return c.B * c.H * c.schedule_rows * ((c.block_q + QROWS - 1) / QROWS);
}

// Keys that key lengths and packed sequences leave to the query in a row.
static inline Interval visible(const Call& c, long b, long row) {
    Interval x{0, (int)c.N};
    if (c.key_lengths && c.key_lengths[b] < x.hi) x.hi = c.key_lengths[b];
    if (c.cu_seqlens) {
        long at = row + c.offset, s = 0;
        long low = 0, high = c.sequences + 1;  // the number of ends that are <= at
        while (low < high) {
            long mid = (low + high) / 2;
            if (c.cu_seqlens[mid] <= at)
                low = mid + 1;
            else
                high = mid;
        }
        s = low - 1;
        if (s < 0 || s >= c.sequences) return {0, 0};
        if (c.cu_seqlens[s] > x.lo) x.lo = c.cu_seqlens[s];
        if (c.cu_seqlens[s + 1] < x.hi) x.hi = c.cu_seqlens[s + 1];
    }
    return x;
}

// What the rows of a task see, beside the predicate.
struct Rows {
    alignas(64) int32_t lo[QROWS], hi[QROWS];
    int any_lo, any_hi, all_lo, all_hi;
    bool bounded;  // whether lo and hi matter

    void fill(const Call& c, const Task& t) {
        bounded = c.key_lengths || c.cu_seqlens || t.rows < QROWS;
        any_lo = (int)c.N, any_hi = 0, all_lo = 0, all_hi = (int)c.N;
        for (int r = 0; r < QROWS; ++r) {
            Interval x = r < t.rows ? visible(c, t.b, t.row + r) : Interval{0, 0};
            lo[r] = x.lo;
            hi[r] = x.hi;
            if (r >= t.rows) continue;
            any_lo = x.lo < any_lo ? x.lo : any_lo;
            any_hi = x.hi > any_hi ? x.hi : any_hi;
            all_lo = x.lo > all_lo ? x.lo : all_lo;
            all_hi = x.hi < all_hi ? x.hi : all_hi;
        }
    }
};

// The part of a tile that a panel has to visit: rows first .. first + rows - 1, masked or not.
struct Part {
    int first, rows;
    bool masked;
};

struct Mask {
    vi at[KROWS][PANEL_VECTORS];

    Part fill(const Call& c, const Task& t, const Rows& rows, int panel, int j0, int n) {
        int first = n, last = -1;
        bool gap = false;
        vi all = splat((int32_t)-1);
        for (int j = 0; j < n; ++j) {
            vi some{}, every = splat((int32_t)-1);
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
                int r = panel * PANEL + v * LANES;
                vi i = splat((int32_t)(t.row + r + c.offset)) + iota();
                vi m = allowed((int)t.h, i, j0 + j, c.tables);
                if (rows.bounded)
                    m &= (vi)(load(rows.lo + r) <= j0 + j) & (vi)(load(rows.hi + r) > j0 + j);
                at[j][v] = m;
                some |= m;
                every &= m;
            }
            if (!any(some)) {
                gap = first < n;
                continue;
            }
            all = gap ? vi{} : all & every;
            first = first < j ? first : j;
            last = j;
        }
        if (last < 0) return {0, 0, true};
        int wider = last | (KEY_STEP - 1);
        wider = wider < n ? wider : n - 1;
        if (wider != last || first % KEY_STEP) all = vi{};
        first -= first % KEY_STEP;
        last = wider;
        return {first, last - first + 1, any(~all)};
    }
};

// Calls visit(first key, keys, full) for every tile of a task.
template <class Visit>
static inline void walk(const Call& c, const Task& t, const Rows& rows, Visit visit) {
    const int32_t* starts = c.starts + (c.schedule_heads > 1 ? t.h * (c.schedule_rows + 1) : 0);
    long begin = starts[t.schedule_row], end = starts[t.schedule_row + 1];
    auto block = [&](long at) {
        long j0 = c.blocks[at] * c.block_k, stop = j0 + c.block_k;
        stop = stop < c.N ? stop : c.N;
        for (long j = j0; j < stop; j += KROWS) {
            int n = stop - j < KROWS ? (int)(stop - j) : KROWS;
            if (j >= rows.any_hi || j + n <= rows.any_lo) continue;
            visit((int)j, n, c.full[at] && j >= rows.all_lo && j + n <= rows.all_hi);
        }
    };
    if constexpr (LISTS) {
        long lists = (c.M + c.block_q - 1) / c.block_q;
        const int32_t* list =
            c.lists + ((t.b * c.Hkv + t.kv) * lists + t.schedule_row) * c.list_length;
        for (long x = 0; x < c.list_length && list[x] >= 0; ++x) {
            if (x > 0 && list[x] == list[x - 1]) continue;
            long low = begin, high = end;
            while (low < high) {
                long mid = (low + high) / 2;
                if (c.blocks[mid] < list[x])
                    low = mid + 1;
                else
                    high = mid;
            }
            if (low < end && c.blocks[low] == list[x]) block(low);
        }
    } else {
        for (long at = begin; at < end; ++at) block(at);
    }
}

// K and V without gaps between rows, if they are not so already. Call inside a parallel region.
template <int D, class TD>
static inline void make_ready(const Call& c, const io_t* src, long sb, long sh, long sn, TD* dst) {
    const long chunk = 256, chunks = (c.N + chunk - 1) / chunk;
#pragma omp for schedule(static)
    for (long x = 0; x < c.B * c.Hkv * chunks; ++x) {
        long n0 = x % chunks * chunk, h = x / chunks % c.Hkv, b = x / chunks / c.Hkv;
        int n = (int)(c.N - n0 < chunk ? c.N - n0 : chunk);
        copy_rows(n, D, src + b * sb + h * sh + n0 * sn, sn, dst + ((b * c.Hkv + h) * c.N + n0) * D,
                  (long)D);
    }
}

// The factor of the dot products of each row of a panel.
static inline void row_factors(const Call& c, const Task& t, int panel, float scale, float cap,
                               vf* factor) {
    float f = HAS_SOFTCAP ? scale / cap : scale;
    alignas(64) float each[PANEL];
    for (int r = 0; r < PANEL; ++r) {
        long row = t.row + panel * PANEL + r;
        each[r] = HAS_TEMPERATURE && row < c.M ? f * c.temperature[t.h * c.M + row] : f;
    }
    UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) factor[v] = load(each + v * LANES);
}

// Scores of a tile from their dot products, in place: soft cap, slopes, bias. With `slope_of_cap`
// the derivative of the soft cap is kept for the backward pass.
template <bool GRAD>
static inline void adjust(const Call& c, const Task& t, int panel, int j0, int rows, float cap,
                          float (*S)[PANEL], float (*slope_of_cap)[PANEL]) {
    alignas(64) float bias[KROWS][PANEL];
    if constexpr (HAS_BIAS) {
        int r0 = panel * PANEL, n = (int)(t.rows - r0 < PANEL ? t.rows - r0 : PANEL);
        for (int j = 0; j < rows; ++j)
            for (int r = n; r < PANEL; ++r) bias[j][r] = 0.0f;
        transpose_in(n, rows, c.bias + t.b * c.bias_b + t.h * c.bias_h + (t.row + r0) * c.bias_m + j0,
                     c.bias_m, bias[0], (long)PANEL);
    }
    float slope = HAS_SLOPES ? c.slopes[t.h] : 0.0f;
    for (int j = 0; j < rows; ++j)
        UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            vf s = load(S[j] + v * LANES);
            if constexpr (HAS_SOFTCAP) {
                vf y = tanh_(s);
                if constexpr (GRAD) store(slope_of_cap[j] + v * LANES, 1.0f - y * y);
                s = y * cap;
            }
            if constexpr (HAS_SLOPES) {
                vi i = splat((int32_t)(t.row + panel * PANEL + v * LANES + c.offset)) + iota();
                s -= __builtin_convertvector(i - (j0 + j), vf) * slope;
            }
            if constexpr (HAS_BIAS) s += load(bias[j] + v * LANES);
            store(S[j] + v * LANES, s);
        }
}
