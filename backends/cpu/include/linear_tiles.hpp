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

// 32 x 32 sums over some steps of K, onto c or, at first, from 0. Both operands are in L2,
// which is near enough. The products of small parts go first, in an order that loads least.
static ALWAYS_INLINE void sums_of(const char* a, const char* b, long steps, float* c, bool first) {
    if (first) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(c, BLOCK * 4), tile_load<1>(c + TILE, BLOCK * 4);
        tile_load<2>(c + TILE * BLOCK, BLOCK * 4), tile_load<3>(c + TILE * BLOCK + TILE, BLOCK * 4);
    }
    for (long s = 0; s < steps; ++s, a += STEP, b += STEP) {
        auto rows = [&](int part) INLINE_LAMBDA { load_two_tiles<4>(a + part * PART); };
        auto columns = [&](int part) INLINE_LAMBDA { load_two_tiles<6>(b + part * PART); };
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
    }
    store_sums(c);
}

// A number as the output holds it.
static ALWAYS_INLINE vf as_io(vf x) {
    return sizeof(io_t) == 2 ? (vf)((vu)round_to_bf16(x) << 16) : x;
}
// What a gated layer does to its gate; the numbers are those of `linear.py`.
template <int F> static ALWAYS_INLINE vf activated(vf x) {
    if constexpr (F == 1) return x * sigmoid_(x);
    if constexpr (F == 2)
        return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    if constexpr (F == 3) return select(x < 0.0f, vf{}, x);  // a NaN passes
    if constexpr (F == 4) return sigmoid_(x);
    return x;
}

// F: 0 for a plain layer; `gate` are the sums of the other matrix.
template <int F>
static ALWAYS_INLINE void write_as(const Call& c, const float* sums, const float* gate, long m,
                                   int rows, long n) {
    for (int v = 0; v < 2; ++v) {
        long first = n + v * TILE, left = c.N - first;
        if (left <= 0) break;
        vf shift = c.bias ? load_some(c.bias + first, left) : vf{};
        vf gate_shift = F && c.gate_bias ? load_some(c.gate_bias + first, left) : vf{};
        for (int r = 0; r < rows; ++r) {
            vf sum = load(sums + r * BLOCK + v * TILE) + shift;
            if constexpr (F > 0) {  // rounded where a model that writes each of them rounds
                vf g = as_io(load(gate + r * BLOCK + v * TILE) + gate_shift);
                sum = as_io(activated<F>(g)) * as_io(sum);
            }
            io_t* y = c.y + (m + r) * c.y_row + first;
            if (left >= LANES)
                store(y, sum);
            else
                store_part(y, sum, int(left));
        }
    }
}
static void write_out(const Call& c, const float* sums, const float* gate, long m, int rows,
                      long n) {
    switch (c.gated) {
    case 0: return write_as<0>(c, sums, gate, m, rows, n);
    case 1: return write_as<1>(c, sums, gate, m, rows, n);
    case 2: return write_as<2>(c, sums, gate, m, rows, n);
    case 3: return write_as<3>(c, sums, gate, m, rows, n);
    case 4: return write_as<4>(c, sums, gate, m, rows, n);
    default: return write_as<5>(c, sums, gate, m, rows, n);
    }
}

EXPORT int linear_parts() { return PARTS; }
EXPORT void linear_tiles(const Call* call) {
    const Call& c = *call;
    const long steps = (c.K + TILE_K - 1) / TILE_K, panel = steps * STEP;
    const long matrices = c.gated ? 2 : 1;
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
                    for (long n = s * wide; n < last; n += BLOCK) {
                        for (long i = 0; i < matrices; ++i) {
                            const char* w = packed + (n / BLOCK * matrices + i) * panel;
                            float* to = sums + i * c.band * BLOCK;
                            for (long k = 0; k < steps; k += CHUNK) {
                                long some = steps - k < CHUNK ? steps - k : CHUNK;
                                for (long m = 0; m < end; m += BLOCK)
                                    sums_of(x + m / BLOCK * panel + k * STEP, w + k * STEP, some,
                                            to + m * BLOCK, k == 0);
                            }
                        }
                        for (long m = 0; m < end; m += BLOCK)
                            write_out(c, sums + m * BLOCK, sums + (c.band + m) * BLOCK, m0 + m,
                                      int(end - m < BLOCK ? end - m : BLOCK), n0 + n);
                    }
                }
        }
    }
}
