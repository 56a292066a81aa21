// Momentum with Sinkhorn balancing: one pass for the momentum, one for each pair of balancing steps, one for the update.
//
// Balancing never rewrites the matrix H. With A its elementwise square, row^2 = 1 / (A column^2) normalises rows and
// column^2 = 1 / (A^T row^2) columns, so a sweep over the active rows does both. H itself is stored for rows with a
// gradient only: elsewhere it is beta times the momentum. Sums over rows are taken in blocks that do not depend on the
// number of threads.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <utility>
#include <vector>

#include "native.hpp"

// Rows that a thread takes at a time; and rows whose column sums are held in float before they join in double.
constexpr int64_t BLOCK = 1024, FLOAT_ROWS = 128;
// Parts that the active rows are cut into for the column sums.
constexpr int64_t PARTS = 1024;
constexpr int64_t ROWS_AHEAD = 8;

struct Momentum {
    float *momentum;
    // H of the rows with a gradient [num_touched, width].
    float *lookahead;
    const int64_t *touched;
    int64_t num_rows, width, num_touched;
    float beta;
};

// H of an active row as `factor * values`. Active rows are listed by their number or, with a gradient, as ~index of it.
struct Source {
    const float *values;
    float factor;
    int64_t row;
};

static inline Source source(const Momentum &state, int64_t active, float scale) {
    if (active >= 0) return {state.momentum + active * state.width, state.beta * scale, active};
    return {state.lookahead + ~active * state.width, scale, state.touched[~active]};
}

static inline void prefetch_source(const Momentum &state, int64_t active) {
    const float *values = source(state, active, 1.0f).values;
    for (int64_t d = 0; d < state.width; d += 16) __builtin_prefetch(values + d);
}

// Norm of values * factor; in double, where no square of a float underflows.
static inline float norm(const float *values, float factor, int64_t width) {
    double squares = 0.0;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < width; d++) squares += static_cast<double>(values[d]) * values[d];
    return static_cast<float>(std::sqrt(squares) * factor);
}

// M = beta M + (1-beta) G; H = beta M + (1-beta) G; the norms of H's rows. Returns their sum and largest one.
template <typename Gradient>
static std::pair<double, float> accumulate(const Momentum &state, const Gradient *gradient, float *norms) {
    int64_t blocks = (state.num_rows + BLOCK - 1) / BLOCK, width = state.width;
    std::vector<double> sums(blocks);
    std::vector<float> highest(blocks);
    float beta = state.beta, rise = 1.0f - beta;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t begin = block * BLOCK, end = std::min(begin + BLOCK, state.num_rows);
        int64_t u = std::lower_bound(state.touched, state.touched + state.num_touched, begin) - state.touched;
        for (int64_t row = begin; row < end; row++) {
            float *__restrict m = state.momentum + row * width;
            if (u < state.num_touched && state.touched[u] == row) {
                float *__restrict h = state.lookahead + u * width;
                const Gradient *__restrict g = gradient + u * width;
                for (int64_t d = 0; d < width; d++) {
                    float step = rise * to_float(g[d]);
                    m[d] = beta * m[d] + step;
                    h[d] = beta * m[d] + step;
                }
                norms[row] = norm(h, 1.0f, width);
                u++;
            } else {
                for (int64_t d = 0; d < width; d++) m[d] *= beta;
                norms[row] = norm(m, beta, width);
            }
            sums[block] += norms[row];
            highest[block] = std::max(highest[block], norms[row]);
        }
    }
    double total = 0.0;
    for (double sum : sums) total += sum;
    return {total, highest.empty() ? 0.0f : *std::max_element(highest.begin(), highest.end())};
}

// Lists the rows whose norm lies above the cutoff, in order; returns how many.
static int64_t list_active(const Momentum &state, const float *norms, float cutoff, int64_t *active) {
    int64_t blocks = (state.num_rows + BLOCK - 1) / BLOCK;
    std::vector<int64_t> first(blocks + 1);
#pragma omp parallel for
    for (int64_t block = 0; block < blocks; block++) {
        const float *begin = norms + block * BLOCK, *end = norms + std::min((block + 1) * BLOCK, state.num_rows);
        first[block + 1] = std::count_if(begin, end, [=](float each) { return each > cutoff; });
    }
    for (int64_t block = 0; block < blocks; block++) first[block + 1] += first[block];
#pragma omp parallel for
    for (int64_t block = 0; block < blocks; block++) {
        int64_t begin = block * BLOCK, end = std::min(begin + BLOCK, state.num_rows), next = first[block];
        int64_t u = std::lower_bound(state.touched, state.touched + state.num_touched, begin) - state.touched;
        for (int64_t row = begin; row < end; row++) {
            bool touched = u < state.num_touched && state.touched[u] == row;
            if (norms[row] > cutoff) active[next++] = touched ? ~u : row;
            u += touched;
        }
    }
    return first[blocks];
}

