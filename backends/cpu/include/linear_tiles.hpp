// Many rows of Y = X W^T + bias as products of bf16 tiles, sums in float32.
//
// A float is the sum of PARTS bf16 numbers, each the rounding of what the ones before it left: with
// three of them nothing is lost (24 bits), with two 16 bits are kept. Of the products of parts
// those are taken that are not below the last bit: part i of x times part j of w for i + j < PARTS,
// 6 or 3 of them. bfloat16 layers have one part and one product.
// X is cut into bands that stay in L2 as tiles, W into blocks of columns that the threads share:
//   [32 rows of X or of W][step of 32 along K][part][two tiles of 16 rows or columns]
// A gated layer has two such matrices, whose blocks alternate; the two sums of a column meet in the
// registers, so neither product is written to memory.
#pragma once
#include "linear.hpp"
#include "math.hpp"
#include "tiles.hpp"

constexpr int BLOCK = 2 * TILE;
constexpr long PART = 2 * 1024, STEP = PARTS * PART;  // bytes
constexpr long CHUNK = 320 * 1024 / STEP;             // steps taken before sums are put aside

static ALWAYS_INLINE vf load_some(const io_t* p, long n) {
    return n >= LANES ? load(p) : n > 0 ? load_part(p, int(n)) : vf{};
}

// 32 rows of X from row m: tiles of 16 rows of 32 numbers. Rows behind M are 0.
static void pack_rows(const Call& c, long m, int rows, long steps, char* to) {
    for (long s = 0; s < steps; ++s, to += STEP) {
        const io_t* x = c.x + m * c.x_row + s * TILE_K;
        for (int r = 0; r < BLOCK; ++r, x += c.x_row) {
            char* row = to + r * 64;
            long left = r < rows ? c.K - s * TILE_K : 0;
            vf a = load_some(x, left), b = load_some(x + LANES, left - LANES);
            UNROLL for (int part = 0; part < PARTS; ++part) {
                store((float*)(row + part * PART), in_order(a, b));
                if (part + 1 < PARTS) a = bf16_rest(a), b = bf16_rest(b);
            }
        }
    }
}

// 32 columns of the output, rows of `matrix`, from n: tiles of 16 pairs along K of 16 columns.
static void pack_columns(const Call& c, const io_t* matrix, long n, long steps, char* to) {
    for (long s = 0; s < steps; ++s)
        for (int h = 0; h < 2; ++h) {
            long first = n + h * TILE, k0 = s * TILE_K;
            char* tile = to + s * STEP + h * 1024;
            if (c.w_k == 1) {
                vf a[TILE], b[TILE];
                for (int i = 0; i < TILE; ++i) {
                    const io_t* w = matrix + (first + i) * c.w_col + k0;
                    long left = first + i < c.N ? c.K - k0 : 0;
                    a[i] = load_some(w, left), b[i] = load_some(w + LANES, left - LANES);
                }
                UNROLL for (int part = 0; part < PARTS; ++part) {
                    vf t[TILE];
                    UNROLL for (int i = 0; i < TILE; ++i) t[i] = in_order(a[i], b[i]);
                    transpose_square(t);
                    UNROLL for (int i = 0; i < TILE; ++i)
                        store((float*)(tile + part * PART + i * 64), t[i]);
                    if (part + 1 < PARTS)
                        UNROLL for (int i = 0; i < TILE; ++i)
                            a[i] = bf16_rest(a[i]), b[i] = bf16_rest(b[i]);
                }
                continue;
            }
            for (int i = 0; i < TILE; ++i) {
                const io_t* w = matrix + (k0 + 2 * i) * c.w_k + first;
                vf even = load_some(w, k0 + 2 * i < c.K ? c.N - first : 0);
                vf odd = load_some(w + c.w_k, k0 + 2 * i + 1 < c.K ? c.N - first : 0);
                UNROLL for (int part = 0; part < PARTS; ++part) {
                    store((int32_t*)(tile + part * PART + i * 64), make_pairs(even, odd));
                    if (part + 1 < PARTS) even = bf16_rest(even), odd = bf16_rest(odd);
                }
            }
        }
}
static_assert(LANES == TILE, "a vector is a row of a tile");

