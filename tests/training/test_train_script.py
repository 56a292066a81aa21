"""`python train.py` from outside: exit status, messages, and how soon they come."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from engram.config import Config
from engram.training.trainer import Trainer

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Config], str]:
    def write(config: Config) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return str(path)

    return write


def train(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **variables})


def test_help_shows_examples_and_exit_status() -> None:
    done = train("--help")
    assert done.returncode == 0
    for part in ("CONFIG", "a.b=c", "python train.py configs/quickstart.yaml train.steps=50", "130  interrupted"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rate=1"], "optim.learning_rate: unknown key (value 1)"),
        (["train.steps=0"], "train.steps"),
        (["train.stpes"], "'train.stpes' is not of the form a.b=value"),
    ],
)
def test_a_bad_config_is_status_2_with_one_message(
    make_config: MakeConfig, write: Callable[[Config], str], overrides: list[str], message: str
) -> None:
    done = train(write(make_config()), *overrides)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_file_is_status_2() -> None:
    done = train("configs/absent.yaml")
    assert (done.returncode, done.stderr) == (
        2,
        "error: configs/absent.yaml: cannot be read: No such file or directory\n",
    )


def test_a_bad_config_does_not_wait_for_torch(make_config: MakeConfig, write: Callable[[Config], str]) -> None:
    script = (
        "import sys, train; status = train.main(sys.argv[1:]); "
        "sys.exit(status if not {'torch', 'numpy'} & set(sys.modules) else 99)"
    )
    command = [sys.executable, "-c", script, write(make_config()), "no.such.key=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr


def test_a_user_error_after_the_config_is_status_2(make_config: MakeConfig, write: Callable[[Config], str]) -> None:
    config = make_config(train={"steps": 1})
    Trainer(config).fit()
    other = train(write(config), "train.steps=2")
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert other.stderr.startswith("error: ") and "train.steps: 1 -> 2" in other.stderr
    again = train(write(config))
    assert again.returncode == 0 and "is finished after step 1: nothing to do" in again.stderr


def test_stop_after_behind_the_run(make_config: MakeConfig, write: Callable[[Config], str]) -> None:
    config = make_config(train={"steps": 6, "stop_after": 4})
    assert "stopped after step 4, as train.stop_after says" in train(write(config)).stderr
    again = train(write(config), "train.stop_after=2")
    assert again.returncode == 0 and "stopped after step 4, beyond train.stop_after" in again.stderr


def test_divergence_is_status_3(make_config: MakeConfig, write: Callable[[Config], str]) -> None:
    # A learning rate at which float32 overflows within a few steps.
    done = train(write(make_config(optim={"lr": 1e30, "schedule": {"warmup_steps": 0}, "muon": None})))
    assert done.returncode == 3, done.stderr
    assert "diverged" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_is_status_130(make_config: MakeConfig, write: Callable[[Config], str], tmp_path: Path) -> None:
    config = make_config(train={"steps": 10_000, "checkpoint_every": 10_000, "eval_every": 10_000})
    command = [sys.executable, str(ROOT / "train.py"), write(config)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    path = Path(config.run_dir) / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert (Path(config.run_dir) / "latest").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_status_130(
    make_config: MakeConfig, write: Callable[[Config], str], number: signal.Signals
) -> None:
    config = make_config()
    command = [sys.executable, str(ROOT / "train.py"), write(config)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (Path(config.run_dir) / "lock").exists():
        time.sleep(0.005)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.startswith("interrupted at once") and not Path(config.run_dir).exists()


def test_a_signal_ends_the_wait_for_other_ranks(make_config: MakeConfig, write: Callable[[Config], str]) -> None:
    config = make_config(distributed={})
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    start = "world.TOLD_AFTER = 0.5; sys.exit(train.main())"
    script = f"import sys, train; from engram.distributed import world; {start}"
    command = [sys.executable, "-c", script, write(config)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | alone, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("rank 0 waits for the others of 2 ranks to start" in line for line in lines)
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error.startswith("interrupted at once")
    assert not Path(config.run_dir).exists()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_the_run_folder_does_not_wait_for_torch(make_config: MakeConfig, write: Callable[[Config], str]) -> None:
    config = make_config(train={"steps": 1})
    Trainer(config).fit()
    script = (
        "import sys, train; status = train.main(sys.argv[1:]); "
        "sys.exit(status if not {'torch', 'numpy'} & set(sys.modules) else 99)"
    )
    for override, status in (("seed=5", 0), ("seed=6", 2)):
        command = [sys.executable, "-c", script, write(config), override]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
