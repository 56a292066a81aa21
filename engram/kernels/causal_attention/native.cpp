// Causal softmax attention in bfloat16, block by block, so that scores never leave the cache. Each head of each
// sequence is one task: sums have one order, whatever the number of threads.
//
// Forward, for a block of queries: scores s = q k^T over blocks of earlier keys, a running maximum m and sum l per
// query, o = softmax(s) v. Backward, for a block of keys, on transposed blocks, whose rows are keys, so that a query's
// statistics lie along the lanes: p^T = exp(scale s^T - L), ds^T = scale p^T (v do^T - rowsum(do o)), and
// dv = p^T do, dk = ds^T q, dq^T = k^T ds^T, where L = m + log l is all that the forward pass saves besides o.
//
// Legend: B batch, H heads, T positions, N query-key width, V value width.
#include "brgemm.hpp"

#include <cmath>
#include <memory>
#include <numeric>
#include <new>
#include <omp.h>

// Queries of one product of the forward pass, keys of one of the backward pass, and what each is multiplied with.
constexpr int64_t QUERIES = 32, KEYS = 64, WIDE = 256;
// Every number of keys or queries is a multiple of this: loops over so many floats become single instructions.
constexpr int64_t LANES = 16;
// The score of what is not seen.
constexpr float NEVER = -3e38f;

struct Sizes {
    int64_t batch, heads, length, width, value_width;
    int64_t even_width() const { return round_up(width, 2); }
    int64_t even_value() const { return round_up(value_width, 2); }
    int64_t padded() const { return round_up(length, KEYS); }
    // Rows of packed pairs start at different sets of the cache when the length is a power of two.
    int64_t pitch() const { return padded() + 16; }
};

// bfloat16 [B, H, T, width] whose last dimension is contiguous.
struct Heads {
    bf16* data;
    int64_t batch_stride, head_stride, row_stride;
    bf16* head(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }
};

struct Mask {
    // bool [B, T, T], or null.
    const uint8_t* data;
    int64_t batch_stride, row_stride;
};

struct Rows {
    const bf16* data;
    int64_t ld;
    const bf16* row(int64_t i) const { return data + i * ld; }
};

// Rows of one head, [padded, even width]: as they lie where they need no zeros around them, else a copy.
static Rows rows_of(const Heads& heads, int64_t b, int64_t h, int64_t first, int64_t length, int64_t width,
                    int64_t padded, bf16* copy) {
    const bf16* src = heads.head(b, h) + first * heads.row_stride;
    const int64_t ld = round_up(width, 2);
    if (length == padded && width == ld && heads.row_stride >= ld) return {src, heads.row_stride};
    for (int64_t t = 0; t < padded; t++) {
        const int64_t filled = t < length ? width : 0;
        if (filled) std::memcpy(copy + t * ld, src + t * heads.row_stride, filled * sizeof(bf16));
        clear(copy + t * ld + filled, ld - filled);
    }
    return {copy, ld};
}

struct Forward {
    bf16 *q, *k, *v, *p;
    uint32_t *k_pairs, *v_pairs;
    float *s, *o, *most, *sum;

    Forward(Arena& arena, const Sizes& n)
        : q(arena.take<bf16>(QUERIES * n.even_width())),
          k(arena.take<bf16>(n.padded() * n.even_width())),
          v(arena.take<bf16>(n.padded() * n.even_value())),
          p(arena.take<bf16>(QUERIES * WIDE)),
          k_pairs(arena.take<uint32_t>(n.even_width() / 2 * n.pitch())),
          v_pairs(arena.take<uint32_t>(n.padded() / 2 * n.value_width)),
          s(arena.take<float>(QUERIES * WIDE)),
          o(arena.take<float>(QUERIES * n.value_width)),
          most(arena.take<float>(QUERIES)),
          sum(arena.take<float>(QUERIES)) {}

