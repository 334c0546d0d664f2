// Backward pass of causal reads. A task is one state head of one row: a forward sweep
// saves the state at every chunk boundary, then the chunks are taken from the last to the first,
// carrying the gradient of the state. Nothing else is saved; weights are computed again.

struct Grads {
    Rows<const T> out;  // gradient of the output
    Rows<T> q, k, v;
    Rows<float> decay, beta, erase, add;  // decay 'head': one number per row and head
    float* bonus;  // one vector per row and head
    const float* end;
    float* start;
};

// Weights, their gradients and those of one query head.
static void read_back(Back& b, const Call& a, const Grads& d, long batch, long head, long t, int n,
                      const float* S0, const float* St, const float* bonus, float* dbonus) {
    Scratch& s = b.f;
    const float* z0 = S0 + DKP * DVP;
    take_rows<DK, DKP>(n, a.q.at(batch, head, t), a.q.n, s.q);
    take_rows<DV, DVP>(n, d.out.at(batch, head, t), d.out.n, b.go);
    weigh(s, n, {s.q, DKP}, s.k, s.kt, s.P);
    scaled_rows<Side::Read>(s, n, s.q, b.qd, SCALE);
    lower<DV, EXCLUSIVE>(n, b.go, DVP, b.wt, b.X,
                         [](int, int, vf sum) INLINE_LAMBDA { return sum; });
    constexpr bool later = ONES || DECAY == CHANNEL;  // gradients of q are scaled apart
    float* seen = later ? b.t : b.dq;
    const float* read = s.scalar.read;
    T* dq = d.q.at(batch, head, t);
    product<DKP>(n, DV, b.go, DVP, 1, St, DKP, [=](int m, int c, vf sum) INLINE_LAMBDA {
        const float by = later ? 1.0f : SCALARS ? SCALE * read[m] : SCALE;
        store(seen + m * DKP + c, sum * by);
        fetch(dq + (m - CHUNK) * d.q.n + c);
    });
    float near[CHUNK], dnear[CHUNK];  // SCALE q u k, and its gradient
    if constexpr (BONUS)
        for (int i = 0; i < n; ++i) {
            vf sum{};
            for (int c = 0; c < DK; c += LANES)
                sum += load(s.q + i * DKP + c) * load(s.k + i * DKP + c) *
                       load_upto(bonus + c, DK - c);
            near[i] = SCALE * sum_lanes(sum);
            dnear[i] = dot<DVP>(b.go + i * DVP, s.v + i * DVP);
        }
    if constexpr (ONES)
        for (int i = 0; i < n; ++i) {
            float *x = b.X + i * CP, *T_ = b.t + i * DKP, *go = b.go + i * DVP;
            const float *p = s.P + i * CP, *q = b.qd + i * DKP;
            vf sum{}, with{};
            for (int j = 0; j <= i; j += LANES) {
                sum += load(p + j);
                with += load(p + j) * load(x + j);
            }
            float mass = sum_lanes(sum) + dot<DKP>(q, z0);
            float read = sum_lanes(with) + dot<DKP>(q, T_);
            if constexpr (BONUS) {
                mass += near[i];
                read += near[i] * dnear[i];
            }
            const float inverse = mass <= 0 ? 0.0f : 1.0f / mass;
            const float dmass = -read * inverse * inverse;
            for (int j = 0; j < i + !EXCLUSIVE; ++j) x[j] = x[j] * inverse + dmass;
            if constexpr (BONUS) dnear[i] = dnear[i] * inverse + dmass;
            for (int c = 0; c < DVP; c += LANES) store(go + c, load(go + c) * inverse);
            for (int c = 0; c < DKP; c += LANES) {
                store(T_ + c, load(T_ + c) * inverse + dmass * load(z0 + c));
                store(b.dz + c, load(b.dz + c) + dmass * load(q + c));
            }
        }
    if constexpr (later) scaled_rows<Side::Read>(s, n, b.t, b.dq, SCALE);
    add_upper<DVP>(n, s.P, b.go, DVP, b.dw, DVP);
    pair_grads<Reader::Query>(s, n, b.X, s.q, s.k, SCALE, b.dq, b.dk);
    if constexpr (CORRECTION == UNTIED) {
        weigh(s, n, {s.q, DKP}, s.b, s.bt, s.P);
        auto same = [](int, int, vf x) INLINE_LAMBDA { return x; };
        lower<DV, EXCLUSIVE>(n, b.go, DVP, b.ut, b.X, same);
        add_upper<DVP>(n, s.P, b.go, DVP, b.du, DVP);
        pair_grads<Reader::Query>(s, n, b.X, s.q, s.b, SCALE, b.dq, b.dadd);
    }
    add_sum_grads(n, s.q, b.dq, 1.0f, b.db, EXCLUSIVE);
    if constexpr (BONUS)
        for (int i = 0; i < n; ++i) {
            const float by = SCALE * dnear[i];
            for (int c = 0; c < DK; c += LANES) {
                const vf u = load_upto(bonus + c, DK - c);
                const vf q = load(s.q + i * DKP + c), k = load(s.k + i * DKP + c);
                float *dq = b.dq + i * DKP + c, *dk = b.near_k + i * DKP + c;
                store(dq, load(dq) + by * (u * k));
                store(dk, load(dk) + by * (u * q));
                store_upto(dbonus + c, load_upto(dbonus + c, DK - c) + by * (q * k), DK - c);
            }
            for (int c = i * DVP; c < (i + 1) * DVP; c += LANES)
                store(b.near_v + c, load(b.near_v + c) + near[i] * load(b.go + c));
        }
    float* dS = b.dS;
    const T *q = a.q.at(batch, head, t), *go = d.out.at(batch, head, t);
    product_onto<DVP>(
        DK, n, b.qd, 1, DKP, b.go, DVP,
        [=](int m, int c) INLINE_LAMBDA { return load(dS + m * DVP + c); },
        [=](int m, int c, vf sum) INLINE_LAMBDA {
            store(dS + m * DVP + c, sum);
            fetch(S0 - SAVED + m * DVP + c);
            if (const int before = m / 2 - CHUNK; before < 0)
                fetch(m % 2 ? q + before * a.q.n + c : go + before * d.out.n + c);
        });
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < DKP; c += LANES)
            store_upto(dq + i * d.q.n + c, load(b.dq + i * DKP + c), DK - c);
}

