// Sixteen floats at a time, in the compiler's portable vectors, and sums of products whose factors may be bfloat16.
//
// A unit is 32 bits of factors that follow each other in a sum of products: one float, or two bfloat16 values.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <type_traits>

#include "native.hpp"

constexpr int LANES = 16;
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t units __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

// Factors in a unit.
template <typename T>
constexpr int PER_UNIT = 4 / sizeof(T);

// Values in a line of the cache, as far as what to fetch ahead is concerned.
template <typename T>
constexpr int LINE = 64 / sizeof(T);

// Brings a row near the processor while something else is computed; rows that are not there do no harm. Always inline:
// GCC takes a function that only fetches for one without effects, and drops calls of it.
template <typename T>
[[gnu::always_inline]] static inline void fetch(const T *row, long length) {
    for (long k = 0; k < length; k += LINE<T>) __builtin_prefetch(row + k);
}

template <typename V>
static inline V load_vector(const void *source) {
    V result;
    std::memcpy(&result, source, sizeof result);
    return result;
}

static inline lanes broadcast(float value) { return lanes{} + value; }
static inline units broadcast(uint32_t value) { return units{} + value; }

static inline lanes load(const float *source) { return load_vector<lanes>(source); }

// 16 values of 16 bits, each in the lower half of a unit.
static inline units widen(const bf16 *source) {
#ifdef __AVX512F__
    // Compilers make five instructions of the line below.
    return (units)_mm512_cvtepu16_epi32(load_vector<__m256i>(source));
#else
    return __builtin_convertvector(load_vector<halves>(source), units);
#endif
}

static inline lanes load(const bf16 *source) { return (lanes)(widen(source) << 16); }

static inline void store(float *target, lanes value) { std::memcpy(target, &value, sizeof value); }
static inline void store(bf16 *target, lanes value) {
#ifdef __AVX512BF16__
    auto rounded = _mm512_cvtneps_pbh((__m512)value);
#else
    units wide = (units)value;
    units nan = (units)(value != value);
    wide = ((wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16 & ~nan) | (0x7FC0u & nan);
    halves rounded = __builtin_convertvector(wide, halves);
#endif
    std::memcpy(target, &rounded, sizeof rounded);
}

template <typename T>
static inline uint32_t unit(float first, float second);
template <>
inline uint32_t unit<float>(float first, float) {
    uint32_t bits;
    std::memcpy(&bits, &first, sizeof bits);
    return bits;
}
template <>
inline uint32_t unit<bf16>(float first, float second) {
    return to_bf16(first).bits | static_cast<uint32_t>(to_bf16(second).bits) << 16;
}

template <typename T>
static inline units broadcast_unit(const T *source) {
    uint32_t bits;
    std::memcpy(&bits, source, sizeof bits);
    return broadcast(bits);
}

// The units of two rows that follow each other in a sum over rows; the second row of floats is a unit of its own.
static inline units pair_rows(const float *row, const float *) { return load_vector<units>(row); }
static inline units pair_rows(const bf16 *row, const bf16 *next) {
    return widen(row) | widen(next) << 16;
}

// sum + the products of two units, lane by lane.
template <typename T>
static inline lanes multiply_add(lanes sum, units a, units b);
template <>
inline lanes multiply_add<float>(lanes sum, units a, units b) { return sum + (lanes)a * (lanes)b; }
template <>
inline lanes multiply_add<bf16>(lanes sum, units a, units b) {
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (lanes)(a << 16) * (lanes)(b << 16);
    return sum + (lanes)(a & 0xFFFF0000u) * (lanes)(b & 0xFFFF0000u);
#endif
}

// As many units as fit a vector, or, where fewer than that remain, 16 values and zeros.
template <typename T>
static inline units load_units(const T *source, long remaining) {
    if (remaining >= LANES * PER_UNIT<T>) return load_vector<units>(source);
    units result = {};
    std::memcpy(&result, source, LANES * sizeof(T));
    return result;
}

// The dot product of two rows whose length is a multiple of 16, still spread over the lanes.
template <typename T>
static inline lanes dot(const T *a, const T *b, long length) {
    lanes sum = {};
    for (long d = 0; d < length; d += LANES * PER_UNIT<T>)
        sum = multiply_add<T>(sum, load_units(a + d, length - d), load_units(b + d, length - d));
    return sum;
}

// GCC has the name that Clang gave it since version 12.
#if __has_builtin(__builtin_shufflevector)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, units{__VA_ARGS__})
#endif

// The sum over the lanes of each of 16 vectors: lane l of the result is that of v[l]. They are overwritten.
static inline lanes totals(lanes (&v)[LANES]) {
    for (int k = 0; k < 8; k++) {
        lanes a = v[2 * k], b = v[2 * k + 1];
        v[k] = PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    for (int k = 0; k < 4; k++) {
        lanes a = v[2 * k], b = v[2 * k + 1];
        v[k] = PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    for (int k = 0; k < 2; k++) {
        lanes a = v[2 * k], b = v[2 * k + 1];
        v[k] = PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    return PICK(v[0], v[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(v[0], v[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
#undef PICK

static inline float total(lanes value) {
    lanes values[LANES] = {value};
    return totals(values)[0];
}

// e^x to 2e-7 of it; arguments outside -87..87 count as these. NaN stays NaN.
static inline lanes exponential(lanes x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    x = x > 87.0f ? broadcast(87.0f) : x;
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
    lanes shifted = x * 1.44269504f + 12582912.0f;
    lanes power = shifted - 12582912.0f;
    x = x - power * 0.693145752f - power * 1.42860677e-6f;
    lanes series = 1.0f + x * (1.0f + x * (0.5f + x * (1.66666667e-1f + x * (4.16666667e-2f +
                   x * (8.33333333e-3f + x * 1.38888889e-3f)))));
    return series * (lanes)(((units)shifted << 23) + 0x3F800000u);
}

static inline lanes sigmoid(lanes x) { return 1.0f / (1.0f + exponential(-x)); }

// run(g, type): 1 to 8 residual streams as a constant, and a value of their type, float (`wide`) or bf16.
template <typename Run>
static void with_streams(int streams, int wide, Run run) {
    auto typed = [&](auto g) { wide ? run(g, float{}) : run(g, bf16{}); };
    switch (streams) {
        case 1: return typed(std::integral_constant<int, 1>{});
        case 2: return typed(std::integral_constant<int, 2>{});
        case 3: return typed(std::integral_constant<int, 3>{});
        case 4: return typed(std::integral_constant<int, 4>{});
        case 5: return typed(std::integral_constant<int, 5>{});
        case 6: return typed(std::integral_constant<int, 6>{});
        case 7: return typed(std::integral_constant<int, 7>{});
        case 8: return typed(std::integral_constant<int, 8>{});
    }
}
