// mHC's read (pre) and its gradient; either goes over the streams once.
//
// Legend: G streams of width D, a multiple of 16. A token's row holds its K = G D values; its O = G (G + 2)
// coefficients lie as rows of G: h_pre, h_post, then the G rows of h_res. Sixteen tokens are a block; one lane is one
// token.
//
// Sinkhorn: alternate normalisation of columns and rows of M only ever scales them, so every iterate is
// diag(u) M diag(v). One step is v = 1 / (M^T u), u = 1 / (M v), and the backward pass needs the vectors of each step,
// not its matrices.
#include <cmath>
#include <memory>
#include <vector>

#include "lanes.hpp"

// u and v after one step of the forward pass.
template <int G>
struct Scales {
    lanes rows[G], columns[G];
};

constexpr float FLOOR = 1e-20f;

// M = exp(logits), the largest entry of each column scaled to 1, and no entry so small that a sum could be 0.
template <int G>
static void positive_matrix(const lanes (&logits)[G][G], lanes (&m)[G][G]) {
    for (int column = 0; column < G; column++) {
        lanes largest = logits[0][column];
        for (int row = 1; row < G; row++) largest = logits[row][column] > largest ? logits[row][column] : largest;
        for (int row = 0; row < G; row++) {
            lanes entry = exponential(logits[row][column] - largest);
            m[row][column] = entry < FLOOR ? broadcast(FLOOR) : entry;
        }
    }
}

template <int G>
static void sinkhorn(const lanes (&m)[G][G], int steps, Scales<G> *scales) {
    lanes rows[G], columns[G];
    for (int row = 0; row < G; row++) rows[row] = broadcast(1.0f);
    for (int step = 0; step < steps; step++) {
        for (int column = 0; column < G; column++) {
            lanes sum = m[0][column] * rows[0];
            for (int row = 1; row < G; row++) sum += m[row][column] * rows[row];
            scales[step].columns[column] = columns[column] = 1.0f / sum;
        }
        for (int row = 0; row < G; row++) {
            lanes sum = m[row][0] * columns[0];
            for (int column = 1; column < G; column++) sum += m[row][column] * columns[column];
            scales[step].rows[row] = rows[row] = 1.0f / sum;
        }
    }
}

// `gradient`: of the loss with respect to the normalised matrix, turned into that with respect to the logits.
template <int G>
static void sinkhorn_backward(const lanes (&m)[G][G], int steps, const Scales<G> *scales, lanes (&gradient)[G][G]) {
    lanes of_m[G][G], of_rows[G] = {}, of_columns[G] = {};
    const Scales<G> &last = scales[steps - 1];
    for (int row = 0; row < G; row++)
        for (int column = 0; column < G; column++) {
            lanes entry = gradient[row][column] * m[row][column];
            of_rows[row] += entry * last.columns[column];
            of_columns[column] += entry * last.rows[row];
            of_m[row][column] = gradient[row][column] * last.rows[row] * last.columns[column];
        }
    for (int step = steps - 1; step >= 0; step--) {
        const Scales<G> &now = scales[step];
        for (int row = 0; row < G; row++) {
            // The square of a scale may overflow; its product with the small gradient does not.
            lanes of_sum = -now.rows[row] * (now.rows[row] * of_rows[row]);
            for (int column = 0; column < G; column++) {
                of_m[row][column] += of_sum * now.columns[column];
                of_columns[column] += of_sum * m[row][column];
            }
            of_rows[row] = lanes{};
        }
        for (int column = 0; column < G; column++) {
            lanes of_sum = -now.columns[column] * (now.columns[column] * of_columns[column]);
            for (int row = 0; row < G; row++) {
                of_m[row][column] += step ? of_sum * scales[step - 1].rows[row] : of_sum;
                of_rows[row] += of_sum * m[row][column];
            }
            of_columns[column] = lanes{};
        }
    }
    for (int row = 0; row < G; row++)
        for (int column = 0; column < G; column++)
            // Entries at the floor do not follow their logits.
            gradient[row][column] = m[row][column] > FLOOR ? of_m[row][column] * m[row][column] : lanes{};
}

