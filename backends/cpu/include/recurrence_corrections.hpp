// Corrections in the backward pass: the adjoint of a triangular system, and what it says about the
// vectors that read and write.

// The delta rule: from the gradient of the written values to v, beta, and the keys that read.
static void correct_back(Back& b, int n, const float* beta, float* dbeta, long dbs) {
    Scratch& s = b.f;
    solve_upper<DVP>(n, s.M, b.dw);
    for (int i = 0; i < n; ++i) dbeta[i * dbs] = -dot<DVP>(b.dw + i * DVP, b.miss + i * DVP);
    lower<DV, true>(n, b.dw, DVP, b.wt, b.X, [=](int i, int, vf sum) INLINE_LAMBDA {
        return sum * -beta[i];
    });
    float* seen = b.t;
    product<DKP>(n, DV, b.dw, DVP, 1, b.St, DKP, [=](int m, int c, vf sum) INLINE_LAMBDA {
        store(seen + m * DKP + c, sum * -beta[m]);
    });
    scaled_rows<Side::Upto>(s, n, b.t, b.dkr);
    pair_grads<Reader::Key>(s, n, b.X, s.k, s.k, 1.0f, b.dkr, b.dk);
    scaled_rows<Side::Upto>(s, n, s.k, b.qd);
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < DVP; c += LANES)
            store(b.dw + i * DVP + c, load(b.dw + i * DVP + c) * beta[i]);
    float* dS = b.dS;
    product_onto<DVP>(
        DK, n, b.qd, 1, DKP, b.dw, DVP,
        [=](int m, int c) INLINE_LAMBDA { return -load(dS + m * DVP + c); },
        [=](int m, int c, vf sum) INLINE_LAMBDA { store(dS + m * DVP + c, -sum); });
}

// An untied correction: from the gradient of what was read to the vectors that read and write.
static void untie_back(Back& b, int n) {
    Scratch& s = b.f;
    auto same = [](int, int, vf x) INLINE_LAMBDA { return x; };
    solve_upper<DVP>(n, s.M, b.du);
    float *seen = b.t, *dS = b.dS;
    product<DKP>(n, DV, b.du, DVP, 1, b.St, DKP, [=](int m, int c, vf sum) INLINE_LAMBDA {
        store(seen + m * DKP + c, sum);
    });
    scaled_rows<Side::Before>(s, n, b.t, b.dkr);
    lower<DV, true>(n, b.du, DVP, b.ut, b.X, same);
    pair_grads<Reader::Eraser>(s, n, b.X, s.a, s.b, 1.0f, b.dkr, b.dadd);
    lower<DV, true>(n, b.du, DVP, b.wt, b.X, same);
    pair_grads<Reader::Eraser>(s, n, b.X, s.a, s.k, 1.0f, b.dkr, b.dk);
    add_upper<DVP>(n, b.KK, b.du, DVP, b.dw, DVP);
    scaled_rows<Side::Before>(s, n, s.a, b.qd);
    product_onto<DVP>(
        DK, n, b.qd, 1, DKP, b.du, DVP,
        [=](int m, int c) INLINE_LAMBDA { return load(dS + m * DVP + c); },
        [=](int m, int c, vf sum) INLINE_LAMBDA { store(dS + m * DVP + c, sum); });
    add_sum_grads(n, s.a, b.dkr, 1.0f, b.db, true);
    add_sum_grads(n, s.b, b.dadd, -1.0f, b.db);
}

// Written values of the delta rule again (into f.u), and -v + what was read, for beta's gradient.
static void correct_again(Back& b, int n, const float* beta, const float* S0) {
    Scratch& s = b.f;
    scaled_rows<Side::Upto>(s, n, s.k, b.qd);
    float *u = s.u, *miss = b.miss;
    const float* v = s.v;
    product<DVP>(n, DK, b.qd, DKP, 1, S0, DVP, [=](int m, int c, vf sum) INLINE_LAMBDA {
        vf less = sum - load(v + m * DVP + c);
        store(miss + m * DVP + c, less);
        store(u + m * DVP + c, less * -beta[m]);
    });
    if constexpr (DECAY == CHANNEL) {
        channel_lower<true, false>(n, s.k, s.k, s.channel.a, 1.0f, b.KK);
    } else {
        const float* D = s.scalar.among();
        lower<DK, true>(n, s.k, DKP, s.kt, b.KK, [=](int i, int j, vf sum) INLINE_LAMBDA {
            return SCALARS ? sum * load(D + i * CP + j) : sum;
        });
    }
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < CP; j += LANES)
            store(s.M + i * CP + j, beta[i] * load(b.KK + i * CP + j));
    solve_lower<DVP>(n, s.M, s.u);
    add_lower<DVP>(n, b.KK, s.u, DVP, b.miss, DVP);
}
