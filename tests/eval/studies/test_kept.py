"""A finished study is taken as it is; another identity, an altered page or an interruption makes it again."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engram.report.page import Page
from eval.studies.kept import Study, made


def a_study(calls: list[Path], **identity: object) -> Study:
    def make(folder: Path, console: Console) -> list[str]:
        calls.append(folder)
        page = Page("Title")
        page.text(f"made {len(calls)} times")
        page.write(folder / "page.html")
        return [f"line {len(calls)}"]

    return Study("name", "Title", "page.html", identity, make)


def test_a_finished_study_is_kept(tmp_path: Path) -> None:
    calls: list[Path] = []
    console = Console(file=io.StringIO())
    first = made(a_study(calls, tokens=5), tmp_path, console)
    assert not first.kept and first.lines == ["line 1"] and calls == [tmp_path / "name"]
    again = made(a_study(calls, tokens=5), tmp_path, console)
    assert again.kept and again.lines == ["line 1"] and again.page.render() == first.page.render()
    other = made(a_study(calls, tokens=6), tmp_path, console)
    assert not other.kept and "made 2 times" in other.page.render()
    # The folder now is of the other identity.
    assert not made(a_study(calls, tokens=5), tmp_path, console).kept
    assert len(calls) == 3


def test_an_altered_or_missing_page_is_made_again(tmp_path: Path) -> None:
    calls: list[Path] = []
    console = Console(file=io.StringIO())
    made(a_study(calls), tmp_path, console)
    page = tmp_path / "name" / "page.html"
    page.write_text(page.read_text().replace("made 1", "made 9"))
    assert "made 2 times" in made(a_study(calls), tmp_path, console).page.render()
    page.unlink()
    assert not made(a_study(calls), tmp_path, console).kept and len(calls) == 3


def test_an_interrupted_study_is_not_finished(tmp_path: Path) -> None:
    calls: list[Path] = []
    console = Console(file=io.StringIO())
    whole = a_study(calls, tokens=1)
    made(whole, tmp_path, console)

    def stop(folder: Path, _: Console) -> list[str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(replace(whole, identity={"tokens": 2}, make=stop), tmp_path, console)
    # Half of it may be written over: not even the first one is there any more.
    assert not made(whole, tmp_path, console).kept