template <int G>
constexpr int OUTPUTS = G * (G + 2);

// Coefficients of a block before the nonlinearities, and what they become.
template <int G>
struct Coefficients {
    lanes pre[G], post[G], positive[G][G];
};

struct Settings {
    const float *scale, *bias;
    int steps;
};

static inline float scale_of(const Settings &settings, int output, int g) {
    return settings.scale[std::min(output / g, 2)];
}

template <int G>
static void coefficients(const float (*normalised)[LANES], const Settings &settings, Coefficients<G> &h) {
    lanes logits[OUTPUTS<G>], mixing[G][G];
    for (int o = 0; o < OUTPUTS<G>; o++)
        logits[o] = load(normalised[o]) * scale_of(settings, o, G) + settings.bias[o];
    for (int g = 0; g < G; g++) {
        h.pre[g] = sigmoid(logits[g]);
        h.post[g] = 2.0f * sigmoid(logits[G + g]);
        for (int i = 0; i < G; i++) mixing[g][i] = logits[(2 + g) * G + i];
    }
    positive_matrix<G>(mixing, h.positive);
}

// Sixteen tokens, or the last ones.
struct Block {
    long first, count;

    Block(long index, long tokens) : first(index * LANES), count(std::min<long>(LANES, tokens - first)) {}
};

// Where the tokens of a block have their rows; lanes past the last token stand for that token once more.
template <typename T>
struct Rows {
    T *of[LANES];

    Rows(T *base, Block block, long length) {
        for (int l = 0; l < LANES; l++) of[l] = base + (block.first + std::min<long>(l, block.count - 1)) * length;
    }
    T *operator[](long lane) const { return of[lane]; }
};

// source [tokens, N] -> block [N, LANES]; lanes past the last token hold zeros.
template <int N>
static void load_block(const float *source, Block tokens, float (*block)[LANES]) {
    std::memset(block, 0, N * LANES * sizeof(float));
    for (long l = 0; l < tokens.count; l++)
        for (int n = 0; n < N; n++) block[n][l] = source[(tokens.first + l) * N + n];
}

template <int N>
static void store_block(const float (*block)[LANES], float *target, Block tokens) {
    for (long l = 0; l < tokens.count; l++)
        for (int n = 0; n < N; n++) target[(tokens.first + l) * N + n] = block[n][l];
}

template <int G>
constexpr int OUTPUT_VECTORS = (OUTPUTS<G> + LANES - 1) / LANES;
// Outputs that are summed at once in the gradient of W: as many as registers hold.
template <int G>
constexpr int GROUP = OUTPUTS<G> <= 24 ? (OUTPUTS<G> + 7) / 8 * 8 : 16;
template <int G>
constexpr int PADDED_OUTPUTS = (OUTPUTS<G> + GROUP<G> - 1) / GROUP<G> * GROUP<G>;
// Units of all outputs of one token.
template <typename T, int G>
constexpr int OUTPUT_UNITS = (OUTPUTS<G> + PER_UNIT<T> - 1) / PER_UNIT<T>;

// weight [OUTPUTS, K] -> units along K [K / PER_UNIT, OUTPUT_VECTORS * LANES]
template <typename T, int G>
static std::vector<uint32_t> pack_along_row(const float *weight, long row_length) {
    constexpr int PER = PER_UNIT<T>, WIDTH = OUTPUT_VECTORS<G> * LANES;
    std::vector<uint32_t> packed(row_length / PER * WIDTH);
    for (int o = 0; o < OUTPUTS<G>; o++) {
        const float *w = weight + o * row_length;
        for (long k = 0; k < row_length; k += PER) packed[k / PER * WIDTH + o] = unit<T>(w[k], w[k + PER - 1]);
    }
    return packed;
}

