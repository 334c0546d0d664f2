// One chunk: outputs of the query heads that read a state, and the state after it.

// Weights of the queries for the written vectors y, yt their transpose, into P.
static ALWAYS_INLINE void weigh(const Scratch& s, int n, View q, const float* y, const float* yt,
                                float* P) {
    if constexpr (DECAY == CHANNEL) {
        channel_lower<EXCLUSIVE, EXCLUSIVE>(n, q.p, y, s.channel.a, SCALE, P);
    } else {
        const float* D = s.scalar.D;
        lower<DK, EXCLUSIVE>(n, q.p, q.rs, yt, P, [=](int i, int j, vf sum) INLINE_LAMBDA {
            return SCALARS ? sum * SCALE * load(D + i * CP + j) : sum * SCALE;
        });
    }
}

// One over the normaliser of every row: its read of z, its weights and its own token. A mass that
// is not positive gives 0; a NaN stays. Where KEY_SUMS, a row reads the sum of the keys up to its
// own instead of its weights, which takes fewer sums and leaves z after the chunk in s.ahead.
static ALWAYS_INLINE void inverse_masses(Scratch& s, int n, View q, View k, const float* near,
                                         float* inverse) {
    vf z[KV_];
    UNROLL for (int c = 0; c < KV_; ++c) z[c] = load(s.z + c * LANES);
    for (int r = 0; r < n; r += LANES) {
        vf t[LANES];
        for (int l = 0; l < LANES; ++l) {
            vf sum{};
            if (const int i = r + l; KEY_SUMS && i < n) {
                UNROLL for (int c = 0; c < KV_; ++c) {
                    const int at = c * LANES;
                    vf q_ = load_upto(q.p + i * q.rs + at, DK - at);
                    vf k_ = load_upto(k.p + i * k.rs + at, DK - at);
                    if constexpr (EXCLUSIVE) sum += q_ * z[c];
                    z[c] = SCALARS ? z[c] * s.scalar.step[i] + k_ : z[c] + k_;
                    if constexpr (!EXCLUSIVE) sum += q_ * z[c];
                }
            } else if (i < n) {
                UNROLL for (int c = 0; c < DKP; c += LANES)
                    sum += load_upto(q.p + i * q.rs + c, DK - c) * load(s.z + c);
                sum = sum * (SCALARS ? SCALE * s.scalar.read[i] : SCALE);
                if constexpr (CAUSAL)
                    for (int j = 0; j <= i; j += LANES) sum += load(s.P + i * CP + j);
            }
            t[l] = sum;
        }
        vf mass = sum_rows(t);
        if constexpr (KEY_SUMS) mass = mass * SCALE;
        if constexpr (BONUS) mass += load(near + r);
        store(inverse + r, select(mass <= 0.0f, vf{}, 1.0f / mass));
    }
    UNROLL for (int c = 0; c < KV_; ++c) store(s.ahead + c * LANES, z[c]);
}

// Weights and outputs of one query head; w are the written values.
static void read_chunk(Scratch& s, const Chunk& c, const Strides& st, long head, View k, View v,
                       View w) {
    const int n = c.n;
    const T* src = c.q + head * st.qh;
    T* dst = c.out + head * st.oh;
    if constexpr (DECAY == CHANNEL) take_rows<DK, DKP>(n, src, st.q, s.q);
    View q = DECAY == CHANNEL ? View{s.q, DKP} : view<DK, DKP>(n, src, st.q, s.q, false);
    if constexpr (CAUSAL) weigh(s, n, q, s.k, s.kt, s.P);
    if constexpr (CORRECTION == UNTIED) weigh(s, n, q, s.b, s.bt, s.M);
    alignas(64) float near[BONUS ? CP + LANES : 1];
    if constexpr (BONUS)
        for (int i = 0; i < n; ++i) {
            vf t{};
            for (int d = 0; d < DK; d += LANES)
                t += load_upto(q.p + i * q.rs + d, DK - d) * load_upto(c.bonus + d, DK - d) *
                     load_upto(k.p + i * k.rs + d, DK - d);
            near[i] = sum_lanes(t) * SCALE;
        }
    if constexpr (DECAY == CHANNEL) {
        const float* f = s.channel.read();
        for (int i = 0; i < n * DKP; i += LANES) store(s.kd + i, load(s.q + i) * load(f + i));
        q = {s.kd, DKP};
    }
    alignas(64) float inverse[ONES ? CP + LANES : 1];
    if constexpr (ONES) inverse_masses(s, n, q, k, near, inverse);
    const float* read = s.scalar.read;
    read_rows<DVP>(
        n, DK, q, s.S, CAUSAL ? s.P : nullptr, w, CORRECTION == UNTIED ? s.M : nullptr,
        {s.u, DVP}, [=](int i) INLINE_LAMBDA { return SCALARS ? SCALE * read[i] : SCALE; },
        [&](int i, int col, vf x) INLINE_LAMBDA {
            if constexpr (BONUS) x += near[i] * load_upto(v.p + i * v.rs + col, DV - col);
            if constexpr (ONES) x = x * inverse[i];
            store_upto(dst + i * st.out + col, x, DV - col);
            fetch(src + (i + CHUNK) * st.q + col);
            fetch(dst + (i + CHUNK) * st.out + col);
        });
}