    void run(const Sizes& n, const Heads& queries, const Heads& keys, const Heads& values, const Heads& out,
             const Mask& mask, float scale, float* log_sums, int64_t b, int64_t h) {
        const int64_t T = n.length, width = n.even_width(), V = n.value_width;
        const Rows k_rows = rows_of(keys, b, h, 0, T, n.width, n.padded(), k);
        pack_columns(k_rows.data, k_rows.ld, n.padded(), width, k_pairs, n.pitch());
        const Rows v_rows = rows_of(values, b, h, 0, T, V, n.padded(), v);
        pack_rows(v_rows.data, v_rows.ld, n.padded(), V, v_pairs, V);
        for (int64_t first = 0; first < T; first += QUERIES) {
            const int64_t count = std::min(QUERIES, T - first), end = first + QUERIES;
            const Rows q_rows = rows_of(queries, b, h, first, count, n.width, QUERIES, q);
            std::fill(most, most + QUERIES, NEVER);
            std::fill(sum, sum + QUERIES, 0.0f);
            for (int64_t key = 0; key < end; key += WIDE) {
                const int64_t keys_here = std::min(WIDE, end - key);
                multiply(QUERIES, keys_here, width, q_rows.data, q_rows.ld, k_pairs + key, n.pitch(), s, WIDE, false);
                for (int64_t i = 0; i < QUERIES; i++) {
                    const int64_t query = first + i;
                    const uint8_t* seen =
                        mask.data && i < count ? mask.data + b * mask.batch_stride + query * mask.row_stride + key
                                               : nullptr;
                    soften(i, query - key + 1, keys_here, T - key, seen, scale, key > 0 ? o + i * V : nullptr, V);
                }
                multiply(QUERIES, V, keys_here, p, WIDE, v_pairs + key / 2 * V, V, o, V, key > 0);
            }
            for (int64_t i = 0; i < count; i++) {
                for (int64_t j = 0; j < V; j++) o[i * V + j] /= sum[i];
                convert(o + i * V, V, out.head(b, h) + (first + i) * out.row_stride);
                log_sums[first + i] = most[i] + std::log(sum[i]);
            }
        }
    }

  private:
    // Row i of the scores becomes probabilities up to the factor 1 / sum; what was summed so far is scaled to the new
    // maximum. The first `allowed` of `count` keys are not in the future, the first `real` exist.
    void soften(int64_t i, int64_t allowed, int64_t count, int64_t real, const uint8_t* seen, float scale,
                float* so_far, int64_t value_width) {
        float* __restrict row = s + i * WIDE;
        for (int64_t j = std::max<int64_t>(allowed, 0); j < count; j++) row[j] = NEVER;
        if (seen)
            for (int64_t j = 0; j < std::min(count, real); j++) row[j] = seen[j] ? row[j] : NEVER;
        float lanes_most[LANES], lanes_sum[LANES] = {};
        std::fill(lanes_most, lanes_most + LANES, NEVER);
        for (int64_t j = 0; j < count; j += LANES)
            for (int64_t l = 0; l < LANES; l++) lanes_most[l] = std::max(lanes_most[l], row[j + l]);
        float highest = *std::max_element(lanes_most, lanes_most + LANES);
        if (highest == NEVER) {
            clear(p + i * WIDE, count);
            return;
        }
        highest = std::max(most[i], highest * scale);
        for (int64_t j = 0; j < count; j += LANES) {
            for (int64_t l = 0; l < LANES; l++) {
                row[j + l] = exponential(row[j + l] * scale - highest);
                lanes_sum[l] += row[j + l];
            }
        }
        convert(row, count, p + i * WIDE);
        const float total = std::accumulate(lanes_sum, lanes_sum + LANES, 0.0f);
        const float kept = exponential(most[i] - highest);
        sum[i] = sum[i] * kept + total;
        most[i] = highest;
        if (so_far)
            for (int64_t j = 0; j < value_width; j++) so_far[j] *= kept;
    }
};

struct Backward {
    bf16 *q_copy, *k_copy, *v_copy, *grad_copy, *k_t, *p, *ds;
    uint32_t *q_columns, *grad_columns, *q_rows, *grad_rows, *ds_pairs;
    float *s, *dp, *log_sum, *inner, *dq_t, *dk, *dv;
    uint8_t* seen;

