// Keys, values and queries of an attention as tiles of bf16 numbers. See attention_tiles.hpp.
#pragma once
#include "attention.hpp"
#include "tiles.hpp"

namespace {

constexpr int DKP = (DK + TILE_K - 1) / TILE_K * TILE_K, DVP = (DV + 31) / 32 * 32;
static_assert(PANEL == 2 * TILE && KROWS % TILE_K == 0, "tiles of 16 x 16");
constexpr int PARTS = sizeof(io_t) == 4 ? 3 : 1, UNITS = PARTS == 3 ? 24 : 4;
constexpr uint8_t KEY_MARK = 1, VALUE_MARK = 2;

// Numbers of a block of 32 keys. V: [32 columns][part][two tiles of 16 columns by 32 keys].
// K: rows of DKP numbers, with parts [32 numbers of a row][part][two tiles of 16 keys].
constexpr long V_BLOCK = (long)PARTS * DVP * TILE_K, K_BLOCK = (long)PARTS * DKP * TILE_K;
constexpr long TWO_TILES = 2048;  // bytes

static ALWAYS_INLINE vi not_finite(vi pairs) {
    return (vi)((pairs & 0x7f80) == 0x7f80) | (vi)((pairs & 0x7f800000) == 0x7f800000);
}

// Takes the first bf16 number off x, rounded.
static ALWAYS_INLINE vf take_part(vf& x) {
    vf part = (vf)(((vi)x + 0x8000) & (int32_t)0xffff0000);
    x -= part;
    return part;
}
// Calls put(part, a, b) for the parts of two vectors. What is left is 0 where both are finite and
// become no infinity, and not finite elsewhere.
template <class Put> static ALWAYS_INLINE vf each_part(vf a, vf b, Put put) {
    UNROLL for (int part = 0; part < PARTS; ++part) {
        vf x = take_part(a), y = take_part(b);
        put(part, x, y);
    }
    return a + b;
}
static ALWAYS_INLINE bool odd_left(vf left) {
    return any((vi)(((vi)left & 0x7f800000) == 0x7f800000));
}
// Two parts as pairs.
static ALWAYS_INLINE vi pairs_of(vf even, vf odd) { return (vi)((vu)even >> 16) | (vi)odd; }

// The queries of a panel as pairs, their parts apart. Returns whether some are not finite.
using Queries = pair[DKP / TILE_K][PARTS][TILE][PANEL];
static inline bool pack_queries(int n, const io_t* q, long rs, Queries& to) {
    if constexpr (PARTS == 1) {
        memset(to, 0, sizeof to);
        transpose_pairs(n, DK / 2 * 2, (const bf16*)q, rs, to[0][0][0], (long)PANEL);
        if constexpr (DK % 2 == 1)
            for (int r = 0; r < n; ++r)
                to[DK / TILE_K][0][DK / 2 % TILE][r].bits = ((const bf16*)q)[r * rs + DK - 1].bits;
    } else {
        alignas(64) float turned[DKP][PANEL];
        if (n < PANEL || DK < DKP) memset(turned, 0, sizeof turned);
        transpose_in(n, DK, q, rs, turned[0], (long)PANEL);
        vf left{};
        for (int d = 0; d < DKP; d += 2)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
                int32_t* at = (int32_t*)to[d / TILE_K][0][d / 2 % TILE] + v * LANES;
                left += each_part(load(turned[d] + v * LANES), load(turned[d + 1] + v * LANES),
                                  [&](int part, vf a, vf b) INLINE_LAMBDA {
                                      store(at + part * (TILE * PANEL), pairs_of(a, b));
                                  });
            }
        if (!odd_left(left)) return false;
        // Keys are taken one by one, by the sum of the parts: nothing is left of an infinity.
        for (int d = 0; d < DKP; d += 2)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
                vf a = load(turned[d] + v * LANES), b = load(turned[d + 1] + v * LANES);
                for (int part = 0; part < PARTS; ++part, a = bf16_rest(a), b = bf16_rest(b))
                    store((int32_t*)to[d / TILE_K][part][d / 2 % TILE] + v * LANES, make_pairs(a, b));
            }
        return true;
    }
    return false;
}

static ALWAYS_INLINE vf load_some(const io_t* p, int n) {
    return n >= LANES ? load(p) : n > 0 ? load_part(p, n) : vf{};
}

// Up to 32 keys of D numbers as rows, whole tiles wide, or as tiles of their parts. Returns whether
// some are not finite, which is not looked for in rows.
template <int D, bool ROWS = PARTS == 1> static inline bool pack_keys(int n, const io_t* src, long rs, bf16* dst) {
    constexpr int WIDTH = (D + TILE_K - 1) / TILE_K * TILE_K;
    vf left{};
    for (int r = 0; r < TILE_K; ++r) {
        const io_t* row = src + r * rs;
        if constexpr (ROWS) {
            bf16* to = dst + (long)r * WIDTH;
            memset(to, 0, WIDTH * 2);
            if (r < n) memcpy(to, row, D * 2);
        } else {
            char* to = (char*)dst + r * 64;
            for (int d = 0; d < WIDTH; d += TILE_K, to += PARTS * TWO_TILES) {
                int some = r < n ? D - d : 0;
                left += each_part(load_some(row + d, some), load_some(row + d + LANES, some - LANES),
                                  [&](int part, vf a, vf b) INLINE_LAMBDA {
                                      store((float*)(to + part * TWO_TILES), in_order(a, b));
                                  });
            }
        }
    }
    return odd_left(left);
}

// Up to 32 values of D numbers as tiles of 16 columns by 32 keys. Whether some are not finite.
template <int D> static inline bool pack_values(int n, const io_t* src, long rs, bf16* dst) {
    constexpr int WIDTH = (D + TILE_K - 1) / TILE_K * TILE_K;
    vi bad{};
    vf left{};
    for (int d = 0; d < WIDTH; d += TILE) {
        const int some = D - d < TILE ? D - d : TILE;
        // Column d of the keys i ... that lie `step` keys apart.
        auto keys = [&](int first, int step, vf* to) INLINE_LAMBDA {
            UNROLL for (int i = 0; i < TILE; ++i) {
                const int key = first + step * i;
                const io_t* at = src + key * rs + d;
                to[i] = key >= n || some <= 0 ? vf{} : some == TILE ? load(at) : load_part(at, some);
            }
        };
        float* to = (float*)(dst + d / 32 * (PARTS * 1024) + d % 32 * TILE_K);
        vf a[TILE], b[TILE];
        if constexpr (PARTS == 1) {
            keys(0, 2, a), keys(1, 2, b);
            UNROLL for (int i = 0; i < TILE; ++i) {
                a[i] = (vf)pairs_of(a[i], b[i]);
                bad |= not_finite((vi)a[i]);
            }
            transpose_square(a);
            UNROLL for (int i = 0; i < TILE; ++i) store(to + i * TILE, a[i]);
        } else {
            keys(0, 1, a), keys(TILE, 1, b);
            transpose_square(a), transpose_square(b);
            UNROLL for (int i = 0; i < TILE; ++i)
                left += each_part(a[i], b[i], [&](int part, vf x, vf y) INLINE_LAMBDA {
                    store(to + i * TILE + part * 512, in_order(x, y));
                });
        }
    }
    return any(bad) || odd_left(left);
}

}  // namespace