// Solves for the values that the delta rule writes, into s.u.
static void correct_chunk(Scratch& s, const Chunk& c, const Strides& st, View k, View v) {
    const int n = c.n;
    float beta[CHUNK];
    for (int i = 0; i < n; ++i) beta[i] = c.beta[i * st.beta];
    const float* b = beta;
    const float* ks = k.p;
    long krs = k.rs;
    const float* upto = nullptr;
    if constexpr (DECAY == CHANNEL) {
        channel_lower<true, false>(n, s.k, s.k, s.channel.a, 1.0f, s.M);
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; j += LANES)
                store(s.M + i * CP + j, b[i] * load(s.M + i * CP + j));
        const float* f = s.channel.upto + DKP;
        for (int i = 0; i < n * DKP; i += LANES) store(s.kd + i, load(s.k + i) * load(f + i));
        ks = s.kd;
        krs = DKP;
    } else {
        const float* D = SCALARS ? s.scalar.among() : nullptr;
        upto = s.scalar.upto;
        lower<DK, true>(n, k.p, k.rs, s.kt, s.M, [=](int i, int j, vf sum) INLINE_LAMBDA {
            return SCALARS ? sum * (load(D + i * CP + j) * b[i]) : sum * b[i];
        });
    }
    float* u = s.u;
    product<DVP>(n, DK, ks, krs, 1, s.S, DVP, [=](int m, int col, vf sum) INLINE_LAMBDA {
        vf seen = SCALARS ? sum * upto[m] : sum;
        store(u + m * DVP + col, b[m] * (load_upto(v.p + m * v.rs + col, DV - col) - seen));
    });
    solve_lower<DVP>(n, s.M, s.u);
}

// What the erasing vectors read of the state before their tokens, into s.u.
static void untie_chunk(Scratch& s, const Chunk& c, const Strides& st, View v) {
    const int n = c.n;
    take_rows<DK, DKP>(n, c.erase, st.erase, s.a);
    take_rows<DK, DKP>(n, c.add, st.add, s.b);
    const float *as = s.a, *before = s.scalar.before;
    if constexpr (DECAY == CHANNEL) {
        channel_lower<true, true>(n, s.a, s.b, s.channel.a, -1.0f, s.M);
        channel_lower<true, true>(n, s.a, s.k, s.channel.a, 1.0f, s.P);
        for (int i = 0; i < n * DKP; i += LANES)
            store(s.kd + i, load(s.a + i) * load(s.channel.upto + i));
        as = s.kd;
    } else {
        transpose_in(n, DK, s.b, DKP, s.bt, CP);
        const float* E = s.scalar.E;
        lower<DK, true>(n, s.a, DKP, s.bt, s.M, [=](int i, int j, vf sum) INLINE_LAMBDA {
            return SCALARS ? -sum * load(E + i * CP + j) : -sum;
        });
        lower<DK, true>(n, s.a, DKP, s.kt, s.P, [=](int i, int j, vf sum) INLINE_LAMBDA {
            return SCALARS ? sum * load(E + i * CP + j) : sum;
        });
    }
    float* u = s.u;
    product<DVP>(n, DK, as, DKP, 1, s.S, DVP, [=](int m, int col, vf sum) INLINE_LAMBDA {
        store(u + m * DVP + col, SCALARS ? sum * before[m] : sum);
    });
    add_lower<DVP>(n, s.P, v.p, v.rs, s.u, DVP);
    solve_lower<DVP>(n, s.M, s.u);
}

