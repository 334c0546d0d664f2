// The recurrence token by token, for one or a few tokens.
//
// Columns of the state are independent, so a panel of them is carried through the rows: one pass
// reads what a correction needs of the old state, one writes the new state and reads it for the
// first query head, one more for every further head of the group. The state is read from `start`
// for the first token and lives in `end` after it. All tensors are contiguous.

struct Token {
    const T* v;
    const float *e, *k, *a, *b, *q, *near;  // e = exp(g); q holds G rows, scaled; near: q u k
    float beta, *o;                         // o: G rows of DVP
    long G;
};

template <int NV, bool PART>
static ALWAYS_INLINE void read_panel(const float* S, const float* q, int col, float* o) {
    vf sum[NV];
    UNROLL for (int i = 0; i < NV; ++i) sum[i] = vf{};
    for (int d = 0; d < DK; ++d)
        UNROLL for (int i = 0; i < NV; ++i) {
            const float* p = S + d * W + col + i * LANES;
            sum[i] += q[d] * (PART ? load_part(p, DV % LANES) : load(p));
        }
    UNROLL for (int i = 0; i < NV; ++i) store(o + col + i * LANES, sum[i]);
}

template <int NV, bool PART>
static ALWAYS_INLINE void step_panel(const float* old, float* S, const Token& t, int col) {
    constexpr int REST = DV % LANES;
    vf val[NV], u[NV], sum[NV];
    UNROLL for (int i = 0; i < NV; ++i) {
        val[i] = PART ? load_part(t.v + col, REST) : load(t.v + col + i * LANES);
        u[i] = sum[i] = vf{};
    }
    if constexpr (CORRECTION != PLAIN) {
        for (int d = 0; d < DK; ++d)
            UNROLL for (int i = 0; i < NV; ++i) {
                const float* p = old + d * W + col + i * LANES;
                u[i] += t.a[d] * (PART ? load_part(p, REST) : load(p));
            }
        if constexpr (CORRECTION == DELTA)
            UNROLL for (int i = 0; i < NV; ++i) val[i] = t.beta * (val[i] - u[i]);
    }
    if constexpr (EXCLUSIVE)
        for (long g = 1; g < t.G; ++g) read_panel<NV, PART>(old, t.q + g * DK, col, t.o + g * DVP);
    for (int d = 0; d < DK; ++d)
        UNROLL for (int i = 0; i < NV; ++i) {
            const long at = d * W + col + i * LANES;
            vf x = PART ? load_part(old + at, REST) : load(old + at);
            if constexpr (EXCLUSIVE) sum[i] += t.q[d] * x;
            if constexpr (DECAY != NONE) x = x * t.e[DECAY == CHANNEL ? d : 0];
            if constexpr (CORRECTION == UNTIED) x += t.b[d] * u[i];
            x += t.k[d] * val[i];
            if constexpr (!EXCLUSIVE) sum[i] += t.q[d] * x;
            if constexpr (PART)
                store_part(S + at, x, REST);
            else
                store(S + at, x);
        }
    UNROLL for (int i = 0; i < NV; ++i) store(t.o + col + i * LANES, sum[i]);
    if constexpr (!EXCLUSIVE)
        for (long g = 1; g < t.G; ++g) read_panel<NV, PART>(S, t.q + g * DK, col, t.o + g * DVP);
}

// The normaliser column; gives the mass of each query head.
static ALWAYS_INLINE void step_mass(const float* old, float* S, const Token& t, float* mass) {
    for (long g = 0; g < t.G; ++g) mass[g] = t.near[g];
    for (int d = 0; d < DK; ++d) {
        const float was = old[d * W + DV];
        const float z = (DECAY == NONE ? was : was * t.e[DECAY == CHANNEL ? d : 0]) + t.k[d];
        for (long g = 0; g < t.G; ++g) mass[g] += t.q[g * DK + d] * (EXCLUSIVE ? was : z);
        S[d * W + DV] = z;
    }
}

