// What the code printed from a mask predicate is made of. Positions of queries are vectors (one
// query in each lane), positions of keys and heads are scalars; conditions on vectors are masks of
// 0 and -1.
#pragma once
#include "math.hpp"

static ALWAYS_INLINE vi lanes(bool x) { return splat(x ? (int32_t)-1 : (int32_t)0); }
static ALWAYS_INLINE vi lanes(vi x) { return x; }
static ALWAYS_INLINE vi numbers(int x) { return splat((int32_t)x); }
static ALWAYS_INLINE vi numbers(vi x) { return x; }

// Rounds down; D > 0.
template <int D> static ALWAYS_INLINE int floor_div(int a) { return a / D - (a % D < 0); }
template <int D> static ALWAYS_INLINE vi floor_div(vi a) {
    vi q = a / D;
    return q + (a - q * D < 0);
}
template <int D, class T> static ALWAYS_INLINE T floor_mod(T a) { return a - floor_div<D>(a) * D; }

static ALWAYS_INLINE int absolute(int a) { return a < 0 ? -a : a; }
static ALWAYS_INLINE vi absolute(vi a) { return (a ^ (a >> 31)) - (a >> 31); }
static ALWAYS_INLINE int least(int a, int b) { return a < b ? a : b; }
static ALWAYS_INLINE int most(int a, int b) { return a > b ? a : b; }
static ALWAYS_INLINE vi pick(vi mask, vi yes, vi no) { return (mask & yes) | (~mask & no); }
template <class A, class B> static ALWAYS_INLINE vi least(A a, B b) {
    return pick(numbers(a) < numbers(b), numbers(a), numbers(b));
}
template <class A, class B> static ALWAYS_INLINE vi most(A a, B b) {
    return pick(numbers(a) > numbers(b), numbers(a), numbers(b));
}

// A table of booleans of up to three axes, false outside; the index is one vector per axis.
template <class... Index>
static inline vi look_up(const uint8_t* table, const int (&shape)[sizeof...(Index)], Index... at) {
    vi index[] = {numbers(at)...};
    vi out{};
    for (int l = 0; l < LANES; ++l) {
        long flat = 0;
        bool inside = true;
        for (unsigned a = 0; a < sizeof...(Index); ++a) {
            inside = inside && index[a][l] >= 0 && index[a][l] < shape[a];
            flat = flat * shape[a] + index[a][l];
        }
        out[l] = inside && table[flat] ? -1 : 0;
    }
    return out;
}