// The state after the chunk; `read`: whether its rows were read before.
template <bool read>
static void write_chunk(Scratch& s, const Chunk& c, const Strides& st, View k, View w) {
    const int n = c.n;
    float* S = s.S;
    const float *keys = k.p, *values = w.p, *whole = nullptr;
    long krs = k.rs, vrs = w.rs;
    float all = 1.0f;
    if constexpr (DECAY == CHANNEL) {
        for (int i = 0; i < n * DKP; i += LANES)
            store(s.kd + i, load(s.k + i) * load(s.channel.after + i));
        keys = s.kd;
        krs = DKP;
        whole = s.channel.whole(n);
    } else if constexpr (SCALARS) {
        for (int j = 0; j < n; ++j)
            for (int col = 0; col < DVP; col += LANES)
                store(s.ve + j * DVP + col, s.scalar.after[j] * load(w.p + j * w.rs + col));
        values = s.ve;
        vrs = DVP;
        all = s.scalar.whole;
    }
    product_onto<DVP>(
        DK, n, keys, 1, krs, values, vrs,
        [=](int m, int col) INLINE_LAMBDA {
            vf old = load(S + m * DVP + col);
            return DECAY == CHANNEL ? old * whole[m] : SCALARS ? old * all : old;
        },
        [&](int m, int col, vf sum) INLINE_LAMBDA {
            store(S + m * DVP + col, sum);
            if (const int next = m / 2; next < CHUNK) {
                if (m % 2)
                    fetch(c.k + (CHUNK + next) * st.k + col);
                else
                    fetch(c.v + (CHUNK + next) * st.v + col);
            }
        });
    if constexpr (CORRECTION == UNTIED) {
        const float *adds = s.b, *seen = s.u;
        if constexpr (DECAY == CHANNEL) {
            for (int i = 0; i < n * DKP; i += LANES)
                store(s.kd + i, load(s.b + i) * load(s.channel.after + i));
            adds = s.kd;
        } else if constexpr (SCALARS) {
            for (int j = 0; j < n; ++j)
                for (int col = j * DVP; col < (j + 1) * DVP; col += LANES)
                    store(s.ve + col, s.scalar.after[j] * load(s.u + col));
            seen = s.ve;
        }
        product_onto<DVP>(
            DK, n, adds, 1, DKP, seen, DVP,
            [=](int m, int col) INLINE_LAMBDA { return load(S + m * DVP + col); },
            [=](int m, int col, vf sum) INLINE_LAMBDA { store(S + m * DVP + col, sum); });
    }
    if constexpr (KEY_SUMS && read) {
        memcpy(s.z, s.ahead, sizeof s.z);
    } else if constexpr (ONES) {
        vf sum[KV_];
        UNROLL for (int i = 0; i < KV_; ++i) {
            sum[i] = load(s.z + i * LANES);
            if constexpr (DECAY == CHANNEL) sum[i] = sum[i] * load(whole + i * LANES);
            if constexpr (SCALARS) sum[i] = sum[i] * all;
        }
        for (int j = 0; j < n; ++j)
            UNROLL for (int i = 0; i < KV_; ++i) {
                vf key = load_upto(keys + j * krs + i * LANES, DK - i * LANES);
                sum[i] += SCALARS ? key * s.scalar.after[j] : key;
            }
        UNROLL for (int i = 0; i < KV_; ++i) store(s.z + i * LANES, sum[i]);
    }
}

template <bool READ, bool WRITE>
static void run_chunk(Scratch& s, const Chunk& c, const Strides& st) {
    if constexpr (TILES) return tile_chunk<READ, WRITE>(s, c, st);
    const int n = c.n;
    View k{s.k, DKP};
    if constexpr (DECAY == CHANNEL)
        take_rows<DK, DKP>(n, c.k, st.k, s.k);
    else
        k = view<DK, DKP>(n, c.k, st.k, s.k, false);
    View v = view<DV, DVP>(n, c.v, st.v, s.v, true), w = v;
    if constexpr (DECAY == CHANNEL) {
        s.channel.set(n, c.g, st.g);
    } else {
        if constexpr (SCALARS)
            if (DECAY != HEAD || s.tabled != n) {
                s.scalar.set_sums(n, c.g, st.g);
                if (READ || CORRECTION != PLAIN) s.scalar.set_pairs(n);
            }
        s.tabled = n;
        if (CAUSAL && (READ || CORRECTION != PLAIN)) transpose_in(n, DK, k.p, k.rs, s.kt, CP);
    }
    if constexpr (CORRECTION == DELTA) {
        correct_chunk(s, c, st, k, v);
        w = {s.u, DVP};
    }
    if constexpr (CORRECTION == UNTIED) untie_chunk(s, c, st, v);
    if constexpr (READ)
        for (long g = 0; g < st.group; ++g) read_chunk(s, c, st, g, k, v, w);
    if constexpr (WRITE) write_chunk<READ>(s, c, st, k, w);
}

