// Vectors of LANES floats in GNU vector extensions, so that one source serves every ISA.
//
// LANES is 16 (AVX-512), 8 (AVX2) or 4 (portable). API:
//   vf, vi                     LANES floats / int32; +, -, *, &, |, ~, <, ?: work lane by lane
//   splat(x)                   all lanes x
//   load<T>(p), store<T>(p, v) unaligned; T is float or bf16, which is converted
//   load_part, store_part      the first n < LANES lanes; the others read as 0
//   vmax, vmin, select, sum_lanes, max_lanes, any
//   iota()                     0, 1, 2 ...
//   UNROLL for (...)           unroll a loop over registers
//   SHUFFLE(a, b, i0, i1 ...)  lanes of the pair (a, b), LANES constant indices
// A function of the hot path is ALWAYS_INLINE: vectors must never travel through memory.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>  // for AVX2 the builtins below do, and parsing it takes half a second
#endif

#ifndef LANES
#error "LANES is set on the command line"
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))  // [](int x) INLINE_LAMBDA { ... }
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));  // LANES halves
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

static ALWAYS_INLINE vf splat(float x) {
    return x - vf{};  // minus +0 keeps the sign of -0
}
static ALWAYS_INLINE vi splat(int32_t x) { return x - vi{}; }
static ALWAYS_INLINE vf bits_to_float(vi x) { return (vf)x; }
static ALWAYS_INLINE vi float_to_bits(vf x) { return (vi)x; }

// Round to nearest even; a NaN stays a NaN because its quiet bit is among the kept ones.
static ALWAYS_INLINE vi round_to_bf16(vf x) {
    vu u = (vu)x;
    return (vi)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static ALWAYS_INLINE float to_float(float x) { return x; }
static ALWAYS_INLINE float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
template <class T> static ALWAYS_INLINE T from_float(float x);
template <> ALWAYS_INLINE float from_float<float>(float x) { return x; }
template <> ALWAYS_INLINE bf16 from_float<bf16>(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return bf16{(uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

static ALWAYS_INLINE vf load(const float* p) { return *(const vf_any*)p; }
static ALWAYS_INLINE vf load(const bf16* p) {
    vh h = *(const vh_any*)p;
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
static ALWAYS_INLINE vi load(const int32_t* p) { return *(const vi_any*)p; }
static ALWAYS_INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
static ALWAYS_INLINE void store(int32_t* p, vi x) { *(vi_any*)p = x; }
static ALWAYS_INLINE void store(bf16* p, vf x) {
    *(vh_any*)p = __builtin_convertvector((vu)round_to_bf16(x), vh);
}
template <class T> static ALWAYS_INLINE vf load_part(const T* p, int n) {
    float t[LANES] = {};
    for (int l = 0; l < n; ++l) t[l] = to_float(p[l]);
    return load(t);
}
template <class T> static ALWAYS_INLINE void store_part(T* p, vf x, int n) {
    float t[LANES];
    store(t, x);
    for (int l = 0; l < n; ++l) p[l] = from_float<T>(t[l]);
}

static ALWAYS_INLINE vf select(vi mask, vf yes, vf no) {
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}
// max(NaN, b) = b and min(NaN, b) = b, as the instructions do it.
#if LANES == 8 && defined(__AVX__)
typedef long long vq __attribute__((vector_size(32)));
static ALWAYS_INLINE vf vmax(vf a, vf b) { return __builtin_ia32_maxps256(a, b); }
static ALWAYS_INLINE vf vmin(vf a, vf b) { return __builtin_ia32_minps256(a, b); }
static ALWAYS_INLINE bool any(vi m) { return !__builtin_ia32_ptestz256((vq)m, (vq)m); }
#elif LANES == 16 && defined(__AVX512F__)
static ALWAYS_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static ALWAYS_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
static ALWAYS_INLINE bool any(vi m) { return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0; }
#else
static ALWAYS_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
static ALWAYS_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
static ALWAYS_INLINE bool any(vi m) {
    int32_t t = 0;
    UNROLL for (int l = 0; l < LANES; ++l) t |= m[l];
    return t != 0;
}
#endif
namespace detail {
// Lane l of the result is lane l ^ D.
template <int D, int... L>
static ALWAYS_INLINE vf exchange(vf x, std::integer_sequence<int, L...>) {
    return SHUFFLE(x, x, (L ^ D)...);
}
template <int D> static ALWAYS_INLINE vf exchange(vf x) {
    return exchange<D>(x, std::make_integer_sequence<int, LANES>{});
}
}  // namespace detail
static ALWAYS_INLINE float sum_lanes(vf x) {
    if constexpr (LANES >= 16) x += detail::exchange<LANES / 2>(x);
    if constexpr (LANES >= 8) x += detail::exchange<4>(x);
    x += detail::exchange<2>(x);
    return x[0] + x[1];
}
static ALWAYS_INLINE float max_lanes(vf x) {
    if constexpr (LANES >= 16) x = vmax(x, detail::exchange<LANES / 2>(x));
    if constexpr (LANES >= 8) x = vmax(x, detail::exchange<4>(x));
    x = vmax(x, detail::exchange<2>(x));
    return x[0] > x[1] ? x[0] : x[1];
}
template <int... L> static ALWAYS_INLINE vi iota_of(std::integer_sequence<int, L...>) {
    return vi{L...};
}
static ALWAYS_INLINE vi iota() { return iota_of(std::make_integer_sequence<int, LANES>{}); }
