// y = W x + b for one row of x or a few, bound by the bandwidth at which W is read: W is read once,
// in place, in its own dtype, and sums are float. Rows are read as two streams, the first half of a
// stretch beside the second, and asked for twice, early into the second cache and late into the
// first: a core has more reads under way so.
#pragma once
#include "vec.hpp"

namespace gemv {

constexpr int SOON = 768, LATER = 2048;  // bytes that are asked for before they are needed
constexpr long STRETCH = 128;  // rows of W, so that both streams stay in a few pages
constexpr int TOGETHER = LANES == 16 ? 4 : 2;  // rows of x in one pass over W

template <int... L>
static ALWAYS_INLINE void split_pairs(const float* x, float* to,
                                      std::integer_sequence<int, L...>) {
    vf a = load(x), b = load(x + LANES);
    store(to, SHUFFLE(a, b, (2 * L)...));
    store(to + LANES, SHUFFLE(a, b, (2 * L + 1)...));
}

// x as the dot products read it: for bf16 weights even and odd numbers of a stretch of 2 LANES apart,
// since a pair of weights is split by a shift and a mask; what is left over stays as it is.
template <class T> static void prepare(const float* x, float* to, long K) {
    if constexpr (sizeof(T) == 4) {
        memcpy(to, x, K * sizeof(float));
        return;
    }
    long k = 0;
    for (; k + 2 * LANES <= K; k += 2 * LANES)
        split_pairs(x + k, to + k, std::make_integer_sequence<int, LANES>{});
    for (; k < K; ++k) to[k] = x[k];
}

// Two vectors of weights in the order of `prepare`.
static ALWAYS_INLINE void pair(const float* w, vf& a, vf& b) {
    a = load(w);
    b = load(w + LANES);
}
static ALWAYS_INLINE void pair(const bf16* w, vf& a, vf& b) {
    vu u = (vu)load((const int32_t*)w);
    a = (vf)(u << 16);
    b = (vf)(u & 0xffff0000u);
}

// sums[i][r] = w_i . x_r for S rows of W and R rows of x.
template <class T, int S, int R>
static ALWAYS_INLINE void dot(const T* const (&w)[S], const float* x, long xs, long K,
                              float (&sums)[S][R]) {
    constexpr int STEP = 256 / (int)sizeof(T), PAIRS = STEP / (2 * LANES);
    vf acc[S][R][2] = {};
    auto add = [&](int i, long k) INLINE_LAMBDA {
        vf a, b;
        pair(w[i] + k, a, b);
        UNROLL for (int r = 0; r < R; ++r) {
            acc[i][r][0] += a * load(x + r * xs + k);
            acc[i][r][1] += b * load(x + r * xs + k + LANES);
        }
    };
    long k = 0;
    for (; k + STEP <= K; k += STEP)
        UNROLL for (int i = 0; i < S; ++i) {
            const char* at = (const char*)(w[i] + k);
            UNROLL for (int b = 0; b < 256; b += 64) {
                __builtin_prefetch(at + SOON + b);
                __builtin_prefetch(at + LATER + b, 0, 2);
            }
            UNROLL for (int p = 0; p < PAIRS; ++p) add(i, k + p * 2 * LANES);
        }
    for (; k + 2 * LANES <= K; k += 2 * LANES)
        UNROLL for (int i = 0; i < S; ++i) add(i, k);
    UNROLL for (int i = 0; i < S; ++i)
        UNROLL for (int r = 0; r < R; ++r) {
            float s = sum_lanes(acc[i][r][0] + acc[i][r][1]);
            for (long j = k; j < K; ++j) s += to_float(w[i][j]) * x[r * xs + j];
            sums[i][r] = s;
        }
}

static ALWAYS_INLINE float rounded(float x, bool round) {
    return round ? to_float(from_float<bf16>(x)) : x;
}

// Rows [from, to) of W (rows `ws` apart) for R rows of x; y rows are `ys` apart.
template <class T, int R>
static void rows(const T* W, long ws, const T* bias, const float* x, long xs, float* y, long ys,
                 long K, long from, long to, bool round) {
    auto put = [&](long n, const float (&sums)[R]) INLINE_LAMBDA {
        for (int r = 0; r < R; ++r)
            y[r * ys + n] = rounded(bias ? sums[r] + to_float(bias[n]) : sums[r], round);
    };
    for (long next; from < to; from = next) {
        next = from + STRETCH < to ? from + STRETCH : to;
        const long half = (next - from) / 2;
        for (long n = from; n < from + half; ++n) {
            const T* const w[2] = {W + n * ws, W + (n + half) * ws};
            float sums[2][R];
            dot<T, 2, R>(w, x, xs, K, sums);
            put(n, sums[0]);
            put(n + half, sums[1]);
        }
        if ((next - from) % 2) {
            const T* const w[1] = {W + (next - 1) * ws};
            float sums[1][R];
            dot<T, 1, R>(w, x, xs, K, sums);
            put(next - 1, sums[0]);
        }
    }
}

// Columns [from, to) where W is (K, N): sums stay in y while rows of W pass by, four at a time.
template <class T>
static void columns(const T* W, long ws, const T* bias, const float* x, float* y, long K, long from,
                    long to, bool round) {
    for (long n = from; n < to; ++n) y[n] = bias ? to_float(bias[n]) : 0.0f;
    for (long k = 0; k < K; k += 4) {
        const int many = K - k < 4 ? (int)(K - k) : 4;
        const T* w = W + k * ws;
        long n = from;
        for (; n + LANES <= to; n += LANES) {
            vf s = load(y + n);
            for (int i = 0; i < many; ++i) s += x[k + i] * load(w + i * ws + n);
            store(y + n, s);
        }
        for (; n < to; ++n)
            for (int i = 0; i < many; ++i) y[n] += x[k + i] * to_float(w[i * ws + n]);
    }
    if (round)
        for (long n = from; n < to; ++n) y[n] = rounded(y[n], true);
}

// All of it. x: (B, K) contiguous; room: B * K floats; `by_row`: W is (N, K), else (K, N).
template <class T>
static void linear(const T* W, long ws, bool by_row, const T* bias, const float* x, float* room,
                   float* y, long ys, long B, long N, long K, bool round, int threads) {
    if (by_row)
        for (long b = 0; b < B; ++b) prepare<T>(x + b * K, room + b * K, K);
    auto part = [&](long from, long to) {
        if (!by_row) {
            for (long b = 0; b < B; ++b)
                columns<T>(W, ws, bias, x + b * K, y + b * ys, K, from, to, round);
            return;
        }
        long b = 0;
        for (; b + TOGETHER <= B; b += TOGETHER)
            rows<T, TOGETHER>(W, ws, bias, room + b * K, K, y + b * ys, ys, K, from, to, round);
        for (; b + 2 <= B; b += 2)
            rows<T, 2>(W, ws, bias, room + b * K, K, y + b * ys, ys, K, from, to, round);
        for (; b < B; ++b)
            rows<T, 1>(W, ws, bias, room + b * K, K, y + b * ys, ys, K, from, to, round);
    };
    if (threads <= 1 || N * K < 1 << 14) {
        part(0, N);
        return;
    }
    const long share = ((N + threads - 1) / threads + 15) / 16 * 16;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (int t = 0; t < threads; ++t) {
            long from = t * share, to = from + share < N ? from + share : N;
            if (from < to) part(from, to);
        }
    }
}

}  // namespace gemv
