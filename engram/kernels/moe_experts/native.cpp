// Routed SwiGLU experts in bfloat16: tokens are sorted by expert, and each task takes some tokens of one expert from
// gathered rows to finished rows, so that the expert's weights and everything between its products stay in the cache.
// Results do not depend on the number of threads: tasks follow from the routing alone, and sums have one order.
//
// Legend: T tokens, D hidden, E experts, F expert width, K experts per token, choice = t K + k, place = rank of a
// choice among all choices sorted by expert.
#include "brgemm.hpp"

#include <memory>
#include <new>
#include <omp.h>
#include <vector>

// Rows of one product of activations: these stay in the first cache level.
constexpr int64_t TILE = 32;
// Rows that one product of a weight's gradient sums over.
constexpr int64_t GROUP = 128;
// Products are compiled for numbers of rows that are multiples of this.
constexpr int64_t GRAIN = 16;

struct Sizes {
    int64_t tokens, hidden, experts, width, top_k;
    int64_t choices() const { return tokens * top_k; }
    int64_t even_hidden() const { return round_up(hidden, 2); }
    int64_t even_width() const { return round_up(width, 2); }
    int64_t weights() const { return 3 * width * hidden; }
};

// The places [begin, end) of one expert. `partial` numbers the tasks of experts that have several, else -1.
struct Task {
    int64_t expert, begin, end, partial;
};

// `partials[e]` is the first partial number of expert e; those of e + 1 follow.
struct Plan {
    std::vector<Task> tasks;
    std::vector<int64_t> partials;
};

static Plan divide(const Sizes& s, const int32_t* starts) {
    // Enough tasks to keep many threads busy, few enough that each one packs its expert's weights for many rows.
    const int64_t most = std::max<int64_t>(512, round_up(s.choices() / 16, GROUP));
    Plan plan{{}, {0}};
    for (int64_t expert = 0; expert < s.experts; expert++) {
        const int64_t first = starts[expert], last = starts[expert + 1];
        const bool whole = last - first <= most;
        int64_t partial = plan.partials.back();
        for (int64_t begin = first; begin == first || begin < last; begin += most)
            plan.tasks.push_back({expert, begin, std::min(begin + most, last), whole ? -1 : partial++});
        plan.partials.push_back(partial);
    }
    // The longest first: threads then finish together.
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [](const Task& a, const Task& b) {
        return a.end - a.begin > b.end - b.begin;
    });
    return plan;
}

// Count-sort: order[place] = choice, and each expert's first place. False if an id is out of range.
static bool sort_choices(const Sizes& s, const int64_t* ids, int32_t* order, int32_t* starts) {
    std::fill(starts, starts + s.experts + 1, 0);
    for (int64_t choice = 0; choice < s.choices(); choice++) {
        if (ids[choice] < 0 || ids[choice] >= s.experts) return false;
        starts[ids[choice] + 1]++;
    }
    for (int64_t expert = 0; expert < s.experts; expert++) starts[expert + 1] += starts[expert];
    std::vector<int32_t> next(starts, starts + s.experts);
    for (int64_t choice = 0; choice < s.choices(); choice++) order[next[ids[choice]]++] = choice;
    return true;
}

// rows [count, ld] = src[choice / top_k], zeros behind each row's end and in rows up to `padded`.
static void gather(const bf16* src, const int32_t* order, int64_t count, int64_t padded, const Sizes& s, bf16* rows) {
    const int64_t ld = s.even_hidden();
    for (int64_t i = 0; i < padded; i++) {
        const int64_t filled = i < count ? s.hidden : 0;
        if (filled) std::memcpy(rows + i * ld, src + order[i] / s.top_k * s.hidden, filled * sizeof(bf16));
        clear(rows + i * ld + filled, ld - filled);
    }
}

static const bf16* in_bf16(const bf16* weights, int64_t, bf16*) { return weights; }

static const bf16* in_bf16(const float* weights, int64_t count, bf16* copy) {
    convert(weights, count, copy);
    return copy;
}

// out[t] = sum of the rows of t's choices, in the order of the choices.
static void combine(const Sizes& s, const bf16* rows, bf16* out) {
    std::vector<float> sum(s.hidden);
#pragma omp for
    for (int64_t t = 0; t < s.tokens; t++) {
        const bf16* row = rows + t * s.top_k * s.hidden;
        for (int64_t j = 0; j < s.hidden; j++) sum[j] = to_float(row[j]);
        for (int64_t k = 1; k < s.top_k; k++)
            for (int64_t j = 0; j < s.hidden; j++) sum[j] += to_float(row[k * s.hidden + j]);
        convert(sum.data(), s.hidden, out + t * s.hidden);
    }
}

