// Linear: Y[M x N] = X[M x K] W[N x K]^T + bias, sums in float32.
//
// The type io_t of x, w, bias and y, DEPTH and SMALL are constants of a unit; the rest is in `Call`.
//
// Many rows: W is packed in blocks of `block` columns into panels [column panel][k][PANEL], shared
// by the threads and small enough for the last-level cache; each thread then takes DEPTH columns of
// BAND rows of X at a time into its own buffer, so that the register tiles read two contiguous
// streams, one from L1 (W) and one from L2 (X). The packed copy is scratch: no second copy of the
// weights outlives the call, and bfloat16 becomes float32 once per packing, not once per product.
// Few rows (SMALL and less): every row of W is read once and used at once, bound by memory.
#pragma once
#include <omp.h>
#include "pack.hpp"

constexpr int BAND = 16 * ROWS;

struct Call {
    const io_t *x, *w, *bias;  // bias may be null
    io_t* y;
    float* scratch;  // see `linear.py`; `band` is for linear_tiles.hpp
    long M, N, K, x_row, w_col, w_k, y_row, block, threads, band;
    // Of linear_tiles.hpp: Y = f(gate) * (X W^T + bias), gate = X G^T + gate_bias, with the strides
    // of W; `gated` is 0 or the number of f.
    const io_t *gate, *gate_bias;
    long gated;
};

// Columns first ... of W as panels [panel][k][PANEL]; columns behind N are 0.
static void pack_panel(const Call& c, long first, float* to) {
    int columns = c.N - first < PANEL ? int(c.N - first) : PANEL;
    const io_t* w = c.w + first * c.w_col;
    if (c.w_k == 1) {
        if (columns <= PANEL - LANES)
            for (long k = 0; k < c.K; ++k)
                for (int v = LANES; v < PANEL; v += LANES) store(to + k * PANEL + v, vf{});
        transpose_in(columns, int(c.K), w, c.w_col, to, PANEL);
        return;
    }
    for (long k = 0; k < c.K; ++k)
        UNROLL for (int v = 0; v < PANEL; v += LANES) {
            const io_t* s = w + k * c.w_k + v;
            int left = columns - v;
            store(to + k * PANEL + v, left >= LANES ? load(s) : left > 0 ? load_part(s, left) : vf{});
        }
}

// One band of rows by one range of columns. `sums` (BAND x a multiple of PANEL) holds what is not
// finished; y is written once.
static void band(const Call& c, long m0, int rows, long n0, long columns, const float* panels,
                 float* a, float* sums, long sums_row) {
    int steps = int((c.K + DEPTH - 1) / DEPTH), depth = int((c.K + steps - 1) / steps);
    for (long k0 = 0; k0 < c.K; k0 += depth) {
        int K = c.K - k0 < depth ? int(c.K - k0) : depth;
        bool first = k0 == 0, last = k0 + K == c.K;
        copy_rows(rows, K, c.x + m0 * c.x_row + k0, c.x_row, a, DEPTH);
        for (long n = 0; n < columns; n += PANEL) {
            int width = columns - n < PANEL ? int(columns - n) : PANEL;
            float* part = sums + n;
            io_t* out = c.y + m0 * c.y_row + n0 + n;
            float shift[PANEL] = {};
            if (c.bias && first)
                for (int i = 0; i < width; ++i) shift[i] = to_float(c.bias[n0 + n + i]);
            auto start = [&](int m, int v) INLINE_LAMBDA {
                return load((first ? shift : part + m * sums_row) + v * LANES);
            };
            auto finish = [&](int m, int v, vf sum) INLINE_LAMBDA {
                io_t* y = out + m * c.y_row + v * LANES;
                if (!last)
                    store(part + m * sums_row + v * LANES, sum);
                else if ((v + 1) * LANES <= width)
                    store(y, sum);
                else if (v * LANES < width)
                    store_part(y, sum, width - v * LANES);
            };
            gemm_onto<PANEL_VECTORS>(rows, K, a, DEPTH, 1, panels + n * c.K + k0 * PANEL, PANEL,
                                     start, finish);
        }
    }
}

