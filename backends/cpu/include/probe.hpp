// Physical limits of a core: independent multiply-adds in float32 and of bf16 pairs, and a stream of
// reads.
#pragma once
#include "tiles.hpp"

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

// The same of bf16 pairs, on the widest instruction there is for them: `rounds` x 12 dot products of
// LANES pairs, or, in tiles, `rounds` x 4 products of 16 x 16 x 32. Returns the multiply-adds of a
// round, 0 without such an instruction.
extern "C" __attribute__((visibility("default"))) int probe_pairs(long rounds, int threads) {
#if defined(__AMX_BF16__)
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) {
        Tiles session;
        tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
        for (long r = 0; r < rounds; ++r) {
            tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
            tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
        }
    }
    return 4 * TILE * TILE * TILE_K;
#elif defined(__AVX512BF16__)
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int t = 0; t < threads; ++t) {
        vf acc[12] = {};
        vi x = splat((int32_t)0x3f803f80), y = splat((int32_t)0x2f802f80);
        for (long r = 0; r < rounds; ++r) {
            UNROLL for (int i = 0; i < 12; ++i) acc[i] = detail::multiply_add(x, y, acc[i]);
            asm volatile("" : "+x"(x), "+x"(y));
        }
        for (int i = 0; i < 12; ++i) total += acc[i][0];
    }
    return total < 0 ? 0 : 12 * LANES * 2;
#else
    return 0;
#endif
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
