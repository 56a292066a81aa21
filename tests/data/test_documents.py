import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engram.data.documents import keyed_fraction, text_digest


def test_digest_sees_words_not_layout() -> None:
    assert text_digest("a  b\n\tc ") == text_digest("a b c") == hashlib.sha256(b"a b c").digest()
    assert text_digest("ab c") != text_digest("a b c")
    assert text_digest("A b c") != text_digest("a b c")


@given(st.binary(max_size=40), st.text(max_size=5))
def test_fraction_is_a_fraction(digest: bytes, key: str) -> None:
    assert 0 <= keyed_fraction(key, digest) < 1
    assert keyed_fraction(key, digest) == keyed_fraction(key, digest)


def test_fractions_are_uniform_and_independent_between_keys() -> None:
    digests = [text_digest(str(number)) for number in range(4000)]
    first = np.array([keyed_fraction("split 0", digest) for digest in digests])
    second = np.array([keyed_fraction("split 1", digest) for digest in digests])
    counts = np.histogram(first, bins=10, range=(0, 1))[0]
    # Chi-square with 9 degrees of freedom: below 27.9 with probability 0.999.
    assert ((counts - 400) ** 2 / 400).sum() < 27.9
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_fraction_is_pinned() -> None:
    # The split of every prepared corpus hangs on this number.
    expected = int.from_bytes(hashlib.sha256(b"split 0:" + hashlib.sha256(b"a b").digest()).digest()[:6], "big") / 2**48
    assert keyed_fraction("split 0", text_digest("a  b")) == expected
