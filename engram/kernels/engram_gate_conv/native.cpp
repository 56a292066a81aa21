// Gate of a memory's value and the short causal convolution after it, with their gradients: for each token and stream
//
//   s = <h gain, k> ir(h) ir(k) / sqrt(D)    a = sigmoid(f(s))    v = a value    out = v + silu(c)
//   c[t] = sum_j taps[j] scale v[t - lag_j]                        scale = ir(v), lag_j = (TAPS - 1 - j) dilation
//
// where ir(x) = 1 / sqrt(mean(x^2) + eps). All streams share one value, so mean(v^2) = a^2 mean(value^2) takes one pass.
// Tensors are contiguous: hidden [N, G, D], keys and value [N, C] (the value its last D columns), N = rows * length.
// A row that is not there (before the start, or of a dead token) is read as a row of zeros: inner loops have no cases.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "native.hpp"

namespace {

// Tokens that one stream handles before the next one: its taps and their gradients stay in the first cache level.
constexpr int64_t BLOCK = 16;

enum Gate { NONE, PLAIN, SIGNED_SQRT };

struct Sizes {
    int64_t rows, length, streams, width, columns, dilation;
    int64_t tokens() const { return rows * length; }
};

// What the forward pass leaves for the backward pass: [N, G] each.
struct Saved {
    float *gates, *score, *inverse_hidden, *inverse_key, *inverse_value;
};

// e^x within 2 units in the last place where the result is a normal number.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    // Adding 1.5 * 2^23 rounds to an integer, which stands in the low bits.
    float shifted = x * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = static_cast<int32_t>(static_cast<uint32_t>(bits) << 23) + 0x3F800000;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// The gate of one token and stream; `score` and the inverse norms are left where they are given.
template <typename T>
float gate_of(const T *hidden, const T *key, const float *gain, int64_t width, float eps, Gate kind, float &score,
              float &inverse_hidden, float &inverse_key) {
    float hh = 0, kk = 0, hk = 0;
#pragma omp simd reduction(+ : hh, kk, hk)
    for (int64_t d = 0; d < width; d++) {
        float h = to_float(hidden[d]), k = to_float(key[d]);
        hh += h * h;
        kk += k * k;
        hk += h * (k * gain[d]);
    }
    inverse_hidden = 1.0f / std::sqrt(hh / width + eps);
    inverse_key = 1.0f / std::sqrt(kk / width + eps);
    score = hk * inverse_hidden * inverse_key / std::sqrt(static_cast<float>(width));
    float s = kind == PLAIN ? score : std::copysign(std::sqrt(std::max(std::fabs(score), 1e-6f)), score);
    return 1.0f / (1.0f + std::exp(-s));
}

template <typename T>
float mean_square(const T *x, int64_t width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; d++) sum += to_float(x[d]) * to_float(x[d]);
    return sum / width;
}

// What the taps of one token and stream meet: pointers to value rows, and the factor that turns each into a normed row.
template <typename T, int TAPS>
struct Window {
    std::array<const T *, TAPS> rows;
    std::array<float, TAPS> factors;

    Window(const Sizes &size, const T *value, const Saved &saved, const T *zeros, int64_t row, int64_t t, int64_t g) {
        for (int j = 0; j < TAPS; j++) {
            int64_t early = t - (TAPS - 1 - j) * size.dilation, n = row * size.length + early, at = n * size.streams + g;
            bool there = early >= 0 && saved.gates[at] != 0;
            rows[j] = there ? value + n * size.columns : zeros;
            factors[j] = there ? saved.gates[at] * saved.inverse_value[at] : 0.0f;
        }
    }
};

template <typename T, int TAPS>
void write_output(Window<T, TAPS> window, const float *taps, int64_t stride, float gate, T *out, int64_t width) {
    const T *now = window.rows[TAPS - 1];
#pragma omp simd
    for (int64_t d = 0; d < width; d++) {
        float c = 0;
        for (int j = 0; j < TAPS; j++) c += taps[j * stride + d] * (window.factors[j] * to_float(window.rows[j][d]));
        out[d] = from_float<T>(gate * to_float(now[d]) + c * sigmoid(c));
    }
}