    Backward(Arena& arena, const Sizes& n)
        : q_copy(arena.take<bf16>(n.padded() * n.even_width())),
          k_copy(arena.take<bf16>(n.padded() * n.even_width())),
          v_copy(arena.take<bf16>(n.padded() * n.even_value())),
          grad_copy(arena.take<bf16>(n.padded() * n.even_value())),
          k_t(arena.take<bf16>(n.width * n.pitch())),
          p(arena.take<bf16>(KEYS * WIDE)),
          ds(arena.take<bf16>(KEYS * WIDE)),
          q_columns(arena.take<uint32_t>(n.even_width() / 2 * n.pitch())),
          grad_columns(arena.take<uint32_t>(n.even_value() / 2 * n.pitch())),
          q_rows(arena.take<uint32_t>(n.padded() / 2 * n.width)),
          grad_rows(arena.take<uint32_t>(n.padded() / 2 * n.value_width)),
          ds_pairs(arena.take<uint32_t>(KEYS / 2 * WIDE)),
          s(arena.take<float>(KEYS * WIDE)),
          dp(arena.take<float>(KEYS * WIDE)),
          log_sum(arena.take<float>(n.padded())),
          inner(arena.take<float>(n.padded())),
          dq_t(arena.take<float>(n.width * n.pitch())),
          dk(arena.take<float>(KEYS * n.width)),
          dv(arena.take<float>(KEYS * n.value_width)),
          seen(arena.take<uint8_t>(KEYS * WIDE)) {}

    void run(const Sizes& n, const Heads& queries, const Heads& keys, const Heads& values, const Heads& out,
             const Heads& grads, const Mask& mask, float scale, const float* log_sums, const Heads& dqueries,
             const Heads& dkeys, const Heads& dvalues, int64_t b, int64_t h) {
        const int64_t T = n.length, padded = n.padded(), width = n.even_width(), V = n.value_width;
        const Rows q = rows_of(queries, b, h, 0, T, n.width, padded, q_copy);
        const Rows k = rows_of(keys, b, h, 0, T, n.width, padded, k_copy);
        const Rows v = rows_of(values, b, h, 0, T, V, padded, v_copy);
        const Rows grad = rows_of(grads, b, h, 0, T, V, padded, grad_copy);
        pack_columns(q.data, q.ld, padded, width, q_columns, n.pitch());
        pack_columns(grad.data, grad.ld, padded, n.even_value(), grad_columns, n.pitch());
        pack_rows(q.data, q.ld, padded, n.width, q_rows, n.width);
        pack_rows(grad.data, grad.ld, padded, V, grad_rows, V);
        transpose(k.data, k.ld, padded, n.width, k_t, n.pitch());
        for (int64_t t = 0; t < padded; t++) {
            const bf16 *row = out.head(b, h) + t * out.row_stride, *g = grad.row(t);
            float dot = 0.0f;
            if (t < T) {
#pragma omp simd reduction(+ : dot)
                for (int64_t j = 0; j < V; j++) dot += to_float(row[j]) * to_float(g[j]);
            }
            inner[t] = dot;
            // Padding: e^-inf = 0.
            log_sum[t] = t < T ? log_sums[t] : INFINITY;
        }
        std::fill(dq_t, dq_t + n.width * n.pitch(), 0.0f);
        for (int64_t key = 0; key < T; key += KEYS) {
            for (int64_t query = key; query < padded; query += WIDE)
                block(n, k.row(key), k.ld, v.row(key), v.ld, key, query, mask, b, scale);
            for (int64_t i = 0; i < std::min(KEYS, T - key); i++) {
                convert(dk + i * n.width, n.width, dkeys.head(b, h) + (key + i) * dkeys.row_stride);
                convert(dv + i * V, V, dvalues.head(b, h) + (key + i) * dvalues.row_stride);
            }
        }
        // The copy of q is free by now.
        for (int64_t j = 0; j < n.width; j++) convert(dq_t + j * n.pitch(), padded, q_copy + j * padded);
        transpose(q_copy, padded, n.width, T, dqueries.head(b, h), dqueries.row_stride);
    }

