// Many rows of Y = X W^T + bias as products of bf16 tiles, sums in float32.
//
// A float is the sum of PARTS bf16 numbers, each the rounding of what the ones before it left: with
// three of them nothing is lost (24 bits), with two 16 bits are kept. Of the products of parts
// those are taken that are not below the last bit: part i of x times part j of w for i + j < PARTS,
// 6 or 3 of them. bfloat16 layers have one part and one product.
// X is cut into bands that stay in L2 as tiles, W into blocks of columns that the threads share:
//   [32 rows of X or of W][step of 32 along K][part][two tiles of 16 rows or columns]
#pragma once
#include "linear.hpp"
#include "tiles.hpp"

constexpr int BLOCK = 2 * TILE;
constexpr long PART = 2 * 1024, STEP = PARTS * PART;  // bytes
constexpr long CHUNK = 24 * 1024 / STEP;              // steps whose tiles of W fit into L1

static ALWAYS_INLINE vf load_some(const io_t* p, long n) {
    return n >= LANES ? load(p) : n > 0 ? load_part(p, int(n)) : vf{};
}

// 32 rows of X from row m: tiles of 16 rows of 32 numbers. Rows behind M are 0.
static void pack_rows(const Call& c, long m, int rows, long steps, char* to) {
    for (int r = 0; r < BLOCK; ++r) {
        char* row = to + r / TILE * 1024 + r % TILE * 64;
        const io_t* x = c.x + (m + r) * c.x_row;
        for (long s = 0; s < steps; ++s, row += STEP) {
            long left = r < rows ? c.K - s * TILE_K : 0;
            vf a = load_some(x + s * TILE_K, left);
            vf b = load_some(x + s * TILE_K + LANES, left - LANES);
            UNROLL for (int part = 0; part < PARTS; ++part) {
                store((float*)(row + part * PART), in_order(a, b));
                if (part + 1 < PARTS) a = bf16_rest(a), b = bf16_rest(b);
            }
        }
    }
}

// 32 columns of the output, rows of W, from n: tiles of 16 pairs along K of 16 columns.
static void pack_columns(const Call& c, long n, long steps, char* to) {
    for (long s = 0; s < steps; ++s)
        for (int h = 0; h < 2; ++h) {
            long first = n + h * TILE, k0 = s * TILE_K;
            char* tile = to + s * STEP + h * 1024;
            if (c.w_k == 1) {
                vf a[TILE], b[TILE];
                for (int i = 0; i < TILE; ++i) {
                    const io_t* w = c.w + (first + i) * c.w_col + k0;
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
                const io_t* w = c.w + (k0 + 2 * i) * c.w_k + first;
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

// 32 x 32 sums over some steps of K, onto c or, at first, from 0. The tiles of W stay in L1 from
// one block of rows to the next, those of X are fetched from L2 one step ahead. The products of
// small parts go first, in an order that loads least.
static ALWAYS_INLINE void sums_of(const char* a, const char* b, long steps, float* c, bool first) {
    if (first) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(c, BLOCK * 4), tile_load<1>(c + TILE, BLOCK * 4);
        tile_load<2>(c + TILE * BLOCK, BLOCK * 4), tile_load<3>(c + TILE * BLOCK + TILE, BLOCK * 4);
    }
    for (long s = 0; s < steps; ++s, a += STEP, b += STEP) {
        auto ahead = [&](int part) INLINE_LAMBDA {
            UNROLL for (int line = 0; line < PART / 64; ++line)
                __builtin_prefetch(a + STEP + part * PART + line * 64);
        };
        auto rows = [&](int part) INLINE_LAMBDA { load_two_tiles<4>(a + part * PART); };
        auto columns = [&](int part) INLINE_LAMBDA { load_two_tiles<6>(b + part * PART); };
        if constexpr (PARTS == 3) {
            rows(2), columns(0), multiply_four();
            rows(1), multiply_four(), ahead(2);
            columns(1), multiply_four();
            rows(0), multiply_four(), ahead(1);
            columns(2), multiply_four(), ahead(0);
            columns(0), multiply_four();
        } else if constexpr (PARTS == 2) {
            rows(1), columns(0), multiply_four(), ahead(1);
            rows(0), multiply_four(), ahead(0);
            columns(1), multiply_four();
        } else {
            rows(0), columns(0), multiply_four(), ahead(0);
        }
    }
    store_sums(c);
}

static ALWAYS_INLINE void write_out(const Call& c, const float* sums, long m, int rows, long n) {
    for (int v = 0; v < 2; ++v) {
        long first = n + v * TILE, left = c.N - first;
        if (left <= 0) break;
        vf shift = c.bias ? load_some(c.bias + first, left) : vf{};
        for (int r = 0; r < rows; ++r) {
            vf sum = load(sums + r * BLOCK + v * TILE) + shift;
            io_t* y = c.y + (m + r) * c.y_row + first;
            if (left >= LANES)
                store(y, sum);
            else
                store_part(y, sum, int(left));
        }
    }
}

EXPORT int linear_parts() { return PARTS; }
EXPORT void linear_tiles(const Call* call) {
    const Call& c = *call;
    const long steps = (c.K + TILE_K - 1) / TILE_K, panel = steps * STEP;
    const long bands = (c.M + c.band - 1) / c.band, wanted = c.threads == 1 ? 1 : 4 * c.threads;
    const long shares = bands >= wanted ? 1 : (wanted + bands - 1) / bands;
#pragma omp parallel num_threads(c.threads)
    {
        Tiles session;
        char* packed = (char*)c.scratch;
        char* x = packed + c.block / BLOCK * panel +
                  omp_get_thread_num() * (c.band / BLOCK * panel + c.band * BLOCK * 4);
        float* sums = (float*)(x + c.band / BLOCK * panel);
        for (long n0 = 0; n0 < c.N; n0 += c.block) {
            const long columns = c.N - n0 < c.block ? c.N - n0 : c.block;
#pragma omp for schedule(static)
            for (long n = 0; n < columns; n += BLOCK)
                pack_columns(c, n0 + n, steps, packed + n / BLOCK * panel);
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
                    for (long n = s * wide; n < last; n += BLOCK) {
                        const char* w = packed + n / BLOCK * panel;
                        for (long k = 0; k < steps; k += CHUNK) {
                            long some = steps - k < CHUNK ? steps - k : CHUNK;
                            for (long m = 0; m < end; m += BLOCK)
                                sums_of(x + m / BLOCK * panel + k * STEP, w + k * STEP, some,
                                        sums + m * BLOCK, k == 0);
                        }
                        for (long m = 0; m < end; m += BLOCK)
                            write_out(c, sums + m * BLOCK, m0 + m,
                                      int(end - m < BLOCK ? end - m : BLOCK), n0 + n);
                    }
                }
        }
    }
}
