// Rows of a table gathered, decoded and converted in one pass.
//
// Random rows miss every cache, so a row is prefetched some four kilobytes ahead of its use. Large outputs are written
// past the caches, which saves reading each line before it is overwritten.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "native.hpp"

namespace {

using ::to_float;

// Values converted at a time: 32 or 64 bytes of output.
constexpr int64_t STEP = 16;
constexpr uintptr_t LINE = 64;
constexpr int64_t PREFETCH_BYTES = 4096;
constexpr int64_t SCALE_BLOCK = 32;
// What is larger will not stay in the caches until it is read.
constexpr int64_t STREAM_BYTES = int64_t(8) << 20;

struct e4m3 {
    uint8_t bits;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Subnormals are built from integers: processors may be set to read them as zero.
inline float to_float(e4m3 value) {
    const uint32_t magnitude = value.bits & 0x7Fu, sign = uint32_t(value.bits & 0x80u) << 24;
    const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
    uint32_t small;
    std::memcpy(&small, &subnormal, sizeof small);
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    const uint32_t finite = magnitude < 8 ? small : normal;
    return from_bits(sign | (magnitude == 0x7F ? 0x7FC00000u : finite));
}

// e8m0: a power of two; 255 is NaN, 0 the subnormal 2^-127.
inline float scale_of(uint8_t byte) {
    return from_bits(byte == 255 ? 0x7FC00000u : byte == 0 ? 0x00400000u : uint32_t(byte) << 23);
}

template <bool STREAM>
inline void store(void *target, const void *source, int64_t bytes) {
#ifdef __AVX__
    if (STREAM) {
        for (int64_t at = 0; at < bytes; at += 32)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(static_cast<char *>(target) + at),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i *>(static_cast<const char *>(source) + at)));
        return;
    }
#endif
    std::memcpy(target, source, bytes);
}

// Into the second cache level, which keeps more misses in flight than the first.
inline void prefetch(const void *address) { __builtin_prefetch(address, 0, 2); }

struct Table {
    const void *values;
    const uint8_t *scales;  // null: none
    int64_t row_stride, scale_stride, rows, width;
};

template <typename In, typename Out>
inline void convert(const In *in, const uint8_t *scales, int64_t at, int64_t count, Out *out) {
    const float scale = scales ? scale_of(scales[at / SCALE_BLOCK]) : 1.0f;
    // Without this, a known count is unrolled into scalars before it could become vectors.
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] = from_float<Out>(to_float(in[at + i]) * scale);
}

template <typename In, typename Out, bool STREAM>
inline void copy_row(const In *in, const uint8_t *scales, int64_t width, Out *out) {
    if constexpr (std::is_same_v<In, Out>) {
        store<STREAM>(out, in, width * sizeof(Out));
        return;
    }
    int64_t at = 0;
    for (; at + STEP <= width; at += STEP) {
        alignas(LINE) Out step[STEP];
        convert(in, scales, at, STEP, step);
        store<STREAM>(out + at, step, sizeof step);
    }
    if (at < width) convert(in, scales, at, width - at, out + at);
}

template <typename In, typename Out, bool STREAM>
int64_t gather(const Table &table, const int64_t *ids, int64_t count, Out *out) {
    const int64_t width = table.width, row_bytes = width * sizeof(In);
    const int64_t ahead = std::clamp<int64_t>(PREFETCH_BYTES / row_bytes, 4, 64);
    const In *values = static_cast<const In *>(table.values);
    int64_t first_bad = count;
#pragma omp parallel reduction(min : first_bad) if (count * width > 16384)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count; i++) {
            if (i + ahead < count) {
                const int64_t next = ids[i + ahead];
                if (next >= 0 && next < table.rows) {
                    const uintptr_t row = reinterpret_cast<uintptr_t>(values + next * table.row_stride);
                    for (uintptr_t line = row & -LINE; line < row + row_bytes; line += LINE)
                        prefetch(reinterpret_cast<const void *>(line));
                    if (table.scales) prefetch(table.scales + next * table.scale_stride);
                }
            }
            const int64_t id = ids[i];
            if (id >= 0 && id < table.rows) {
                const uint8_t *scales = table.scales ? table.scales + id * table.scale_stride : nullptr;
                copy_row<In, Out, STREAM>(values + id * table.row_stride, scales, width, out + i * width);
            } else {
                std::memset(static_cast<void *>(out + i * width), 0, width * sizeof(Out));
                if (id >= 0) first_bad = std::min(first_bad, i);
            }
        }
#ifdef __AVX__
        // Each thread's own: what it wrote past the caches is seen by whoever comes after the loop's end.
        if (STREAM) _mm_sfence();
#endif
    }
    return first_bad == count ? -1 : first_bad;
}

template <typename In, typename Out>
int64_t gather(const Table &table, const int64_t *ids, int64_t count, void *out) {
    const int64_t bytes = table.width * sizeof(Out);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 32 == 0 && bytes % 32 == 0;
    Out *target = static_cast<Out *>(out);
    if (aligned && count * bytes >= STREAM_BYTES) return gather<In, Out, true>(table, ids, count, target);
    return gather<In, Out, false>(table, ids, count, target);
}

template <typename In>
int64_t gather(const Table &table, const int64_t *ids, int64_t count, void *out, int out_is_bf16) {
    if (out_is_bf16) return gather<In, bf16>(table, ids, count, out);
    return gather<In, float>(table, ids, count, out);
}

}  // namespace

// out [count, width]; ids that are negative or beyond the table give rows of zeros. `bytes` of one stored value tell its
// type: 4 float32, 2 bfloat16, 1 e4m3. Returns the position of the first id beyond the table, -1 where there is none.
extern "C" int64_t gather_rows(const void *values, const uint8_t *scales, const int64_t *ids, void *out,
                               int64_t row_stride, int64_t scale_stride, int64_t rows, int64_t width, int64_t count,
                               int bytes, int out_is_bf16) {
    const Table table = {values, scales, row_stride, scale_stride, rows, width};
    if (bytes == 4) return gather<float>(table, ids, count, out, out_is_bf16);
    if (bytes == 2) return gather<bf16>(table, ids, count, out, out_is_bf16);
    return gather<e4m3>(table, ids, count, out, out_is_bf16);
}
