// Shared by the recurrence kernels: arguments, rows of tensors, decay inside a chunk.
//
// Constants of the unit: DK, DV, DECAY, CORRECTION, EXCLUSIVE, BONUS, ONES, CAUSAL, CHUNK, SCALE
// and the type T of q, k, v and the output. Everything else is float; a running sum of g is kept
// as high + low float, so that a small step after a huge one is not lost.

constexpr int up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int DKP = up(DK, LANES), DVP = up(DV, LANES), CP = up(CHUNK, PANEL), W = DV + ONES;
constexpr int KV_ = DKP / LANES, VV_ = DVP / LANES;  // vectors in a row
enum { NONE, HEAD, TOKEN, CHANNEL };
enum { PLAIN, DELTA, UNTIED };
constexpr bool SCALARS = DECAY == HEAD || DECAY == TOKEN;
constexpr float FLOOR = -120.0f;  // e^FLOOR is 0 in float; keeps inf - inf out of the differences

// A tensor (batch, head, token, feature) with unit stride of features.
template <class E> struct Rows {
    E* p;
    long b, h, n;
    E* at(long batch, long head, long token) const { return p + batch * b + head * h + token * n; }
};

struct Call {
    Rows<const T> q, k, v;
    Rows<T> out;
    Rows<const float> decay, beta, erase, add;
    const float *bonus, *start;
    float* end;
    const int32_t* cu;
    long B, H, Hkv, N, rows, threads, parts;

    long group() const { return H / Hkv; }
    long batch(long row) const { return cu ? 0 : row; }
    long first(long row) const { return cu ? cu[row] : 0; }
    long length(long row) const { return cu ? cu[row + 1] - cu[row] : N; }
};

// A store of results: the instruction that rounds them to bf16 makes subnormal numbers 0.
template <class E> static ALWAYS_INLINE void store_rounded(E* p, vf x) {
#if LANES == 16 && defined(__AVX512BF16__)
    if constexpr (sizeof(E) == 2) {
        __m256bh half = _mm512_cvtneps_pbh((__m512)x);
        memcpy(p, &half, sizeof half);
        return;
    }
#endif
    store(p, x);
}
template <class E> static ALWAYS_INLINE vf load_upto(const E* p, int n) {
    return n >= LANES ? load(p) : load_part(p, n);
}
template <class E> static ALWAYS_INLINE void store_upto(E* p, vf x, int n) {
    if (n >= LANES)
        store_rounded(p, x);
    else
        store_part(p, x, n);
}

// n rows of D elements to float rows of DP elements, zero behind D.
template <int D, int DP, class E>
static ALWAYS_INLINE void take_rows(int n, const E* src, long rs, float* dst) {
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < DP; c += LANES)
            store(dst + i * DP + c, load_upto(src + i * rs + c, D - c));
}

// Rows usable as they lie, or a copy: A operands are read element by element, B operands by vector.
struct View {
    const float* p;
    long rs;
};
template <int D, int DP, class E>
static ALWAYS_INLINE View view(int n, const E* src, long rs, float* room, bool by_vector) {
    if constexpr (sizeof(E) == 4)
        if (!by_vector || D == DP) return {(const float*)src, rs};
    take_rows<D, DP>(n, src, rs, room);
    return {room, DP};
}

// What a later chunk will touch: without this the hardware starts anew at every page.
template <class E> static ALWAYS_INLINE void fetch(const E* p) { __builtin_prefetch(p, 0, 2); }

// Lane l: the sum of t[l]. Overwrites t.
static ALWAYS_INLINE vf sum_rows(vf* t) {
    transpose_square(t);
    UNROLL for (int d = LANES / 2; d; d /= 2)
        UNROLL for (int l = 0; l < d; ++l) t[l] += t[l + d];
    return t[0];
}

template <int DP> static ALWAYS_INLINE float dot(const float* a, const float* b) {
    vf s{};
    for (int c = 0; c < DP; c += LANES) s += load(a + c) * load(b + c);
    return sum_lanes(s);
}
template <int D> static ALWAYS_INLINE float dot_part(const float* a, const float* b) {
    vf s{};
    int c = 0;
    for (; c + LANES <= D; c += LANES) s += load(a + c) * load(b + c);
    if (c < D) s += load_part(a + c, D - c) * load_part(b + c, D - c);
    return sum_lanes(s);
}

// One decay per token: sums b of g in a chunk; index 0 is before the first token, i + 1 after i.
struct ScalarDecay {
    alignas(64) float high[CHUNK + 1 + LANES], low[CHUNK + 1 + LANES];
    alignas(64) float read[CP + LANES];   // e^{b of a reader}
    alignas(64) float upto[CP + LANES];   // e^{b_i}
    alignas(64) float after[CP + LANES];  // e^{b_last - b_j}
    alignas(64) float step[CP + LANES];   // e^{g_i}
    alignas(64) float D[CHUNK * CP];      // e^{b of reader i - b_j}
    // What a correction reads with: e^{b_i - b_j}, untied e^{b_{i - 1} - b_j}; and e^{b_{i - 1}}.
    alignas(64) float E[CHUNK * CP], before[CP + LANES];
    float whole;                          // e^{b_last}