template <int AT> static ALWAYS_INLINE void load_two_tiles(const char* p) {
    tile_load<AT>(p, 64);
    tile_load<AT + 1>(p + 1024, 64);
}
static ALWAYS_INLINE void multiply_four() {
    tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
}
static ALWAYS_INLINE void store_sums(float* c) {
    tile_store<0>(c, BLOCK * 4), tile_store<1>(c + TILE, BLOCK * 4);
    tile_store<2>(c + TILE * BLOCK, BLOCK * 4), tile_store<3>(c + TILE * BLOCK + TILE, BLOCK * 4);
}

// A number as the output holds it.
static ALWAYS_INLINE vf as_io(vf x) {
    return sizeof(io_t) == 2 ? (vf)((vu)round_to_bf16(x) << 16) : x;
}
// One division of a vector takes as long as a step of tiles. d is between 1 and 2.
static ALWAYS_INLINE vf reciprocal(vf d) {
#if LANES == 16 && defined(__AVX512F__)
    vf r = (vf)_mm512_rcp14_ps((__m512)d);
    return r * (2.0f - d * r);
#endif
    return 1.0f / d;
}
static ALWAYS_INLINE vf quick_sigmoid(vf x) {
    const vf below = (vf)((vi)x | (int32_t)0x80000000);  // -|x|
    const vf e = sizeof(io_t) == 2 ? exp2_rough(below * LOG2E) : exp_neg(below);
    const vf d = reciprocal(1.0f + e);
    return select(x < 0.0f, e * d, d);
}
// What a gated layer does to its gate; the numbers are those of `linear.py`.
template <int F> static ALWAYS_INLINE vf activated(vf x) {
    if constexpr (F == 1) return x * quick_sigmoid(x);
    if constexpr (F == 2)
        return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    if constexpr (F == 3) return select(x < 0.0f, vf{}, x);  // a NaN passes
    if constexpr (F == 4) return quick_sigmoid(x);
    return x;
}

// A block of sums that is to be written; `gate` are the sums of the other matrix.
struct Finished {
    const float *sums, *gate;
    long m, n;
    int rows, next;  // rows before `next` are written
};
// F: 0 for a plain layer.
template <int F> static ALWAYS_INLINE void write_row(const Call& c, Finished& f) {
    const float* sums = f.sums + f.next * BLOCK;
    const float* gate = f.gate + f.next * BLOCK;
    io_t* y = c.y + (f.m + f.next) * c.y_row + f.n;
    ++f.next;
    UNROLL for (int v = 0; v < 2; ++v) {
        const long first = f.n + v * TILE, left = c.N - first;
        if (left <= 0) return;
        vf sum = load(sums + v * TILE);
        if (c.bias) sum += load_some(c.bias + first, left);
        if constexpr (F > 0) {  // rounded where a model that writes each of them rounds
            vf g = load(gate + v * TILE);
            if (c.gate_bias) g += load_some(c.gate_bias + first, left);
            sum = as_io(activated<F>(as_io(g))) * as_io(sum);
        }
        if (left >= LANES)
            store(y + v * TILE, sum);
        else
            store_part(y + v * TILE, sum, int(left));
    }
}

template <int F> static void write_rest(const Call& c, Finished& before) {
    while (before.next < before.rows) write_row<F>(c, before);
}

// Four tiles of sums: what is in c or, at first, zeros.
static ALWAYS_INLINE void begin_sums(const float* c, bool first) {
    if (first) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(c, BLOCK * 4), tile_load<1>(c + TILE, BLOCK * 4);
        tile_load<2>(c + TILE * BLOCK, BLOCK * 4), tile_load<3>(c + TILE * BLOCK + TILE, BLOCK * 4);
    }
}

// 32 x 32 sums over some steps of K, onto c or, at first, from 0. Both operands are in L2, which is
// near enough. The products of small parts go first, in an order that loads least. The multiplier
// works for 64 cycles and more on a step, and meanwhile rows of the block before are written.
template <int F>
static ALWAYS_INLINE void sums_of(const Call& call, const char* a, const char* b, long steps,
                                  float* c, bool first, Finished& before, const io_t* y) {
    begin_sums(c, first);
    const int each = int((BLOCK + steps - 1) / steps);
    for (long s = 0; s < steps; ++s, a += STEP, b += STEP) {
        auto rows = [&](int part) INLINE_LAMBDA { load_two_tiles<4>(a + part * PART); };
        auto columns = [&](int part) INLINE_LAMBDA { load_two_tiles<6>(b + part * PART); };
        if (sizeof(io_t) == 2)  // half of a line of the output a row: fetched before it is written
            for (int i = 0; i < each; ++i, y += call.y_row) __builtin_prefetch(y, 1, 3);
        if constexpr (PARTS == 3) {
            rows(2), columns(0), multiply_four();
            rows(1), multiply_four();
            columns(1), multiply_four();
            rows(0), multiply_four();
            columns(2), multiply_four();
            columns(0), multiply_four();
        } else if constexpr (PARTS == 2) {
            rows(1), columns(0), multiply_four();
            rows(0), multiply_four();
            columns(1), multiply_four();
        } else {
            rows(0), columns(0), multiply_four();
        }
        for (int i = 0; i < each && before.next < before.rows; ++i) write_row<F>(call, before);
    }
    write_rest<F>(call, before);
    store_sums(c);
}