// u = grad silu'(c), and its products with what the taps meet are added to the taps' gradient.
template <bool ADD, typename T, int TAPS>
void through_silu(Window<T, TAPS> window, const float *taps, int64_t stride, const T *grad, float *u, float *grad_taps,
                  int64_t width) {
#pragma omp simd
    for (int64_t d = 0; d < width; d++) {
        float c = 0, x[TAPS];
        for (int j = 0; j < TAPS; j++) {
            x[j] = window.factors[j] * to_float(window.rows[j][d]);
            c += taps[j * stride + d] * x[j];
        }
        float s = sigmoid(c), change = to_float(grad[d]) * (s * (1.0f + c * (1.0f - s)));
        u[d] = change;
        if (ADD)
            for (int j = 0; j < TAPS; j++) grad_taps[j * width + d] += change * x[j];
    }
}

// Adds a stream's part to the gradient of the value, but for its norm's; gives <grad, value> and <through conv, value>.
template <typename T, int TAPS>
std::array<float, 2> through_value(std::array<const float *, TAPS> u, const float *taps, int64_t stride, const T *grad,
                                   const T *value, float gate, float factor, float *grad_value, int64_t width) {
    float direct = 0, conv = 0;
#pragma omp simd reduction(+ : direct, conv)
    for (int64_t d = 0; d < width; d++) {
        float normed = 0, go = to_float(grad[d]), v = to_float(value[d]);
        for (int j = 0; j < TAPS; j++) normed += taps[j * stride + d] * u[j][d];
        direct += go * v;
        conv += normed * v;
        grad_value[d] += gate * go + factor * normed;
    }
    return {direct, conv};
}

// With x = ir(h) h and y = ir(k) k: dh = ir(h) ds (gain y / sqrt(D) - s x / D), dk alike, dgain = ds x y / sqrt(D).
template <typename T>
void through_score(const T *hidden, const T *key, const float *gain, float score, float inverse_hidden,
                   float inverse_key, float grad, T *grad_hidden, T *grad_key, float *grad_gain, int64_t width) {
    float root = 1.0f / std::sqrt(static_cast<float>(width)), shrink = score / width;
#pragma omp simd
    for (int64_t d = 0; d < width; d++) {
        float x = inverse_hidden * to_float(hidden[d]), y = inverse_key * to_float(key[d]);
        grad_hidden[d] = from_float<T>(grad * inverse_hidden * (root * gain[d] * y - shrink * x));
        grad_key[d] = from_float<T>(grad * inverse_key * (root * gain[d] * x - shrink * y));
        grad_gain[d] += grad * root * x * y;
    }
}

template <typename T, int TAPS>
void forward(const Sizes &size, const T *hidden, const T *keys, const bool *alive, const float *gain, const float *taps,
             T *out, const Saved &saved, Gate kind, float eps, float conv_eps) {
    int64_t G = size.streams, D = size.width, before = size.columns - D;
    const std::vector<T> zeros(D);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < size.tokens(); n++) {
        const T *value = alive[n] ? keys + n * size.columns + before : zeros.data();
        float square = TAPS ? mean_square(value, D) : 0;
        for (int64_t g = 0; g < G; g++) {
            int64_t at = n * G + g;
            float &gate = saved.gates[at] = alive[n];
            if (kind != NONE) {
                float &score = saved.score[at] = 0, &of_hidden = saved.inverse_hidden[at] = 0;
                float &of_key = saved.inverse_key[at] = 0;
                if (alive[n])
                    gate = gate_of(hidden + at * D, keys + n * size.columns + g * D, gain + g * D, D, eps, kind, score,
                                   of_hidden, of_key);
            }
            if (TAPS)
                saved.inverse_value[at] = 1.0f / std::sqrt(gate * gate * square + conv_eps);
            else
                for (int64_t d = 0; d < D; d++) out[at * D + d] = from_float<T>(gate * to_float(value[d]));
        }
    }
    if constexpr (TAPS > 0) {
        int64_t blocks = (size.length + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
        for (int64_t block = 0; block < size.rows * blocks; block++) {
            int64_t row = block / blocks, start = block % blocks * BLOCK, end = std::min(start + BLOCK, size.length);
            for (int64_t g = 0; g < G; g++)
                for (int64_t t = start; t < end; t++) {
                    int64_t at = (row * size.length + t) * G + g;
                    Window<T, TAPS> window(size, keys + before, saved, zeros.data(), row, t, g);
                    write_output<T, TAPS>(window, taps + g * D, G * D, saved.gates[at], out + at * D, D);
                }
        }
    }
}