// weight [OUTPUTS, K] -> units along the outputs [OUTPUT_UNITS, K]
template <typename T, int G>
static std::vector<uint32_t> pack_along_outputs(const float *weight, long row_length) {
    constexpr int PER = PER_UNIT<T>;
    std::vector<uint32_t> packed(OUTPUT_UNITS<T, G> * row_length);
    for (int o = 0; o < OUTPUTS<G>; o += PER) {
        const float *w = weight + o * row_length, *next = w + (PER - 1) * row_length;
        bool last = o + PER > OUTPUTS<G>;
        for (long k = 0; k < row_length; k++) packed[o / PER * row_length + k] = unit<T>(w[k], last ? 0.0f : next[k]);
    }
    return packed;
}

template <typename T, int G, int TOKENS>
static void project(const T *const *rows, const uint32_t *packed, long row_length,
                    float (*result)[OUTPUT_VECTORS<G> * LANES]) {
    constexpr int VECTORS = OUTPUT_VECTORS<G>;
    lanes sums[TOKENS][VECTORS] = {};
    for (long k = 0; k < row_length; k += PER_UNIT<T>, packed += VECTORS * LANES) {
        // The next block comes from memory meanwhile.
        if (k % LINE<T> == 0)
            for (int t = 0; t < TOKENS; t++) __builtin_prefetch(rows[t] + k + LANES * row_length, 0, 2);
        units w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = load_vector<units>(packed + v * LANES);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            units value = broadcast_unit(rows[t] + k);
            for (int v = 0; v < VECTORS; v++) sums[t][v] = multiply_add<T>(sums[t][v], value, w[v]);
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < VECTORS; v++) store(result[t] + v * LANES, sums[t][v]);
}

template <typename T, int G>
static void pre_forward(const T *x, const float *weight, Settings settings, T *u, float *h_post, float *h_res,
                        float *normalised, float *inverse_rms, long tokens, long width, float eps) {
    constexpr int O = OUTPUTS<G>, TOGETHER = OUTPUT_VECTORS<G> <= 3 ? 8 : 4;
    long row_length = G * width;
    const std::vector<uint32_t> packed = pack_along_row<T, G>(weight, row_length);
#pragma omp parallel
    {
        std::vector<Scales<G>> scales(settings.steps);
#pragma omp for schedule(static)
        for (long index = 0; index < (tokens + LANES - 1) / LANES; index++) {
            Block block(index, tokens);
            Rows<const T> rows(x, block, row_length);
            float product[LANES][OUTPUT_VECTORS<G> * LANES], inverse[1][LANES], logits[O][LANES];
            for (int l = 0; l < LANES; l += TOGETHER)
                project<T, G, TOGETHER>(rows.of + l, packed.data(), row_length, product + l);
            lanes squares[LANES];
            for (int l = 0; l < LANES; l++) squares[l] = dot(rows[l], rows[l], row_length);
            store(inverse[0], totals(squares));
            for (float &value : inverse[0]) value = 1.0f / std::sqrt(value / row_length + eps);
            for (int o = 0; o < O; o++)
                for (int l = 0; l < LANES; l++) logits[o][l] = product[l][o] * inverse[0][l];
            store_block<1>(inverse, inverse_rms, block);
            store_block<O>(logits, normalised, block);

            Coefficients<G> h;
            coefficients<G>(logits, settings, h);
            sinkhorn<G>(h.positive, settings.steps, scales.data());
            float pre[G][LANES], post[G][LANES], mixing[G * G][LANES];
            const Scales<G> &last = scales.back();
            for (int g = 0; g < G; g++) {
                store(pre[g], h.pre[g]);
                store(post[g], h.post[g]);
                for (int i = 0; i < G; i++) store(mixing[g * G + i], last.rows[g] * h.positive[g][i] * last.columns[i]);
            }
            store_block<G>(post, h_post, block);
            store_block<G * G>(mixing, h_res, block);
            for (int l = 0; l < block.count; l++)
                for (long d = 0; d < width; d += LANES) {
                    lanes sum = {};
                    for (int g = 0; g < G; g++) sum += pre[g][l] * load(rows[l] + g * width + d);
                    store(u + (block.first + l) * width + d, sum);
                }
        }
    }
}

