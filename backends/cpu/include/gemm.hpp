// Micro-GEMM on row-major B and C and an A of any strides.
//
//   gemm<mode>(M, N, K, A, ars, acs, B, ldb, C, ldc, alpha)
//       C[M x N] (mode: Set =, Add +=) alpha * A[M x K] B[K x N]
//       A[m][k] = A[m * ars + k * acs], so a transposed A costs nothing; B and C have unit column
//       stride. Any M, N, K >= 0; nothing is read behind the last element of B, nothing written
//       outside C. Element types of A and B: float or bf16 (converted on load). C is float.
//   gemm_tiles<NV>(M, K, A, ars, acs, B, ldb, finish)
//       the same for a panel of exactly NV vectors of columns, where finish(row, v, sum) decides
//       what happens to each vector of the result (row m, columns v * LANES ...), in registers.
//   gemm_onto<NV>(M, K, A, ars, acs, B, ldb, start, finish)
//       the same, the sums beginning at start(row, v).
//   Pass constants (template arguments, constexpr) for strides wherever they are known: calls are
//   inlined and addresses then fold into the instructions.
//   MR x NV = ROWS x PANEL_VECTORS is the register block; PANEL = PANEL_VECTORS * LANES columns.
//   bf16 pairs: A of `pair` (two neighbours in k) and B of packed pairs (pack.hpp) run on the
//   two-term dot product instruction where there is one, with K counting pairs.
#pragma once
#include "vec.hpp"

#if LANES == 16 && defined(__AVX512F__)
constexpr int ROWS = 8;
#elif LANES == 16
constexpr int ROWS = 3;  // emulated, in tests
#else
constexpr int ROWS = 6;
#endif
constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * LANES;

enum class Mode { Set, Add };

// Two bf16 numbers: low half = even k, high half = odd k.
struct pair {
    int32_t bits;
};

namespace detail {
static ALWAYS_INLINE vf broadcast(const float* p) { return splat(*p); }
static ALWAYS_INLINE vf broadcast(const bf16* p) { return splat(to_float(*p)); }
static ALWAYS_INLINE vi broadcast(const pair* p) { return splat(p->bits); }
static ALWAYS_INLINE vi load(const pair* p) { return ::load((const int32_t*)p); }
static ALWAYS_INLINE vf load(const float* p) { return ::load(p); }
static ALWAYS_INLINE vf load(const bf16* p) { return ::load(p); }

static ALWAYS_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
// The pair dot product: odd terms first, then even ones, each rounded, as the instruction does.
static ALWAYS_INLINE vf multiply_add(vi a, vi b, vf c) {
#if LANES == 16 && defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
    const int32_t high = (int32_t)0xffff0000;
    c = (vf)(a & high) * (vf)(b & high) + c;
    return (vf)(a << 16) * (vf)(b << 16) + c;
#endif
}

// acc += A B: rows of A from `a`, K steps.
template <int M, int NV, class TA, class TB>
static ALWAYS_INLINE void accumulate(vf (&acc)[M][NV], int K, const TA* a, long ars, long acs,
                                     const TB* B, long ldb) {
    for (int k = 0; k < K; ++k) {
        decltype(load(B)) b[NV];
        UNROLL for (int v = 0; v < NV; ++v) b[v] = load(B + v * LANES);
        UNROLL for (int m = 0; m < M; ++m) {
            auto x = broadcast(a + m * ars);
            UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = multiply_add(x, b[v], acc[m][v]);
        }
        a += acs;
        B += ldb;
    }
}

template <int M, int NV, class TA, class TB, class Start, class Finish>
static ALWAYS_INLINE void tile(int row, int K, const TA* A, long ars, long acs, const TB* B,
                               long ldb, Start start, Finish finish) {
    vf acc[M][NV];
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = start(row + m, v);
    accumulate<M, NV>(acc, K, A + row * ars, ars, acs, B, ldb);
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int v = 0; v < NV; ++v) finish(row + m, v, acc[m][v]);
}

