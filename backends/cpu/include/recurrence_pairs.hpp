// Gradients of the weights inside a chunk, and what the backward pass keeps of one.

struct Back {
    Scratch f;  // of the forward sweep that saves the states
    alignas(64) float dS[DKP * DVP], dz[DKP], St[DVP * DKP], dSt[DVP * DKP];
    alignas(64) float wt[DVP * CP], X[CHUNK * CP], KK[CHUNK * CP];
    alignas(64) float go[CHUNK * DVP], dw[CHUNK * DVP], miss[CHUNK * DVP];
    alignas(64) float t[CHUNK * DKP], qd[CHUNK * DKP], dq[CHUNK * DKP];
    alignas(64) float dk[CHUNK * DKP], dkr[CHUNK * DKP];  // as a written key, as a reading one
    alignas(64) float db[CHUNK * DKP], inner[DKP];
    alignas(64) float ut[DVP * CP], du[CHUNK * DVP], dadd[CHUNK * DKP];  // of an untied correction
    alignas(64) float near_k[CHUNK * DKP], near_v[CHUNK * DVP];  // through the bonus
};

// dst[i] = scale * f(i) * src[i] for n rows of DKP; f: what the decay leaves at a reader, up to and with
// the token, before the token, or after it to the end.
enum class Side { Read, Upto, Before, After };
template <Side side>
static ALWAYS_INLINE void scaled_rows(const Scratch& f, int n, const float* src, float* dst,
                                      float scale = 1.0f) {
    for (int i = 0; i < n; ++i) {
        float one = scale;
        if constexpr (SCALARS)
            one *= side == Side::Read     ? f.scalar.read[i]
                   : side == Side::Upto   ? f.scalar.upto[i]
                   : side == Side::Before ? f.scalar.before[i]
                                          : f.scalar.after[i];
        const float* by = side == Side::Read     ? f.channel.read()
                          : side == Side::Upto   ? f.channel.upto + DKP
                          : side == Side::Before ? f.channel.upto
                                                 : f.channel.after;
        for (int c = i * DKP; c < (i + 1) * DKP; c += LANES)
            store(dst + c, load(src + c) * (DECAY == CHANNEL ? load(by + c) * one : splat(one)));
    }
}

// dx_i += scale sum_j A_ij y_j prod a, dy_j += scale sum_i A_ij x_i prod a, over j <= i (strict: <),
// the product over j < t <= i (shift: < i).
template <bool strict, bool shift>
static void channel_pair_grads(int n, const float* A, const float* x, const float* y,
                               const float* a, float scale, float* dx, float* dy) {
    for (int c = 0; c < DKP; c += 2 * LANES) {
        const bool two = c + LANES < DKP;
        const int c1 = two ? c + LANES : c;
        for (int j = 0; j < n; ++j) {
            vf key0 = load(y + j * DKP + c) * scale, key1 = load(y + j * DKP + c1) * scale;
            for (int i = j; i < n; ++i) {
                if (strict && i == j) continue;
                if (i > j && !shift) {
                    key0 *= load(a + i * DKP + c);
                    key1 *= load(a + i * DKP + c1);
                }
                const float w = A[i * CP + j];
                float* d = dx + i * DKP;
                store(d + c, load(d + c) + w * key0);
                if (two) store(d + c1, load(d + c1) + w * key1);
                if (shift) {
                    key0 *= load(a + i * DKP + c);
                    key1 *= load(a + i * DKP + c1);
                }
            }
            vf sum0{}, sum1{};
            for (int i = n - 1; i > j; --i) {
                const float w = A[i * CP + j];
                vf x0 = w * load(x + i * DKP + c), x1 = w * load(x + i * DKP + c1);
                vf a0 = load(a + i * DKP + c), a1 = load(a + i * DKP + c1);
                sum0 = shift ? sum0 * a0 + x0 : (sum0 + x0) * a0;
                sum1 = shift ? sum1 * a1 + x1 : (sum1 + x1) * a1;
            }
            if (!strict) {
                sum0 += A[j * CP + j] * load(x + j * DKP + c);
                sum1 += A[j * CP + j] * load(x + j * DKP + c1);
            }
            float* d = dy + j * DKP;
            store(d + c, load(d + c) + scale * sum0);
            if (two) store(d + c1, load(d + c1) + scale * sum1);
        }
    }
}

// The same for every decay; x are queries, keys of the delta rule or erasing vectors. A is
// overwritten.
enum class Reader { Query, Key, Eraser };
template <Reader reader>
static ALWAYS_INLINE void pair_grads(const Scratch& f, int n, float* A, const float* x,
                                     const float* y, float scale, float* dx, float* dy) {
    if constexpr (DECAY == CHANNEL) {
        constexpr bool strict = reader != Reader::Query || EXCLUSIVE;
        constexpr bool shift = reader == Reader::Query ? EXCLUSIVE : reader == Reader::Eraser;
        channel_pair_grads<strict, shift>(n, A, x, y, f.channel.a, scale, dx, dy);
    } else {
        const float* D = reader == Reader::Query ? f.scalar.D
                         : reader == Reader::Key ? f.scalar.among()
                                                 : f.scalar.E;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j <= i; j += LANES) {
                float* p = A + i * CP + j;
                store(p, load(p) * (SCALARS ? load(D + i * CP + j) * scale : splat(scale)));
            }
        add_lower<DKP>(n, A, y, DKP, dx, DKP);
        add_upper<DKP>(n, A, x, DKP, dy, DKP);
    }
}

// db += sign * x dx: what a running sum of log decays gets from the rows it scales.
// Row i scales with the sum before its token if `before`; that of the first row is 0.
static ALWAYS_INLINE void add_sum_grads(int n, const float* x, const float* dx, float sign,
                                        float* db, bool before = false) {
    const int skip = before ? 1 : 0;
    if (DECAY == CHANNEL)
        for (int i = skip * DKP; i < n * DKP; i += LANES) {
            float* d = db + i - skip * DKP;
            store(d, load(d) + sign * (load(x + i) * load(dx + i)));
        }
    else if (SCALARS)
        for (int i = skip; i < n; ++i)
            db[i - skip] += sign * dot<DKP>(x + i * DKP, dx + i * DKP);
}
