// A chunk of a bf16 recurrence, its products in tiles (tiles.hpp).
//
// Weights and values are bf16 in the products of the read, and so is the state it reads. What is
// written is summed in float: decayed or corrected values are a high and a low bf16, and so is the
// state that a correction reads, so the state has the accuracy of float sums. DK and DV are
// multiples of 32, CHUNK is 64.

constexpr bool SPLIT = SCALARS || CORRECTION == DELTA;  // written values are high + low

// c (+)= a b: `blocks` blocks of 32 rows, `columns` of 32 columns, `steps` of 32 in the summed index.
// a: bf16 rows; b: rows of pairs; strides in bytes.
static ALWAYS_INLINE void tile_product(const void* a, long a_row, const void* b, long b_row,
                                       float* c, long ldc, int blocks, int columns, int steps,
                                       bool fresh) {
    for (int i = 0; i < columns; ++i) {
        TileWork work{(const char*)a, (const char*)b + i * 128, a_row, TILE * a_row, 64,
                      2 * TILE * a_row, b_row, 64, TILE * b_row, c + i * 2 * TILE, ldc,
                      blocks, steps, fresh};
        while (!work.done()) work.step();
    }
}

// 2 LANES neighbours in bf16.
static ALWAYS_INLINE void store_two(bf16* p, vf a, vf b) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    store(p, a);
    store(p + LANES, b);
#endif
}

// The same past the caches, to an address that is a multiple of 64: the line is not read before.
static ALWAYS_INLINE void stream_two(bf16* p, vf a, vf b) {
#if defined(__AVX512BF16__)
    _mm512_stream_si512((__m512i*)p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    store_two(p, a, b);
#endif
}

// The low (ODD = 0) or high halves of a, then of b.
template <int ODD> static ALWAYS_INLINE void store_halves(bf16* p, vi a, vi b) {
#if defined(__AVX512BW__)
    const vi first = iota() * 4 + ODD;  // halves 0, 2 ... of a and b together
    const vi order = (vi)((vu)first | (vu)(first + 2) << 16);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)a, (__m512i)order, (__m512i)b));
#else
    for (int l = 0; l < LANES; ++l) {
        p[l].bits = (uint16_t)((uint32_t)a[l] >> 16 * ODD);
        p[l + LANES].bits = (uint16_t)((uint32_t)b[l] >> 16 * ODD);
    }
#endif
}

// n rows as they lie if they fill a chunk, else a copy with rows of zeros behind.
struct Halves {
    const bf16* p;
    long rs;
};
template <int D> static Halves whole_rows(int n, const bf16* p, long rs, bf16* room) {
    if (n == CHUNK) return {p, rs};
    for (int i = 0; i < n; ++i) memcpy(room + i * D, p + i * rs, sizeof(bf16) * D);
    memset(room + n * D, 0, sizeof(bf16) * D * (CHUNK - n));
    return {room, D};
}

// Keys as the right side of q k^T (pairs of features) and the left side of k^T v (features by token).
static void pack_keys(Scratch& s, Halves k) {
    transpose_pairs(CHUNK, DK, k.p, k.rs, s.kp, CHUNK);
    for (int d = 0; d < DK / 2; ++d)
        for (int t = 0; t < CHUNK; t += 2 * LANES) {
            vi a = load(&s.kp[d * CHUNK + t].bits), b = load(&s.kp[d * CHUNK + t + LANES].bits);
            bf16* to = s.kc + 2 * d * CHUNK + t;
            store_halves<0>(to, a, b);
            store_halves<1>(to + CHUNK, a, b);
        }
}

// Written values, (token, column) to a vector, in pairs of tokens; says whether all are finite. With
// decay, also what is left of them at the end of the chunk, as high + low.
template <class Value> static bool pack_values(Scratch& s, int n, Value value) {
    vi bad{};
    const float* after = s.scalar.after;
    for (int t = 0; t < CHUNK; t += 2)
        for (int c = 0; c < DV; c += LANES) {
            const long at = t / 2 * DV + c;
            vf even = value(t, c), odd = value(t + 1, c);
            bad |= ((vi)even & 0x7f800000) == 0x7f800000;
            bad |= ((vi)odd & 0x7f800000) == 0x7f800000;
            if constexpr (CORRECTION == DELTA)
                store(&s.vp[at].bits, make_pairs(even, odd));
            else
                store(&s.vp[at].bits, (vi)((vu)(vi)even >> 16) | (vi)odd);
            if constexpr (SPLIT) {
                if constexpr (SCALARS) {
                    even *= t < n ? after[t] : 0.0f;
                    odd *= t + 1 < n ? after[t + 1] : 0.0f;
                }
                const vi high = make_pairs(even, odd);
                even -= (vf)(high << 16);
                odd -= (vf)(high & (int32_t)0xffff0000);
                store(&s.vh[at].bits, high);
                store(&s.vl[at].bits, make_pairs(even, odd));
            }
        }
    return !any(bad);
}

