import string

from hypothesis import given
from hypothesis import strategies as st

from engram.data.dictionaries import dictd_entries, wordnet_glosses

DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def dictd_number(number: int) -> str:
    return (dictd_number(number // 64) if number >= 64 else "") + DIGITS[number % 64]


def make_dictd(entries: list[tuple[list[str], str]]) -> tuple[str, bytes]:
    """Index (sorted by headword, as dictd's are) and dictionary."""
    lines, data = [], b""
    for headwords, definition in entries:
        encoded = definition.encode()
        place = f"{dictd_number(len(data))}\t{dictd_number(len(encoded))}"
        lines += [f"{headword}\t{place}" for headword in headwords]
        data += encoded
    return "\n".join(sorted(lines)) + "\n", data


def test_dictd() -> None:
    index, data = make_dictd(
        [
            (["00-database-info"], "about the dictionary\n"),
            (["Zebra"], "Zebra, n.\n   A striped h\u00f4rse.\n   [1913 Webster]\n\n"),
            (["B side", "Bside"], "B side\n   The back.  [Note]\n   [PJC]\n"),
        ]
    )
    assert list(dictd_entries(index, data)) == [
        ("Zebra", "Zebra, n.\n   A striped h\u00f4rse.\n"),
        ("B side", "B side\n   The back.  [Note]\n"),
    ]


@given(st.lists(st.text("abc é", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=100))
def test_dictd_finds_every_entry(texts: list[str]) -> None:
    index, data = make_dictd([([f"word{number:03}"], text) for number, text in enumerate(texts)])
    assert [definition for _, definition in dictd_entries(index, data)] == [text + "\n" for text in texts]


def test_wordnet() -> None:
    data = (
        "  1 This software and database is licensed | not a gloss\n"
        '00002684 03 n 02 object 0 physical_object 0 039 @ 00001930 n 0000 | a thing; "balls | and others"  \n'
        "00185160 00 s 01 on_tap(p) 0 001 & 00183053 a 0000 | available  \n"
        "00212790 30 v 0a " + " ".join(f"w{number} 0" for number in range(10)) + " 000 | many  \n"
    )
    assert list(wordnet_glosses(data)) == [
        'object, physical object (noun): a thing; "balls | and others"\n',
        "on tap (adjective): available\n",
        "w0, w1, w2, w3, w4, w5, w6, w7, w8, w9 (verb): many\n",
    ]
