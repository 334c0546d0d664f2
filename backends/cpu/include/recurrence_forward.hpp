// Chunked forward pass. One task is one state head of one row: its chunks run in sequence, so a
// correction needs no precomputed inverse, and all query heads of the group read the same state.
//
// With fewer heads than threads a causal row is split in parts + 1 pieces, the first shorter. While
// one thread runs the first piece, the others sum what the next pieces write; then the state at the
// start of every piece but the first is known, and they run at once. A row that is not causal is
// split evenly: first the sum of every piece, then the outputs.

constexpr float FIRST = 0.4f;  // time of a sum over that of a run, so the length of the first piece

static long piece_start(const Call& a, long row, long piece, long pieces) {
    const long chunks = (a.length(row) + CHUNK - 1) / CHUNK, n = a.length(row);
    const float before = CAUSAL && piece ? piece - 1 + FIRST : piece;
    const float all = CAUSAL ? pieces - 1 + FIRST : pieces;
    const long t = piece == pieces ? n : (long)(chunks * (before / all)) * CHUNK;
    return t < n ? t : n;
}

// What is left, per key channel, of a state over tokens [from, to).
static void kept(const Call& a, long row, long head, long from, long to, float* left) {
    const long b = a.batch(row), at = a.first(row);
    constexpr int width = DECAY == CHANNEL ? DK : 1;
    double sum[4][width] = {};  // four, so that no addition waits for the one before
    for (long t = from; t < to; ++t) {
        const float* g = DECAY == HEAD ? a.decay.p + head : a.decay.at(b, head, at + t);
        for (int d = 0; d < width; ++d) sum[t % 4][d] += g[d] < FLOOR ? FLOOR : g[d];
    }
    for (int d = 0; d < width; ++d)
        left[d] = exp_neg(splat((float)(sum[0][d] + sum[1][d] + sum[2][d] + sum[3][d])))[0];
    for (int d = width; d < DK; ++d) left[d] = left[0];
}

static void split_forward(const Call& a, float* between) {
    const long heads = a.rows * a.Hkv, size = (long)DK * W, tasks = a.parts, pieces = tasks + 1;
    float* left = (float*)malloc(sizeof(float) * heads * pieces * DK);
    auto begin = [&](Scratch& s, long i) {
        const long each = i / tasks, piece = i % tasks, row = each / a.Hkv, head = each % a.Hkv;
        const long from = piece_start(a, row, piece, pieces);
        const long to = piece_start(a, row, piece + 1, pieces);
        fresh(s);
        if (piece == 0) {
            take_state(s, a.start ? a.start + each * size : nullptr);
            run_tokens<true, true>(s, a, row, head, from, to);
        } else {
            take_state(s, nullptr);
            run_tokens<false, true>(s, a, row, head, from, to);
            if constexpr (DECAY != NONE)
                kept(a, row, head, from, to, left + (each * pieces + piece) * DK);
        }
        give_state(s, between + i * size);
    };
    auto follow = [&](Scratch& s, long i) {
        const long each = i / tasks, row = each / a.Hkv, head = each % a.Hkv;
        const long piece = i % tasks ? i % tasks : tasks;  // the one it has summed is in its cache
        float* state = (float*)(&s + 1);
        memcpy(state, between + each * tasks * size, sizeof(float) * size);
        for (long p = 1; p < piece; ++p)
            for (long e = 0; e < size; ++e)
                state[e] = state[e] * (DECAY == NONE ? 1 : left[(each * pieces + p) * DK + e / W]) +
                           between[(each * tasks + p) * size + e];
        fresh(s);
        take_state(s, state);
        run_tokens<true, true>(s, a, row, head, piece_start(a, row, piece, pieces),
                               piece_start(a, row, piece + 1, pieces));
        if (piece == tasks) give_state(s, a.end + each * size);
    };
    parallel<Scratch>(a, heads * tasks, sizeof(float) * size, begin, follow);
    free(left);
}

extern "C" __attribute__((visibility("default"))) void recurrence_forward(const Call* call,
                                                                          float* between) {
    const Call& a = *call;
    const long heads = a.rows * a.Hkv, size = (long)DK * W;
    if constexpr (CAUSAL) {
        if (a.parts > 1) return split_forward(a, between);
        parallel<Scratch>(a, heads, 0, [&](Scratch& s, long i) {
            fresh(s);
            take_state(s, a.start ? a.start + i * size : nullptr);
            run_tokens<true, true>(s, a, i / a.Hkv, i % a.Hkv, 0, a.length(i / a.Hkv));
            give_state(s, a.end + i * size);
        });
    } else {
        auto pass = [&](auto body) {
            parallel<Scratch>(a, heads * a.parts, 0, [&](Scratch& s, long i) {
                const long each = i / a.parts, piece = i % a.parts, row = each / a.Hkv;
                fresh(s);
                body(s, i, each, row, piece_start(a, row, piece, a.parts),
                     piece_start(a, row, piece + 1, a.parts));
            });
        };
        pass([&](Scratch& s, long i, long each, long row, long from, long to) {
            take_state(s, nullptr);
            run_tokens<false, true>(s, a, row, each % a.Hkv, from, to);
            give_state(s, between + i * size);
        });
        for (long each = 0; each < heads; ++each)
            for (long e = 0; e < size; ++e) {
                float sum = a.start ? a.start[each * size + e] : 0.0f;
                for (long p = 0; p < a.parts; ++p) sum += between[(each * a.parts + p) * size + e];
                a.end[each * size + e] = sum;
            }
        pass([&](Scratch& s, long, long each, long row, long from, long to) {
            take_state(s, a.end + each * size);
            run_tokens<true, false>(s, a, row, each % a.Hkv, from, to);
        });
    }
}