// 32 columns of the output for a band of rows, from row m0.
template <int F>
static void column_of(const Call& c, const char* x, const char* w, long m0, long end, long n,
                      long steps, float* sums, Finished& before) {
    const long panel = steps * STEP, matrices = F ? 2 : 1;
    for (long i = 0; i < matrices; ++i) {
        float* to = sums + i * c.band * BLOCK;
        for (long k = 0; k < steps; k += CHUNK) {
            const long some = steps - k < CHUNK ? steps - k : CHUNK;
            for (long m = 0; m < end; m += BLOCK) {
                sums_of<F>(c, x + m / BLOCK * panel + k * STEP, w + i * panel + k * STEP, some,
                           to + m * BLOCK, k == 0, before, c.y + (m0 + m) * c.y_row + n);
                if (i + 1 == matrices && k + some == steps)
                    before = {sums + m * BLOCK, to + m * BLOCK, m0 + m, n,
                              int(end - m < BLOCK ? end - m : BLOCK), 0};
            }
        }
    }
}
EXPORT int linear_parts() { return PARTS; }
template <int F> static void product(const Call& c) {
    const long steps = (c.K + TILE_K - 1) / TILE_K, panel = steps * STEP;
    const long matrices = F ? 2 : 1;
    const long bands = (c.M + c.band - 1) / c.band, wanted = c.threads == 1 ? 1 : 4 * c.threads;
    const long shares = bands >= wanted ? 1 : (wanted + bands - 1) / bands;
#pragma omp parallel num_threads(c.threads)
    {
        Tiles session;
        char* packed = (char*)c.scratch;
        char* x = packed + matrices * (c.block / BLOCK) * panel +
                  omp_get_thread_num() * (c.band / BLOCK * panel + matrices * c.band * BLOCK * 4);
        float* sums = (float*)(x + c.band / BLOCK * panel);
        for (long n0 = 0; n0 < c.N; n0 += c.block) {
            const long columns = c.N - n0 < c.block ? c.N - n0 : c.block;
#pragma omp for schedule(static)
            for (long n = 0; n < columns; n += BLOCK)
                for (long w = 0; w < matrices; ++w)
                    pack_columns(c, w ? c.gate : c.w, n0 + n, steps,
                                 packed + (n / BLOCK * matrices + w) * panel);
            const long wide = ((columns + shares - 1) / shares + BLOCK - 1) / BLOCK * BLOCK;
#pragma omp for schedule(dynamic, 1) collapse(2)
            for (long b = 0; b < bands; ++b)
                for (long s = 0; s < shares; ++s) {
                    long m0 = b * c.band, end = c.M - m0 < c.band ? c.M - m0 : c.band;
                    long last = (s + 1) * wide < columns ? (s + 1) * wide : columns;
                    if (s * wide >= last) continue;
                    for (long m = 0; m < end; m += BLOCK)
                        pack_rows(c, m0 + m, int(end - m < BLOCK ? end - m : BLOCK), steps,
                                  x + m / BLOCK * panel);
                    Finished before = {};
                    for (long n = s * wide; n < last; n += BLOCK) {
                        const char* w = packed + n / BLOCK * matrices * panel;
                        column_of<F>(c, x, w, m0, end, n0 + n, steps, sums, before);
                    }
                    write_rest<F>(c, before);
                }
        }
    }
}
EXPORT void linear_tiles(const Call* call) {
    switch (call->gated) {
    case 0: return product<0>(*call);
    case 1: return product<1>(*call);
    case 2: return product<2>(*call);
    case 3: return product<3>(*call);
    case 4: return product<4>(*call);
    default: return product<5>(*call);
    }
}
