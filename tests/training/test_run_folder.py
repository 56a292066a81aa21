import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from engram.config import Config
from engram.training.files import unfinished
from engram.training.provenance import origin, provenance
from engram.training.run_folder import RunFolder, RunFolderError, differences

MakeConfig = Callable[..., Config]


def start(config: Config) -> Path:
    with RunFolder(config) as folder:
        folder.start({})
    return folder.path


def test_a_folder_in_use_names_the_process(make_config: MakeConfig) -> None:
    config = make_config()

    def second() -> None:
        with (
            pytest.raises(RunFolderError, match=f"in use by process {os.getppid()} on {socket.gethostname()}: wait"),
            RunFolder(config),
        ):
            pass

    with RunFolder(config):
        child = multiprocessing.get_context("fork").Process(target=second)
        child.start()
        child.join()
        assert child.exitcode == 0
    # Given back at the end.
    with RunFolder(config):
        pass


def test_a_killed_process_gives_its_lock_back(make_config: MakeConfig) -> None:
    config = make_config()

    def killed() -> None:
        RunFolder(config).__enter__()
        os.kill(os.getpid(), 9)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -9
    with RunFolder(config):
        pass


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"steps": 10}}, ["train.steps: 9 -> 10"]),
        ({"optim": {"lr": 0.1}}, ["optim.lr: 0.003 -> 0.1"]),
        ({"model": {"memory": None}}, ["model.memory: {", "... -> null"]),
        ({"train": {"steps": 10, "log_every": 5}, "seed": 6}, ["train.steps: 9 -> 10", "seed: 5 -> 6"]),
    ],
)
def test_another_config_is_refused_with_the_settings_that_differ(
    make_config: MakeConfig, changes: dict, told: list[str]
) -> None:
    start(make_config())
    with pytest.raises(RunFolderError) as caught, RunFolder(make_config(**changes)):
        pass
    message = str(caught.value)
    assert [part for part in told if part not in message] == []
    assert "choose another run_dir" in message and "log_every" not in message


def test_settings_that_change_no_weight_may_change(make_config: MakeConfig) -> None:
    start(make_config())
    changes = {
        "train": {"stop_after": 4, "log_every": 7, "keep_checkpoints": 9, "wandb": {"project": "other"}},
        "eval": {"prompt": "Else"},
    }
    with RunFolder(make_config(**changes)) as folder:
        assert folder.rounding_changes == []
    # The folder's config is that of the latest start.
    start(make_config(**changes, data={"prefetch": 0}))
    assert "prompt: Else" in (folder.path / "config.yaml").read_text()


def test_a_run_that_never_started_binds_nothing(make_config: MakeConfig) -> None:
    """As where a wrong setting came to light while the model was built."""
    with RunFolder(make_config()):
        pass
    start(make_config(seed=6))
    with pytest.raises(RunFolderError, match="seed: 6 -> 5"), RunFolder(make_config()):
        pass


def test_settings_that_change_rounding_are_reported(make_config: MakeConfig) -> None:
    start(make_config())
    with RunFolder(make_config(train={"threads": 2, "micro_batch_size": 2})) as folder:
        assert folder.rounding_changes == ["train.micro_batch_size: null -> 2", "train.threads: 1 -> 2"]


def test_a_config_of_other_code_is_refused(make_config: MakeConfig) -> None:
    path = start(make_config()) / "config.yaml"
    path.write_text(path.read_text() + "retired_setting: 3\n")
    with pytest.raises(RunFolderError, match="retired_setting.*\n.*code.json"), RunFolder(make_config()):
        pass


def test_leftovers_are_cleared_under_the_lock(make_config: MakeConfig) -> None:
    with RunFolder(make_config()) as folder:
        unfinished(folder.path / "step_000003").mkdir()
    with RunFolder(make_config()) as folder:
        assert folder.leftovers == [".unfinished_step_000003"]


def test_finished_runs_are_recognised(make_config: MakeConfig) -> None:
    with RunFolder(make_config()) as folder:
        assert folder.finished is None
        folder.finish({"step": 9, "val_loss": 1.25})
    with RunFolder(make_config()) as folder:
        assert folder.finished == {"step": 9, "val_loss": 1.25}


def test_a_folder_that_cannot_be_written(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunFolderError, match="cannot be written .* choose another"),
        RunFolder(make_config(run_dir=str(tmp_path / "file" / "run"))),
    ):
        pass


def test_code_json_keeps_every_start_and_one_id(make_config: MakeConfig) -> None:
    with RunFolder(make_config()) as folder:
        ids = {folder.start({"threads": count}) for count in (1, 2)}
    starts = json.loads((folder.path / "code.json").read_text())["starts"]
    assert [start["threads"] for start in starts] == [2, 1]
    assert {start["run_id"] for start in starts} == ids and len(ids) == 1
    assert starts[0]["python"] and starts[0]["torch"] and starts[0]["cpu"]


def test_provenance_tells_uncommitted_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"rev-parse": "abc\n", "diff": ""}
    monkeypatch.setattr("engram.training.provenance._git", lambda command, *_: outputs[command])
    assert (provenance()["commit"], provenance()["uncommitted_sha256"]) == ("abc", None)
    outputs["diff"] = "abc"
    # sha256 of "abc".
    assert provenance()["uncommitted_sha256"].startswith("ba7816bf8f01cfea")


def test_an_origin_names_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/somebody/eval/__main__.py", "facts", "--certify"])
    assert origin()["command"] == ["facts", "--certify"] and "host" not in origin()
    assert origin().keys() | {"host"} == provenance().keys()


def test_differences_go_as_deep_as_both_sides() -> None:
    old = {"a": 1, "b": {"c": [1], "d": None}, "e": {"f": 1}}
    new = {"a": 1, "b": {"c": [2], "d": {"x": 1}}, "e": None, "g": 0}
    assert differences(old, new) == {
        "b.c": "b.c: [1] -> [2]",
        "b.d": 'b.d: null -> {"x": 1}',
        "e": 'e: {"f": 1} -> null',
        "g": "g: null -> 0",
    }


def test_a_home_folder_is_found(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder(make_config(run_dir="~/runs/a")).path == tmp_path / "runs" / "a"


def test_a_folder_of_something_else_is_left_alone(make_config: MakeConfig) -> None:
    config = make_config()
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="holds files, but no run"), RunFolder(config):
        pass
    assert [path.name for path in Path(config.run_dir).iterdir()] == ["thesis.tex"]


def test_without_its_config_a_run_is_what_its_checkpoint_says(make_config: MakeConfig) -> None:
    path = start(make_config())
    (path / "step_000003").mkdir()
    (path / "config.yaml").rename(path / "step_000003" / "config.yaml")
    with pytest.raises(RunFolderError, match="seed: 5 -> 6"), RunFolder(make_config(seed=6)):
        pass
    with RunFolder(make_config()):
        pass


def test_a_failed_start_leaves_only_what_was_there(make_config: MakeConfig) -> None:
    config = make_config()
    path = Path(config.run_dir)

    def fail() -> None:
        with pytest.raises(KeyError), RunFolder(config):
            (path / "log.txt").write_text("why")
            raise KeyError

    fail()
    assert not path.exists()
    path.mkdir()
    fail()
    assert {child.name for child in path.iterdir()} == {"lock", "log.txt"}


def test_a_disk_that_takes_no_lock(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    config = make_config()
    with pytest.raises(RunFolderError, match="cannot be written .No space left"), RunFolder(config):
        pass
    assert not Path(config.run_dir).exists()
