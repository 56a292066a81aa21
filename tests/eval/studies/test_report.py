"""`report --checkpoint`: every study that the models allow on one page, and nothing is made twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.studies.plan import Wanted, plan

STUDIES = ["perplexity", "logit_lens", "cka", "depth", "gates", "sensitivity"]


def arguments(run: Path, baseline: Path, out: Path, *more: object) -> list[str]:
    given = ["report", "--checkpoint", run, "--baseline", baseline, "--out", out, "--device", "cpu", "--threads", 1]
    return [str(one) for one in (*given, "--tokens", 300, *more)]


@pytest.fixture(scope="module")
def out(run_folder: Path, baseline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "out"
    assert main(arguments(run_folder, baseline_folder, folder)) == 0
    return folder


def test_the_page_holds_every_study_and_its_files_stand_beside_it(out: Path) -> None:
    html = (out / "index.html").read_text(encoding="utf-8")
    states = json.loads((out / "provenance.json").read_text())["studies"]
    assert list(states) == STUDIES
    # The corpus has no names, so that there are no positions to compare layers at: the page says so.
    assert "no entity found" in states.pop("cka") and "Similarity of layers: not made: " in html
    assert set(states.values()) == {"made"}
    for title in ("Perplexity", "LogitLens", "Effective depth", "Memory gates", "Sensitivity to memory"):
        assert f">{title}</h2>" in html and f">{title}</a>" in html
    for figure in ("perplexity/loss_by_place", "logit_lens/logit_lens", "depth/measures", "gates/gates_by_stream"):
        assert all((out / f"{figure}.{kind}").is_file() for kind in ("png", "pdf", "svg", "csv"))
    assert "Facts are asked of models that were all trained on a world" in html
    assert "http" not in html and "<script" not in html


def test_nothing_is_made_twice(
    out: Path, run_folder: Path, baseline_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded again")

    for module in ("lens", "depth", "sensitivity"):
        monkeypatch.setattr(f"eval.{module}.study.load", refuse)
    monkeypatch.setattr("eval.studies.perplexity.load", refuse)
    monkeypatch.setattr("eval.studies.plan.load", refuse)
    assert main(arguments(run_folder, baseline_folder, out)) == 0
    states = json.loads((out / "provenance.json").read_text())["studies"]
    assert [name for name, state in states.items() if state == "kept"] == [n for n in STUDIES if n != "cka"]
    assert "logit_lens: finished earlier from these checkpoints and options; kept" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="loaded again"):
        main(arguments(run_folder, baseline_folder, out, "--level", 0.8))
    # Another checkpoint of the same run.
    with pytest.raises(AssertionError, match="loaded again"):
        main(arguments(run_folder / "step_000006", baseline_folder, out))


def test_what_models_allow(run_folder: Path, baseline_folder: Path) -> None:
    wanted = Wanted(None, 300, 0.9, 0, "cpu", 1)

    def names(**sides: Path) -> tuple[list[str], int]:
        found = plan({side: [str(path)] for side, path in sides.items()}, wanted)
        return [study.name for study in found.studies], len(found.left_out)

    assert names(a=run_folder, b=baseline_folder) == (STUDIES, 1)
    assert names(a=run_folder) == ([name for name in STUDIES if name != "cka"], 2)
    assert names(a=baseline_folder) == (["perplexity", "logit_lens", "depth"], 4)
    both = [*STUDIES[:4], "gates", "gates_baseline", "sensitivity", "sensitivity_baseline"]
    assert names(a=run_folder, b=run_folder / "step_000006") == (both, 1)
    swapped = [*STUDIES[:4], "gates_baseline", "sensitivity_baseline"]
    assert names(a=baseline_folder, b=run_folder) == (swapped, 1)


def test_mistakes_are_one_message(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(run_folder), str(tmp_path / "out")
    (tmp_path / "file").write_text("")
    cases = {
        ("report", "--checkpoint", run): "name it with --out DIR",
        ("report", "--checkpoint", run, "--out", f"{out}.html"): "name a folder with --out",
        ("report", "--checkpoint", run, "--out", str(tmp_path / "file")): "is a file: name a folder with --out",
        ("report", run, "--baseline", run): "--baseline belongs to --checkpoint",
        ("report", "--checkpoint", run, "--out", out, "--data", str(tmp_path)): "is not a prepared data folder",
        ("report", "--checkpoint", run, "--baseline", run, "--name", "x", "--baseline-name", "x", "--out", out): (
            "both sides are called 'x'"
        ),
        ("report", "--checkpoint", run, "--out", out, "--tokens", "1", "--device", "cpu"): "allow more tokens",
    }
    for given, message in cases.items():
        assert main(given) == 2, given
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error, given
    for given in (["report", run, "--checkpoint", run], ["report", "--out", out]):
        with pytest.raises(SystemExit) as end:
            main(given)
        assert end.value.code == 2


def test_a_study_belongs_to_what_its_checkpoints_and_data_hold(
    run_folder: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    """The same paths with other contents are other studies; threads and device are not."""
    checkpoint, data = tmp_path / "checkpoint", tmp_path / "data"
    shutil.copytree(run_folder / "step_000012", checkpoint)
    shutil.copytree(prepared_folder, data)

    def identities(**changes: object) -> list[object]:
        wanted = replace(Wanted(str(data), 300, 0.9, 0, "cpu", 1), **changes)
        return [study.identity for study in plan({"model": [str(checkpoint)]}, wanted).studies]

    first = identities()
    assert identities() == first and identities(threads=2, device="auto") == first
    for change in (dict(tokens=301), dict(level=0.8), dict(seed=1)):
        assert all(one != other for one, other in zip(first, identities(**change), strict=True))
    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    second = identities()
    assert all(one != other for one, other in zip(first, second, strict=True))
    shutil.rmtree(checkpoint)
    shutil.copytree(run_folder / "step_000006", checkpoint)
    assert all(one != other for one, other in zip(second, identities(), strict=True))
