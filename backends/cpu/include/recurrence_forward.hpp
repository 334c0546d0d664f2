// Chunked forward pass. One task is one state head of one row (or of a part of it): its chunks run
// in sequence, so a correction needs no precomputed inverse, and all query heads of the group read
// the same state. When there are fewer heads than threads, a row is split in parts: first every
// part's own sum, then the states at its start, then the outputs.

static long part_start(const Call& a, long row, long part) {
    long chunks = (a.length(row) + CHUNK - 1) / CHUNK;
    long t = chunks * part / a.parts * CHUNK, n = a.length(row);
    return t < n ? t : n;
}

// What is left, per key channel, of a state over tokens [from, to).
static void kept(const Call& a, long row, long head, long from, long to, float* left) {
    const long b = a.batch(row), at = a.first(row);
    for (int d = 0; d < DK; ++d) left[d] = 1.0f;
    if (DECAY == NONE) return;
    for (int d = 0; d < (DECAY == CHANNEL ? DK : 1); ++d) {
        double sum = 0;
        for (long t = from; t < to; ++t) {
            float g = DECAY == HEAD ? a.decay.p[head] : a.decay.at(b, head, at + t)[d];
            sum += g < FLOOR ? FLOOR : g;
        }
        float x = exp_neg(splat((float)sum))[0];
        for (int e = DECAY == CHANNEL ? d : 0; e < (DECAY == CHANNEL ? d + 1 : DK); ++e) left[e] = x;
    }
}

extern "C" __attribute__((visibility("default"))) void recurrence_forward(const Call* call,
                                                                          float* between) {
    const Call& a = *call;
    const long heads = a.rows * a.Hkv, size = (long)DK * W;
    const bool split = a.parts > 1;
    auto start = [&](long i) { return a.start ? a.start + i * size : nullptr; };
    if (!split && CAUSAL) {
        parallel<Scratch>(a, heads, 0, [&](Scratch& s, long i) {
            fresh(s);
            take_state(s, start(i));
            run_tokens<true, true>(s, a, i / a.Hkv, i % a.Hkv, 0, a.length(i / a.Hkv));
            give_state(s, a.end + i * size);
        });
        return;
    }
    // The sum of each part on its own; `between` holds parts states a head.
    parallel<Scratch>(a, heads * a.parts, 0, [&](Scratch& s, long i) {
        const long head = i / a.parts, part = i % a.parts, row = head / a.Hkv;
        fresh(s);
        take_state(s, nullptr);
        run_tokens<false, true>(s, a, row, head % a.Hkv, part_start(a, row, part),
                                part_start(a, row, part + 1));
        give_state(s, between + i * size);
    });
    parallel<Scratch>(a, heads, 0, [&](Scratch&, long i) {
        float left[DK];
        float* end = a.end + i * size;
        const float* first = start(i);
        for (long e = 0; e < size; ++e) end[e] = first ? first[e] : 0.0f;
        for (long part = 0; part < a.parts; ++part) {
            const long row = i / a.Hkv;
            kept(a, row, i % a.Hkv, part_start(a, row, part), part_start(a, row, part + 1), left);
            float* own = between + (i * a.parts + part) * size;
            for (long e = 0; e < size; ++e) {
                float sum = own[e];
                own[e] = end[e];
                end[e] = end[e] * left[e / W] + sum;
            }
        }
    });
    parallel<Scratch>(a, heads * a.parts, 0, [&](Scratch& s, long i) {
        const long head = i / a.parts, part = i % a.parts, row = head / a.Hkv;
        fresh(s);
        take_state(s, CAUSAL ? between + i * size : a.end + head * size);
        run_tokens<true, CAUSAL>(s, a, row, head % a.Hkv, part_start(a, row, part),
                                 part_start(a, row, part + 1));
    });
}
