// Physical limits of a core: independent multiply-adds, and a stream of reads.
#pragma once
#include "vec.hpp"

// Runs `rounds` x 12 independent fused multiply-adds on each of `threads` threads. Returns a value
// that depends on all of them.
extern "C" __attribute__((visibility("default"))) float probe_fma(long rounds, int threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int t = 0; t < threads; ++t) {
        vf acc[12];
        for (int i = 0; i < 12; ++i) acc[i] = splat(1e-3f * i);
        vf x = splat(0.999f), y = splat(1e-6f);
        for (long r = 0; r < rounds; ++r) {
            UNROLL for (int i = 0; i < 12; ++i) acc[i] = acc[i] * x + y;
            asm volatile("" : "+x"(x), "+x"(y));
        }
        vf sum = acc[0];
        for (int i = 1; i < 12; ++i) sum += acc[i];
        for (int l = 0; l < LANES; ++l) total += sum[l];
    }
    return total;
}

// Reads n floats once, split over the threads.
extern "C" __attribute__((visibility("default"))) float probe_read(const float* data, long n,
                                                                    int threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int t = 0; t < threads; ++t) {
        long begin = n / threads * t, end = t + 1 == threads ? n : begin + n / threads;
        vf acc[4] = {};
        for (long i = begin; i + 4 * LANES <= end; i += 4 * LANES)
            UNROLL for (int v = 0; v < 4; ++v) acc[v] += load(data + i + v * LANES);
        vf sum = acc[0] + acc[1] + acc[2] + acc[3];
        for (int l = 0; l < LANES; ++l) total += sum[l];
    }
    return total;
}