// sum_d (factor values_d)^2 columns_d, with columns the squares of column scales.
static inline float weighted_squares(const Source &from, const float *__restrict columns, int64_t width) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; d++) {
        float h = from.factor * from.values[d];
        sum += h * h * columns[d];
    }
    return sum;
}

// One normalisation of rows and one of columns. `part_sums` holds PARTS * width doubles.
static void sweep(const Momentum &state, const int64_t *active, int64_t num_active, float scale, double *part_sums,
                  float *columns) {
    int64_t width = state.width, size = std::max<int64_t>(FLOAT_ROWS, (num_active + PARTS - 1) / PARTS);
    int64_t parts = (num_active + size - 1) / size;
#pragma omp parallel
    {
        std::vector<float> buffer(width);
        float *__restrict sums = buffer.data();
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; part++) {
            double *total = part_sums + part * width;
            std::fill(total, total + width, 0.0);
            int64_t end = std::min((part + 1) * size, num_active);
            for (int64_t begin = part * size; begin < end; begin += FLOAT_ROWS) {
                std::fill(sums, sums + width, 0.0f);
                for (int64_t a = begin; a < std::min(begin + FLOAT_ROWS, end); a++) {
                    prefetch_source(state, active[std::min(a + ROWS_AHEAD, num_active - 1)]);
                    Source from = source(state, active[a], scale);
                    float squares = weighted_squares(from, columns, width);
                    float row = squares < FLT_MIN ? 0.0f : 1.0f / squares;
                    for (int64_t d = 0; d < width; d++) {
                        float h = from.factor * from.values[d];
                        sums[d] += h * h * row;
                    }
                }
                for (int64_t d = 0; d < width; d++) total[d] += sums[d];
            }
        }
#pragma omp for
        for (int64_t d = 0; d < width; d++) {
            double total = 0.0;
            for (int64_t part = 0; part < parts; part++) total += part_sums[part * width + d];
            columns[d] = total < FLT_MIN ? 0.0f : static_cast<float>(1.0 / total);
        }
    }
}

// W = keep W - step balanced(H) on the active rows.
template <typename Table>
static void apply(const Momentum &state, const int64_t *active, int64_t num_active, float scale, const float *columns,
                  Table *table, float step, float keep, uint32_t seed) {
    int64_t width = state.width;
    std::vector<float> roots(width);
    for (int64_t d = 0; d < width; d++) roots[d] = std::sqrt(columns[d]);
    const float *__restrict root = roots.data();
#pragma omp parallel for schedule(dynamic, BLOCK)
    for (int64_t a = 0; a < num_active; a++) {
        prefetch_source(state, active[std::min(a + ROWS_AHEAD, num_active - 1)]);
        Source from = source(state, active[a], scale);
        float squares = weighted_squares(from, columns, width);
        float size = squares < FLT_MIN ? 0.0f : step * from.factor / std::sqrt(squares);
        uint32_t key = row_key(seed, from.row);
        const float *__restrict values = from.values;
        Table *__restrict weight = table + from.row * width;
        for (int64_t d = 0; d < width; d++) {
            float moved = keep * to_float(weight[d]) - size * root[d] * values[d];
            weight[d] = round_stochastically<Table>(moved, key, static_cast<uint32_t>(d));
        }
    }
}

// Scratch: norms [num_rows], active [num_rows], part_sums [PARTS, width].
extern "C" void sinkhorn_momentum(const Momentum *state, const void *gradient, bool bf16_gradient, void *table,
                                  bool bf16_table, float *norms, int64_t *active, double *part_sums, int32_t steps,
                                  double threshold, double step, double keep, uint32_t seed) {
    auto [sum, highest] = bf16_gradient ? accumulate(*state, static_cast<const bf16 *>(gradient), norms)
                                        : accumulate(*state, static_cast<const float *>(gradient), norms);
    auto cutoff = static_cast<float>(threshold * sum / static_cast<double>(state->num_rows));
    int64_t num_active = list_active(*state, norms, cutoff, active);
    // Cancels in every normalisation, and keeps squares of small gradients from underflowing.
    float scale = 1.0f / std::max(highest, FLT_MIN);
    std::vector<float> columns(state->width, 1.0f);
    for (int32_t pair = 0; pair < steps / 2; pair++)
        sweep(*state, active, num_active, scale, part_sums, columns.data());
    auto size = static_cast<float>(step), kept = static_cast<float>(keep);
    if (bf16_table)
        apply(*state, active, num_active, scale, columns.data(), static_cast<bf16 *>(table), size, kept, seed);
    else
        apply(*state, active, num_active, scale, columns.data(), static_cast<float *>(table), size, kept, seed);
}
