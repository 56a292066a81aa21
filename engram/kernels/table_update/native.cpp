// Plans of table reads, and one pass over the rows they touch: segment sum, optimizer, store.
//
// Nothing depends on the number of threads. A stable sort has one result, and a row's reads are summed in the order of
// their arrival. Rows read so often that threads should share the work are cut at multiples of CHUNK of the sorted reads.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "native.hpp"

// Reads that one thread sums alone; and rows that a thread takes at a time.
constexpr int64_t CHUNK = 512, BLOCK = 256;
// Distance of prefetches, in rows of the table and in reads of the gradient: about one memory latency of work.
constexpr int64_t ROWS_AHEAD = 8, READS_AHEAD = 14;
// 2^11 counters fit into the first cache level, and most tables need two passes then.
constexpr int DIGIT_BITS = 11;

// ---------------------------------------------------------------------------------------------------------------- plan

struct Read {
    int64_t row, position;
};

struct Share {
    int64_t begin, end;
};

static Share share(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Where a thread's reads of each digit go: after all smaller digits, and after earlier threads' reads of this one.
static void first_places(const std::vector<std::vector<int64_t>> &histograms, int thread, int threads, int64_t *places) {
    int64_t total = 0;
    for (size_t digit = 0; digit < histograms[0].size(); digit++)
        for (int other = 0; other < threads; other++) {
            if (other == thread) places[digit] = total;
            total += histograms[other][digit];
        }
}

// Stable radix sort of the reads of living (non-negative) rows, then their runs. `a` and `b` hold n reads each;
// sizes = {distinct rows, living reads}.
extern "C" void plan_rows(const int64_t *ids, int64_t n, int64_t *rows, int64_t *starts, int64_t *order, Read *a,
                          Read *b, int64_t *sizes) {
    int most = omp_get_max_threads();
    std::vector<int64_t> living(most), highest(most), runs(most);
    std::vector<std::vector<int64_t>> histograms(most);
#pragma omp parallel
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        auto sum = [](const std::vector<int64_t> &counts, int until) {
            int64_t total = 0;
            for (int other = 0; other < until; other++) total += counts[other];
            return total;
        };

        Share mine = share(n, thread, threads);
        int64_t alive = 0, top = 0;
        for (int64_t i = mine.begin; i < mine.end; i++) {
            alive += ids[i] >= 0;
            top = std::max(top, ids[i]);
        }
        living[thread] = alive;
        highest[thread] = top;
#pragma omp barrier
        int64_t count = sum(living, threads);
        int bits = 1;
        for (int other = 0; other < threads; other++)
            while (highest[other] >> bits) bits++;
        Read *from = a, *to = b, *next = a + sum(living, thread);
        for (int64_t i = mine.begin; i < mine.end; i++)
            if (ids[i] >= 0) *next++ = {ids[i], i};

        int passes = (bits + DIGIT_BITS - 1) / DIGIT_BITS, width = (bits + passes - 1) / passes;
        int64_t mask = (int64_t(1) << width) - 1;
        std::vector<int64_t> places(mask + 1);
        mine = share(count, thread, threads);
        for (int pass = 0; pass < passes; pass++) {
            int shift = pass * width;
            std::vector<int64_t> &histogram = histograms[thread];
#pragma omp barrier
            histogram.assign(mask + 1, 0);
            for (int64_t i = mine.begin; i < mine.end; i++) histogram[from[i].row >> shift & mask]++;
#pragma omp barrier
            first_places(histograms, thread, threads, places.data());
            for (int64_t i = mine.begin; i < mine.end; i++) to[places[from[i].row >> shift & mask]++] = from[i];
            std::swap(from, to);
        }
#pragma omp barrier

        auto begins = [&](int64_t i) { return i == 0 || from[i].row != from[i - 1].row; };
        int64_t found = 0;
        for (int64_t i = mine.begin; i < mine.end; i++) {
            found += begins(i);
            order[i] = from[i].position;
        }
        runs[thread] = found;
#pragma omp barrier
        int64_t run = sum(runs, thread);
        for (int64_t i = mine.begin; i < mine.end; i++)
            if (begins(i)) {
                rows[run] = from[i].row;
                starts[run++] = i;
            }
#pragma omp single
        {
            sizes[0] = sum(runs, threads);
            sizes[1] = count;
            starts[sizes[0]] = count;
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- update

struct Plan {
    const int64_t *rows, *starts, *order;
    int64_t num_rows;
};

// Into the second cache level, which can wait for more lines at once than the first.
template <typename T>
static inline void prefetch_row(const T *row, int64_t width) {
    for (int64_t d = 0; d < width; d += 64 / sizeof(T)) __builtin_prefetch(row + d, 0, 2);
}

// sum += the gradients of the sorted reads begin to end.
template <typename Gradient>
static void add_reads(const Gradient *gradient, const Plan &plan, int64_t begin, int64_t end, int64_t width,
                      float *__restrict sum) {
    int64_t last = plan.starts[plan.num_rows] - 1;
    for (int64_t i = begin; i < end; i++) {
        prefetch_row(gradient + plan.order[std::min(i + READS_AHEAD, last)] * width, width);
        const Gradient *__restrict row = gradient + plan.order[i] * width;
        for (int64_t d = 0; d < width; d++) sum[d] += to_float(row[d]);
    }
}

// Calls update(u, row, sum of its gradients) for every row of the plan. `chunk_sums` holds width floats for each CHUNK
// of reads.
template <typename Gradient, typename Update>
static void for_each_row(const Plan &plan, const Gradient *gradient, int64_t width, float *chunk_sums,
                         const Update &update) {
    int64_t chunks = plan.starts[plan.num_rows] / CHUNK, blocks = (plan.num_rows + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        // First the chunks that lie within one row's reads.
#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t begin = chunk * CHUNK, end = begin + CHUNK;
            if (*std::upper_bound(plan.starts, plan.starts + plan.num_rows, begin) < end) continue;
            float *sum = chunk_sums + chunk * width;
            std::fill(sum, sum + width, 0.0f);
            add_reads(gradient, plan, begin, end, width, sum);
        }
        std::vector<float> buffer(width);
        float *__restrict sum = buffer.data();
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t u = block * BLOCK; u < std::min((block + 1) * BLOCK, plan.num_rows); u++) {
                update.prefetch(plan.rows[std::min(u + ROWS_AHEAD, plan.num_rows - 1)]);
                int64_t begin = plan.starts[u], end = plan.starts[u + 1];
                int64_t first = (begin + CHUNK - 1) / CHUNK, last = end / CHUNK;
                std::fill(sum, sum + width, 0.0f);
                add_reads(gradient, plan, begin, first < last ? first * CHUNK : end, width, sum);
                for (int64_t chunk = first; chunk < last; chunk++)
                    for (int64_t d = 0; d < width; d++) sum[d] += chunk_sums[chunk * width + d];
                if (first < last) add_reads(gradient, plan, last * CHUNK, end, width, sum);
                update(u, plan.rows[u], sum);
            }
    }
}

struct Sum {
    float *out;
    int64_t width;

    void prefetch(int64_t) const {}
    void operator()(int64_t u, int64_t, const float *sum) const { std::copy(sum, sum + width, out + u * width); }
};

// 1 - beta^t for every t: from a list up to where it rounds to 1 or the list ends.
class Correction {
  public:
    explicit Correction(double beta) : beta_(beta) {
        double power = 1.0;
        while (values_.size() < 65536 && (values_.empty() || values_.back() != 1.0f)) {
            power *= beta;
            values_.push_back(static_cast<float>(1.0 - power));
        }
    }
    float operator()(int32_t step) const {
        if (static_cast<size_t>(step) <= values_.size()) return values_[step - 1];
        return values_.back() == 1.0f ? 1.0f : static_cast<float>(1.0 - std::pow(beta_, step));
    }

  private:
    double beta_;
    std::vector<float> values_;
};

template <typename Table>
struct RowAdam {
    Table *table;
    float *first, *second;
    int32_t *row_step;
    int64_t width;
    float lr, rise1, beta2, rise2, eps, keep;
    uint32_t seed;
    // The rows' numbers in the whole table, of which this one may be a part.
    const int64_t *row_ids;
    const Correction &correction1, &correction2;

    void prefetch(int64_t row) const {
        prefetch_row(table + row * width, width);
        prefetch_row(first + row * width, width);
        prefetch_row(second + row * width, width);
        __builtin_prefetch(row_step + row);
    }
    void operator()(int64_t u, int64_t row, const float *__restrict sum) const {
        int32_t step = ++row_step[row];
        float size = lr / correction1(step), unbias = 1.0f / correction2(step);
        uint32_t key = row_key(seed, row_ids[u]);
        Table *__restrict weight = table + row * width;
        float *__restrict mean = first + row * width, *__restrict square = second + row * width;
        for (int64_t d = 0; d < width; d++) {
            float m = mean[d] + rise1 * (sum[d] - mean[d]);
            float v = beta2 * square[d] + rise2 * sum[d] * sum[d];
            mean[d] = m;
            square[d] = v;
            float moved = keep * to_float(weight[d]) - size * m / (std::sqrt(v * unbias) + eps);
            weight[d] = round_stochastically<Table>(moved, key, static_cast<uint32_t>(d));
        }
    }
};

template <typename Table>
struct RowwiseAdagrad {
    Table *table;
    float *square_sum;
    int64_t width;
    float lr, eps, keep;
    uint32_t seed;
    const int64_t *row_ids;

    void prefetch(int64_t row) const {
        prefetch_row(table + row * width, width);
        __builtin_prefetch(square_sum + row);
    }
    void operator()(int64_t u, int64_t row, const float *__restrict sum) const {
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < width; d++) squares += sum[d] * sum[d];
        square_sum[row] += squares / static_cast<float>(width);
        float size = lr / (std::sqrt(square_sum[row]) + eps);
        uint32_t key = row_key(seed, row_ids[u]);
        Table *__restrict weight = table + row * width;
        for (int64_t d = 0; d < width; d++) {
            float moved = keep * to_float(weight[d]) - size * sum[d];
            weight[d] = round_stochastically<Table>(moved, key, static_cast<uint32_t>(d));
        }
    }
};