// What the gradient of the state after the chunk says about its keys, values and decay; then it
// becomes its part of the gradient of the state before.
static void end_back(Back& b, const Call& a, const Grads& d, long batch, long head, long at, int n,
                     const float* w, const float* S1t, const float* z1) {
    Scratch& s = b.f;
    const T *k = a.k.at(batch, head, at), *v = a.v.at(batch, head, at);
    const T *to_k = d.k.at(batch, head, at), *to_v = d.v.at(batch, head, at);
    transpose_in(DK, DV, b.dS, DVP, b.dSt, DKP);
    float *dk = b.dk, *dw = b.dw, *t = b.t;
    const float *dz = b.dz, *after = s.scalar.after;
    product<DKP>(n, DV, w, DVP, 1, b.dSt, DKP, [=](int m, int c, vf sum) INLINE_LAMBDA {
        if constexpr (ONES) sum += load(dz + c);
        store((DECAY == CHANNEL ? t : dk) + m * DKP + c, SCALARS ? sum * after[m] : sum);
        fetch(k + (m - CHUNK) * a.k.n + c);
        fetch(to_k + (m - CHUNK) * d.k.n + c);
    });
    const float* keys = s.k;
    if constexpr (DECAY == CHANNEL) {
        scaled_rows<Side::After>(s, n, t, dk);
        scaled_rows<Side::After>(s, n, s.k, b.qd);
        keys = b.qd;
    }
    product<DVP>(n, DK, keys, DKP, 1, b.dS, DVP, [=](int m, int c, vf sum) INLINE_LAMBDA {
        store(dw + m * DVP + c, SCALARS ? sum * after[m] : sum);
        fetch(v + (m - CHUNK) * a.v.n + c);
        fetch(to_v + (m - CHUNK) * d.v.n + c);
    });
    if constexpr (CORRECTION == UNTIED) {
        float* du = b.du;
        product<DKP>(n, DV, s.u, DVP, 1, b.dSt, DKP, [=](int m, int c, vf sum) INLINE_LAMBDA {
            store(t + m * DKP + c, sum);
        });
        scaled_rows<Side::After>(s, n, t, b.dadd);
        scaled_rows<Side::After>(s, n, s.b, b.qd);
        product<DVP>(n, DK, b.qd, DKP, 1, b.dS, DVP, [=](int m, int c, vf sum) INLINE_LAMBDA {
            store(du + m * DVP + c, sum);
        });
    }
    if constexpr (DECAY == NONE) return;
    const float* whole = s.channel.whole(n);
    vf here[KV_], all{};
    UNROLL for (int i = 0; i < KV_; ++i)
        here[i] = ONES ? load(z1 + i * LANES) * load(dz + i * LANES) : vf{};
    for (int c = 0; c < DV * DKP; c += DKP)
        UNROLL for (int i = 0; i < KV_; ++i)
            here[i] += load(S1t + c + i * LANES) * load(b.dSt + c + i * LANES);
    UNROLL for (int i = 0; i < KV_; ++i) {
        store(b.inner + i * LANES, here[i]);
        all += here[i];
    }
    if (SCALARS) b.inner[0] = sum_lanes(all);
    for (int e = 0; e < DK; ++e) {
        const float left = DECAY == CHANNEL ? whole[e] : s.scalar.whole;
        for (int c = 0; c < DVP; c += LANES)
            store(b.dS + e * DVP + c, load(b.dS + e * DVP + c) * left);
        b.dz[e] *= left;
    }
}

