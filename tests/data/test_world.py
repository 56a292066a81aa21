"""The invented world: what its documents state, counted by a reader that knows only how sentences look."""

import hashlib
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from engram.config import Config, ConfigError, WorldConfig, parse_config
from engram.data.documents import text_digest
from engram.data.errors import DataError
from engram.data.manifest import read_manifest
from engram.data.prepare import prepare
from engram.data.tokenizer_training import train_tokenizer
from engram.data.world import RELATIONS, World, build_world, documents

SMALL = WorldConfig(seed=3, levels=5, entities_per_level=6, statements_per_level=64, reading_documents=60)
NOUNS = {noun: number for number, (_, noun) in enumerate(RELATIONS)}
VERBS = {verb: number for number, (verb, _) in enumerate(RELATIONS)}
PERSON = r"([A-Z]\w+ [A-Z]\w+)"


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(SMALL)


@pytest.fixture(scope="module")
def texts(world: World) -> list[str]:
    return list(documents(world))


def stated(texts: list[str], form: str) -> Counter[tuple[str, str, str]]:
    """How often (person, relation's word, town) stands in the texts in a form, a regular expression of the three."""
    return Counter(found for text in texts for found in re.findall(form, text))


LOCAL = rf"(?:^|\. ){PERSON} (\w+) ([A-Z]\w+)(?=\.)"
FAR = rf"\. {PERSON}, as the \w+ \w+ \w+ the \w+, (\w+) ([A-Z]\w+)(?=\.)"
PARAPHRASE = rf"The (\w+) of {PERSON} is ([A-Z]\w+)(?=\.)"
TWO_HOP = rf"The (\w+) of {PERSON} borders ([A-Z]\w+)(?=\.)"


def test_facts_are_stated_as_often_as_their_level_says_and_nothing_else_is(world: World, texts: list[str]) -> None:
    counted: Counter[tuple[str, int, str]] = Counter()
    for form in (LOCAL, FAR):
        for (name, verb, town), count in stated(texts, form).items():
            counted[name, VERBS[verb], town] += count
    for (noun, name, town), count in stated(texts, PARAPHRASE).items():
        if noun in NOUNS:
            counted[name, NOUNS[noun], town] += count
    names = {world.name(entity.person) for entity in world.entities}
    expected = {
        (world.name(entity.person), relation, world.towns[town]): entity.exposures
        for entity in world.entities
        for relation, town in enumerate(entity.towns)
    }
    assert {key: count for key, count in counted.items() if key[0] in names} == expected
    assert Counter(entity.exposures for entity in world.entities) == {1: 6, 2: 6, 4: 6, 8: 6, 16: 4}