// Calls run with a pointer of the type that memory holds.
template <typename Run>
static void with_type(void *memory, bool is_bf16, const Run &run) {
    if (is_bf16)
        run(static_cast<bf16 *>(memory));
    else
        run(static_cast<float *>(memory));
}

extern "C" void sum_rows(const Plan *plan, void *gradient, bool bf16_gradient, int64_t width, float *chunk_sums,
                         float *out) {
    with_type(gradient, bf16_gradient, [&](auto *values) {
        for_each_row(*plan, values, width, chunk_sums, Sum{out, width});
    });
}

extern "C" void row_adam(const Plan *plan, void *gradient, bool bf16_gradient, int64_t width, float *chunk_sums,
                         void *table, bool bf16_table, float *first, float *second, int32_t *row_step, double lr,
                         double beta1, double beta2, double eps, double weight_decay, uint32_t seed,
                         const int64_t *row_ids) {
    Correction correction1(beta1), correction2(beta2);
    auto rate = static_cast<float>(lr), decay = static_cast<float>(1.0 - lr * weight_decay);
    auto rise1 = static_cast<float>(1.0 - beta1), rise2 = static_cast<float>(1.0 - beta2);
    with_type(gradient, bf16_gradient, [&](auto *values) {
        with_type(table, bf16_table, [&](auto *weights) {
            using Table = std::remove_pointer_t<decltype(weights)>;
            RowAdam<Table> update{weights, first, second, row_step, width, rate, rise1, static_cast<float>(beta2),
                                  rise2, static_cast<float>(eps), decay, seed, row_ids, correction1, correction2};
            for_each_row(*plan, values, width, chunk_sums, update);
        });
    });
}

extern "C" void rowwise_adagrad(const Plan *plan, void *gradient, bool bf16_gradient, int64_t width, float *chunk_sums,
                                void *table, bool bf16_table, float *square_sum, double lr, double eps,
                                double weight_decay, uint32_t seed, const int64_t *row_ids) {
    auto rate = static_cast<float>(lr), decay = static_cast<float>(1.0 - lr * weight_decay);
    with_type(gradient, bf16_gradient, [&](auto *values) {
        with_type(table, bf16_table, [&](auto *weights) {
            using Table = std::remove_pointer_t<decltype(weights)>;
            RowwiseAdagrad<Table> update{weights, square_sum, width, rate, static_cast<float>(eps), decay, seed,
                                         row_ids};
            for_each_row(*plan, values, width, chunk_sums, update);
        });
    });
}