// What a block's dx is made of: dx = h_pre du + dproduct W + of_row x + carried.
template <typename T, int G>
struct RowTerms {
    Rows<const T> x, du, carried;
    float pre[G][LANES], of_row[LANES];
    // Gradients of the products x W^T, [O, LANES]: as floats, and rounded, as units along the outputs.
    float of_product[OUTPUTS<G> + 1][LANES];
    uint32_t rounded[LANES][OUTPUT_UNITS<T, G>];
};

// VECTORS vectors of stream `g` from channel `d` on, for TOKENS tokens from lane `first` on.
template <typename T, int G, int TOKENS, int VECTORS, bool CARRIED>
static inline void row_gradients(const RowTerms<T, G> &terms, const uint32_t *packed, int first, int g, long d,
                                 long width, const Rows<T> &dx) {
    long k = g * width + d;
    lanes sums[TOKENS][VECTORS] = {};
#pragma GCC unroll 1
    for (int o = 0; o < OUTPUT_UNITS<T, G>; o++) {
        units w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = load_vector<units>(packed + o * G * width + k + v * LANES);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++)
            for (int v = 0; v < VECTORS; v++)
                sums[t][v] = multiply_add<T>(sums[t][v], broadcast(terms.rounded[first + t][o]), w[v]);
    }
    // Lanes past the last token come first: what they write is overwritten by that token's own.
#pragma GCC unroll 8
    for (int t = TOKENS - 1; t >= 0; t--)
        for (int v = 0; v < VECTORS; v++) {
            int l = first + t;
            long at = k + v * LANES;
            lanes sum = sums[t][v] + terms.pre[g][l] * load(terms.du[l] + d + v * LANES);
            sum += terms.of_row[l] * load(terms.x[l] + at);
            store(dx[l] + at, CARRIED ? sum + load(terms.carried[l] + at) : sum);
        }
}

template <typename T, int G, bool CARRIED>
static void row_gradients(const RowTerms<T, G> &terms, const uint32_t *packed, long count, long width,
                          const Rows<T> &dx) {
    constexpr int TOGETHER = 8;
    for (int l = 0; l < count; l += TOGETHER)
        for (int g = 0; g < G; g++) {
            long d = 0;
            for (; d + 2 * LANES <= width; d += 2 * LANES)
                row_gradients<T, G, TOGETHER, 2, CARRIED>(terms, packed, l, g, d, width, dx);
            if (d < width) row_gradients<T, G, TOGETHER, 1, CARRIED>(terms, packed, l, g, d, width, dx);
        }
}

// sums [K / LANES, PADDED_OUTPUTS, LANES] += dproduct^T x over units of tokens. `fetch(n, k)` is called on the way,
// once for the n-th unit of each line of the rows.
template <typename T, int G, typename Fetch>
static void weight_gradients(const T *const *rows, const uint32_t (*of_product)[PADDED_OUTPUTS<G>], int unit_count,
                             long row_length, float *sums, Fetch fetch) {
    for (long k = 0; k < row_length; k += LANES)
        for (int o0 = 0; o0 < PADDED_OUTPUTS<G>; o0 += GROUP<G>) {
            bool first_of_line = k % LINE<T> == 0 && o0 == 0;
            float *group = sums + k * PADDED_OUTPUTS<G> + o0 * LANES;
            lanes sum[GROUP<G>];
            // Every loop over the sums is unrolled: with an index they would be in memory.
#pragma GCC unroll 24
            for (int o = 0; o < GROUP<G>; o++) sum[o] = load(group + o * LANES);
            for (int n = 0; n < unit_count; n++) {
                if (first_of_line) fetch(n, k);
                units x = pair_rows(rows[n * PER_UNIT<T>] + k, rows[(n + 1) * PER_UNIT<T> - 1] + k);
#pragma GCC unroll 24
                for (int o = 0; o < GROUP<G>; o++)
                    sum[o] = multiply_add<T>(sum[o], broadcast(of_product[n][o0 + o]), x);
            }
#pragma GCC unroll 24
            for (int o = 0; o < GROUP<G>; o++) store(group + o * LANES, sum[o]);
        }
}

