"""compressed ids -> hash ids, against `engram_loops`, golden files and the published row counts."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.config import UserError
from engram.memory.hashing import NgramHash
from engram.memory.vocabulary import VocabularyMap
from tests.reference import engram_loops as loops

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "hash_ids.json").read_text())
SMALL: dict[str, Any] = {
    "vocabulary_size": 13,
    "layer_ids": [1, 4],
    "max_ngram_size": 3,
    "num_heads": 2,
    "rows_per_head": [1_000_003, 2_000_003],
    "pad_id": 2,
}
V4_1: dict[str, Any] = {
    "vocabulary_size": 99_092,
    "layer_ids": [1, 14],
    "max_ngram_size": 4,
    "num_heads": 8,
    "rows_per_head": [16_000_000] * 3,
    "pad_id": 2,
}
PAPER_27B: dict[str, Any] = {**V4_1, "max_ngram_size": 3, "rows_per_head": [2_262_400] * 2}


def hasher_of(case: dict[str, Any]) -> NgramHash:
    return NgramHash(max_ngram_size=len(case["recipe"]["rows_per_head"]) + 1, **case["recipe"])


def integers(values: Any) -> Any:
    """Nested lists of Python integers, whatever holds them."""
    return np.asarray(values).tolist()


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
class TestGolden:
    def test_the_loops_still_agree(self, case: dict[str, Any]) -> None:
        recipe = case["recipe"]
        for layer in case["layers"].values():
            for ids, documents, expected in zip(case["ids"], case["documents"], layer["hash_ids"], strict=True):
                rule, pad = recipe["look_back"], recipe["pad_id"]
                assert loops.hash_ids(ids, layer["multipliers"], layer["primes"], pad, rule, documents) == expected

    def test_constants(self, case: dict[str, Any]) -> None:
        hasher = hasher_of(case)
        for layer, expected in case["layers"].items():
            assert integers(hasher.multipliers[int(layer)]) == expected["multipliers"]
            assert integers(hasher.vocab_sizes[int(layer)]) == expected["primes"]
            assert int(hasher.num_rows[int(layer)]) == expected["num_rows"]

    def test_ids(self, case: dict[str, Any]) -> None:
        hasher = hasher_of(case)
        ids, documents = torch.tensor(case["ids"]), torch.tensor(case["documents"])
        plain, shifted = hasher.hash(ids, documents), hasher(ids, documents)
        assert list(plain) == list(shifted) == case["recipe"]["layer_ids"]
        for layer, expected in case["layers"].items():
            assert plain[int(layer)].dtype == shifted[int(layer)].dtype == torch.int64
            assert plain[int(layer)].tolist() == expected["hash_ids"]
            assert shifted[int(layer)].tolist() == [
                loops.add_offsets(row, expected["primes"]) for row in expected["hash_ids"]
            ]


def test_multipliers_of_deepseeks_recipe() -> None:
    paper, production = NgramHash(**PAPER_27B), NgramHash(**V4_1)
    assert integers(paper.multipliers[1]) == [76632096046245, 4839876093313, 35959672319349]
    assert integers(paper.multipliers[14]) == [67716810739261, 51510806800915, 30921347202721]
    # numpy draws one after the other: a longer n-gram leaves the first multipliers as they are.
    assert integers(production.multipliers[1]) == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    assert integers(production.multipliers[14]) == [67716810739261, 51510806800915, 30921347202721, 82619226485591]


def test_multipliers_are_not_those_of_an_int32_draw() -> None:
    # MaxText bounds its multipliers by int32: about 13 bits, other rows than everybody else's.
    drawn = NgramHash(**{**PAPER_27B, "vocabulary_size": 99_000}).multipliers[1]
    assert integers(drawn) != [3253, 17857, 13447]
    assert integers(NgramHash(**PAPER_27B).multipliers[1]) != [3253, 17857, 13447]
    assert min(integers(drawn)) > 2**31


def test_the_compressed_size_feeds_the_multipliers() -> None:
    drifted = NgramHash(**{**PAPER_27B, "vocabulary_size": 99_091})
    assert integers(drifted.multipliers[1]) != integers(NgramHash(**PAPER_27B).multipliers[1])


def test_published_row_counts() -> None:
    production, paper = NgramHash(**V4_1), NgramHash(**PAPER_27B)
    assert {layer: int(rows) for layer, rows in production.num_rows.items()} == {1: 384_006_168, 14: 384_016_682}
    assert {layer: int(rows) for layer, rows in paper.num_rows.items()} == {1: 36_199_972, 14: 36_204_260}
    primes = np.array(integers([paper.vocab_sizes[1], paper.vocab_sizes[14]]))
    assert (primes.min(), primes.max()) == (2_262_409, 2_262_859)
    qwen = {**PAPER_27B, "vocabulary_size": 248_320, "layer_ids": [1], "rows_per_head": [20_000_000] * 2}
    assert int(NgramHash(**qwen).num_rows[1]) == 320_001_446


@pytest.mark.parametrize("vocabulary_size", [2, 13, 99_092, 129_280, 2**31, 2**40 + 1])
@pytest.mark.parametrize("multipliers", ["pcg64", "splitmix64"])
def test_no_product_leaves_int64(vocabulary_size: int, multipliers: str) -> None:
    recipe = {**SMALL, "vocabulary_size": vocabulary_size, "pad_id": 1, "layer_ids": range(40)}
    hasher = NgramHash(**recipe, multipliers=multipliers)
    largest = max(value for layer in integers(list(hasher.multipliers.values())) for value in layer)
    assert largest * (vocabulary_size - 1) < 2**63
    assert all(value % 2 == 1 for layer in integers(list(hasher.multipliers.values())) for value in layer)


def test_the_largest_ids_hash_exactly() -> None:
    hasher = NgramHash(**V4_1)
    ids = [99_091] * 5
    for layer, rows in hasher.hash(torch.tensor([ids])).items():
        expected = loops.hash_ids(ids, integers(hasher.multipliers[layer]), integers(hasher.vocab_sizes[layer]), 2)
        assert rows[0].tolist() == expected


@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=3),
    st.integers(1, 4),
    st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True),
)
def test_primes_are_the_smallest_unused_ones(rows: list[int], num_heads: int, layers: list[int]) -> None:
    recipe = {**SMALL, "max_ngram_size": len(rows) + 1, "rows_per_head": rows, "num_heads": num_heads}
    hasher = NgramHash(**{**recipe, "layer_ids": sorted(layers)})
    sizes = [integers(hasher.vocab_sizes[layer]) for layer in sorted(layers)]
    assert sizes == loops.distinct_primes(len(layers), num_heads, rows)
    flat = [size for layer in sizes for order in layer for size in order]
    assert len(set(flat)) == len(flat)


def test_a_layer_on_its_own_addresses_other_rows() -> None:
    together, alone = NgramHash(**SMALL), NgramHash(**{**SMALL, "layer_ids": [4]})
    assert integers(together.multipliers[4]) == integers(alone.multipliers[4])
    # The first layer took the first primes, so the second layer's are larger than its own search would find.
    assert integers(together.vocab_sizes[4]) == [[1_000_037, 1_000_039], [2_000_039, 2_000_081]]
    assert integers(alone.vocab_sizes[4]) == [[1_000_003, 1_000_033], [2_000_003, 2_000_029]]
    ids = torch.arange(13)[None]
    assert (together.hash(ids)[4] != alone.hash(ids)[4]).all(dim=1).any()
    assert torch.equal(NgramHash(**{**SMALL, "layer_ids": [1]}).hash(ids)[1], together.hash(ids)[1])


def test_heads_own_disjoint_ranges_of_the_table() -> None:
    hasher = NgramHash(**SMALL)
    ids = torch.randint(0, 13, (5, 301))
    for layer in SMALL["layer_ids"]:
        rows = hasher(ids)[layer].flatten(0, 1)
        sizes = [size for order in integers(hasher.vocab_sizes[layer]) for size in order]
        starts = [sum(sizes[:head]) for head in range(len(sizes))]
        assert np.ravel(integers(hasher.offsets[layer])).tolist() == starts
        for head, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            column = rows[:, head]
            assert start <= int(column.min())
            assert int(column.max()) < start + size
            # 169 bigrams and more trigrams, so a constant or a collapsed column cannot pass.
            assert len(column.unique()) > 100
        assert int(hasher.num_rows[layer]) == sum(sizes)


def test_heads_of_one_order_share_the_mix() -> None:
    case = next(case for case in GOLDEN if case["name"] == "small")
    hasher, layer = hasher_of(case), case["recipe"]["layer_ids"][1]
    ids = [5, 17, 30]
    m = integers(hasher.multipliers[layer])
    bigram = (30 * m[0]) ^ (17 * m[1])
    mixes = [bigram, bigram ^ (5 * m[2]), bigram ^ (5 * m[2]) ^ (case["recipe"]["pad_id"] * m[3])]
    expected = [
        mix % size for mix, order in zip(mixes, integers(hasher.vocab_sizes[layer]), strict=True) for size in order
    ]
    assert hasher.hash(torch.tensor([ids]))[layer][0, -1].tolist() == expected


tokens = st.integers(0, 12)
maybe_dead = st.integers(-2, 12)


@given(st.data(), st.integers(1, 12), st.sampled_from(["sequence", "segment", "eos"]), st.integers(2, 4))
def test_any_batch_equals_the_loops(data: st.DataObject, length: int, rule: str, size: int) -> None:
    recipe = {**SMALL, "max_ngram_size": size, "rows_per_head": [101, 11, 53][: size - 1], "look_back": rule}
    hasher = NgramHash(**recipe)
    batch = data.draw(st.lists(st.lists(maybe_dead, min_size=length, max_size=length), min_size=1, max_size=3))
    starts = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=3, max_size=3))
    documents = [list(np.cumsum(row)) for row, _ in zip(starts, batch, strict=False)]
    # Document ids are no dense count of tokens of other rules: only `segment` looks at them.
    result = hasher.hash(torch.tensor(batch), torch.tensor(np.array(documents)))
    for layer in recipe["layer_ids"]:
        constants = integers(hasher.multipliers[layer]), integers(hasher.vocab_sizes[layer])
        for row, ids, own in zip(result[layer], batch, documents, strict=True):
            assert row.tolist() == loops.hash_ids(ids, *constants, 2, rule, own)


@given(st.lists(tokens, min_size=9, max_size=9), st.integers(0, 8), st.integers(1, 12))
def test_a_hash_depends_on_exactly_the_last_n_tokens(ids: list[int], changed: int, step: int) -> None:
    hasher = NgramHash(**SMALL)
    other = list(ids)
    other[changed] = (ids[changed] + step) % 13
    before, after = (hasher.hash(torch.tensor([row]))[1][0] for row in (ids, other))
    for position in range(9):
        for order, columns in ((2, slice(0, 2)), (3, slice(2, 4))):
            same = torch.equal(before[position, columns], after[position, columns])
            assert same == (not 0 <= position - changed < order), (position, order)


@given(st.lists(tokens, min_size=4, max_size=4), st.lists(tokens, min_size=5, max_size=5))
def test_a_document_hashes_as_if_it_stood_alone(first: list[int], second: list[int]) -> None:
    hasher = NgramHash(**SMALL)
    packed = hasher.hash(torch.tensor([first + second]), torch.tensor([[0] * 4 + [1] * 5]))
    for layer in SMALL["layer_ids"]:
        alone = [hasher.hash(torch.tensor([document]))[layer][0] for document in (first, second)]
        assert torch.equal(packed[layer][0], torch.cat(alone))


def test_without_document_ids_look_back_crosses_documents() -> None:
    hasher = NgramHash(**SMALL)
    ids = torch.tensor([[5, 6, 7, 8]])
    crossing, isolated = hasher.hash(ids)[1][0], hasher.hash(ids, torch.tensor([[0, 0, 1, 1]]))[1][0]
    assert torch.equal(crossing[:2], isolated[:2])
    assert (crossing[2] != isolated[2]).all()
    # The bigram of the second token of a document lies within it, the trigram does not.
    assert torch.equal(crossing[3, :2], isolated[3, :2])
    assert (crossing[3, 2:] != isolated[3, 2:]).all()


def test_the_sequence_rule_ignores_document_ids() -> None:
    hasher = NgramHash(**SMALL, look_back="sequence")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(hasher.hash(ids, torch.tensor([[0, 0, 1, 1]]))[1], hasher.hash(ids)[1])


def test_eos_ends_look_back_and_pads_it() -> None:
    hasher = NgramHash(**SMALL, look_back="eos")
    eos = SMALL["pad_id"]
    after = hasher.hash(torch.tensor([[5, 6, eos, 7, 8, 9]]))[1][0]
    # After the end-of-sequence token a text hashes as at the start of a sequence.
    assert torch.equal(after[3:], hasher.hash(torch.tensor([[7, 8, 9]]))[1][0])
    # The end-of-sequence token itself still belongs to the text before it.
    constants = integers(hasher.multipliers[1]), integers(hasher.vocab_sizes[1])
    assert after[2].tolist() == loops.hash_ids([5, 6, eos], *constants, eos, "sequence")[2]


def test_a_dead_token_latches() -> None:
    hasher = NgramHash(**{**SMALL, "max_ngram_size": 4, "rows_per_head": [1009, 2003, 3001]})
    rows = hasher(torch.tensor([[5, 6, -1, 7, 8, 9, 10]]))[1][0]
    assert (rows[2] == -1).all()
    # Behind a dead token everything is pad, also the living tokens before it.
    assert torch.equal(rows[3:], hasher(torch.tensor([[7, 8, 9, 10]]))[1][0])
    alive = hasher(torch.tensor([[5, 6, 11, 7, 8, 9, 10]]))[1][0]
    differ = (rows != alive).any(dim=1).tolist()
    assert differ == [False, False, True, True, True, True, False]


def test_dead_tokens_are_dead_whatever_their_number() -> None:
    hasher = NgramHash(**SMALL)
    one, other = (hasher(torch.tensor([[4, dead, 5, 6]])) for dead in (-1, -9))
    for layer in SMALL["layer_ids"]:
        assert torch.equal(one[layer], other[layer])
        assert (one[layer][0, 1] == -1).all()
        assert (one[layer][0, [0, 2, 3]] >= 0).all()


def test_left_padding_changes_hashes() -> None:
    """A known trap: a left-padded text reads other rows at its start, so a score depends on its batch."""
    hasher = NgramHash(**SMALL)
    text, filler = [5, 6, 7, 8], 0
    alone = hasher.hash(torch.tensor([text]))[1][0]
    padded = hasher.hash(torch.tensor([[filler, filler, *text]]))[1][0, 2:]
    assert (alone[:2] != padded[:2]).any(dim=1).all()
    assert torch.equal(alone[2:], padded[2:])
    # Three ways out: pad on the right, mark the filler dead, or make it a document of its own.
    assert torch.equal(hasher.hash(torch.tensor([[*text, filler, filler]]))[1][0, :4], alone)
    assert torch.equal(hasher.hash(torch.tensor([[-1, -1, *text]]))[1][0, 2:], alone)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.equal(hasher.hash(torch.tensor([[filler, filler, *text]]), documents)[1][0, 2:], alone)


def test_the_pad_id_stands_before_the_start() -> None:
    hasher = NgramHash(**SMALL)
    pad = SMALL["pad_id"]
    explicit = hasher.hash(torch.tensor([[pad, pad, 5, 6]]))[1][0, 2:]
    assert torch.equal(hasher.hash(torch.tensor([[5, 6]]))[1][0], explicit)
    other = NgramHash(**{**SMALL, "pad_id": 3}).hash(torch.tensor([[5, 6]]))[1][0]
    assert (other[0] != explicit[0]).all()


def test_rows_of_a_batch_are_independent() -> None:
    hasher = NgramHash(**SMALL)
    ids = torch.randint(-1, 13, (6, 7))
    together = hasher(ids)[4]
    assert torch.equal(together, torch.cat([hasher(row[None])[4] for row in ids]))


def test_token_ids_with_their_map_hash_as_compressed_ids() -> None:
    vocabulary = VocabularyMap.from_texts(["a", "b", "A", "c", " a", "B", "d"])
    hasher = NgramHash(**{**SMALL, "vocabulary_size": vocabulary.size, "pad_id": 1})
    tokens, documents = torch.randint(-1, 7, (3, 11)), torch.tensor([[0] * 5 + [1] * 6] * 3)
    mapped = hasher(tokens, documents, token_map=vocabulary.table_on(tokens.device))
    compressed = hasher(vocabulary.compress(tokens), documents)
    assert all(torch.equal(mapped[layer], compressed[layer]) for layer in SMALL["layer_ids"])
    with pytest.raises(IndexError, match=r"token id 7 at \[1, 2\]"):
        hasher(torch.tensor([[0, 1, 2], [3, 4, 7]]), token_map=vocabulary.table_on(tokens.device))


def test_ids_spread_evenly_over_a_head() -> None:
    hasher = NgramHash(**{**SMALL, "vocabulary_size": 1000, "rows_per_head": [97, 211]})
    ids = torch.randint(0, 1000, (40, 500))
    column = hasher.hash(ids)[1][..., 0].flatten()
    counts = torch.bincount(column, minlength=integers(hasher.vocab_sizes[1])[0][0]).double()
    mean = counts.mean()
    # Pearson's statistic is about its degrees of freedom, give or take its standard deviation sqrt(2 dof).
    statistic, freedom = float(((counts - mean) ** 2 / mean).sum()), len(counts) - 1
    assert abs(statistic - freedom) < 6 * math.sqrt(2 * freedom)


def test_the_fingerprint_names_the_recipe() -> None:
    base = NgramHash(**SMALL).fingerprint()
    assert base == NgramHash(**SMALL).fingerprint()
    changes: list[dict[str, Any]] = [
        {"vocabulary_size": 14},
        {"layer_ids": [1, 5]},
        {"num_heads": 3},
        {"rows_per_head": [1_000_004, 2_000_003]},
        {"pad_id": 3},
        {"seed": 1},
        {"multipliers": "splitmix64"},
        {"look_back": "sequence"},
    ]
    prints = [NgramHash(**{**SMALL, **change}).fingerprint() for change in changes]
    assert len({base, *prints}) == len(changes) + 1
    # 1000003 is the smallest prime from 1000002 on as well: the same addresses, the same fingerprint.
    assert NgramHash(**{**SMALL, "rows_per_head": [1_000_002, 2_000_003]}).fingerprint() == base


def test_impossible_recipes_are_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match="13.*12"):
        NgramHash(**{**SMALL, "pad_id": 13})
    with pytest.raises(UserError, match="-1"):
        NgramHash(**{**SMALL, "pad_id": -1})
    with pytest.raises(UserError, match="3"):
        NgramHash(**{**SMALL, "rows_per_head": [5, 7, 11]})