template <typename T>
struct Gradients {
    T *hidden, *keys;
    // [chunks, G, D] and [chunks, G, TAPS, D]: one sum for each chunk, added up in order by the caller.
    float *gain, *taps;
};

// Tokens [start, end) of one row, latest first: u of a token reaches the values up to (TAPS - 1) * dilation before it.
template <typename T, int TAPS>
void backward_chunk(const Sizes &size, const T *grad, const T *hidden, const T *keys, const float *gain,
                    const float *taps, const Saved &saved, Gate kind, float conv_eps, int64_t row, int64_t start,
                    int64_t end, T *grad_hidden, T *grad_keys, float *grad_gain, float *grad_taps) {
    int64_t G = size.streams, D = size.width, C = size.columns, first = row * size.length;
    int64_t reach = TAPS ? (TAPS - 1) * size.dilation : 0, held = TAPS ? reach + BLOCK : 0;
    const T *values = keys + C - D;
    const std::vector<T> zeros(D);
    const std::vector<float> no_change(D);
    std::vector<float> changes(G * held * D), grad_value(BLOCK * D), shrink(BLOCK);
    auto change = [&](int64_t g, int64_t t) { return changes.data() + (g * held + t % held) * D; };

    if constexpr (TAPS > 0)
        for (int64_t g = 0; g < G; g++)
            for (int64_t t = end; t < std::min(end + reach, size.length); t++)
                through_silu<false, T, TAPS>({size, values, saved, zeros.data(), row, t, g}, taps + g * D, G * D,
                                             grad + ((first + t) * G + g) * D, change(g, t), nullptr, D);

    for (int64_t high = end; high > start; high -= BLOCK) {
        int64_t low = std::max(high - BLOCK, start);
        std::fill(grad_value.begin(), grad_value.end(), 0.0f);
        std::fill(shrink.begin(), shrink.end(), 0.0f);
        for (int64_t g = 0; g < G; g++)
            for (int64_t t = high - 1; t >= low; t--) {
                int64_t n = first + t, at = n * G + g;
                float gate = saved.gates[at], inverse = 0, factor = 0;
                std::array<const float *, TAPS> reached;
                if constexpr (TAPS > 0) {
                    through_silu<true, T, TAPS>({size, values, saved, zeros.data(), row, t, g}, taps + g * D, G * D,
                                                grad + at * D, change(g, t), grad_taps + g * TAPS * D, D);
                    for (int j = 0; j < TAPS; j++) {
                        int64_t late = t + (TAPS - 1 - j) * size.dilation;
                        reached[j] = late < size.length ? change(g, late) : no_change.data();
                    }
                    inverse = saved.inverse_value[at];
                    factor = gate * inverse;
                }
                bool dead = gate == 0;
                float grad_score = 0;
                if (!dead) {
                    auto [direct, conv] = through_value<T, TAPS>(reached, taps + g * D, G * D, grad + at * D,
                                                                 values + n * C, gate, factor,
                                                                 grad_value.data() + (t - low) * D, D);
                    // rms(v) hardly depends on the size of v: what reaches the gate through it is what eps lets pass.
                    float cube = inverse * inverse * inverse;
                    shrink[t - low] += gate * gate * gate * cube * conv / D;
                    grad_score = (direct + conv_eps * cube * conv) * gate * (1 - gate);
                }
                if (kind == NONE) continue;
                if (dead) {
                    std::fill_n(grad_hidden + at * D, D, T{});
                    std::fill_n(grad_keys + n * C + g * D, D, T{});
                    continue;
                }
                float size_of_score = std::fabs(saved.score[at]);
                // Below the floor the gate is constant.
                if (kind == SIGNED_SQRT) grad_score *= size_of_score >= 1e-6f ? 0.5f / std::sqrt(size_of_score) : 0.0f;
                through_score(hidden + at * D, keys + n * C + g * D, gain + g * D, saved.score[at],
                              saved.inverse_hidden[at], saved.inverse_key[at], grad_score, grad_hidden + at * D,
                              grad_keys + n * C + g * D, grad_gain + g * D, D);
            }
        for (int64_t t = low; t < high; t++) {
            int64_t n = first + t;
            const float *sum = grad_value.data() + (t - low) * D;
            // A dead token's sum is zero, and its value may be anything.
            const T *value = shrink[t - low] != 0 ? values + n * C : zeros.data();
            T *target = grad_keys + n * C + C - D;
            for (int64_t d = 0; d < D; d++) target[d] = from_float<T>(sum[d] - shrink[t - low] * to_float(value[d]));
        }
    }
}