// Gradients of the steps from those of their running sums. A step below FLOOR has none.
static void decay_back(Back& b, int n, const float* g, long gs, float* dg, long dgs) {
    if constexpr (DECAY == CHANNEL) {
        for (int c = 0; c < DK; ++c) {
            double sum = b.inner[c];
            for (int i = n - 1; i >= 0; --i) {
                sum += b.db[i * DKP + c];
                dg[i * dgs + c] = g[i * gs + c] < FLOOR ? 0.0f : (float)sum;
            }
        }
    } else {
        double sum = b.inner[0];
        for (int i = n - 1; i >= 0; --i) {
            sum += b.db[i];
            const float x = g[i * gs] < FLOOR ? 0.0f : (float)sum;
            if (DECAY == HEAD)
                *dg += x;
            else
                dg[i * dgs] = x;
        }
    }
}

static void chunk_back(Back& b, const Call& a, const Grads& d, long row, long head, long t, int n,
                       const float* saved) {
    Scratch& s = b.f;
    const long batch = a.batch(row), at = a.first(row) + t, G = a.group();
    const float *S0 = saved, *S1 = saved + SAVED, *z1 = S1 + DKP * DVP;
    const float* g = DECAY == NONE   ? nullptr
                     : DECAY == HEAD ? a.decay.p + head
                                     : a.decay.at(batch, head, at);
    take_rows<DK, DKP>(n, a.k.at(batch, head, at), a.k.n, s.k);
    take_rows<DV, DVP>(n, a.v.at(batch, head, at), a.v.n, s.v);
    if constexpr (DECAY == CHANNEL) s.channel.set(n, g, a.decay.n);
    if constexpr (SCALARS)
        if (DECAY != HEAD || s.tabled != n) s.scalar.set(n, g, a.decay.n);
    s.tabled = n;
    if constexpr (DECAY != CHANNEL) transpose_in(n, DK, s.k, DKP, s.kt, CP);
    const float* w = s.v;
    float beta[CHUNK] = {};
    if constexpr (CORRECTION == DELTA) {
        const float* p = a.beta.at(batch, head, at);
        for (int i = 0; i < n; ++i) beta[i] = p[i * a.beta.n];
        correct_again(b, n, beta, S0);
        w = s.u;
    }
    if constexpr (CORRECTION == UNTIED) {
        Chunk c{};
        Strides st{};
        c.n = n;
        c.erase = a.erase.at(batch, head, at);
        c.add = a.add.at(batch, head, at);
        st.erase = a.erase.n;
        st.add = a.add.n;
        memcpy(s.S, S0, sizeof s.S);
        untie_chunk(s, c, st, {s.v, DVP});
        memcpy(b.KK, s.P, sizeof s.P);
        transpose_in(n, DV, s.u, DVP, b.ut, CP);
    }
    transpose_in(n, DV, w, DVP, b.wt, CP);
    memset(b.db, 0, sizeof(float) * CHUNK * (DECAY == CHANNEL ? DKP : 1));
    end_back(b, a, d, batch, head, at, n, w, CORRECTION == PLAIN ? S1 : b.St, z1);
    if constexpr (CORRECTION != PLAIN) transpose_in(DK, DV, S0, DVP, b.St, DKP);
    const float* St = CORRECTION == PLAIN ? S0 : b.St;
    if constexpr (BONUS) {
        memset(b.near_k, 0, sizeof b.near_k);
        memset(b.near_v, 0, sizeof b.near_v);
    }
    const float* bonus = BONUS ? a.bonus + head * DK : nullptr;
    float* dbonus = BONUS ? d.bonus + (row * a.Hkv + head) * DK : nullptr;
    for (long i = 0; i < G; ++i)
        read_back(b, a, d, batch, head * G + i, at, n, S0, St, bonus, dbonus);
    if constexpr (CORRECTION == DELTA) {
        correct_back(b, n, beta, d.beta.at(batch, head, at), d.beta.n);
        add_sum_grads(n, s.k, b.dkr, 1.0f, b.db);
    }
    if constexpr (CORRECTION == UNTIED) untie_back(b, n);
    add_sum_grads(n, s.k, b.dk, -1.0f, b.db);
    if constexpr (DECAY != NONE)
        decay_back(b, n, g, a.decay.n,
                   DECAY == HEAD ? d.decay.at(row, head, 0) : d.decay.at(batch, head, at),
                   d.decay.n);
    if constexpr (CORRECTION == UNTIED)
        for (int i = 0; i < n; ++i)
            for (int c = 0; c < DKP; c += LANES) {
                float* to = d.erase.at(batch, head, at + i) + c;
                store_upto(to, load(b.dkr + i * DKP + c), DK - c);
                to = d.add.at(batch, head, at + i) + c;
                store_upto(to, load(b.dadd + i * DKP + c), DK - c);
            }
    T *dk = d.k.at(batch, head, at), *dv = d.v.at(batch, head, at);
    for (int i = 0; i < n; ++i) {
        for (int c = 0; c < DKP; c += LANES) {
            vf x = load(b.dk + i * DKP + c);
            if constexpr (CORRECTION == DELTA) x += load(b.dkr + i * DKP + c);
            if constexpr (BONUS) x += load(b.near_k + i * DKP + c);
            store_upto(dk + i * d.k.n + c, x, DK - c);
        }
        for (int c = 0; c < DVP; c += LANES) {
            vf x = load(b.dw + i * DVP + c);
            if constexpr (BONUS) x += load(b.near_v + i * DVP + c);
            store_upto(dv + i * d.v.n + c, x, DV - c);
        }
    }
}