struct Forward {
    bf16 *copy, *x, *act;
    uint32_t *gate_up, *down;
    float *pre, *out;

    Forward(Arena& arena, const Sizes& s)
        : copy(arena.take<bf16>(2 * s.width * s.hidden)),
          x(arena.take<bf16>(TILE * s.even_hidden())),
          act(arena.take<bf16>(TILE * s.even_width())),
          gate_up(arena.take<uint32_t>(s.even_hidden() * s.width)),
          down(arena.take<uint32_t>(s.even_width() / 2 * s.hidden)),
          pre(arena.take<float>(TILE * 2 * s.width)),
          out(arena.take<float>(TILE * s.hidden)) {}

    template <typename W>
    void run(const Sizes& s, const Task& task, const bf16* tokens, const int32_t* order, const float* weights,
             const W* all_gate_up, const W* all_down, bf16* saved, bf16* rows) {
        const int64_t D = s.hidden, F = s.width;
        if (task.begin == task.end) return;
        pack_columns(in_bf16(all_gate_up + task.expert * 2 * F * D, 2 * F * D, copy), D, 2 * F, D, gate_up, 2 * F);
        pack_columns(in_bf16(all_down + task.expert * D * F, D * F, copy), F, D, F, down, D);
        clear(act, TILE * s.even_width());
        for (int64_t place = task.begin; place < task.end; place += TILE) {
            const int64_t count = std::min(TILE, task.end - place), m = round_up(count, GRAIN);
            gather(tokens, order + place, count, m, s, x);
            multiply(m, 2 * F, s.even_hidden(), x, s.even_hidden(), gate_up, 2 * F, pre, 2 * F, false);
            for (int64_t i = 0; i < count; i++) {
                float *__restrict gate = pre + i * 2 * F, *__restrict up = gate + F;
                convert(gate, 2 * F, saved + (place + i) * 2 * F);
                for (int64_t j = 0; j < F; j++) gate[j] = gate[j] / (1.0f + exponential(-gate[j])) * up[j];
                convert(gate, F, act + i * s.even_width());
            }
            multiply(m, D, s.even_width(), act, s.even_width(), down, D, out, D, false);
            for (int64_t i = 0; i < count; i++) {
                const int64_t choice = order[place + i];
                float* row = out + i * D;
                for (int64_t j = 0; j < D; j++) row[j] *= weights[choice];
                convert(row, D, rows + choice * D);
            }
        }
    }
};

// Gradients of one task. Weights' gradients sum over GROUP rows at a time: a = rows^T, b = rows packed in pairs.
struct Backward {
    bf16 *copy, *x, *dy, *act, *dpre, *dy_t, *dpre_t;
    uint32_t *gate_up, *down, *x_pairs, *act_pairs;
    float *dact, *dx, *row, *sums;

    Backward(Arena& arena, const Sizes& s)
        : copy(arena.take<bf16>(2 * s.width * s.hidden)),
          x(arena.take<bf16>(GROUP * s.even_hidden())),
          dy(arena.take<bf16>(GROUP * s.even_hidden())),
          act(arena.take<bf16>(GROUP * s.width)),
          dpre(arena.take<bf16>(GROUP * 2 * s.width)),
          dy_t(arena.take<bf16>(GROUP * s.hidden)),
          dpre_t(arena.take<bf16>(GROUP * 2 * s.width)),
          gate_up(arena.take<uint32_t>(s.width * s.hidden)),
          down(arena.take<uint32_t>(s.even_hidden() / 2 * s.width)),
          x_pairs(arena.take<uint32_t>(GROUP / 2 * s.hidden)),
          act_pairs(arena.take<uint32_t>(GROUP / 2 * s.width)),
          dact(arena.take<float>(TILE * s.width)),
          dx(arena.take<float>(TILE * s.hidden)),
          row(arena.take<float>(3 * s.width)),
          sums(arena.take<float>(s.weights())) {}

