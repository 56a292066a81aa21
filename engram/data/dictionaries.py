"""Entries of dictd dictionaries and glosses of WordNet's data files."""

import re
import string
from collections.abc import Iterator

from engram.data.extractors import tidy

_DICTD_DIGITS = {
    digit: value for value, digit in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/")
}
# Lines that only name the edition an entry was taken from.
_GCIDE_SOURCE = re.compile(
    r"(?m)^\s*\[(?:1913 Webster|Webster 1913 Suppl\.|WordNet 1\.5|PJC|Century Dict[^\]]*|[^\]]*PJC)\]\s*?$\n?"
)


def dictd_entries(index: str, dictionary: bytes) -> Iterator[tuple[str, str]]:
    """(headword, definition) of each entry of a dictd dictionary (unzipped), in the order of the dictionary.

    The index names an entry once for each of its headwords; the first one counts. Entries about the dictionary go.
    """
    entries: dict[tuple[int, int], str] = {}
    for line in index.splitlines():
        headword, offset, length = line.split("\t")[:3]
        if not headword.startswith("00-"):
            entries.setdefault((_dictd_number(offset), _dictd_number(length)), headword)
    for (start, size), headword in sorted(entries.items()):
        yield headword, tidy(_GCIDE_SOURCE.sub("", dictionary[start : start + size].decode("utf-8", "replace")))


def _dictd_number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 64 + _DICTD_DIGITS[digit]
    return number


_WORDNET_KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


def wordnet_glosses(data: str) -> Iterator[str]:
    """One line for each synset of a WordNet data file: `word, word (noun): gloss`."""
    for line in data.splitlines():
        # The licence at the start of the file is indented.
        if line.startswith(" ") or "|" not in line:
            continue
        fields, _, gloss = line.partition("|")
        _, _, kind, count, *words = fields.split()
        names = [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in words[: 2 * int(count, 16) : 2]]
        yield f"{', '.join(names)} ({_WORDNET_KINDS[kind]}): {gloss.strip()}\n"
