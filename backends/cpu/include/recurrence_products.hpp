// Products of a chunk: whole and triangular ones, reads of the state, triangular systems.

// Sums of 6 x 4 vectors, where 32 registers hold them, take fewer loads than 8 x 2.
constexpr int WIDE = ROWS == 8 ? 4 * LANES : PANEL;
template <int NV> constexpr int HEIGHT = NV == 4 ? 6 : ROWS;

// f(std::integral_constant<int, NV>, column) for panels of NV vectors that cover DP columns: of one
// width where that is the wide one, of two widths at most, since each costs compile time.
template <int DP, class F> static ALWAYS_INLINE void panels(F f) {
    constexpr int step = DP % WIDE ? PANEL : WIDE;
    for (int c = 0; c + step <= DP; c += step) f(std::integral_constant<int, step / LANES>{}, c);
    if constexpr (DP % step != 0) f(std::integral_constant<int, 1>{}, DP / step * step);
}

// f(std::integral_constant<int, M>, row) for tiles of M rows and NV vectors: four heights instead of
// every one, since each costs compile time per product.
template <int NV, class F> static ALWAYS_INLINE void heights(int M, F f) {
    constexpr int most = HEIGHT<NV>;
    int row = 0;
    for (; M - row >= most && (most == 8 || M - row != 8); row += most)
        f(std::integral_constant<int, most>{}, row);
    for (; M - row >= 4; row += 4) f(std::integral_constant<int, 4>{}, row);
    if (M - row >= 2) {
        f(std::integral_constant<int, 2>{}, row);
        row += 2;
    }
    if (M - row) f(std::integral_constant<int, 1>{}, row);
}
template <int NV, class Start, class Finish>
static ALWAYS_INLINE void tiles(int M, int K, const float* A, long ars, long acs, const float* B,
                                long ldb, Start start, Finish finish) {
    heights<NV>(M, [=](auto height, int row) INLINE_LAMBDA {
        detail::tile<decltype(height)::value, NV>(row, K, A, ars, acs, B, ldb, start, finish);
    });
}

// C[M x DP] = finish(row, column, A B): the sums stay in registers until then.
template <int DP, class Finish>
static ALWAYS_INLINE void product(int M, int K, const float* A, long ars, long acs, const float* B,
                                  long ldb, Finish finish) {
    panels<DP>([&](auto nv, int c) INLINE_LAMBDA {
        tiles<decltype(nv)::value>(
            M, K, A, ars, acs, B + c, ldb, [](int, int) INLINE_LAMBDA { return vf{}; },
            [=](int m, int v, vf sum) INLINE_LAMBDA { finish(m, c + v * LANES, sum); });
    });
}
template <int DP, class Start, class Finish>
static ALWAYS_INLINE void product_onto(int M, int K, const float* A, long ars, long acs,
                                       const float* B, long ldb, Start start, Finish finish) {
    panels<DP>([&](auto nv, int c) INLINE_LAMBDA {
        tiles<decltype(nv)::value>(
            M, K, A, ars, acs, B + c, ldb,
            [=](int m, int v) INLINE_LAMBDA { return start(m, c + v * LANES); },
            [=](int m, int v, vf sum) INLINE_LAMBDA { finish(m, c + v * LANES, sum); });
    });
}

// P[i][j] = finish(i, j, x_i . y_j) for j <= i (strict: j < i), 0 above; yt is y transposed (CP).
template <int D, bool strict, class Finish>
static ALWAYS_INLINE void lower(int n, const float* x, long xs, const float* yt, float* P,
                                Finish finish) {
    auto zero = [](int, int) INLINE_LAMBDA { return vf{}; };
    for (int p = 0; p < n; p += PANEL) {
        auto write = [=](int m, int v, vf sum) INLINE_LAMBDA {
            int i = p + m, j = p + v * LANES;
            vi seen = (iota() + j) < (i + (strict ? 0 : 1));
            store(P + i * CP + j, (vf)(seen & (vi)finish(i, j, sum)));
        };
        // The first rows see nothing of the second vector of keys.
        constexpr int FEW = PANEL_VECTORS == 2 && LANES % ROWS == 0 ? LANES : 0;
        int from = p;
        if (FEW && n - p >= FEW) {
            detail::tile<FEW ? FEW : 1, 1>(0, D, x + p * xs, xs, 1, yt + p, CP, zero, write);
            for (int m = 0; m < FEW; ++m) store(P + (p + m) * CP + p + LANES, vf{});
            from += FEW;
        }
        auto below = [=](int m, int v, vf sum) INLINE_LAMBDA { write(m + from - p, v, sum); };
        tiles<PANEL_VECTORS>(n - from, D, x + from * xs, xs, 1, yt + p, CP, zero, below);
    }
}

struct Steps {
    int K;
    const float *A, *B;
};