static void step(const float* old, float* S, const Token& t, T* out, long os) {
    constexpr int NV = LANES == 16 ? 8 : 4;
    constexpr int FULL = DV / LANES;
    int col = 0;
    for (int i = 0; i + NV <= FULL; i += NV, col += NV * LANES)
        step_panel<NV, false>(old, S, t, col);
    for (; col + LANES <= DV; col += LANES) step_panel<1, false>(old, S, t, col);
    if constexpr (DV % LANES != 0) step_panel<1, true>(old, S, t, col);
    float* mass = (float*)__builtin_alloca(t.G * sizeof(float));
    if constexpr (ONES) step_mass(old, S, t, mass);
    for (long g = 0; g < t.G; ++g) {
        const float scale = ONES ? (mass[g] <= 0 ? 0.0f : 1.0f / mass[g]) : 1.0f;
        for (int c = 0; c < DVP; c += LANES) {
            vf x = load(t.o + g * DVP + c);
            if constexpr (BONUS) x += t.near[g] * load_upto(t.v + c, DV - c);
            store_upto(out + g * os + c, ONES ? x * scale : x, DV - c);
        }
    }
}

struct Few {
    const T *q, *k, *v;
    const float *decay, *beta, *erase, *add, *bonus, *start;
    float* end;
    T* out;
    const int32_t* cu;  // starts of packed sequences, or null
    long H, Hkv, N, rows, threads;
};

// Tokens [from, to) of batch b and state head h; `old` is null for a zero state.
static void steps(const Few& x, long b, long h, long from, long to, const float* old, float* S) {
    const long G = x.H / x.Hkv, head = b * x.Hkv + h;
    float* room = (float*)__builtin_alloca((G * (DK + DVP + 1) + LANES) * sizeof(float));
    float *q = room, *o = q + G * DK, *near = o + G * DVP;
    float e[DKP], k[DKP], a[DKP];
    if (!old) {
        memset(S, 0, sizeof(float) * DK * W);
        old = S;
    }
    if (DECAY == HEAD) e[0] = exp_neg(splat(x.decay[h]))[0];
    for (long t = from; t < to; ++t) {
        const long at = head * x.N + t;
        for (int d = 0; d < DK; ++d) k[d] = to_float(x.k[at * DK + d]);
        if (DECAY == TOKEN) e[0] = exp_neg(splat(x.decay[at]))[0];
        if (DECAY == CHANNEL)
            for (int c = 0; c < DKP; c += LANES)
                store(e + c, exp_neg(load_upto(x.decay + at * DK + c, DK - c)));
        if (CORRECTION == DELTA)
            for (int d = 0; d < DK; ++d)
                a[d] = DECAY == NONE ? k[d] : k[d] * e[DECAY == CHANNEL ? d : 0];
        for (long g = 0; g < G; ++g) {
            const T* src = x.q + ((b * x.H + h * G + g) * x.N + t) * DK;
            for (int d = 0; d < DK; ++d) q[g * DK + d] = to_float(src[d]) * SCALE;
            near[g] = 0;
            if (BONUS)
                for (int d = 0; d < DK; ++d) near[g] += q[g * DK + d] * x.bonus[h * DK + d] * k[d];
        }
        Token one{x.v + at * DV, e, k, CORRECTION == UNTIED ? x.erase + at * DK : a,
                  CORRECTION == UNTIED ? x.add + at * DK : nullptr, q, near,
                  CORRECTION == DELTA ? x.beta[at] : 1.0f, o, G};
        step(old, S, one, x.out + ((b * x.H + h * G) * x.N + t) * DV, x.N * DV);
        old = S;
    }
}

extern "C" __attribute__((visibility("default"))) void recurrence_step(const Few* few) {
    const Few& x = *few;
    const long size = (long)DK * W;
    auto one = [&](long i) {
        const long row = i / x.Hkv, from = x.cu ? x.cu[row] : 0, to = x.cu ? x.cu[row + 1] : x.N;
        const float* old = x.start ? x.start + i * size : nullptr;
        if (from == to && old)
            memcpy(x.end + i * size, old, sizeof(float) * size);
        else
            steps(x, x.cu ? 0 : row, i % x.Hkv, from, to, old, x.end + i * size);
    };
    if (x.threads <= 1) {
        for (long i = 0; i < x.rows * x.Hkv; ++i) one(i);
        return;
    }
#pragma omp parallel for num_threads(x.threads) schedule(dynamic)
    for (long i = 0; i < x.rows * x.Hkv; ++i) one(i);
}
