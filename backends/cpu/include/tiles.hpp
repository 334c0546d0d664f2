// Tiles of 16 rows of 64 bytes: sums of products of bf16 pairs, 16 x 16 at a time.
//
//   Tiles session;            configures the tile registers of this thread, and releases them at the
//                             end: the configuration is per thread, and other libraries set their own
//   tile_zero<T>()            register T (0 ... 7) = 0
//   tile_load<T>(p, stride)   16 rows of 64 bytes, `stride` bytes apart
//   tile_store<T>(p, stride)
//   tile_multiply<C, A, B>()  C (16 x 16 floats) += A (16 rows of 32 bf16) times B, 16 rows of 16
//                             pairs: row k holds the numbers 2k and 2k + 1 of every column
//   bf16_part(x), bf16_rest(x) a float rounded to bf16; what is left of it. Nothing is left of
//                             infinities, of NaN and of what rounds to infinity
//   in_order(a, b)            32 bf16 numbers: those of a, then those of b
// A float is the sum of three bf16 numbers, x = p + q + r with p = bf16_part(x) and so on: 24 bits.
// Products of parts i and j with i + j < 3, six of nine, are as exact as float32. The instructions
// take subnormal numbers for 0, so parts below 1e-38 are lost.
// Without the instructions (in tests) the same functions run on an emulation. Source: Intel
// Architecture Instruction Set Extensions, chapter on AMX.
#pragma once
#include "gemm.hpp"

constexpr int TILE = 16;           // rows of a tile, and columns of a tile of sums
constexpr int TILE_K = 2 * TILE;   // bf16 numbers in a row

#if defined(__AMX_BF16__)
struct Tiles {
    Tiles() {
        alignas(64) uint8_t config[64] = {1};  // palette 1
        for (int t = 0; t < 8; ++t) {
            config[16 + 2 * t] = 64;  // bytes of a row, 16 bits
            config[48 + t] = 16;      // rows
        }
        asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
    Tiles(const Tiles&) = delete;
};
template <int T> static ALWAYS_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T> static ALWAYS_INLINE void tile_load(const void* p, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> static ALWAYS_INLINE void tile_store(void* p, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B> static ALWAYS_INLINE void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#else
#define OUT_OF_LINE __attribute__((noinline))  // or a unit takes minutes to compile
struct Tiles {};
static thread_local int32_t tile_registers[8][TILE][TILE];
template <int T> static OUT_OF_LINE void tile_zero() { memset(tile_registers[T], 0, 1024); }
template <int T> static OUT_OF_LINE void tile_load(const void* p, long stride) {
    for (int r = 0; r < TILE; ++r)
        memcpy(tile_registers[T][r], (const char*)p + r * stride, 64);
}
template <int T> static OUT_OF_LINE void tile_store(void* p, long stride) {
    for (int r = 0; r < TILE; ++r)
        memcpy((char*)p + r * stride, tile_registers[T][r], 64);
}
template <int C, int A, int B> static OUT_OF_LINE void tile_multiply() {
    auto half = [](int32_t x, int odd) { return to_float(bf16{(uint16_t)(x >> 16 * odd)}); };
    for (int r = 0; r < TILE; ++r)
        for (int n = 0; n < TILE; ++n) {
            float sum;
            memcpy(&sum, &tile_registers[C][r][n], 4);
            for (int k = 0; k < TILE; ++k) {
                int32_t a = tile_registers[A][r][k], b = tile_registers[B][k][n];
                sum += half(a, 0) * half(b, 0);
                sum += half(a, 1) * half(b, 1);
            }
            memcpy(&tile_registers[C][r][n], &sum, 4);
        }
}
#endif

static ALWAYS_INLINE vf bf16_part(vf x) {
    vu u = (vu)x;
    return (vf)((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}
static ALWAYS_INLINE vf bf16_rest(vf x) {
    vf part = bf16_part(x);
#if LANES == 16 && defined(__AVX512DQ__)
    __mmask16 none = _mm512_fpclass_ps_mask((__m512)part, 0x99);  // infinities and NaN
    return (vf)_mm512_maskz_sub_ps(_knot_mask16(none), (__m512)x, (__m512)part);
#endif
    vi finite = ((vi)part & 0x7f800000) != 0x7f800000;
    return select(finite, x - part, vf{});
}
static ALWAYS_INLINE vf in_order(vf a, vf b) {
#if LANES == 16 && defined(__AVX512BF16__)
    return (vf)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#endif
    bf16 t[2 * LANES];
    store(t, a);
    store(t + LANES, b);
    return load((const float*)t);
}

// Products of 32 rows by 32 columns at a time, in four sums, that are taken step by step between
// other work: the multiplier is busy for some 64 cycles with one step, so a loop that calls `step`
// every so often has them for nothing.
struct TileWork {
    const char *a, *b;
    long a_row, a_tile, a_step, a_block;  // bytes from row to row, tile to tile of a block ...
    long b_row, b_tile, b_step;
    float* c;
    long ldc;
    int blocks, steps;  // blocks of 32 rows; steps of 32 bf16 in each
    bool fresh;         // whether c begins at 0
    int at = 0;         // steps taken of the present block

    bool done() const { return blocks == 0; }
    ALWAYS_INLINE float* sums(int m, int n) const { return c + m * TILE * ldc + n * TILE; }
    ALWAYS_INLINE void step() {
        if (at == 0) {
            if (fresh) {
                tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
            } else {
                tile_load<0>(sums(0, 0), ldc * 4);
                tile_load<1>(sums(0, 1), ldc * 4);
                tile_load<2>(sums(1, 0), ldc * 4);
                tile_load<3>(sums(1, 1), ldc * 4);
            }
        }
        const char *x = a + at * a_step, *y = b + at * b_step;
        tile_load<6>(y, b_row);
        tile_load<4>(x, a_row);
        tile_multiply<0, 4, 6>();
        tile_load<7>(y + b_tile, b_row);
        tile_multiply<1, 4, 7>();
        tile_load<5>(x + a_tile, a_row);
        tile_multiply<2, 5, 6>();
        tile_multiply<3, 5, 7>();
        if (++at < steps) return;
        tile_store<0>(sums(0, 0), ldc * 4);
        tile_store<1>(sums(0, 1), ldc * 4);
        tile_store<2>(sums(1, 0), ldc * 4);
        tile_store<3>(sums(1, 1), ldc * 4);
        at = 0;
        a += a_block;
        c += 2 * TILE * ldc;
        --blocks;
    }
};