// Blocks whose tokens enter the weight's gradient together: fewer passes over its sums, more rows to keep in cache.
constexpr int BATCH = 4;

// The backward pass: what it reads, what it writes. `carried` may be null, a gradient of x from elsewhere.
template <typename T, int G>
struct PreBackward {
    static constexpr int O = OUTPUTS<G>, PER = PER_UNIT<T>;

    const T *x, *du, *carried;
    const float *weight, *normalised, *inverse_rms, *dpost, *dres;
    Settings settings;
    long tokens, width;
    T *dx;
    float *dweight, *dscale, *dbias;

    // Sums over the tokens of a chunk.
    struct Sums {
        float *weight;
        lanes bias[O] = {}, scale[3] = {};
    };

    void run() const {
        // Chunks are a function of the number of tokens alone: any number of threads gives the same sums.
        const long blocks = (tokens + LANES - 1) / LANES, chunk = std::max<long>(16, (blocks + 63) / 64);
        const long chunks = (blocks + chunk - 1) / chunk, size = PADDED_OUTPUTS<G> * G * width;
        const std::vector<uint32_t> packed = pack_along_outputs<T, G>(weight, G * width);
        // Not vectors: each thread clears, and so maps, what it fills.
        std::unique_ptr<float[]> of_weight(new float[chunks * size]), of_rest(new float[chunks * (O + 3)]);
#pragma omp parallel
        {
            std::vector<Scales<G>> scales(settings.steps);
#pragma omp for schedule(static)
            for (long c = 0; c < chunks; c++) {
                Sums sums{of_weight.get() + c * size};
                std::fill_n(sums.weight, size, 0.0f);
                for (long first = c * chunk, end = std::min(blocks, first + chunk); first < end; first += BATCH) {
                    int count = static_cast<int>(std::min<long>(BATCH, end - first));
                    add_batch(first, count, packed.data(), scales.data(), sums);
                }
                float *rest = of_rest.get() + c * (O + 3);
                for (int o = 0; o < O; o++) rest[o] = total(sums.bias[o]);
                for (int part = 0; part < 3; part++) rest[O + part] = total(sums.scale[part]);
            }
#pragma omp for schedule(static)
            for (long k = 0; k < G * width; k += LANES)
                for (int o = 0; o < O; o++) {
                    const float *part = of_weight.get() + k * PADDED_OUTPUTS<G> + o * LANES;
                    lanes sum = {};
                    for (long c = 0; c < chunks; c++) sum += load(part + c * size);
                    store(dweight + o * G * width + k, sum);
                }
        }
        for (int n = 0; n < O + 3; n++) {
            float sum = 0.0f;
            for (long c = 0; c < chunks; c++) sum += of_rest[c * (O + 3) + n];
            (n < O ? dbias[n] : dscale[n - O]) = sum;
        }
    }

    // dx of `count` blocks, and their share of the sums.
    void add_batch(long first, int count, const uint32_t *packed, Scales<G> *scales, Sums &sums) const {
        const T *rows[BATCH * LANES];
        uint32_t by_token[BATCH * LANES / PER][PADDED_OUTPUTS<G>] = {};
        for (int b = 0; b < count; b++) {
            Block block(first + b, tokens);
            RowTerms<T, G> terms{{x, block, G * width}, {du, block, width}, {carried ? carried : x, block, G * width}};
            logit_gradients(block, scales, terms, sums);
            for (int l = 0; l < LANES; l++) {
                rows[b * LANES + l] = terms.x[l];
                for (int o = 0; o < O; o += PER)
                    terms.rounded[l][o / PER] = unit<T>(terms.of_product[o][l], terms.of_product[o + PER - 1][l]);
            }
            for (int o = 0; o < O; o++) {
                const float *product = terms.of_product[o];
                for (int l = 0; l < LANES; l += PER)
                    by_token[(b * LANES + l) / PER][o] = unit<T>(product[l], product[l + PER - 1]);
            }
            auto write = carried ? row_gradients<T, G, true> : row_gradients<T, G, false>;
            write(terms, packed, block.count, width, Rows<T>(dx, block, G * width));
        }
        // The next batch comes from memory while this product, which finds all in cache, is computed. Always inline, as
        // in lanes.hpp.
        auto fetch = [&](int n, long k) __attribute__((always_inline)) {
            for (int t = n * PER; t < (n + 1) * PER; t++) {
                long token = (first + count) * LANES + t, at = token * G * width + k;
                if (k < width) __builtin_prefetch(du + token * width + k, 0, 2);
                __builtin_prefetch(x + at, 0, 2);
                __builtin_prefetch(dx + at, 1, 2);
                if (carried) __builtin_prefetch(carried + at, 0, 2);
            }
        };
        weight_gradients<T, G>(rows, by_token, count * LANES / PER, G * width, sums.weight, fetch);
    }