    // `own` [3 F D] takes the sums of a task that is not its expert's only one.
    template <typename W>
    void run(const Sizes& s, const Task& task, const bf16* grad, const bf16* tokens, const int32_t* order,
             const float* weights, const W* all_gate_up, const W* all_down, const bf16* saved, bf16* dx_rows,
             float* dweights, W* dgate_up, W* ddown, float* own) {
        const int64_t D = s.hidden, F = s.width;
        float* total = own ? own : sums;
        std::fill(total, total + s.weights(), 0.0f);
        if (task.begin < task.end) {
            pack_rows(in_bf16(all_gate_up + task.expert * 2 * F * D, 2 * F * D, copy), D, 2 * F, D, gate_up, D);
            pack_rows(in_bf16(all_down + task.expert * D * F, D * F, copy), F, D, F, down, F);
        }
        for (int64_t place = task.begin; place < task.end; place += GROUP) {
            const int64_t count = std::min(GROUP, task.end - place), padded = round_up(count, GRAIN);
            gather(tokens, order + place, count, padded, s, x);
            gather(grad, order + place, count, padded, s, dy);
            for (int64_t first = 0; first < padded; first += TILE)
                rows(s, first, std::min(TILE, padded - first), count, order + place, weights, saved + place * 2 * F,
                     dx_rows, dweights);
            pack_rows(x, s.even_hidden(), padded, D, x_pairs, D);
            pack_rows(act, F, padded, F, act_pairs, F);
            transpose(dpre, 2 * F, padded, 2 * F, dpre_t, GROUP);
            transpose(dy, s.even_hidden(), padded, D, dy_t, GROUP);
            multiply(2 * F, D, padded, dpre_t, GROUP, x_pairs, D, total, D, true);
            multiply(D, F, padded, dy_t, GROUP, act_pairs, F, total + 2 * F * D, F, true);
        }
        if (!own) finish(s, task.expert, total, dgate_up, ddown);
    }

    template <typename W>
    static void finish(const Sizes& s, int64_t expert, const float* total, W* dgate_up, W* ddown) {
        const int64_t size = s.width * s.hidden;
        convert(total, 2 * size, dgate_up + expert * 2 * size);
        convert(total + 2 * size, size, ddown + expert * size);
    }

  private:
    // row = dgate, dup and the weighted activation of one choice; returns the gradient of its weight.
    float swiglu(int64_t F, const bf16* gate_and_up, const float* d, float weight) {
        const bf16 *__restrict gate = gate_and_up, *__restrict up = gate + F;
        float *__restrict dgate = row, *__restrict dup = row + F, *__restrict weighted_act = row + 2 * F;
        float dweight = 0.0f;
#pragma omp simd reduction(+ : dweight)
        for (int64_t j = 0; j < F; j++) {
            const float g = to_float(gate[j]), u = to_float(up[j]);
            const float sigmoid = 1.0f / (1.0f + exponential(-g)), silu = g * sigmoid, weighted = d[j] * weight;
            dweight += d[j] * silu * u;
            dgate[j] = weighted * u * (sigmoid + silu * (1.0f - sigmoid));
            dup[j] = weighted * silu;
            weighted_act[j] = silu * u * weight;
        }
        return dweight;
    }

    // Rows [first, first + m) of the group, of which those from `count` on are padding.
    void rows(const Sizes& s, int64_t first, int64_t m, int64_t count, const int32_t* order, const float* weights,
              const bf16* saved, bf16* dx_rows, float* dweights) {
        const int64_t D = s.hidden, F = s.width;
        multiply(m, F, s.even_hidden(), dy + first * s.even_hidden(), s.even_hidden(), down, F, dact, F, false);
        for (int64_t i = first; i < first + m; i++) {
            bf16 *act_row = act + i * F, *dpre_row = dpre + i * 2 * F;
            if (i >= count) {
                clear(act_row, F);
                clear(dpre_row, 2 * F);
                continue;
            }
            dweights[order[i]] = swiglu(F, saved + i * 2 * F, dact + (i - first) * F, weights[order[i]]);
            convert(row, 2 * F, dpre_row);
            convert(row + 2 * F, F, act_row);
        }
        multiply(m, D, 2 * F, dpre + first * 2 * F, 2 * F, gate_up, D, dx, D, false);
        for (int64_t i = first; i < std::min(first + m, count); i++)
            convert(dx + (i - first) * D, D, dx_rows + order[i] * D);
    }
};