// The state in pairs of key channels, to be read; for a correction also what bf16 leaves of it.
static void pack_state(Scratch& s) {
    for (int d = 0; d < DK; d += 2)
        for (int c = 0; c < DV; c += LANES) {
            vf even = load(s.S + d * DV + c), odd = load(s.S + (d + 1) * DV + c);
            const vi high = make_pairs(even, odd);
            store(&s.Sp[d / 2 * DV + c].bits, high);
            if constexpr (CORRECTION == DELTA) {
                even -= (vf)(high << 16);
                odd -= (vf)(high & (int32_t)0xffff0000);
                store(&s.Sl[d / 2 * DV + c].bits, make_pairs(even, odd));
            }
        }
}

// P = x k^T for rows of x, in blocks of 32 by 32 down to the diagonal.
static void tile_lower(Scratch& s, int n, Halves x, float* P) {
    tile_product(x.p, 2 * x.rs, s.kp, 4 * CHUNK, P, CP, n > 32 ? 2 : 1, 1, DK / 32, true);
    if (n > 32)
        tile_product(x.p + 32 * x.rs, 2 * x.rs, s.kp + 32, 4 * CHUNK, P + 32 * CP + 32, CP, 1, 1,
                     DK / 32, true);
}

// The values that the delta rule writes, into s.u.
static void correct_tiles(Scratch& s, const Chunk& c, const Strides& st, Halves k, Halves v) {
    const int n = c.n, blocks = n > 32 ? 2 : 1;
    tile_lower(s, n, k, s.M);
    tile_product(k.p, 2 * k.rs, s.Sp, 4 * DV, s.inter, DV, blocks, DV / 32, DK / 32, true);
    tile_product(k.p, 2 * k.rs, s.Sl, 4 * DV, s.inter, DV, blocks, DV / 32, DK / 32, false);
    const float* D = s.scalar.among();
    for (int i = 0; i < n; ++i) {
        const float beta = c.beta[i * st.beta];
        for (int j = 0; j <= i; j += LANES) {
            vi seen = (iota() + j) < i;
            vf x = load(s.M + i * CP + j) * beta;
            if constexpr (SCALARS) x *= load(D + i * CP + j);
            store(s.M + i * CP + j, (vf)(seen & (vi)x));
        }
        for (int col = 0; col < DV; col += LANES) {
            vf seen = load(s.inter + i * DV + col);
            if constexpr (SCALARS) seen *= s.scalar.upto[i];
            store(s.u + i * DV + col, beta * (load(v.p + i * v.rs + col) - seen));
        }
    }
    memset(s.u + n * DV, 0, sizeof(float) * DV * (CHUNK - n));
    solve_lower<DV>(n, s.M, s.u);
}

// Weights from the products in s.P: masked, decayed, in bf16; and one over the normalisers.
static void weigh_tiles(Scratch& s, int n, Halves q, float* inverse) {
    for (int r = 0; r < n; r += LANES) {
        vf t[LANES];
        for (int l = 0; l < LANES; ++l) {
            const int i = r + l;
            vf sum{};
            if constexpr (ONES) {
                UNROLL for (int c = 0; c < DK; c += LANES)
                    sum += load(q.p + i * q.rs + c) * load(s.z + c);
                if constexpr (SCALARS) sum = sum * (i < n ? s.scalar.read[i] : 0.0f);
            }
            auto weight = [&](int j) INLINE_LAMBDA {
                vi seen = (iota() + j) < (i + !EXCLUSIVE);
                vf x = load(s.P + i * CP + j);
                if constexpr (SCALARS) x *= load(s.scalar.D + i * CP + j);
                x = (vf)(seen & (vi)x);
                store(s.P + i * CP + j, x);
                if constexpr (ONES) sum += x;
                return x;
            };
            for (int j = 0; j <= r; j += 2 * LANES) {
                vf x = weight(j), y{};
                if (j + LANES <= r) y = weight(j + LANES);
                store_two(s.weights + i * CHUNK + j, x, y);
            }
            t[l] = sum;
        }
        if constexpr (ONES) {
            vf mass = sum_rows(t) * SCALE;
            store(inverse + r, select(mass <= 0.0f, vf{}, 1.0f / mass));
        }
    }
}

