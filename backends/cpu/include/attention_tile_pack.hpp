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

// The queries of a panel as pairs, their parts apart. Returns whether some are not finite.
using Queries = pair[DKP / TILE_K][PARTS][TILE][PANEL];
static inline bool pack_queries(int n, const io_t* q, long rs, Queries& to) {
    memset(to, 0, sizeof to);
    if constexpr (PARTS == 1) {
        transpose_pairs(n, DK / 2 * 2, (const bf16*)q, rs, to[0][0][0], (long)PANEL);
        if constexpr (DK % 2 == 1)
            for (int r = 0; r < n; ++r)
                to[DK / TILE_K][0][DK / 2 % TILE][r].bits = ((const bf16*)q)[r * rs + DK - 1].bits;
    } else {
        alignas(64) float turned[DKP][PANEL];
        memset(turned, 0, sizeof turned);
        transpose_in(n, DK, q, rs, turned[0], (long)PANEL);
        vi odd{};
        for (int d = 0; d < DKP; d += 2)
            UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
                vf a = load(turned[d] + v * LANES), b = load(turned[d + 1] + v * LANES);
                UNROLL for (int part = 0; part < PARTS; ++part) {
                    vi both = make_pairs(a, b);
                    if (part == 0) odd |= not_finite(both);
                    store((int32_t*)to[d / TILE_K][part][d / 2 % TILE] + v * LANES, both);
                    a = bf16_rest(a), b = bf16_rest(b);
                }
            }
        return any(odd);
    }
    return false;
}

static ALWAYS_INLINE vf load_some(const io_t* p, int n) {
    return n >= LANES ? load(p) : n > 0 ? load_part(p, n) : vf{};
}

// Up to 32 keys of D numbers as rows, whole tiles wide, or as tiles of their parts.
template <int D> static inline vi pack_keys(int n, const io_t* src, long rs, bf16* dst) {
    constexpr int WIDTH = (D + TILE_K - 1) / TILE_K * TILE_K;
    vi odd{};
    for (int r = 0; r < TILE_K; ++r) {
        const io_t* row = src + r * rs;
        if constexpr (PARTS == 1) {
            bf16* to = dst + (long)r * WIDTH;
            memset(to, 0, WIDTH * 2);
            if (r < n) memcpy(to, row, D * 2);
        } else {
            char* to = (char*)dst + r * 64;
            for (int d = 0; d < WIDTH; d += TILE_K, to += PARTS * TWO_TILES) {
                int left = r < n ? D - d : 0;
                vf a = load_some(row + d, left), b = load_some(row + d + LANES, left - LANES);
                UNROLL for (int part = 0; part < PARTS; ++part) {
                    vf both = in_order(a, b);
                    if (part == 0) odd |= not_finite((vi)both);
                    store((float*)(to + part * TWO_TILES), both);
                    a = bf16_rest(a), b = bf16_rest(b);
                }
            }
        }
    }
    return odd;
}

// Up to 32 values of D numbers as tiles of 16 columns by 32 keys.
template <int D> static inline vi pack_values(int n, const io_t* src, long rs, bf16* dst) {
    constexpr int WIDTH = (D + TILE_K - 1) / TILE_K * TILE_K;
    vi bad{};
    for (int d = 0; d < WIDTH; d += TILE) {
        vf even[TILE], odd[TILE];
        int some = D - d < TILE ? D - d : TILE;
        for (int i = 0; i < TILE; ++i) {
            const io_t *a = src + 2 * i * rs + d, *b = a + rs;
            even[i] = odd[i] = vf{};
            if (2 * i < n && some > 0) even[i] = some == TILE ? load(a) : load_part(a, some);
            if (2 * i + 1 < n && some > 0) odd[i] = some == TILE ? load(b) : load_part(b, some);
        }
        UNROLL for (int part = 0; part < PARTS; ++part) {
            vf t[TILE];
            UNROLL for (int i = 0; i < TILE; ++i) {
                t[i] = PARTS == 1 ? (vf)((vi)((vu)even[i] >> 16) | (vi)odd[i])
                                  : (vf)make_pairs(even[i], odd[i]);
                if (part == 0) bad |= not_finite((vi)t[i]);
                if (PARTS > 1) even[i] = bf16_rest(even[i]), odd[i] = bf16_rest(odd[i]);
            }
            transpose_square(t);
            float* to = (float*)(dst + d / 32 * (PARTS * 1024) + part * 1024 + d % 32 * TILE_K);
            UNROLL for (int i = 0; i < TILE; ++i) store(to + i * TILE, t[i]);
        }
    }
    return bad;
}

}  // namespace
