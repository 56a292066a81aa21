// Hash ids of n-grams, exact in 64 bits and without integer division.
//
// remainder: the quotient of n < 2^63 by p comes from doubles, whose five roundings and one deliberate shortfall make it
// at most 13 * 2^10 / p + 1 too small and never too large. So it is exact or one short where p >= 2^14; for smaller p
// the remainder of that remainder (below 2^15) is taken once more. One conditional subtraction settles the rest.
#include <algorithm>
#include <cstdint>

namespace {

// Tokens whose windows and mixes stay in the first cache level.
constexpr int64_t BLOCK = 64;
constexpr int LONGEST = 8;
constexpr int64_t TWO_ROUNDS_BELOW = int64_t(1) << 14;
constexpr double SHORTFALL = 1.0 - 0x1p-50;
constexpr int64_t DEAD = -1;

struct Columns {
    const int64_t *prime;
    const int64_t *offset;
    const double *inverse;
};

template <bool TWO_ROUNDS>
inline int64_t remainder(int64_t number, double as_double, int64_t prime, double inverse) {
    int64_t rest = number - static_cast<int64_t>(as_double * inverse) * prime;
    if (TWO_ROUNDS) rest -= static_cast<int64_t>(static_cast<double>(rest) * inverse) * prime;
    return rest >= prime ? rest - prime : rest;
}

// HEADS known at compile time turns the loop into a few vector instructions; 0 stands for any number.
template <int HEADS, bool TWO_ROUNDS>
inline void write_order(int64_t number, Columns columns, int heads, int64_t *__restrict out) {
    const double as_double = static_cast<double>(number);
    const int count = HEADS ? HEADS : heads;
    // Without this, a known count is unrolled into scalars before it could become vectors.
#pragma omp simd
    for (int h = 0; h < count; h++)
        out[h] = remainder<TWO_ROUNDS>(number, as_double, columns.prime[h], columns.inverse[h]) + columns.offset[h];
}

struct Tokens {
    const int64_t *ids;        // [batch, length]
    const int64_t *documents;  // [batch, length] or null
    const int64_t *map;        // [map_size] or null
    int64_t map_size, batch, length, pad;
    bool stop_at_pad;
};

// What look-back finds `shift` tokens before each of the `count` tokens at `start`: window[shift][...]. Returns the
// first token beyond the map, or -1.
int64_t read_windows(const Tokens &tokens, int64_t row, int64_t start, int64_t count, int longest,
                     int64_t (*window)[BLOCK]) {
    const int64_t *ids = tokens.ids + row * tokens.length + start;
    int64_t keys[LONGEST - 1 + BLOCK], bad = -1;
    int64_t *key = keys + LONGEST - 1;
    for (int64_t t = -(longest - 1); t < count; t++) {
        // Positions before the start read as dead tokens, and a dead token is an obstacle.
        int64_t id = start + t < 0 ? DEAD : ids[t];
        if (tokens.map && id >= tokens.map_size) {
            if (bad < 0 && t >= 0) bad = row * tokens.length + start + t;
            id = DEAD;
        }
        key[t] = id < 0 ? DEAD : tokens.map ? tokens.map[id] : id;
    }
    // All bits set while look-back has met no obstacle.
    int64_t open[BLOCK];
    for (int64_t t = 0; t < count; t++) open[t] = -1, window[0][t] = key[t];
    for (int shift = 1; shift < longest; shift++) {
        if (tokens.documents) {
            const int64_t *document = tokens.documents + row * tokens.length + start;
            for (int64_t t = 0; t < std::min<int64_t>(count, std::max<int64_t>(shift - start, 0)); t++) open[t] = 0;
            for (int64_t t = std::max<int64_t>(shift - start, 0); t < count; t++)
                open[t] &= document[t - shift] == document[t] ? -1 : 0;
        }
        for (int64_t t = 0; t < count; t++) {
            const int64_t older = key[t - shift];
            open[t] &= older < 0 || (tokens.stop_at_pad && older == tokens.pad) ? 0 : -1;
            window[shift][t] = open[t] ? older : tokens.pad;
        }
    }
    return bad;
}

template <int HEADS, bool TWO_ROUNDS>
int64_t hash_all(const Tokens &tokens, const int64_t *multipliers, Columns columns, int layers, int longest, int heads,
                 int64_t *out) {
    const int orders = longest - 1;
    const int64_t width = int64_t(orders) * heads, size = tokens.batch * tokens.length;
    const int64_t blocks = (tokens.length + BLOCK - 1) / BLOCK;
    int64_t first_bad = size;
#pragma omp parallel for schedule(static) reduction(min : first_bad) if (size * width * layers > 16384)
    for (int64_t work = 0; work < tokens.batch * blocks; work++) {
        const int64_t row = work / blocks, start = work % blocks * BLOCK;
        const int64_t count = std::min(BLOCK, tokens.length - start);
        int64_t window[LONGEST][BLOCK], mix[LONGEST][BLOCK];
        const int64_t bad = read_windows(tokens, row, start, count, longest, window);
        if (bad >= 0) first_bad = std::min(first_bad, bad);
        for (int layer = 0; layer < layers; layer++) {
            const int64_t *multiplier = multipliers + layer * longest;
            for (int64_t t = 0; t < count; t++) mix[0][t] = window[0][t] * multiplier[0];
            for (int shift = 1; shift < longest; shift++)
                for (int64_t t = 0; t < count; t++)
                    mix[shift][t] = mix[shift - 1][t] ^ (window[shift][t] * multiplier[shift]);
            int64_t *target = out + (layer * size + row * tokens.length + start) * width;
            for (int64_t t = 0; t < count; t++, target += width) {
                if (window[0][t] < 0) {
                    std::fill(target, target + width, DEAD);
                    continue;
                }
                for (int order = 0; order < orders; order++) {
                    const int64_t at = layer * width + order * heads;
                    const Columns here = {columns.prime + at, columns.offset + at, columns.inverse + at};
                    write_order<HEADS, TWO_ROUNDS>(mix[order + 1][t], here, heads, target + order * heads);
                }
            }
        }
    }
    return first_bad == size ? -1 : first_bad;
}

}  // namespace

// out [layers, batch, length, (longest - 1) * heads]; `inverses` is scratch for one double per prime. Returns the flat
// position of the first token beyond the map, -1 where there is none; such a token counts as dead.
extern "C" int64_t ngram_hash(const int64_t *ids, const int64_t *documents, const int64_t *map,
                              const int64_t *multipliers, const int64_t *primes, const int64_t *offsets,
                              double *inverses, int64_t *out, int64_t map_size, int64_t batch, int64_t length,
                              int64_t pad, int stop_at_pad, int layers, int longest, int heads) {
    int64_t smallest = INT64_MAX;
    for (int i = 0; i < layers * (longest - 1) * heads; i++) {
        inverses[i] = 1.0 / static_cast<double>(primes[i]) * SHORTFALL;
        smallest = std::min(smallest, primes[i]);
    }
    const Tokens tokens = {ids, documents, map, map_size, batch, length, pad, stop_at_pad != 0};
    auto run = smallest < TWO_ROUNDS_BELOW ? hash_all<0, true>
               : heads == 8                ? hash_all<8, false>
               : heads == 4                ? hash_all<4, false>
                                           : hash_all<0, false>;
    return run(tokens, multipliers, {primes, offsets, inverses}, layers, longest, heads, out);
}