  private:
    // Keys [key, key + KEYS), whose rows are k and v, and up to WIDE queries from `query` on.
    void block(const Sizes& n, const bf16* k, int64_t ldk, const bf16* v, int64_t ldv, int64_t key, int64_t query,
               const Mask& mask, int64_t b, float scale) {
        const int64_t count = std::min(WIDE, n.padded() - query);
        const int64_t width = n.even_width(), value = n.even_value(), V = n.value_width, pitch = n.pitch();
        const bool first = query == key;
        multiply(KEYS, count, width, k, ldk, q_columns + query, pitch, s, WIDE, false);
        multiply(KEYS, count, value, v, ldv, grad_columns + query, pitch, dp, WIDE, false);
        if (mask.data) look(n, key, query, count, mask, b);
        for (int64_t i = 0; i < KEYS; i += 2) {
            for (int64_t row = i; row < i + 2; row++) {
                // On the diagonal, the queries before the row's key.
                soften(row, query, count, first ? row : 0, mask.data ? seen + row * WIDE : nullptr, scale);
            }
            pack_rows(ds + i * WIDE, WIDE, 2, count, ds_pairs + i / 2 * WIDE, WIDE);
        }
        multiply(KEYS, V, count, p, WIDE, grad_rows + query / 2 * V, V, dv, V, !first);
        multiply(KEYS, n.width, count, ds, WIDE, q_rows + query / 2 * n.width, n.width, dk, n.width, !first);
        multiply(n.width, count, KEYS, k_t + key, pitch, ds_pairs, WIDE, dq_t + query, pitch, true);
    }

    void soften(int64_t row, int64_t query, int64_t count, int64_t before, const uint8_t* is_seen, float scale) {
        float *__restrict score = s + row * WIDE, *__restrict dscore = dp + row * WIDE;
        const float *__restrict l = log_sum + query, *__restrict dot = inner + query;
        for (int64_t j = 0; j < count; j++) {
            score[j] = exponential(score[j] * scale - l[j]);
            dscore[j] = score[j] * (dscore[j] - dot[j]) * scale;
        }
        if (is_seen)
            for (int64_t j = 0; j < count; j++) {
                score[j] = is_seen[j] ? score[j] : 0.0f;
                dscore[j] = is_seen[j] ? dscore[j] : 0.0f;
            }
        convert(score, count, p + row * WIDE);
        convert(dscore, count, ds + row * WIDE);
        clear(p + row * WIDE, before);
        clear(ds + row * WIDE, before);
    }

    // seen [KEYS, count] = the mask's block, transposed.
    void look(const Sizes& n, int64_t key, int64_t query, int64_t count, const Mask& mask, int64_t b) {
        for (int64_t j = 0; j < count; j++) {
            const uint8_t* row = mask.data + b * mask.batch_stride + (query + j) * mask.row_stride + key;
            const int64_t real = query + j < n.length ? std::min(KEYS, n.length - key) : 0;
            for (int64_t i = 0; i < KEYS; i++) seen[i * WIDE + j] = i < real ? row[i] : 0;
        }
    }
};

// Runs `task(work, b, h)` for every head of every sequence, with a Work of its own in each thread. 1: no memory.
template <typename Work, typename Task>
static int for_each_head(const Sizes& n, const Task& task) {
    Arena measure(nullptr);
    Work unused(measure, n);
    const int64_t each = measure.used();
    const std::unique_ptr<char[]> memory(new (std::nothrow) char[each * omp_get_max_threads() + 64]);
    if (!memory) return 1;
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
#pragma omp parallel
    {
        Arena arena(aligned + each * omp_get_thread_num());
        Work work(arena, n);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n.batch * n.heads; i++) task(work, i / n.heads, i % n.heads);
        finish_products();
    }
    return 0;
}

// log_sums [B, H, T].
extern "C" int attention_forward(const Sizes* n, const Heads* q, const Heads* k, const Heads* v, const Mask* mask,
                                 float scale, const Heads* out, float* log_sums) {
    return for_each_head<Forward>(*n, [&](Forward& work, int64_t b, int64_t h) {
        work.run(*n, *q, *k, *v, *out, *mask, scale, log_sums + (b * n->heads + h) * n->length, b, h);
    });
}

extern "C" int attention_backward(const Sizes* n, const Heads* q, const Heads* k, const Heads* v, const Mask* mask,
                                  float scale, const Heads* out, const float* log_sums, const Heads* grad,
                                  const Heads* dq, const Heads* dk, const Heads* dv) {
    return for_each_head<Backward>(*n, [&](Backward& work, int64_t b, int64_t h) {
        work.run(*n, *q, *k, *v, *out, *grad, *mask, scale, log_sums + (b * n->heads + h) * n->length, *dq, *dk, *dv, b,
                 h);
    });
}