static void take_state(Scratch& s, const float* p) {
    memset(s.S, 0, sizeof s.S);
    memset(s.z, 0, sizeof s.z);
    if (!p) return;
    for (int d = 0; d < DK; ++d) {
        for (int c = 0; c < DVP; c += LANES)
            store(s.S + d * DVP + c, load_upto(p + d * W + c, DV - c));
        if constexpr (ONES) s.z[d] = p[d * W + DV];
    }
}
static void give_state(const Scratch& s, float* p) {
    for (int d = 0; d < DK; ++d) {
        for (int c = 0; c < DVP; c += LANES)
            store_upto(p + d * W + c, load(s.S + d * DVP + c), DV - c);
        if constexpr (ONES) p[d * W + DV] = s.z[d];
    }
}

// Outputs that fill the second cache are gone from it before somebody reads them.
constexpr long STREAMED = 1 << 22;
static Strides strides_of(const Call& a) {
    const long size = a.B * a.H * a.N * DV * (long)sizeof(T);
    const long odd = (long)a.out.p | (a.out.b | a.out.h | a.out.n) * (long)sizeof(T);
    return {a.q.n,     a.q.h,    a.k.n,     a.v.n,   a.out.n,   a.out.h,
            a.decay.n, a.beta.n, a.erase.n, a.add.n, a.group(), size >= STREAMED && odd % 64 == 0};
}
// The chunk at token t of a row and state head, that ends at `to` at the latest.
static Chunk chunk_at(const Call& a, long row, long head, long t, long to) {
    const long q = head * a.group(), b = a.batch(row), at = a.first(row) + t;
    Chunk c{a.q.at(b, q, at), a.k.at(b, head, at), a.v.at(b, head, at), a.out.at(b, q, at),
            nullptr, nullptr, nullptr, nullptr, nullptr, (int)(to - t < CHUNK ? to - t : CHUNK)};
    if (DECAY != NONE) c.g = DECAY == HEAD ? a.decay.p + head : a.decay.at(b, head, at);
    if (CORRECTION == DELTA) c.beta = a.beta.at(b, head, at);
    if (CORRECTION == UNTIED) {
        c.erase = a.erase.at(b, head, at);
        c.add = a.add.at(b, head, at);
    }
    if (BONUS) c.bonus = a.bonus + head * DK;
    return c;
}

// Tokens [from, to) of a row and state head, in chunks.
template <bool READ, bool WRITE>
static void run_tokens(Scratch& s, const Call& a, long row, long head, long from, long to) {
    const Strides st = strides_of(a);
    for (long t = from; t < to; t += CHUNK)
        run_chunk<READ, WRITE>(s, chunk_at(a, row, head, t, to), st);
    if (TILES && st.stream) __atomic_thread_fence(__ATOMIC_SEQ_CST);  // streamed stores come late
}

static void fresh(Scratch& s) {
    memset(s.kt, 0, sizeof s.kt);
    memset(s.P, 0, sizeof s.P);
    memset(s.M, 0, sizeof s.M);
    memset(s.bt, 0, sizeof s.bt);
    s.tabled = 0;
}

// f(room, i) for i < tasks, then the same of the next f; each thread has a Room with `more` bytes
// behind it. With a task for each thread, all i of the same number run on one thread.
template <class Room, class... F>
static void parallel(const Call& a, long tasks, long more, F... f) {
    const long threads = a.threads < tasks ? a.threads : tasks, size = sizeof(Room) + (more + 63) / 64 * 64;
    static_assert(alignof(Room) == 64);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        [[maybe_unused]] Session session;
        Room* s = (Room*)aligned_alloc(64, size);
        auto pass = [&](auto& g) {
            if (tasks == threads) {
#pragma omp for schedule(static, 1)
                for (long i = 0; i < tasks; ++i) g(*s, i);
            } else {
#pragma omp for schedule(dynamic)
                for (long i = 0; i < tasks; ++i) g(*s, i);
            }
        };
        (pass(f), ...);
        free(s);
    }
}
