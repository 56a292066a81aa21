"""`train.py --dry-run`: a plan on standard output, at once; a message and exit 2 where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest

import train as train_script
from engram.config import load_config
from engram.model.accounting import count_parameters

ROOT = Path(train_script.__file__).parent
CONFIGS = ROOT / "configs/cluster"


@pytest.mark.parametrize(("name", "memory"), [("engram_27b", 5.79e9), ("engram_40b", 18.5e9)])
@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_the_papers_models_on_clusters(
    name: str, memory: float, ranks: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # 1,280 sequences are no multiple of 512.
    batch = ["train.batch_size=2048", "train.micro_batch_size=4"] if ranks == 512 else []
    command = [str(CONFIGS / f"{name}.yaml"), *batch, f"run_dir={tmp_path / 'run'}", "--dry-run", "--ranks", str(ranks)]
    assert train_script.main(command) == 0
    text = capsys.readouterr().out
    assert f"{ranks} ranks, ZeRO 3" in text
    # Entries of all tables together, 80 in a row.
    lines = [line for line in text.splitlines() if line.startswith("table of block")][:2]
    rows = [int(line.split()[4].replace(",", "")) for line in lines]
    assert 80 * sum(rows) == pytest.approx(memory, rel=0.01)
    assert 80 * sum(rows) == count_parameters(load_config(CONFIGS / f"{name}.yaml").model).memory
    fits = "fits into a device of 80 GB"
    assert (f"it {fits}" in text) == (ranks >= 64)
    assert ("A rank holds less with more ranks" in text) == (ranks < 64)
    assert not (tmp_path / "run").exists()


def test_a_plan_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(CONFIGS / "engram_27b.yaml"), "--dry-run", "--ranks", "7"]
    assert train_script.main(command) == 2
    captured = capsys.readouterr()
    assert "train.batch_size 1280 cannot be shared equally by 7 ranks: make it a multiple of 7" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--ranks", "0"], "'0' is no number of ranks: give 1 or more"),
        (["--link-gbps", "-3"], "'-3' is not a number above 0"),
        (["--device-tflops", "fast"], "'fast' is not a number above 0"),
    ],
)
def test_odd_options(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_script.main([str(CONFIGS / "engram_27b.yaml"), "--dry-run", *options])
    assert complaint in capsys.readouterr().err


def test_options_of_a_plan_start_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--ranks", "4"], ["--device-gb", "40"]):
        with pytest.raises(SystemExit, match="2"):
            train_script.main([str(CONFIGS / "engram_27b.yaml"), *options])
        assert f"{options[0]} belongs to a plan that is not started: give --dry-run too" in capsys.readouterr().err


def test_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys, train; status = train.main(['configs/cluster/engram_27b.yaml', '--dry-run', '--ranks', '64']); "
        "heavy = {'torch', 'deepspeed', 'transformers', 'pyarrow'} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
