// Moving blocks between layouts: transposes, panels, conversions, bf16 pairs.
//
//   transpose_square(r)                      LANES x LANES in registers, r[LANES]
//   transpose_in<T>(n, d, src, rs, dst, ld, scale)
//       dst[c * ld + r] = scale * src[r * rs + c], r < n, c < d, float result. Rows n .. up to the
//       next multiple of LANES are written as 0, so ld and dst must have room for them.
//   transpose_out<T>(n, d, src, ld, dst, rs)  dst[r * rs + c] = src[c * ld + r], converted to T
//       src must be readable up to the next multiple of LANES of n.
//   copy_rows<TD, TS>(n, d, src, rs, dst, ld)  row by row, converted
//   transpose_pairs(n, d, src, rs, dst, ld)  bf16 rows to pairs: dst[(c/2) * ld + r] =
//       (src[r][c], src[r][c+1]); rows up to the next multiple of LANES are 0, d is even
//   interleave_rows(n, d, src, rs, dst)      bf16: dst[(r/2) * d + c] = (src[r][c], src[r+1][c]);
//       an odd last row is paired with 0
//   make_pairs(even, odd)                    two float vectors to one of bf16 pairs; the instruction
//                                            for it makes subnormal numbers 0
#pragma once
#include "gemm.hpp"

namespace detail {
// Swap the blocks of D lanes that lie off the diagonal of rows a and b.
template <int D, int... L>
static ALWAYS_INLINE void swap_blocks(vf& a, vf& b, std::integer_sequence<int, L...>) {
    vf x = SHUFFLE(a, b, ((L & D) ? LANES + L - D : L)...);
    vf y = SHUFFLE(a, b, ((L & D) ? LANES + L : L + D)...);
    a = x;
    b = y;
}
template <int D> static ALWAYS_INLINE void transpose_step(vf* r) {
    UNROLL for (int i = 0; i < LANES; ++i)
        if (!(i & D)) swap_blocks<D>(r[i], r[i + D], std::make_integer_sequence<int, LANES>{});
    if constexpr (D > 1) transpose_step<D / 2>(r);
}
}  // namespace detail

static ALWAYS_INLINE void transpose_square(vf* r) { detail::transpose_step<LANES / 2>(r); }

template <class T>
static inline void transpose_in(int n, int d, const T* src, long rs, float* dst, long ld,
                                float scale = 1.0f) {
    for (int r0 = 0; r0 < n; r0 += LANES) {
        int rows = n - r0 < LANES ? n - r0 : LANES;
        for (int c0 = 0; c0 < d; c0 += LANES) {
            int cols = d - c0 < LANES ? d - c0 : LANES;
            const T* s = src + r0 * rs + c0;
            vf t[LANES];
            if (rows == LANES && cols == LANES) {
                UNROLL for (int i = 0; i < LANES; ++i) t[i] = load(s + i * rs) * scale;
            } else {
                for (int i = 0; i < LANES; ++i)
                    t[i] = i < rows ? load_part(s + i * rs, cols) * scale : vf{};
            }
            transpose_square(t);
            float* o = dst + c0 * ld + r0;
            if (cols == LANES) {
                UNROLL for (int i = 0; i < LANES; ++i) store(o + i * ld, t[i]);
            } else {
                for (int i = 0; i < cols; ++i) store(o + i * ld, t[i]);
            }
        }
    }
}

template <class T>
static inline void transpose_out(int n, int d, const float* src, long ld, T* dst, long rs) {
    for (int r0 = 0; r0 < n; r0 += LANES) {
        int rows = n - r0 < LANES ? n - r0 : LANES;
        for (int c0 = 0; c0 < d; c0 += LANES) {
            int cols = d - c0 < LANES ? d - c0 : LANES;
            const float* s = src + c0 * ld + r0;
            vf t[LANES];
            for (int i = 0; i < LANES; ++i) t[i] = i < cols ? load(s + i * ld) : vf{};
            transpose_square(t);
            T* o = dst + r0 * rs + c0;
            if (rows == LANES && cols == LANES) {
                UNROLL for (int i = 0; i < LANES; ++i) store(o + i * rs, t[i]);
            } else {
                for (int i = 0; i < rows; ++i) store_part(o + i * rs, t[i], cols);
            }
        }
    }
}

template <class TD, class TS>
static inline void copy_rows(long n, int d, const TS* src, long rs, TD* dst, long ld) {
    for (long r = 0; r < n; ++r) {
        const TS* s = src + r * rs;
        TD* o = dst + r * ld;
        int c = 0;
        for (; c + LANES <= d; c += LANES) store(o + c, load(s + c));
        if (c < d) store_part(o + c, load_part(s + c, d - c), d - c);
    }
}

static ALWAYS_INLINE vi make_pairs(vf even, vf odd) {
#if LANES == 16 && defined(__AVX512BF16__)
    const vi order = iota() | ((iota() + 16) << 16);  // halves 0, 16, 1, 17 ...
    return (vi)_mm512_permutexvar_epi16(
        (__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#endif
    return round_to_bf16(even) | (round_to_bf16(odd) << 16);
}

static inline void transpose_pairs(int n, int d, const bf16* src, long rs, pair* dst, long ld) {
    for (int r0 = 0; r0 < n; r0 += LANES) {
        int rows = n - r0 < LANES ? n - r0 : LANES;
        for (int c0 = 0; c0 < d; c0 += 2 * LANES) {
            int cols = d - c0 < 2 * LANES ? (d - c0) / 2 : LANES;
            const bf16* s = src + r0 * rs + c0;
            pair* o = dst + c0 / 2 * ld + r0;
            if (cols == LANES) {
                vf t[LANES];
                for (int i = 0; i < LANES; ++i)
                    t[i] = i < rows ? load((const float*)(s + i * rs)) : vf{};
                transpose_square(t);
                UNROLL for (int i = 0; i < LANES; ++i) store((float*)(o + i * ld), t[i]);
                continue;
            }
            for (int c = 0; c < cols; ++c)
                for (int r = 0; r < LANES; ++r) {
                    int32_t both = 0;
                    if (r < rows) memcpy(&both, s + r * rs + 2 * c, 4);
                    o[c * ld + r].bits = both;
                }
        }
    }
}

static inline void interleave_rows(int n, int d, const bf16* src, long rs, pair* dst) {
    for (int r = 0; r < n; r += 2) {
        const uint16_t* a = (const uint16_t*)(src + r * rs);
        const uint16_t* b = (const uint16_t*)(src + (r + 1) * rs);
        for (int c = 0; c < d; ++c)
            dst[(r / 2) * d + c].bits =
                (int32_t)((uint32_t)a[c] | (r + 1 < n ? (uint32_t)b[c] << 16 : 0));
    }
}
