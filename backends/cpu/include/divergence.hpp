// (1 - ce) KL(teacher || student) + weight * cross-entropy of rows of logits, and the gradient.
//
// Of a row, with p = softmax(x):
//   loss = (1 - ce) sum p_t (log p_t - log p_s) - weight log p_s[label]
//   slope = ((1 - ce) + weight) p_s - (1 - ce) p_t, less `weight` at the label
// where `weight` is 0 for a row without a label (label < 0). The slope is multiplied by `scale` and
// stored in the type io_t of the logits, where the student's are if so asked; sums are float32 within
// a row and float64 over rows.
// A row is read three times (largest, normaliser, result); it stays in the cache between them.
#pragma once
#include <cmath>
#include <omp.h>
#include "math.hpp"

struct Call {
    const io_t *student, *teacher;
    const int64_t* labels;
    io_t* slope;
    double* loss;  // one a row
    long rows, vocabulary, student_row, teacher_row, slope_row, threads;
    double ce, weight, scale;
};

// log p = (x - highest) - rest. The largest logit is taken off first: beside it the logits that matter
// are small numbers, whose difference is exact, however large they are themselves.
struct Normaliser {
    float highest, rest;
};

static ALWAYS_INLINE Normaliser normaliser(const io_t* x, long V) {
    constexpr int WAYS = 4;
    vf top[WAYS];
    UNROLL for (int w = 0; w < WAYS; ++w) top[w] = splat(-INFINITY);
    long i = 0;
    for (; i + WAYS * LANES <= V; i += WAYS * LANES)
        UNROLL for (int w = 0; w < WAYS; ++w) top[w] = vmax(load(x + i + w * LANES), top[w]);
    float highest = max_lanes(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
    for (long j = i; j < V; ++j) highest = to_float(x[j]) > highest ? to_float(x[j]) : highest;
    vf sum[WAYS] = {};
    for (i = 0; i + WAYS * LANES <= V; i += WAYS * LANES)
        UNROLL for (int w = 0; w < WAYS; ++w) sum[w] += exp_neg(load(x + i + w * LANES) - highest);
    float total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < V; ++i) total += std::exp(to_float(x[i]) - highest);
    return {highest, std::log(total)};
}

static void row_of(const Call& c, long r) {
    const io_t *s = c.student + r * c.student_row, *t = c.teacher + r * c.teacher_row;
    io_t* out = c.slope + r * c.slope_row;
    const Normaliser ns = normaliser(s, c.vocabulary), nt = normaliser(t, c.vocabulary);
    const int64_t label = c.labels[r];
    const float kept = float(1.0 - c.ce), weight = label >= 0 ? float(c.weight) : 0.0f;
    const float share = kept + weight, scale = float(c.scale);
    // Read before the slope is written, which may lie where the logits are.
    const float label_s = label >= 0 ? to_float(s[label]) : 0.0f;
    const float label_t = label >= 0 ? to_float(t[label]) : 0.0f;
    vf sum = {};
    long i = 0;
    for (; i + LANES <= c.vocabulary; i += LANES) {
        vf log_s = load(s + i) - ns.highest - ns.rest;
        vf log_t = load(t + i) - nt.highest - nt.rest;
        // Rounding may leave a largest logit a hair above the normaliser; a NaN passes.
        vf p_s = exp_neg(vmin(vf{}, log_s)), p_t = exp_neg(vmin(vf{}, log_t));
        sum += p_t * (log_t - log_s);
        store(out + i, (p_s * share - p_t * kept) * scale);
    }
    double divergence = sum_lanes(sum);
    for (; i < c.vocabulary; ++i) {
        float log_s = to_float(s[i]) - ns.highest - ns.rest;
        float log_t = to_float(t[i]) - nt.highest - nt.rest;
        float p_t = std::exp(log_t);
        divergence += p_t * (log_t - log_s);
        out[i] = from_float<io_t>((std::exp(log_s) * share - p_t * kept) * scale);
    }
    c.loss[r] = kept * divergence;
    if (label >= 0) {
        float log_s = label_s - ns.highest - ns.rest;
        float p_t = std::exp(label_t - nt.highest - nt.rest);
        c.loss[r] -= weight * log_s;
        out[label] = from_float<io_t>((std::exp(log_s) * share - p_t * kept - weight) * scale);
    }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void divergence(const Call* call) {
#pragma omp parallel for num_threads(call->threads) schedule(static)
    for (long r = 0; r < call->rows; ++r) row_of(*call, r);
}