extern "C" __attribute__((visibility("default"))) void recurrence_backward(const Call* call,
                                                                           const Grads* grads) {
    const Call& a = *call;
    const Grads& d = *grads;
    const long size = (long)DK * W;
    long longest = 0;
    for (long row = 0; row < a.rows; ++row) longest = a.length(row) > longest ? a.length(row) : longest;
    const long states = ((longest + CHUNK - 1) / CHUNK + 1) * SAVED * sizeof(float);
    parallel<Back>(a, a.rows * a.Hkv, states, [&](Back& b, long i) {
        float* saved = (float*)(&b + 1);
        const long row = i / a.Hkv, head = i % a.Hkv, n = a.length(row);
        const long chunks = (n + CHUNK - 1) / CHUNK;
        Scratch& s = b.f;
        auto save = [&](long c) {
            if constexpr (CORRECTION == PLAIN)
                transpose_in(DK, DV, s.S, DVP, saved + c * SAVED, DKP);
            else
                memcpy(saved + c * SAVED, s.S, sizeof s.S);
            memcpy(saved + c * SAVED + DKP * DVP, s.z, sizeof s.z);
        };
        fresh(s);
        memset(b.X, 0, sizeof b.X);
        memset(b.KK, 0, sizeof b.KK);
        memset(b.wt, 0, sizeof b.wt);
        memset(b.ut, 0, sizeof b.ut);
        take_state(s, d.end ? d.end + i * size : nullptr);
        memcpy(b.dS, s.S, sizeof s.S);
        memcpy(b.dz, s.z, sizeof s.z);
        take_state(s, a.start ? a.start + i * size : nullptr);
        save(0);
        for (long c = 0; c < chunks; ++c) {
            const long t = c * CHUNK, to = t + CHUNK < n ? t + CHUNK : n;
            if constexpr (CORRECTION == PLAIN) {
                float* S = saved + c * SAVED;
                next_state(s, chunk_at(a, row, head, t, to), strides_of(a), S, S + SAVED);
            } else {
                run_tokens<false, true>(s, a, row, head, t, to);
                save(c + 1);
            }
        }
        if constexpr (CORRECTION != PLAIN) transpose_in(DK, DV, s.S, DVP, b.St, DKP);
        s.tabled = 0;
        for (long c = chunks - 1; c >= 0; --c) {
            const long t = c * CHUNK;
            chunk_back(b, a, d, row, head, t, (int)(n - t < CHUNK ? n - t : CHUNK),
                       saved + c * SAVED);
        }
        if (d.start) {
            memcpy(s.S, b.dS, sizeof s.S);
            memcpy(s.z, b.dz, sizeof s.z);
            give_state(s, d.start + i * size);
        }
    });
}
