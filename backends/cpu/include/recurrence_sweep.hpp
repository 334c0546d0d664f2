// The forward sweep of a backward pass: states at the chunk boundaries.

// Floats of a saved state: S, z; they lie behind Back. Without a correction S is transposed, as its
// gradients read it.
constexpr long SAVED = DKP * DVP + DKP;

// The state after a chunk of a recurrence without correction, from the one before.
static void next_state(Scratch& s, const Chunk& c, const Strides& st, const float* from, float* to) {
    const int n = c.n;
    View k = view<DK, DKP>(n, c.k, st.k, s.k, true);
    const View v = view<DV, DVP>(n, c.v, st.v, s.v, false);
    if constexpr (DECAY == CHANNEL) s.channel.set(n, c.g, st.g);
    if constexpr (SCALARS)
        if (DECAY != HEAD || s.tabled != n) s.scalar.set_sums(n, c.g, st.g);
    s.tabled = n;
    if constexpr (DECAY != NONE) {
        for (int j = 0; j < n; ++j)
            for (int d = 0; d < DKP; d += LANES) {
                vf after = SCALARS ? splat(s.scalar.after[j]) : load(s.channel.after + j * DKP + d);
                store(s.kd + j * DKP + d, after * load(k.p + j * k.rs + d));
            }
        k = {s.kd, DKP};
    }
    const float* whole = s.channel.whole(n);
    auto left = [&](vf x, int d) INLINE_LAMBDA {
        return DECAY == CHANNEL ? x * load(whole + d) : SCALARS ? x * s.scalar.whole : x;
    };
    product_onto<DKP>(
        DV, n, v.p, 1, v.rs, k.p, k.rs,
        [&](int m, int d) INLINE_LAMBDA { return left(load(from + m * DKP + d), d); },
        [&](int m, int d, vf sum) INLINE_LAMBDA {
            store(to + m * DKP + d, sum);
            fetch(to + SAVED + m * DKP + d);
            if (const int next = m / 2; next < CHUNK)
                fetch(m % 2 ? c.k + (CHUNK + next) * st.k + d : c.v + (CHUNK + next) * st.v + d);
        });
    if constexpr (ONES)
        for (int d = 0; d < DKP; d += LANES) {
            vf sum = left(load(from + DKP * DVP + d), d);
            for (int j = 0; j < n; ++j) sum += load(k.p + j * k.rs + d);
            store(to + DKP * DVP + d, sum);
        }
}