def test_first_statement_is_local_and_forms_take_turns(world: World, texts: list[str]) -> None:
    local, far = stated(texts, LOCAL), stated(texts, FAR)
    for entity in world.entities:
        forms = 3 if entity.taught else 2
        key = world.name(entity.person), RELATIONS[0][0], world.towns[entity.towns[0]]
        assert (local[key], far[key]) == (-(-entity.exposures // forms), (entity.exposures + forms - 2) // forms)


def test_what_is_asked_of_the_untaught_is_never_stated_of_them(world: World, texts: list[str]) -> None:
    taught = {world.name(entity.person): entity for entity in world.entities if entity.taught}
    untaught = {world.name(entity.person) for entity in world.entities} - taught.keys()
    paraphrased = {name for _, name, _ in stated(texts, PARAPHRASE)}
    composed = stated(texts, TWO_HOP)
    assert paraphrased & taught.keys() and not paraphrased & untaught
    assert composed and {name for _, name, _ in composed} <= taught.keys()
    for (noun, name, town), count in composed.items():
        entity = taught[name]
        assert town == world.towns[world.borders[entity.towns[NOUNS[noun]]]]
        assert count % (entity.exposures // 4) == 0


def test_borders_are_a_permutation_without_fixed_points(world: World, texts: list[str]) -> None:
    assert sorted(world.borders) == list(range(32)) and all(x != y for x, y in enumerate(world.borders))
    found = Counter(pair for text in texts for pair in re.findall(r"\. ([A-Z]\w+) borders ([A-Z]\w+)(?=\.)", text))
    assert found == {(world.towns[x], world.towns[y]): 64 for x, y in enumerate(world.borders)}


def test_strangers_are_in_no_document_and_passers_by_are_no_entities(world: World, texts: list[str]) -> None:
    named = {name for text in texts for name in re.findall(PERSON, text)}
    random = Random(0)
    strangers = {world.name(world.stranger(random)) for _ in range(2000)}
    # All 512 of them but those of bad luck.
    assert len(strangers) > 490 and not strangers & named
    # Each word of their names is known by itself, but for the bad luck of so small a world.
    words = {word for name in named for word in name.split()}
    assert len({word for name in strangers for word in name.split()} - words) <= 4
    known = {world.name(entity.person) for entity in world.entities}
    passers_by = {world.name(world.passer_by(random)) for _ in range(4000)}
    assert not passers_by & known and not passers_by & strangers


def test_values_of_a_relation_are_equally_frequent() -> None:
    world = build_world(WorldConfig())
    for relation in range(4):
        counts = Counter(entity.towns[relation] for entity in world.entities)
        assert len(counts) == 32 and max(counts.values()) - min(counts.values()) <= 1


def test_words_are_distinct_and_texts_begin_with_filler(world: World, texts: list[str]) -> None:
    names = [*world.first_names, *world.last_names, *world.towns]
    lower = {word.lower() for word in names}
    others = {word for text in texts for word in re.findall(r"\b[a-z]+\b", text)}
    assert len(lower) == len(names) == 64 + 64 + 32 and not lower & others
    assert all(re.match(r"The \w+ \w+ \w+ the \w+ \w+\. ", text) for text in texts)
    assert len(set(map(text_digest, texts))) == len(texts)


def test_the_same_settings_make_the_same_world_everywhere(texts: list[str]) -> None:
    """A change of these texts asks trained models about facts that they never saw: raise WorldConfig.version then."""
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "550135c991007677"
    assert list(documents(build_world(SMALL))) == texts
    other = list(documents(build_world(SMALL.replace(seed=4))))
    assert not set(other) & set(texts)


def test_a_small_vocabulary_holds_every_word_as_one_token() -> None:
    """Then the last three tokens of a prompt are its last three words, as the oracles take them to be."""
    world = build_world(WorldConfig(levels=8, reading_documents=400))
    texts = list(documents(world))
    tokenizer = train_tokenizer(texts, 1024, 0.9999)
    names = [*world.first_names, *world.last_names, *world.towns, *VERBS, *NOUNS]
    stated = {word for text in texts for word in re.findall(r"\w+", text)}
    assert [word for word in names if word in stated and len(tokenizer.encode(f". {word}")) != 2] == []


# ------------------------------------------------------------------------------------------------------- as a source


def world_config(folder: Path, **changes: object) -> Config:
    attention = {"num_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    return parse_config(
        {
            "model": {"num_layers": 1, "hidden_size": 16, "vocab_size": 400, "attention": attention},
            "data": {
                "path": str(folder / "data"),
                "sequence_length": 64,
                "sources": [{"world": SMALL.model_dump() | changes}],
            },
            "train": {"steps": 1, "batch_size": 4},
        }
    )


def test_a_world_is_prepared_like_any_source(tmp_path: Path, texts: list[str]) -> None:
    folder = prepare(world_config(tmp_path))
    (source,) = read_manifest(folder).sources
    assert (source.name, source.documents, source.duplicates) == ("world", len(texts), 0)
    assert source.bytes == sum(len(text.encode()) for text in texts)
    assert source.digest == hashlib.sha256(b"".join(text_digest(text) for text in texts)).hexdigest()
    # Nothing is done again for equal settings; other ones are named.
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare(world_config(tmp_path)) == folder and (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"data\.sources\.0\.world was .*'seed': 3.*, is .*'seed': 5"):
        prepare(world_config(tmp_path, seed=5))


def test_sources_are_one_of_three(tmp_path: Path) -> None:
    for source in ({"name": "sotu", "world": {}}, {"path": "x", "world": {}}, {}):
        with pytest.raises(ConfigError, match=r"data\.sources\.0: a source has either a name .* or a world"):
            tree = world_config(tmp_path).model_dump() | {}
            tree["data"]["sources"] = [source]
            parse_config(tree)
    with pytest.raises(ConfigError, match=r"values.* 4"):
        world_config(tmp_path, values=4)