    vf apart(int row, int j) const {
        return vmin(vf{}, (high[row] - load(high + 1 + j)) + (low[row] - load(low + 1 + j)));
    }
    // g: one step per token (stride gs) or a constant (stride 0).
    void set(int n, const float* g, long gs) {
        set_sums(n, g, gs);
        set_pairs(n);
    }
    // All but what is between pairs of tokens.
    void set_sums(int n, const float* g, long gs) {
        double b = 0;
        high[0] = low[0] = 0;
        for (int i = 0; i < CHUNK + LANES; ++i) {
            float x = i < n ? g[i * gs] : 0.0f;
            b += x < FLOOR ? FLOOR : x;
            high[i + 1] = (float)b;
            low[i + 1] = (float)(b - (double)(float)b);
        }
        for (int j = 0; j < n; j += LANES) {
            store(after + j, exp_neg(apart(n, j)));
            store(upto + j, exp_neg(load(high + 1 + j) + load(low + 1 + j)));
            if (ONES)
                store(step + j, exp_neg((load(high + 1 + j) - load(high + j)) +
                                        (load(low + 1 + j) - load(low + j))));
            if (CORRECTION == UNTIED) store(before + j, exp_neg(load(high + j) + load(low + j)));
            const int r = j + 1 - EXCLUSIVE;
            store(read + j, exp_neg(load(high + r) + load(low + r)));
        }
        whole = upto[n - 1];
    }
    void set_pairs(int n) {
        // Below the diagonal blocks: what is left at the block's first row, times what is from there.
        for (int r = 0; r < n; r += LANES) {
            const int last = n - r < LANES ? n : r + LANES, at = r + 1 - EXCLUSIVE;
            vf step = (load(high + at) - high[r]) + (load(low + at) - low[r]);
            alignas(64) float from[LANES];
            store(from, exp_neg(vmin(vf{}, step)));
            for (int j = 0; j < r; j += LANES) {
                vf upto = exp_neg(apart(r, j));
                for (int i = r; i < last; ++i) store(D + i * CP + j, from[i - r] * upto);
            }
            for (int i = r; i < last; ++i)
                store(D + i * CP + r, exp_neg(apart(i + 1 - EXCLUSIVE, r)));
        }
        if constexpr ((CORRECTION == DELTA && EXCLUSIVE) || CORRECTION == UNTIED)
            for (int i = 0; i < n; ++i)
                for (int j = 0; j <= i; j += LANES)
                    store(E + i * CP + j, exp_neg(apart(i + (CORRECTION == DELTA), j)));
    }
    const float* among() const { return EXCLUSIVE ? E : D; }
};

// One decay per key channel: factors a = e^g, and their products from the start, to the end.
// Products of numbers <= 1 never overflow and need no difference of sums.
struct ChannelDecay {
    alignas(64) float a[CHUNK * DKP], upto[(CHUNK + 1) * DKP], after[CHUNK * DKP];

    void set(int n, const float* g, long gs) {
        vf all[KV_];
        UNROLL for (int c = 0; c < KV_; ++c) {
            all[c] = splat(1.0f);
            store(upto + c * LANES, all[c]);
        }
        for (int i = 0; i < n; ++i)
            UNROLL for (int c = 0; c < KV_; ++c) {
                const int at = c * LANES;
                vf x = load_upto(g + i * gs + at, DK - at);
                fetch(g + (i + CHUNK) * gs + at);
                x = select(x < FLOOR, splat(FLOOR), x);
                vf one = exp_neg(x);
                store(a + i * DKP + at, one);
                all[c] *= one;
                store(upto + (i + 1) * DKP + at, all[c]);
            }
        UNROLL for (int c = 0; c < KV_; ++c) all[c] = splat(1.0f);
        for (int j = n - 1; j >= 0; --j)
            UNROLL for (int c = 0; c < KV_; ++c) {
                const int at = j * DKP + c * LANES;
                store(after + at, all[c]);
                all[c] *= load(a + at);
            }
    }
    const float* read() const { return upto + (EXCLUSIVE ? 0 : DKP); }
    const float* whole(int n) const { return upto + n * DKP; }
};

// The first n lanes times `by`.
static ALWAYS_INLINE vf times_first(int n, vf x, float by) {
#if LANES == 16 && defined(__AVX512F__)
    const __mmask16 first = n >= LANES ? 0xffff : (1u << n) - 1;
    return (vf)_mm512_mask_mul_ps((__m512)x, first, (__m512)x, _mm512_set1_ps(by));
#else
    return select(iota() < n, x * by, x);
#endif
}

// P[i][j] = scale * sum_d x_id y_jd prod_{j < t <= i (shift: < i)} a_td for j <= i (strict: j < i),
// 0 above. A lane is a key: those of one channel are carried down the rows, one factor a row.
template <bool strict, bool shift>
static void channel_lower(int n, const float* x, const float* y, const float* a, float scale,
                          float* P) {
    alignas(64) float keys[DKP * LANES];
    for (int j = 0; j < n; j += LANES) {
        transpose_in(n - j < LANES ? n - j : LANES, DKP, y + j * DKP, DKP, keys, LANES);
        for (int r = j; r < n; r += LANES) {
            vf acc[LANES];
            UNROLL for (int l = 0; l < LANES; ++l) acc[l] = vf{};
            auto rows = [&](int count) INLINE_LAMBDA {
                for (int d = 0; d < DK; ++d) {
                    vf key = load(keys + d * LANES);
                    const float *xd = x + r * DKP + d, *ad = a + r * DKP + d;
                    UNROLL for (int l = 0; l < LANES; ++l) {
                        if (l >= count) break;
                        const int first = r - j + l;  // keys before the row
                        if (shift) acc[l] += xd[l * DKP] * key;
                        key = times_first(first, key, ad[l * DKP]);
                        if (!shift) acc[l] += xd[l * DKP] * key;
                    }
                    store(keys + d * LANES, key);
                }
            };
            if (n - r >= LANES)
                rows(LANES);
            else
                rows(n - r);
            UNROLL for (int l = 0; l < LANES; ++l)
                if (l < n - r) {
                    vi seen = (iota() + j) < (r + l + (strict ? 0 : 1));
                    store(P + (r + l) * CP + j, (vf)(seen & (vi)(acc[l] * scale)));
                }
        }
    }
}
