"""The command line: answers, exit statuses, and one message for what the user got wrong."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engram.data.shards import Dataset
from eval.__main__ import TASKS, main

HELP = """
import runpy, sys
sys.argv = ["eval", "--help"]
try:
    runpy.run_module("eval", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "matplotlib"} & set(sys.modules)
"""


def test_help_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, command in TASKS.items():
        # One line for each: the name, and what it does.
        assert re.search(rf"^ +{name}\s+\S", done.stdout, re.MULTILINE), name
        assert command.HELP in " ".join(done.stdout.split()), name


@pytest.mark.parametrize("task", TASKS)
def test_every_option_says_what_it_does(task: str) -> None:
    parser = argparse.ArgumentParser()
    TASKS[task].add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_perplexity_as_json(run_folder: Path, prepared_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["perplexity", "--checkpoint", str(run_folder), "--tokens", "320", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    done = json.loads((run_folder / "done.json").read_text())
    assert found["loss"] == pytest.approx(done["val_loss"], abs=2e-6)
    assert found["step"] == 12 and found["data"] == str(prepared_folder) and found["split"] == "validation"


def test_perplexity_of_the_train_split(run_folder: Path, prepared_folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["perplexity", "--checkpoint", str(run_folder / "step_000006"), "--split", "train", "--device", "cpu"]
    assert main([*arguments, "--data", str(prepared_folder), "--sequence-length", "64", "--dtype", "bfloat16"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    dataset = Dataset(prepared_folder, "train")
    tokens = (dataset.num_tokens - 1) // 64 * 64
    ignored = sum(0 < start <= tokens for start in dataset.documents.tolist())
    assert lines["targets"] == f"{tokens - ignored:,}" and lines["step"] == "6"


def test_generate(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "generate",
        "--checkpoint",
        str(run_folder),
        "--prompt",
        "the people",
        "--tokens",
        "7",
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--samples", "2", "--top-k", "9", "--top-p", "0.9"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("the people") and first.count("the people") >= 2 and "\n---\n" in first
    assert main([*arguments, "--samples", "2", "--top-k", "9", "--top-p", "0.9"]) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--temperature", "0"]) == 0


def test_gates(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "gates.html"
    arguments = ["gates", "--checkpoint", str(run_folder), "--text", "the union", "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "gates.csv")]
    assert "http" not in out.read_text() and "layer 1, stream 1" in out.read_text()


def test_ngram(prepared_folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["ngram", "--data", str(prepared_folder), "--sequence-length", "16", "--tokens", "160", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trigram"] < found["bigram"] < found["unigram"] and found["targets"] <= 160


def test_report(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(run_folder), "--out", str(out), "--device", "cpu"]) == 0
    assert (tmp_path / "page_figures" / "loss.png").exists()
    assert out.exists() and f"report: {out}" in capsys.readouterr().out


def test_user_errors_are_one_message(
    run_folder: Path, prepared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run_folder / "step_000012", damaged)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    run, data, config = str(run_folder), str(prepared_folder), (run_folder / "config.yaml").read_text()
    cases = {
        ("perplexity", "--checkpoint", str(tmp_path / "none")): "does not exist",
        ("perplexity", "--checkpoint", str(damaged)): "is damaged",
        ("perplexity", "--checkpoint", run, "--data", str(tmp_path)): "is not a prepared data folder",
        ("generate", "--checkpoint", run, "--prompt", ""): "the text is empty",
        ("generate", "--checkpoint", run, "--prompt", "a", "--temperature", "-1"): "temperature is -1.0",
        ("generate", "--checkpoint", run, "--prompt", "a", "--temperature", "nan"): "temperature is nan",
        ("generate", "--checkpoint", run, "--prompt", "a\udce9"): "character 1 is '\\udce9', half of a surrogate pair",
        ("gates", "--checkpoint", run, "--text", "a", "--out", str(tmp_path)): "is a folder: name a file with --out",
        ("gates", "--checkpoint", run, "--text", "a", "--out", f"{damaged}/state.json/g.html"): "cannot be written",
        ("report", run, "--out", str(tmp_path)): "is a folder: name a file with --out",
        ("gates", "--checkpoint", run, "--text", "a", "--out", f"{tmp_path}/g.csv"): "g.html",
        ("gates", "--checkpoint", run, "--text", "a", "--out", f"{tmp_path}/gates"): "a page is an .html file: name",
        ("report", run, "--out", f"{run}/config.yaml"): "config.yaml: a page is an .html file: name one with --out",
        ("perplexity", "--checkpoint", run, "--tokens", "31"): "--tokens is 31, less than one row of --sequence-length",
        ("perplexity", "--checkpoint", run, "--sequence-length", "99999"): "but one row of --sequence-length 99,999",
        ("ngram", "--data", data, "--tokens", "5"): "--tokens is 5, less than one row of --sequence-length 1,024",
        ("ngram", "--data", data, "--sequence-length", "99999"): "lower it, or give other --data",
        ("gates", "--checkpoint", run, "--text", "", "--out", str(tmp_path / "g.html")): "the text is empty",
        ("ngram", "--data", str(tmp_path)): "is not a prepared data folder",
        ("report", str(tmp_path)): "is not a run folder",
    }
    for arguments, message in cases.items():
        assert main(arguments) == 2, arguments
        out = capsys.readouterr()
        assert out.err.startswith("error: ") and message in out.err and "Traceback" not in out.err, arguments
        assert not out.out
        # The page of a refused name is not written, nor is anything beside it.
        assert {path.name for path in tmp_path.iterdir()} == {"damaged"}
    assert (run_folder / "config.yaml").read_text() == config


def test_a_place_that_cannot_be_written(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "page.html")

    monkeypatch.setattr(Path, "replace", refuse)
    for arguments in (
        ["report", str(run_folder)],
        ["gates", "--checkpoint", str(run_folder), "--text", "the union"],
    ):
        assert main([*arguments, "--device", "cpu", "--out", str(tmp_path / "page.html")]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "page.html: cannot be written: [Errno 13] Permission denied" in message
    assert {path.name for path in tmp_path.iterdir()} <= {"page_figures"}


def test_damaged_data_is_never_measured(
    run_folder: Path, prepared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(prepared_folder, folder)
    shard = folder / "validation_000.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    for arguments in (["ngram"], ["perplexity", "--checkpoint", str(run_folder)]):
        assert main([*arguments, "--data", str(folder)]) == 2
        assert "validation_000.bin: its sha256 is " in capsys.readouterr().err


def test_an_interrupt(prepared_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.ngram.measure", interrupt)
    assert main(["ngram", "--data", str(prepared_folder), "--sequence-length", "16"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves(prepared_folder: Path) -> None:
    command = [sys.executable, "-m", "eval", "ngram", "--data", str(prepared_folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_data_of_another_tokenizer(run_folder: Path, workplace: Path, capsys: pytest.CaptureFixture) -> None:
    from engram.data.prepare import prepare
    from tests.eval.conftest import tiny_config

    other = workplace / "other"
    prepare(tiny_config(workplace, "other", **{"data.path": str(other), "model.vocab_size": "310"}))
    assert main(["perplexity", "--checkpoint", str(run_folder), "--data", str(other)]) == 2
    message = capsys.readouterr().err
    assert "was prepared with tokenizer" in message and "--data" in message


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["perplexity"], ["ngram", "--data", "x", "--tokens", "0"], ["report"]]
    + [["generate", "--checkpoint", "x", "--prompt", "a", "--seed", seed] for seed in ("-1", "4294967296", "x")],
)
def test_wrong_usage_is_status_two(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_nearest_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["logit_len", "--checkpoint", "x"])
    assert ended.value.code == 2
    assert "there is no task 'logit_len': did you mean logit_lens? (tasks are report, " in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/deeper/out"])
def test_an_out_that_cannot_be_is_told_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    # No checkpoint is there: that would be told next.
    where = ["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / place)]
    for task in (["logit_lens"], ["sensitivity"], ["ruler"], ["suite", "configs/eval/tiny.yaml"]):
        assert main([*task, *where]) == 2
        assert f"{tmp_path / 'file'}" in (told := capsys.readouterr().err) and "is a file: name a" in told.replace(
            "another", "a"
        )