// O[row] += A[row] B for tiles of rows; steps(row, M) says how many steps a tile takes, and from where.
template <int DP, class F>
static ALWAYS_INLINE void add_triangle(int n, long ars, long acs, long ldb, float* O, long os,
                                       F steps) {
    panels<DP>([&](auto nv, int c) INLINE_LAMBDA {
        constexpr int NV = decltype(nv)::value;
        heights<NV>(n, [&](auto height, int row) INLINE_LAMBDA {
            constexpr int M = decltype(height)::value;
            float* o = O + row * os + c;
            auto [K, A, B] = steps(row, M);
            detail::tile<M, NV>(
                0, K, A, ars, acs, B + c, ldb,
                [=](int m, int v) INLINE_LAMBDA { return load(o + m * os + v * LANES); },
                [=](int m, int v, vf s) INLINE_LAMBDA { store(o + m * os + v * LANES, s); });
        });
    });
}
// O[i] += sum_{j <= i} P[i][j] V[j] for n rows.
template <int DP>
static ALWAYS_INLINE void add_lower(int n, const float* P, const float* V, long vs, float* O,
                                    long os) {
    add_triangle<DP>(n, CP, 1, vs, O, os, [=](int row, int M) INLINE_LAMBDA {
        return Steps{row + M, P + row * CP, V};
    });
}

// O[j] += sum_{i >= j} P[i][j] X[i] for n rows.
template <int DP>
static ALWAYS_INLINE void add_upper(int n, const float* P, const float* X, long xs, float* O,
                                    long os) {
    add_triangle<DP>(n, 1, CP, xs, O, os, [=](int row, int) INLINE_LAMBDA {
        return Steps{n - row, P + row * CP + row, X + row * xs};
    });
}

// Rows of a read: finish(i, column, scale(i) * (x_i S) + sum_{j <= i} P_ij w_j [+ Q_ij u_j]) with
// the sums in registers throughout. P and Q may be null.
template <int DP, class Scale, class Finish>
static ALWAYS_INLINE void read_rows(int n, int K, View x, const float* S, const float* P, View w,
                                    const float* Q, View u, Scale scale, Finish finish) {
    panels<DP>([&](auto nv, int c) INLINE_LAMBDA {
        constexpr int NV = decltype(nv)::value;
        heights<NV>(n, [&](auto height, int row) INLINE_LAMBDA {
            constexpr int M = decltype(height)::value;
            vf acc[M][NV];
            UNROLL for (int m = 0; m < M; ++m)
                UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = vf{};
            detail::accumulate<M, NV>(acc, K, x.p + row * x.rs, x.rs, 1, S + c, DP);
            UNROLL for (int m = 0; m < M; ++m)
                UNROLL for (int v = 0; v < NV; ++v) acc[m][v] *= scale(row + m);
            if (P)
                detail::accumulate<M, NV>(acc, row + M, P + row * CP, CP, 1, w.p + c, w.rs);
            if (Q)
                detail::accumulate<M, NV>(acc, row + M, Q + row * CP, CP, 1, u.p + c, u.rs);
            UNROLL for (int m = 0; m < M; ++m)
                UNROLL for (int v = 0; v < NV; ++v) finish(row + m, c + v * LANES, acc[m][v]);
        });
    });
}

// X = (1 + M)^-1 X in place, M strictly lower triangular: blocks of rows, each solved in registers.
template <int DP> static void solve_lower(int n, const float* M, float* X) {
    panels<DP>([&](auto nv, int c) INLINE_LAMBDA {
        constexpr int NV = decltype(nv)::value;
        heights<NV>(n, [&](auto height, int row) INLINE_LAMBDA {
            constexpr int H = decltype(height)::value;
            float* x = X + row * DP + c;
            const float* m = M + row * CP;
            vf acc[H][NV];
            UNROLL for (int i = 0; i < H; ++i)
                UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = -load(x + i * DP + v * LANES);
            detail::accumulate<H, NV>(acc, row, m, CP, 1, X + c, DP);
            UNROLL for (int j = 0; j < H; ++j)
                UNROLL for (int i = j + 1; i < H; ++i)
                    UNROLL for (int v = 0; v < NV; ++v)
                        acc[i][v] -= m[i * CP + row + j] * acc[j][v];
            UNROLL for (int i = 0; i < H; ++i)
                UNROLL for (int v = 0; v < NV; ++v) store(x + i * DP + v * LANES, -acc[i][v]);
        });
    });
}

// X = (1 + M)^-T X in place.
template <int DP> static void solve_upper(int n, const float* M, float* X) {
    panels<DP>([&](auto nv, int c) INLINE_LAMBDA {
        constexpr int NV = decltype(nv)::value;
        heights<NV>(n, [&](auto height, int above) INLINE_LAMBDA {
            constexpr int H = decltype(height)::value;
            const int end = n - above, row = end - H;  // the last rows first
            float* x = X + row * DP + c;
            const float* m = M + row * CP + row;
            vf acc[H][NV];
            UNROLL for (int i = 0; i < H; ++i)
                UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = -load(x + i * DP + v * LANES);
            detail::accumulate<H, NV>(acc, above, m + H * CP, 1, CP, x + H * DP, DP);
            UNROLL for (int i = H - 1; i > 0; --i)
                UNROLL for (int j = 0; j < i; ++j)
                    UNROLL for (int v = 0; v < NV; ++v) acc[j][v] -= m[i * CP + j] * acc[i][v];
            UNROLL for (int i = 0; i < H; ++i)
                UNROLL for (int v = 0; v < NV; ++v) store(x + i * DP + v * LANES, -acc[i][v]);
        });
    });
}
