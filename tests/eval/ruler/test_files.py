"""Samples on disk: written once, read again as long as everything they were made of is the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from engram.config import UserError
from eval.ruler.files import MANIFEST, make_samples, settings
from eval.ruler.tasks import Sources, all_tasks, choose
from tests.eval.pieces import Pieces

TASKS = choose(all_tasks("tiny", Sources()), ("niah_single_1", "vt"))


def wanted(**changes: Any) -> dict[str, Any]:
    given = {"profile": "tiny", "tasks": TASKS, "lengths": (200, 300), "samples": 3, "seed": 0, "digest": "d"}
    return settings(**(given | changes), given=Sources())  # type: ignore[arg-type]


def test_samples_are_written_once_and_read_again(tmp_path: Path) -> None:
    told: list[int] = []
    made = make_samples(tmp_path, TASKS, Pieces(), wanted(), told.append)
    assert told == [3, 3, 3, 3]
    assert [one.id for one in made[:4]] == [
        "niah_single_1/200/0",
        "niah_single_1/200/1",
        "niah_single_1/200/2",
        "niah_single_1/300/0",
    ]
    lines = (tmp_path / "vt_300.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["vt/300/0", "vt/300/1", "vt/300/2"]
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["tokenizer"] == "d" and len(manifest["files"]) == 4
    pieces = Pieces()
    assert make_samples(tmp_path, TASKS, pieces, wanted()) == made
    assert pieces.encoded == 0


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"digest": "e"}, {"lengths": (200,)}, {"samples": 4}, {"profile": "full"}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_make_other_samples(changes: dict[str, Any], tmp_path: Path) -> None:
    make_samples(tmp_path, TASKS, Pieces(), wanted())
    pieces = Pieces()
    made = make_samples(tmp_path, TASKS, pieces, wanted(**changes))
    assert pieces.encoded > 0
    assert len(made) == 2 * len(changes.get("lengths", (1, 2))) * changes.get("samples", 3)
    assert make_samples(tmp_path, TASKS, Pieces(), wanted(**changes)) == made


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    made = make_samples(tmp_path, TASKS, Pieces(), wanted())
    path = tmp_path / "vt_200.jsonl"
    text = path.read_text()
    path.write_text(text.replace("vt/200/1", "vt/200/9"))
    assert make_samples(tmp_path, TASKS, Pieces(), wanted()) == made
    assert path.read_text() == text
    (tmp_path / MANIFEST).write_text("{")
    assert make_samples(tmp_path, TASKS, Pieces(), wanted()) == made


def test_nothing_is_written_where_a_sample_does_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    with pytest.raises(UserError, match="its smallest sample 0 takes"):
        make_samples(folder, TASKS, Pieces(), wanted(lengths=(40,)))
    assert not folder.exists()