// Scratch of every thread; null where there is no memory.
template <typename Work>
static std::unique_ptr<char[]> scratch(const Sizes& s, int64_t* each) {
    Arena measure(nullptr);
    Work work(measure, s);
    *each = measure.used();
    return std::unique_ptr<char[]>(new (std::nothrow) char[*each * omp_get_max_threads() + 64]);
}

static char* piece(char* all, int64_t each) {
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(all) + 63) / 64 * 64;
    return reinterpret_cast<char*>(aligned) + each * omp_get_thread_num();
}

enum Outcome { DONE, NO_MEMORY, BAD_ID };

template <typename W>
static int forward(const Sizes& s, const bf16* x, const int64_t* ids, const float* weights, const W* gate_up,
                   const W* down, bf16* out, bf16* saved, int32_t* order, int32_t* starts, bf16* rows) {
    if (!sort_choices(s, ids, order, starts)) return BAD_ID;
    const std::vector<Task> tasks = divide(s, starts).tasks;
    int64_t each;
    const auto memory = scratch<Forward>(s, &each);
    if (!memory) return NO_MEMORY;
#pragma omp parallel
    {
        Arena arena(piece(memory.get(), each));
        Forward work(arena, s);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++)
            work.run(s, tasks[i], x, order, weights, gate_up, down, saved, rows);
        finish_products();
        combine(s, rows, out);
    }
    return DONE;
}

template <typename W>
static int backward(const Sizes& s, const bf16* grad, const bf16* x, const float* weights, const W* gate_up,
                    const W* down, const bf16* saved, const int32_t* order, const int32_t* starts, bf16* dx,
                    float* dweights, W* dgate_up, W* ddown, bf16* rows) {
    const auto [tasks, partials] = divide(s, starts);
    int64_t each;
    const auto memory = scratch<Backward>(s, &each);
    const std::unique_ptr<float[]> sums(new (std::nothrow) float[partials.back() * s.weights() + 1]);
    if (!memory || !sums) return NO_MEMORY;
#pragma omp parallel
    {
        Arena arena(piece(memory.get(), each));
        Backward work(arena, s);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) {
            float* own = tasks[i].partial < 0 ? nullptr : sums.get() + tasks[i].partial * s.weights();
            work.run(s, tasks[i], grad, x, order, weights, gate_up, down, saved, rows, dweights, dgate_up, ddown, own);
        }
        finish_products();
#pragma omp for schedule(dynamic)
        for (int64_t expert = 0; expert < s.experts; expert++) {
            if (partials[expert] == partials[expert + 1]) continue;
            float* total = sums.get() + partials[expert] * s.weights();
            for (int64_t partial = partials[expert] + 1; partial < partials[expert + 1]; partial++) {
                const float* part = sums.get() + partial * s.weights();
                for (int64_t j = 0; j < s.weights(); j++) total[j] += part[j];
            }
            Backward::finish(s, expert, total, dgate_up, ddown);
        }
        combine(s, rows, dx);
    }
    return DONE;
}

// `rows` [T K, D] is scratch; `saved` [T K, 2, F] holds gate and up by place.
extern "C" int moe_forward(const bf16* x, const int64_t* ids, const float* weights, const void* gate_up,
                           const void* down, bf16* out, bf16* saved, int32_t* order, int32_t* starts, bf16* rows,
                           const Sizes* s, int in_float) {
    if (in_float)
        return forward(*s, x, ids, weights, static_cast<const float*>(gate_up), static_cast<const float*>(down), out,
                       saved, order, starts, rows);
    return forward(*s, x, ids, weights, static_cast<const bf16*>(gate_up), static_cast<const bf16*>(down), out, saved,
                   order, starts, rows);
}

extern "C" int moe_backward(const bf16* grad, const bf16* x, const float* weights, const void* gate_up,
                            const void* down, const bf16* saved, const int32_t* order, const int32_t* starts, bf16* dx,
                            float* dweights, void* dgate_up, void* ddown, bf16* rows, const Sizes* s, int in_float) {
    if (in_float)
        return backward(*s, grad, x, weights, static_cast<const float*>(gate_up), static_cast<const float*>(down),
                        saved, order, starts, dx, dweights, static_cast<float*>(dgate_up), static_cast<float*>(ddown),
                        rows);
    return backward(*s, grad, x, weights, static_cast<const bf16*>(gate_up), static_cast<const bf16*>(down), saved,
                    order, starts, dx, dweights, static_cast<bf16*>(dgate_up), static_cast<bf16*>(ddown), rows);
}
