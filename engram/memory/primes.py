"""Prime sizes of the hash tables: one prime per head, none used twice. Needs no torch, so that counting stays cheap."""

from collections.abc import Sequence

# Miller-Rabin with these witnesses is exact below 3.3e24 (Sorenson and Webster 2015), so for every 64-bit number.
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(number: int) -> bool:
    """Exact for all 64-bit numbers."""
    if number < 2:
        return False
    for witness in _WITNESSES:
        if number % witness == 0:
            return number == witness
    halvings = ((number - 1) & (1 - number)).bit_length() - 1
    return all(_passes(number, witness, halvings) for witness in _WITNESSES)


def distinct_primes(
    layer_ids: Sequence[int], rows_per_head: Sequence[int], num_heads: int
) -> dict[int, list[list[int]]]:
    """Table sizes `[order][head]` of each layer: the smallest unused primes >= `rows_per_head[order]`.

    Drawn in the order layer, n-gram order, head, and unique over all of them: every head of the model hashes by a
    modulus of its own (DeepSeek's reference code).
    """
    used: set[int] = set()
    # Below this number, every prime that a search starting at the key could find is used.
    exhausted: dict[int, int] = {}

    def draw(at_least: int) -> int:
        candidate = exhausted.get(at_least, at_least)
        while candidate in used or not is_prime(candidate):
            candidate += 1
        used.add(candidate)
        exhausted[at_least] = candidate + 1
        return candidate

    return {layer: [[draw(rows) for _ in range(num_heads)] for rows in rows_per_head] for layer in layer_ids}


def _passes(number: int, witness: int, halvings: int) -> bool:
    """Strong probable-prime test of an odd `number` to the base `witness`."""
    power = pow(witness, (number - 1) >> halvings, number)
    if power in (1, number - 1):
        return True
    for _ in range(halvings - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False