template <int M, int NV, class... Rest>
static ALWAYS_INLINE void tile_of(int rows, int row, Rest... rest) {
    if constexpr (M > 0) {
        if (rows == M)
            tile<M, NV>(row, rest...);
        else
            tile_of<M - 1, NV>(rows, row, rest...);
    }
}
}  // namespace detail

template <int NV, class TA, class TB, class Start, class Finish>
static ALWAYS_INLINE void gemm_onto(int M, int K, const TA* A, long ars, long acs, const TB* B,
                                    long ldb, Start start, Finish finish) {
    int row = 0;
    // A short last tile would leave the multipliers waiting: split the last two evenly.
    for (; M - row >= 2 * ROWS || M - row == ROWS; row += ROWS)
        detail::tile<ROWS, NV>(row, K, A, ars, acs, B, ldb, start, finish);
    if (int left = M - row) {
        int first = left > ROWS ? (left + 1) / 2 : left;
        detail::tile_of<ROWS, NV>(first, row, K, A, ars, acs, B, ldb, start, finish);
        if (left > first)
            detail::tile_of<ROWS - 1, NV>(left - first, row + first, K, A, ars, acs, B, ldb,
                                          start, finish);
    }
}

template <int NV, class TA, class TB, class Finish>
static ALWAYS_INLINE void gemm_tiles(int M, int K, const TA* A, long ars, long acs, const TB* B,
                                     long ldb, Finish finish) {
    gemm_onto<NV>(M, K, A, ars, acs, B, ldb, [](int, int) INLINE_LAMBDA { return vf{}; },
                  finish);
}

namespace detail {
// The columns behind the last full vector. Loads may run into the next row, whose lanes are
// dropped, but not behind the last row.
template <int M, class TA, class TB, class Start, class Finish>
static ALWAYS_INLINE void narrow_tile(int row, int K, int n, const TA* A, long ars, long acs,
                                      const TB* B, long ldb, Start start, Finish finish) {
    vf acc[M];
    UNROLL for (int m = 0; m < M; ++m) acc[m] = start(row + m);
    const TA* a = A + row * ars;
    for (int k = 0; k < K; ++k) {
        vf b = (K - 1 - k) * ldb + n >= LANES ? ::load(B) : load_part(B, n);
        UNROLL for (int m = 0; m < M; ++m) acc[m] = broadcast(a + m * ars) * b + acc[m];
        a += acs;
        B += ldb;
    }
    UNROLL for (int m = 0; m < M; ++m) finish(row + m, acc[m]);
}
}  // namespace detail

template <Mode mode, class TA, class TB>
static ALWAYS_INLINE void gemm(int M, int N, int K, const TA* A, long ars, long acs, const TB* B,
                               long ldb, float* C, long ldc, float alpha = 1.0f) {
    auto write = [=](float* c, vf sum) INLINE_LAMBDA {
        store(c, mode == Mode::Add ? load(c) + alpha * sum : alpha * sum);
    };
    int n = 0;
    for (; n + PANEL <= N; n += PANEL) {
        float* c = C + n;
        gemm_tiles<PANEL_VECTORS>(
            M, K, A, ars, acs, B + n, ldb,
            [=](int m, int v, vf sum) INLINE_LAMBDA { write(c + m * ldc + v * LANES, sum); });
    }
    for (; n + LANES <= N; n += LANES) {
        float* c = C + n;
        gemm_tiles<1>(M, K, A, ars, acs, B + n, ldb,
                      [=](int m, int, vf sum) INLINE_LAMBDA { write(c + m * ldc, sum); });
    }
    if (int rest = N - n) {
        float* c = C + n;
        auto zero = [](int) INLINE_LAMBDA { return vf{}; };
        auto finish = [=](int m, vf sum) INLINE_LAMBDA {
            vf old = mode == Mode::Add ? load_part(c + m * ldc, rest) : vf{};
            store_part(c + m * ldc, old + alpha * sum, rest);
        };
        int m = 0;
        for (; m + 4 <= M; m += 4)
            detail::narrow_tile<4>(m, K, rest, A, ars, acs, B + n, ldb, zero, finish);
        for (; m < M; ++m)
            detail::narrow_tile<1>(m, K, rest, A, ars, acs, B + n, ldb, zero, finish);
    }
}