    void logit_gradients(Block block, Scales<G> *scales, RowTerms<T, G> &terms, Sums &sums) const {
        float logits[O][LANES], of_post[G][LANES], of_mixing[G * G][LANES], inverse[1][LANES];
        load_block<O>(normalised, block, logits);
        load_block<1>(inverse_rms, block, inverse);
        load_block<G>(dpost, block, of_post);
        load_block<G * G>(dres, block, of_mixing);

        Coefficients<G> h;
        coefficients<G>(logits, settings, h);
        sinkhorn<G>(h.positive, settings.steps, scales);
        lanes mixing[G][G], of_logits[O];
        for (int g = 0; g < G; g++) {
            lanes of_pre[LANES] = {};
            for (int l = 0; l < block.count; l++) of_pre[l] = dot(terms.du[l], terms.x[l] + g * width, width);
            store(terms.pre[g], h.pre[g]);
            of_logits[g] = totals(of_pre) * h.pre[g] * (1.0f - h.pre[g]);
            of_logits[G + g] = load(of_post[g]) * h.post[g] * (1.0f - 0.5f * h.post[g]);
            for (int i = 0; i < G; i++) mixing[g][i] = load(of_mixing[g * G + i]);
        }
        sinkhorn_backward<G>(h.positive, settings.steps, scales, mixing);
        for (int n = 0; n < G * G; n++) of_logits[2 * G + n] = mixing[n / G][n % G];

        lanes along_row = {}, scale = load(inverse[0]);
        for (int o = 0; o < O; o++) {
            lanes of_scale = of_logits[o] * load(logits[o]);
            sums.bias[o] += of_logits[o];
            sums.scale[std::min(o / G, 2)] += of_scale;
            along_row += of_scale * scale_of(settings, o, G);
            store(terms.of_product[o], of_logits[o] * scale_of(settings, o, G) * scale);
        }
        // Read beside the last output where their number is odd.
        store(terms.of_product[O], lanes{});
        store(terms.of_row, -along_row * scale * scale / static_cast<float>(G * width));
    }
};

// What Python calls. `wide`: streams in float32; else in bfloat16. Everything else is float32.
extern "C" {

void mhc_pre_forward(const void *x, const float *weight, const float *scale, const float *bias, void *u, float *h_post,
                     float *h_res, float *normalised, float *inverse_rms, long tokens, long width, int streams,
                     int wide, int steps, float eps) {
    with_streams(streams, wide, [&](auto g, auto type) {
        using T = decltype(type);
        pre_forward<T, g()>((const T *)x, weight, {scale, bias, steps}, (T *)u, h_post, h_res, normalised, inverse_rms,
                            tokens, width, eps);
    });
}

void mhc_pre_backward(const void *x, const float *weight, const float *scale, const float *bias,
                      const float *normalised, const float *inverse_rms, const void *du, const void *carried,
                      const float *dpost, const float *dres, void *dx, float *dweight, float *dscale, float *dbias,
                      long tokens, long width, int streams, int wide, int steps) {
    with_streams(streams, wide, [&](auto g, auto type) {
        using T = decltype(type);
        PreBackward<T, g()>{(const T *)x, (const T *)du, (const T *)carried, weight, normalised, inverse_rms, dpost,
                            dres, {scale, bias, steps}, tokens, width, (T *)dx, dweight, dscale, dbias}
            .run();
    });
}
}