static void many_rows(const Call& c) {
    const long bands = (c.M + BAND - 1) / BAND, wanted = c.threads == 1 ? 1 : 4 * c.threads;
    const long shares = bands >= wanted ? 1 : (wanted + bands - 1) / bands;
#pragma omp parallel num_threads(c.threads)
    {
        float* a = c.scratch + c.block * c.K + omp_get_thread_num() * (BAND * (DEPTH + c.block));
        for (long n0 = 0; n0 < c.N; n0 += c.block) {
            const long columns = c.N - n0 < c.block ? c.N - n0 : c.block;
#pragma omp for schedule(static)
            for (long n = 0; n < columns; n += PANEL) pack_panel(c, n0 + n, c.scratch + n * c.K);
            // Where there are few bands the columns are shared out too.
            const long wide = ((columns + shares - 1) / shares + PANEL - 1) / PANEL * PANEL;
#pragma omp for schedule(dynamic, 1) collapse(2)
            for (long b = 0; b < bands; ++b)
                for (long s = 0; s < shares; ++s) {
                    long m0 = b * BAND, n = s * wide;
                    if (n >= columns) continue;
                    int rows = c.M - m0 < BAND ? int(c.M - m0) : BAND;
                    band(c, m0, rows, n0 + n, columns - n < wide ? columns - n : wide,
                         c.scratch + n * c.K, a, a + BAND * DEPTH, wide);
                }
        }
    }
}

// Numbers of W as two vectors, in the order of `spread`. bfloat16 is split into its even and its odd
// numbers, a shift and a mask instead of two widening loads.
static ALWAYS_INLINE void load_two(const float* p, vf& a, vf& b) {
    a = load(p);
    b = load(p + LANES);
}
static ALWAYS_INLINE void load_two(const bf16* p, vf& a, vf& b) {
    vi both = load((const int32_t*)p);
    a = (vf)(both << 16);
    b = (vf)(both & (int32_t)0xffff0000);
}
// A row of x in float32, ordered as `load_two` gives W; 0 up to a multiple of 2 LANES.
static void spread(const io_t* x, long K, float* to) {
    constexpr bool split = sizeof(io_t) == 2;
    for (long k0 = 0; k0 < K; k0 += 2 * LANES)
        for (int i = 0; i < 2 * LANES; ++i) {
            int from = split ? i % LANES * 2 + i / LANES : i;
            to[k0 + i] = k0 + from < K ? to_float(x[k0 + from]) : 0.0f;
        }
}

// MM rows of x by W4 neighbouring rows of W, all of K.
template <int MM, int W4>
static ALWAYS_INLINE void dots(const Call& c, const float* x, long x_row, long n, io_t* y) {
    vf acc[MM][W4] = {};
    const io_t* w = c.w + n * c.w_col;
    long k = 0;
    auto add = [&](const io_t* row, long step) INLINE_LAMBDA {
        UNROLL for (int j = 0; j < W4; ++j) {
            vf b0, b1;
            load_two(row + j * step, b0, b1);
            UNROLL for (int m = 0; m < MM; ++m) {
                const float* a = x + m * x_row + k;
                acc[m][j] = load(a) * b0 + acc[m][j];
                acc[m][j] = load(a + LANES) * b1 + acc[m][j];
            }
        }
    };
    for (; k + 2 * LANES <= c.K; k += 2 * LANES) add(w + k, c.w_col);
    if (k < c.K) {
        io_t rest[W4][2 * LANES] = {};
        for (int j = 0; j < W4; ++j)
            memcpy(rest[j], w + j * c.w_col + k, (c.K - k) * sizeof(io_t));
        add(rest[0], 2 * LANES);
    }
    for (int m = 0; m < MM; ++m)
        for (int j = 0; j < W4; ++j) {
            float bias = c.bias ? to_float(c.bias[n + j]) : 0.0f;
            y[m * c.y_row + n + j] = from_float<io_t>(sum_lanes(acc[m][j]) + bias);
        }
}

template <int W4>
static ALWAYS_INLINE void few(const Call& c, const float* x, long x_row, long n) {
    long m = 0;
    for (; m + 2 <= c.M; m += 2) dots<2, W4>(c, x + m * x_row, x_row, n, c.y + m * c.y_row);
    if (m < c.M) dots<1, W4>(c, x + m * x_row, x_row, n, c.y + m * c.y_row);
}

static void few_rows(const Call& c) {
    constexpr int GROUP = 4;
    const long x_row = (c.K + 2 * LANES - 1) / (2 * LANES) * (2 * LANES), groups = c.N / GROUP;
    float* x = c.scratch;
    for (long m = 0; m < c.M; ++m) spread(c.x + m * c.x_row, c.K, x + m * x_row);
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (long g = 0; g < groups; ++g) few<GROUP>(c, x, x_row, g * GROUP);
    for (long n = groups * GROUP; n < c.N; ++n) few<1>(c, x, x_row, n);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int linear_band() { return BAND; }
EXPORT int linear_panel() { return PANEL; }
EXPORT void linear(const Call* call) {
    if (call->M <= SMALL && call->w_k == 1)
        few_rows(*call);
    else
        many_rows(*call);
}
