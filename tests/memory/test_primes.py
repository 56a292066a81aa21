"""Prime table sizes: exact, distinct, and the ones that DeepSeek's recipe gives."""

from hypothesis import given
from hypothesis import strategies as st

from engram.memory.primes import distinct_primes, is_prime


def test_is_prime_agrees_with_a_sieve() -> None:
    limit = 20_000
    sieve = [number > 1 for number in range(limit)]
    for factor in range(2, 142):
        for multiple in range(factor * factor, limit, factor):
            sieve[multiple] = False
    assert [is_prime(number) for number in range(limit)] == sieve


def test_is_prime_sees_through_strong_pseudoprimes_and_64_bits() -> None:
    # The smallest composites that pass Miller-Rabin for the first 4, 9 and 11 prime bases.
    for composite in (3_215_031_751, 3_825_123_056_546_413_051, (2**61 - 1) * 7, 561, 1_000_003**2):
        assert not is_prime(composite)
    for prime in (2**61 - 1, 18_446_744_073_709_551_557):
        assert is_prime(prime)


def test_sizes_are_those_of_the_paper_and_of_v4_1() -> None:
    paper = distinct_primes([1, 14], [2_262_400, 2_262_400], 8)
    assert paper[1][0][0] == 2_262_409
    assert paper[14][1][7] == 2_262_859
    assert [sum(map(sum, paper[layer])) for layer in (1, 14)] == [36_199_972, 36_204_260]
    production = distinct_primes([1, 14], [16_000_000] * 3, 8)
    assert [sum(map(sum, production[layer])) for layer in (1, 14)] == [384_006_168, 384_016_682]


@given(
    layers=st.integers(1, 3),
    rows=st.lists(st.integers(2, 400), min_size=1, max_size=4),
    heads=st.integers(1, 5),
)
def test_each_size_is_the_smallest_prime_that_is_left(layers: int, rows: list[int], heads: int) -> None:
    sizes = distinct_primes(range(layers), rows, heads)
    left = [number for number in range(1000) if is_prime(number)]
    for layer in range(layers):
        for at_least, order in zip(rows, sizes[layer], strict=True):
            for size in order:
                assert size == next(prime for prime in left if prime >= at_least)
                left.remove(size)
