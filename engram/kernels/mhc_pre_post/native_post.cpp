// mHC's write (post) and its gradient; either goes over the streams once.
//
// Legend: G streams of width D, a multiple of 16.
#include "lanes.hpp"

// Tokens between the one whose rows are fetched and the one at work.
constexpr long AHEAD = 4;

template <typename T, int G>
static void post_forward(const T *x, const T *y, const float *h_post, const float *h_res, T *out, long tokens,
                         long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *post = h_post + t * G, *mixing = h_res + t * G * G;
        fetch(x + (t + AHEAD) * G * width, G * width);
        fetch(out + (t + AHEAD) * G * width, G * width);
        for (long d = 0; d < width; d += LANES) {
            lanes streams[G], added = load(y + t * width + d);
            for (int g = 0; g < G; g++) streams[g] = load(x + (t * G + g) * width + d);
            for (int o = 0; o < G; o++) {
                lanes sum = post[o] * added;
                for (int i = 0; i < G; i++) sum += mixing[o * G + i] * streams[i];
                store(out + (t * G + o) * width + d, sum);
            }
        }
    }
}

template <typename T, int G>
static void post_backward(const T *x, const T *y, const float *h_post, const float *h_res, const T *dout, T *dx, T *dy,
                          float *dpost, float *dres, long tokens, long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *post = h_post + t * G, *mixing = h_res + t * G * G;
        const T *given = dout + t * G * width, *streams = x + t * G * width;
        fetch(given + AHEAD * G * width, G * width);
        fetch(streams + AHEAD * G * width, G * width);
        fetch(dx + (t + AHEAD) * G * width, G * width);
        for (long d = 0; d < width; d += LANES) {
            lanes of_streams[G] = {}, of_added = {};
            for (int o = 0; o < G; o++) {
                lanes of_out = load(given + o * width + d);
                of_added += post[o] * of_out;
                for (int i = 0; i < G; i++) of_streams[i] += mixing[o * G + i] * of_out;
            }
            for (int i = 0; i < G; i++) store(dx + (t * G + i) * width + d, of_streams[i]);
            store(dy + t * width + d, of_added);
        }
        // The products of the outputs' gradients with every stream, then with y.
        constexpr int PRODUCTS = (G * (G + 1) + LANES - 1) / LANES * LANES;
        lanes sums[PRODUCTS / LANES][LANES] = {};
        for (long d = 0; d < width; d += LANES * PER_UNIT<T>) {
            units of_out[G];
            for (int o = 0; o < G; o++) of_out[o] = load_units(given + o * width + d, width - d);
            for (int i = 0; i <= G; i++) {
                units stream = load_units(i < G ? streams + i * width + d : y + t * width + d, width - d);
                for (int o = 0; o < G; o++) {
                    lanes &sum = sums[(i * G + o) / LANES][(i * G + o) % LANES];
                    sum = multiply_add<T>(sum, of_out[o], stream);
                }
            }
        }
        float products[PRODUCTS];
        for (int n = 0; n < PRODUCTS / LANES; n++) store(products + n * LANES, totals(sums[n]));
        for (int o = 0; o < G; o++) {
            for (int i = 0; i < G; i++) dres[(t * G + o) * G + i] = products[i * G + o];
            dpost[t * G + o] = products[G * G + o];
        }
    }
}

// What Python calls. `wide`: streams in float32; else in bfloat16. Coefficients are float32.
extern "C" {

void mhc_post_forward(const void *x, const void *y, const float *h_post, const float *h_res, void *out, long tokens,
                      long width, int streams, int wide) {
    with_streams(streams, wide, [&](auto g, auto type) {
        using T = decltype(type);
        post_forward<T, g()>((const T *)x, (const T *)y, h_post, h_res, (T *)out, tokens, width);
    });
}

void mhc_post_backward(const void *x, const void *y, const float *h_post, const float *h_res, const void *dout,
                       void *dx, void *dy, float *dpost, float *dres, long tokens, long width, int streams, int wide) {
    with_streams(streams, wide, [&](auto g, auto type) {
        using T = decltype(type);
        post_backward<T, g()>((const T *)x, (const T *)y, h_post, h_res, (const T *)dout, (T *)dx, (T *)dy, dpost, dres,
                              tokens, width);
    });
}
}
