"""A document, its digest, and the one number that orders and splits a corpus.

Everything that depends on a document depends on its digest alone, never on file names or the order of reading: the same
texts give the same split, the same order and the same tokens on every machine.
"""

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """A text and where it comes from; `meta["origin"]` names the place in error messages."""

    text: str
    meta: dict[str, str]


def text_digest(text: str) -> bytes:
    """sha256 of the text with every run of whitespace as one space: equal for copies that differ in layout only."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()


def keyed_fraction(key: str, digest: bytes) -> float:
    """A number in [0, 1), uniform over digests and independent between keys."""
    return int.from_bytes(hashlib.sha256(key.encode() + b":" + digest).digest()[:6]) / 2**48
