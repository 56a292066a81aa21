"""The cache answers for one checkpoint, tokenizer and dtype, and for nothing else."""

import dataclasses
from pathlib import Path

import pytest
import torch

from engram.config import UserError
from eval import score_cache
from eval.loading import Loaded, load
from eval.score_cache import ScoreCache


@pytest.fixture
def loaded(run_folder: Path) -> Loaded:
    return load(run_folder, "cpu", threads=1)


def test_answers_stay(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.sqlite"
    cache = ScoreCache(path, loaded)
    assert cache.get([["a", [1, 2]]]) == {}
    cache.put([(["a", [1, 2]], [-0.1234567890123456, True]), (["b"], "text")])
    cache.close()
    again = ScoreCache(path, loaded)
    assert again.get([["b"], ["c"], ["a", (1, 2)]]) == {0: "text", 2: [-0.1234567890123456, True]}
    again.close()


@pytest.mark.parametrize("other", ["checkpoint", "tokenizer", "dtype", "version"])
def test_never_answers_for_another(
    other: str, loaded: Loaded, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.sqlite"
    ScoreCache(path, loaded).put([("question", 1.0)])
    assert ScoreCache(path, loaded).get(["question"]) == {0: 1.0}
    if other == "checkpoint":
        loaded = load(run_folder / "step_000006", "cpu", threads=1)
    elif other == "tokenizer":
        monkeypatch.setattr(loaded.tokenizer, "digest", "another")
    elif other == "dtype":
        loaded.model.compute_dtype = torch.bfloat16
    else:
        monkeypatch.setattr(score_cache, "VERSION", score_cache.VERSION + 1)
    assert ScoreCache(path, dataclasses.replace(loaded)).get(["question"]) == {}


def test_no_file_keeps_nothing(loaded: Loaded) -> None:
    cache = ScoreCache(None, loaded)
    cache.put([("question", 1.0)])
    assert cache.get(["question"]) == {}


def test_a_file_that_is_no_cache(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, and no database of anything " * 50)
    with pytest.raises(UserError, match="name another file with --cache"):
        ScoreCache(path, loaded)


def test_a_page_that_is_damaged(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    cache = ScoreCache(path, loaded)
    cache.put([(number, "x" * 100) for number in range(300)])
    cache.close()
    content = bytearray(path.read_bytes())
    # The first page tells what tables there are; the others hold them.
    content[4096:] = bytes(0x5A ^ byte for byte in content[4096:])
    path.write_bytes(content)
    again = ScoreCache(path, loaded)
    for use in (lambda: again.get(range(300)), lambda: again.put([(7, "y")])):
        with pytest.raises(UserError, match="cannot be used as a cache .*: delete it, or name another file"):
            use()
    again.close()
