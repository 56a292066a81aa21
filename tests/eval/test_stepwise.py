"""Generation without padding: batches of different prompts give what each prompt gives alone."""

import dataclasses
from pathlib import Path

import pytest

from engram.inference.generate import generate
from eval import stepwise
from eval.loading import Loaded, load
from eval.stepwise import Question, answer, cut


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> Loaded:
    return load(run_folder, "cpu", threads=1)


TEXTS = ("the people of", "the", "union states congress shall have power to lay", "café & No.", "of")


def questions(loaded: Loaded, **settings: object) -> list[Question]:
    return [Question(tuple(loaded.encode(text)), **{"max_new_tokens": 9, **settings}) for text in TEXTS]


def test_prompts_of_different_lengths_as_if_each_were_alone(loaded: Loaded) -> None:
    asked = questions(loaded)
    asked[1] = dataclasses.replace(asked[1], max_new_tokens=3)
    expected = []
    for one in asked:
        (row,) = generate(
            loaded.model, [one.prompt], one.max_new_tokens, temperature=0, eos_id=loaded.tokenizer.eos_id
        ).tolist()
        expected.append(loaded.continuation(list(one.prompt), row))
    told: list[int] = []
    assert answer(loaded, asked, told.append) == expected
    assert sum(told) == len(asked) and any(expected)


def test_stop_strings_cut_at_their_first_place(loaded: Loaded) -> None:
    free = answer(loaded, questions(loaded, max_new_tokens=30))
    stop = free[0][7:9]
    stopped = answer(loaded, questions(loaded, max_new_tokens=30, stops=("never there", stop)))
    assert stopped == [text.split(stop)[0] for text in free] != free


def test_cut() -> None:
    assert cut("a b c b", ("c", "b")) == "a "
    assert cut("abc", ("x", "")) == "abc"


def test_draws_belong_to_the_prompt(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither order nor batch changes a sample; another draw of the same prompt does."""
    asked = questions(loaded, temperature=1.0)
    first = answer(loaded, asked)
    monkeypatch.setattr(stepwise, "BATCH_ROWS", 2)
    assert answer(loaded, asked[::-1]) == first[::-1]
    assert answer(loaded, [dataclasses.replace(one, draw=1) for one in asked]) != first


def test_settings_do_not_mix_in_a_batch(loaded: Loaded) -> None:
    greedy, sampled = questions(loaded), questions(loaded, temperature=1.5, top_k=40)
    together = answer(loaded, [one for pair in zip(greedy, sampled, strict=True) for one in pair])
    assert together[::2] == answer(loaded, greedy) and together[1::2] == answer(loaded, sampled)


def test_prompts_that_are_read_at_once_are_bounded(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = questions(loaded)
    expected = answer(loaded, asked)
    sizes: list[int] = []
    batch = stepwise._answer_batch

    def counted(loaded: Loaded, chosen: list[Question]) -> list[str]:
        sizes.append(len(chosen) * max(len(one.prompt) for one in chosen))
        return batch(loaded, chosen)

    monkeypatch.setattr(stepwise, "_answer_batch", counted)
    monkeypatch.setattr(stepwise, "MAX_TOKENS", 8)
    assert answer(loaded, asked) == expected
    longest = max(len(one.prompt) for one in asked)
    assert len(sizes) > 1 and all(size <= max(8, longest) for size in sizes)
