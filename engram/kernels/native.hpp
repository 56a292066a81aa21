// What native operations share: bfloat16 values in memory, float arithmetic in registers.
#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

static inline float to_float(bf16 value) {
    uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

static inline float to_float(float value) { return value; }

// Round to nearest, ties to even, as torch does; NaN stays NaN.
static inline bf16 to_bf16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    uint32_t rounded = (wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(value != value ? 0x7FC0u : rounded)};
}

template <typename T>
static inline T from_float(float value);
template <>
inline float from_float<float>(float value) { return value; }
template <>
inline bf16 from_float<bf16>(float value) { return to_bf16(value); }

// Stochastic rounding to bfloat16; table_update/rounding.py is the specification of the hash.
static inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}

static inline uint32_t row_key(uint32_t seed, int64_t row) {
    uint32_t low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(row >> 32);
    return mix(mix(mix(seed) ^ low) ^ high);
}

// The value as its table stores it: float as it is, bfloat16 rounded by the hash of the row's key and the column.
template <typename T>
static inline T round_stochastically(float value, uint32_t key, uint32_t column);
template <>
inline float round_stochastically<float>(float value, uint32_t, uint32_t) { return value; }
template <>
inline bf16 round_stochastically<bf16>(float value, uint32_t key, uint32_t column) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + (mix(key + column * 0x9E3779B9u) >> 16)) >> 16;
    uint32_t special = value != value ? 0x7FC0u : bits >> 16;
    return {static_cast<uint16_t>((bits & 0x7F800000u) == 0x7F800000u ? special : rounded)};
}