// intra = weights times written values.
template <class Value>
static void read_values(Scratch& s, int n, bool finite, Value value, float* intra, bool fresh) {
    if (finite) {
        tile_product(s.weights, 2 * CHUNK, s.vp, 4 * DV, intra, DV, 1, DV / 32, 1, fresh);
        if (n > 32)
            tile_product(s.weights + 32 * CHUNK, 2 * CHUNK, s.vp, 4 * DV, intra + 32 * DV, DV, 1,
                         DV / 32, 2, fresh);
        return;
    }
    // A weight of 0 for a later token must not meet its infinity.
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < DV; c += LANES) {
            vf sum = fresh ? vf{} : load(intra + i * DV + c);
            for (int j = 0; j < i + !EXCLUSIVE; ++j) sum += s.P[i * CP + j] * value(j, c);
            store(intra + i * DV + c, sum);
        }
}

template <class Value>
static void read_tiles(Scratch& s, const Chunk& c, const Strides& st, long head, Value value,
                       bool finite) {
    const int n = c.n, blocks = n > 32 ? 2 : 1;
    const T* src = c.q + head * st.qh;
    T* dst = c.out + head * st.oh;
    const Halves q = whole_rows<DK>(n, src, st.q, s.rows);
    tile_lower(s, n, q, s.P);
    tile_product(q.p, 2 * q.rs, s.Sp, 4 * DV, s.inter, DV, blocks, DV / 32, DK / 32, true);
    alignas(64) float inverse[CHUNK];
    weigh_tiles(s, n, q, inverse);
    float* intra = SCALARS ? s.intra : s.inter;
    read_values(s, n, finite, value, intra, SCALARS);
    for (int i = 0; i < n; ++i)
        for (int col = 0; col < DV; col += 2 * LANES) {
            auto out = [&](int at) INLINE_LAMBDA {
                vf x = load(intra + i * DV + at);
                if constexpr (SCALARS) x += s.scalar.read[i] * load(s.inter + i * DV + at);
                return x * (ONES ? SCALE * inverse[i] : SCALE);
            };
            if (st.stream) {
                stream_two(dst + i * st.out + col, out(col), out(col + LANES));
            } else {
                store_two(dst + i * st.out + col, out(col), out(col + LANES));
                fetch(dst + (i + CHUNK) * st.out + col);
            }
            fetch(src + (i + CHUNK) * st.q + col);
            fetch(c.k + (i + CHUNK) * st.k + col);
            fetch(c.v + (i + CHUNK) * st.v + col);
        }
}

static void write_tiles(Scratch& s, int n, Halves k) {
    const int steps = n > 32 ? 2 : 1;
    if constexpr (SCALARS)
        for (int e = 0; e < DK * DV; e += LANES) store(s.S + e, load(s.S + e) * s.scalar.whole);
    tile_product(s.kc, 2 * CHUNK, SPLIT ? s.vh : s.vp, 4 * DV, s.S, DV, DK / 32, DV / 32, steps,
                 false);
    if constexpr (SPLIT)
        tile_product(s.kc, 2 * CHUNK, s.vl, 4 * DV, s.S, DV, DK / 32, DV / 32, steps, false);
    if constexpr (ONES) {
        vf sum[KV_];
        UNROLL for (int i = 0; i < KV_; ++i)
            sum[i] = load(s.z + i * LANES) * (SCALARS ? s.scalar.whole : 1.0f);
        for (int j = 0; j < n; ++j)
            UNROLL for (int i = 0; i < KV_; ++i) {
                vf key = load(k.p + j * k.rs + i * LANES);
                sum[i] += SCALARS ? key * s.scalar.after[j] : key;
            }
        UNROLL for (int i = 0; i < KV_; ++i) store(s.z + i * LANES, sum[i]);
    }
}

template <bool READ, bool WRITE>
static void tile_chunk(Scratch& s, const Chunk& c, const Strides& st) {
    const int n = c.n;
    constexpr int D = DK > DV ? DK : DV;
    const Halves k = whole_rows<DK>(n, c.k, st.k, s.rows + CHUNK * D);
    const Halves v = whole_rows<DV>(n, c.v, st.v, s.rows + 2 * CHUNK * D);
    if constexpr (SCALARS)
        if (DECAY != HEAD || s.tabled != n) s.scalar.set(n, c.g, st.g);
    s.tabled = n;
    pack_keys(s, k);
    if constexpr (READ || CORRECTION == DELTA) pack_state(s);
    if constexpr (CORRECTION == DELTA) correct_tiles(s, c, st, k, v);
    auto value = [&](int t, int col) INLINE_LAMBDA {
        return CORRECTION == DELTA ? load(s.u + t * DV + col) : load(v.p + t * v.rs + col);
    };
    const bool finite = pack_values(s, n, value);
    if constexpr (READ)
        for (long g = 0; g < st.group; ++g) read_tiles(s, c, st, g, value, finite);
    if constexpr (WRITE) write_tiles(s, n, k);
}