template <typename T, int TAPS>
void backward(const Sizes &size, int64_t chunk, const T *grad, const T *hidden, const T *keys, const float *gain,
              const float *taps, const Saved &saved, Gate kind, float conv_eps, T *grad_hidden, T *grad_keys,
              float *grad_gain, float *grad_taps) {
    int64_t G = size.streams, D = size.width, chunks = (size.length + chunk - 1) / chunk;
#pragma omp parallel for schedule(dynamic)
    for (int64_t c = 0; c < size.rows * chunks; c++) {
        int64_t start = c % chunks * chunk;
        backward_chunk<T, TAPS>(size, grad, hidden, keys, gain, taps, saved, kind, conv_eps, c / chunks, start,
                                std::min(start + chunk, size.length), grad_hidden, grad_keys,
                                grad_gain ? grad_gain + c * G * D : nullptr,
                                grad_taps ? grad_taps + c * G * TAPS * D : nullptr);
    }
}

}  // namespace

#define ENTRY(NAME, T, TAPS)                                                                                           \
    extern "C" void forward_##NAME##_##TAPS(                                                                           \
        const Sizes *size, const T *hidden, const T *keys, const bool *alive, const float *gain, const float *taps,    \
        T *out, const Saved *saved, int kind, float eps, float conv_eps) {                                             \
        forward<T, TAPS>(*size, hidden, keys, alive, gain, taps, out, *saved, Gate(kind), eps, conv_eps);              \
    }                                                                                                                  \
    extern "C" void backward_##NAME##_##TAPS(                                                                          \
        const Sizes *size, int64_t chunk, const T *grad, const T *hidden, const T *keys, const float *gain,            \
        const float *taps, const Saved *saved, int kind, float conv_eps, T *grad_hidden, T *grad_keys,                 \
        float *grad_gain, float *grad_taps) {                                                                          \
        backward<T, TAPS>(*size, chunk, grad, hidden, keys, gain, taps, *saved, Gate(kind), conv_eps, grad_hidden,     \
                          grad_keys, grad_gain, grad_taps);                                                            \
    }

ENTRY(float32, float, 0)
ENTRY(float32, float, 4)
ENTRY(float32, float, 8)
ENTRY(bfloat16, bf16, 0)
ENTRY(bfloat16, bf16, 4)
ENTRY(bfloat16, bf16, 8)
