"""How many distinct rows a batch reads: an estimate by Zipf's law, before any text is seen.

N-grams of length n are taken for draws from vocabulary^n types with frequencies 1, 1/2, 1/3, ...; each type falls on a
row of a head at random. Beside random windows of 512 tokens of this repository's two corpora (vocabulary 4,096), the
estimate is 0.79 to 0.94 of the bigrams and trigrams that 4 to 32 thousand tokens hold, and 0.85 to 1.9 of those of 0.26
to 1 million.
"""

import math
from functools import cache

from engram.distributed.layout import Table

# Types counted one by one; those of lower frequency are summed in ranges whose ends have this ratio.
_SINGLE, _RATIO = 1000, 1.02


def rows_by_zipf(table: Table, rows: range, vocabulary: int, tokens: int) -> float:
    """Distinct rows among `rows` that so many tokens read, on average."""
    total = 0.0
    for order, count, inside in table.heads_of(rows):
        types = types_by_zipf(tokens, vocabulary**order)
        # Each row is missed by a type with probability 1 - 1 / count.
        total -= inside * math.expm1(types * math.log1p(-1 / count))
    return total


@cache
def types_by_zipf(draws: int, types: int) -> float:
    """Distinct ones among `draws` independent draws from `types` types, number i with a frequency of 1 / i."""
    ranges = _ranges(types)
    # The sum of 1 / i over a range, so that frequencies sum to 1.
    weights = [width / middle for middle, width in ranges]
    norm = sum(weights)
    return sum(
        -width * math.expm1(draws * math.log1p(-weight / norm / width))
        for (_, width), weight in zip(ranges, weights, strict=True)
    )


def _ranges(types: int) -> list[tuple[float, int]]:
    """(the place whose frequency is the range's mean, number of types) of ranges that cover 1 to `types`."""
    found = []
    first = 1
    while first <= types:
        last = first if first < _SINGLE else min(types, int(first * _RATIO))
        width = last - first + 1
        # The sum of 1 / i over the range is that of the logarithms of its ends, half a step out, but for O(1 / i^3).
        found.append((float(first) if width == 1 else width / math.log((last + 0.5) / (first - 0.5)), width))
        first = last + 1
    return found
