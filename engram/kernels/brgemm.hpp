// Products of bfloat16 blocks on torch's own block kernel, the layouts that it reads, and an exponential for loops.
//
// c = a b with a [m, k] row-major and b [k, n] packed: rows 2i and 2i + 1 interleaved, [k / 2][n][2], so that one
// instruction reads a pair. A pair is a uint32_t, the even row in its low half; an odd k ends in a pair with zero.
#pragma once

#include "native.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace c10 {
struct BFloat16;
}

namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add_c, const c10::BFloat16* a,
            const c10::BFloat16* b, float* c, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

static inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// c [m, n] = a [m, k] b [k, n], or += where `add`. Every new combination of sizes is compiled once per thread: callers
// keep to few. k is even (pad a with zeros); `ldb` counts pairs.
static inline void multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                            float* c, int64_t ldc, bool add) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const c10::BFloat16*>(a),
                                reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

// What a thread calls after its last product: it gives back the processor's tile registers, where it has them.
static inline void finish_products() { at::native::cpublas::brgemm_release(true); }

// 0 where packed products run on this processor. Asked once, because torch throws where they do not, and nothing may
// be thrown out of a parallel loop.
extern "C" int products_missing() {
    try {
        const bf16 a[2] = {to_bf16(2.0f), to_bf16(3.0f)};
        uint32_t b[16];
        float c[16];
        std::fill(b, b + 16, 0x40A04080u);
        multiply(1, 16, 2, a, 2, b, 16, c, 16, false);
        finish_products();
        // 2 * 4 + 3 * 5.
        return c[0] != 23.0f || c[15] != 23.0f;
    } catch (...) {
        return 1;
    }
}

// Sixteen pairs: one register where the processor has such.
typedef uint32_t pairs16 __attribute__((vector_size(64)));

// One level of the transposition by quadrants: of each two rows that lie `distance` apart, the off-diagonal blocks of
// `distance` lanes change places.
template <int distance, int... lane>
static inline void exchange(pairs16* rows, std::integer_sequence<int, lane...>) {
    for (int row = 0; row < 16; row++) {
        if (row & distance) continue;
        const pairs16 upper = rows[row], lower = rows[row + distance];
        const pairs16 left = __builtin_shufflevector(upper, lower, (lane & distance ? 16 + lane - distance : lane)...);
        rows[row + distance] =
            __builtin_shufflevector(upper, lower, (lane & distance ? 16 + lane : lane + distance)...);
        rows[row] = left;
    }
}

static inline void transpose_16x16(pairs16* rows) {
    constexpr auto all = std::make_integer_sequence<int, 16>();
    exchange<1>(rows, all);
    exchange<2>(rows, all);
    exchange<4>(rows, all);
    exchange<8>(rows, all);
}

static inline uint32_t pair(bf16 even, bf16 odd) { return even.bits | static_cast<uint32_t>(odd.bits) << 16; }

// b = src: pairs[i][column] of two rows.
static inline void pack_rows(const bf16* src, int64_t ld, int64_t rows, int64_t columns, uint32_t* pairs, int64_t ldp) {
    for (int64_t i = 0; i < rows / 2; i++) {
        const bf16 *even = src + 2 * i * ld, *odd = even + ld;
        for (int64_t j = 0; j < columns; j++) pairs[i * ldp + j] = pair(even[j], odd[j]);
    }
    if (rows % 2)
        for (int64_t j = 0; j < columns; j++) pairs[rows / 2 * ldp + j] = src[(rows - 1) * ld + j].bits;
}

// b = src^T: pairs[i][row] of two columns.
static inline void pack_columns(const bf16* src, int64_t ld, int64_t rows, int64_t columns, uint32_t* pairs,
                                int64_t ldp) {
    const int64_t whole_rows = rows / 16 * 16, whole_pairs = columns / 32 * 16;
    pairs16 block[16];
    for (int64_t r = 0; r < whole_rows; r += 16) {
        for (int64_t i = 0; i < whole_pairs; i += 16) {
            for (int k = 0; k < 16; k++) std::memcpy(&block[k], src + (r + k) * ld + 2 * i, sizeof(pairs16));
            transpose_16x16(block);
            for (int k = 0; k < 16; k++) std::memcpy(pairs + (i + k) * ldp + r, &block[k], sizeof(pairs16));
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = r < whole_rows ? whole_pairs : 0; i < (columns + 1) / 2; i++) {
            const bf16* even = src + r * ld + 2 * i;
            pairs[i * ldp + r] = pair(even[0], 2 * i + 1 < columns ? even[1] : bf16{0});
        }
    }
}

// dst [columns, rows] = src^T.
static inline void transpose(const bf16* src, int64_t ld, int64_t rows, int64_t columns, bf16* dst, int64_t ldd) {
    const int64_t even_rows = rows / 2 * 2, whole_columns = columns / 16 * 16;
    pairs16 block[16] = {};
    for (int64_t r = 0; r < even_rows; r += 32) {
        const int64_t count = std::min<int64_t>(16, (even_rows - r) / 2);
        for (int64_t c = 0; c < whole_columns; c += 16) {
            for (int k = 0; k < count; k++) {
                const bf16 *even = src + (r + 2 * k) * ld + c, *odd = even + ld;
                uint32_t pairs[16];
                for (int j = 0; j < 16; j++) pairs[j] = pair(even[j], odd[j]);
                std::memcpy(&block[k], pairs, sizeof(pairs16));
            }
            transpose_16x16(block);
            for (int k = 0; k < 16; k++) {
                // A size that the compiler knows is one instruction.
                if (count == 16)
                    std::memcpy(dst + (c + k) * ldd + r, &block[k], sizeof(pairs16));
                else
                    std::memcpy(dst + (c + k) * ldd + r, &block[k], count * sizeof(uint32_t));
            }
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = r < even_rows ? whole_columns : 0; c < columns; c++) dst[c * ldd + r] = src[r * ld + c];
}

static inline void convert(const float* src, int64_t count, bf16* dst) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    // The processor's own rounding; the loop below takes ten instructions for as many values.
    for (; i + 16 <= count; i += 16) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(src + i));
        std::memcpy(dst + i, &rounded, sizeof rounded);
    }
#endif
    for (; i < count; i++) dst[i] = to_bf16(src[i]);
}

static inline void convert(const float* src, int64_t count, float* dst) { std::copy(src, src + count, dst); }

static inline void clear(bf16* dst, int64_t count) {
    if (count) std::memset(static_cast<void*>(dst), 0, count * sizeof(bf16));
}

// e^x to 2 units in the last place, 0 below -87: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline float exponential(float x) {
    const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
    const float shifted = clamped * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits, power;
    std::memcpy(&power, &shifted, sizeof power);
    std::memcpy(&bits, &p, sizeof bits);
    bits += power << 23;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return x < -87.0f ? 0.0f : result;
}

// Memory of one thread, handed out piece by piece. With a null base it measures what would be handed out.
class Arena {
  public:
    explicit Arena(char* base) : base_(base) {}

    template <typename T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(base_ + used_);
        used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return piece;
    }

    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};
