/* Sinkhorn-Knopp half-steps on positive matrices [G, G, N], and their gradient by recomputation.
 *
 * Matrices lie along the last axis, so each operation handles LANES of them at once. A half-step divides by the sums over
 * axis 0 (columns), the next one by those over axis 1 (rows). Scratch memory holds the iterates of LANES matrices only.
 */
#include <stdlib.h>
#include <string.h>

#define LANES 16

/* y = x / sum(x); inverse[line] keeps 1 / sum. Line `l` runs over `axis`: its k-th element is entry (k, l) or (l, k). */
static void half_step(const float *restrict x, float *restrict y, float *restrict inverse, int g, int axis) {
    int along = axis == 0 ? g : 1, across = axis == 0 ? 1 : g;
    for (int line = 0; line < g; line++) {
        float sum[LANES] = {0};
        for (int k = 0; k < g; k++)
            for (int b = 0; b < LANES; b++) sum[b] += x[(line * across + k * along) * LANES + b];
        for (int b = 0; b < LANES; b++) inverse[line * LANES + b] = 1.0f / sum[b];
        for (int k = 0; k < g; k++)
            for (int b = 0; b < LANES; b++) {
                int at = (line * across + k * along) * LANES + b;
                y[at] = x[at] * inverse[line * LANES + b];
            }
    }
}

/* dx = (dy - sum(dy * y)) / sum(x), in place of dy. */
static void half_step_backward(float *restrict d, const float *restrict y, const float *restrict inverse, int g, int axis) {
    int along = axis == 0 ? g : 1, across = axis == 0 ? 1 : g;
    for (int line = 0; line < g; line++) {
        float projection[LANES] = {0};
        for (int k = 0; k < g; k++)
            for (int b = 0; b < LANES; b++) {
                int at = (line * across + k * along) * LANES + b;
                projection[b] += d[at] * y[at];
            }
        for (int k = 0; k < g; k++)
            for (int b = 0; b < LANES; b++) {
                int at = (line * across + k * along) * LANES + b;
                d[at] = (d[at] - projection[b]) * inverse[line * LANES + b];
            }
    }
}

/* LANES matrices starting at n0; lanes past the end hold ones, which no division can hurt. */
static void load(const float *source, float *block, long n, long n0, int entries, float filler) {
    long count = n - n0 < LANES ? n - n0 : LANES;
    for (int e = 0; e < entries; e++) {
        memcpy(block + e * LANES, source + e * n + n0, count * sizeof(float));
        for (long b = count; b < LANES; b++) block[e * LANES + b] = filler;
    }
}

static void store(const float *block, float *target, long n, long n0, int entries) {
    long count = n - n0 < LANES ? n - n0 : LANES;
    for (int e = 0; e < entries; e++) memcpy(target + e * n + n0, block + e * LANES, count * sizeof(float));
}

/* Returns 0, or 1 where memory ran out. */
int sinkhorn_forward(const float *x, float *out, long n, int g, int half_steps) {
    int size = g * g * LANES;
    float *block = malloc((2 * size + g * LANES) * sizeof(float));
    if (!block) return 1;
    for (long n0 = 0; n0 < n; n0 += LANES) {
        float *now = block, *next = block + size;
        load(x, now, n, n0, g * g, 1.0f);
        for (int h = 0; h < half_steps; h++) {
            half_step(now, next, block + 2 * size, g, h % 2);
            float *swap = now;
            now = next;
            next = swap;
        }
        store(now, out, n, n0, g * g);
    }
    free(block);
    return 0;
}

/* Gradient with respect to x. Returns 0, or 1 where memory ran out. */
int sinkhorn_backward(const float *x, const float *grad, float *grad_x, long n, int g, int half_steps) {
    int size = g * g * LANES;
    float *iterates = malloc((size_t)(half_steps + 2) * size * sizeof(float));
    float *inverses = malloc((size_t)half_steps * g * LANES * sizeof(float));
    if (!iterates || !inverses) {
        free(iterates);
        free(inverses);
        return 1;
    }
    float *d = iterates + (size_t)(half_steps + 1) * size;
    for (long n0 = 0; n0 < n; n0 += LANES) {
        load(x, iterates, n, n0, g * g, 1.0f);
        for (int h = 0; h < half_steps; h++)
            half_step(iterates + (size_t)h * size, iterates + (size_t)(h + 1) * size, inverses + h * g * LANES, g, h % 2);
        load(grad, d, n, n0, g * g, 0.0f);
        for (int h = half_steps - 1; h >= 0; h--)
            half_step_backward(d, iterates + (size_t)(h + 1) * size, inverses + h * g * LANES, g, h % 2);
        store(d, grad_x, n, n0, g * g);
    }
    free(iterates);
    free(inverses);
    return 0;
}
