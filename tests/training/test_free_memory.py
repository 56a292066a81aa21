"""Free memory as a container sees it."""

from pathlib import Path

import pytest
import torch

from engram.training import free_memory as module
from engram.training.free_memory import container_memory, free_memory

CPU = torch.device("cpu")
MIB = 2**20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(folder: str, limit: int | str, use: int, files: int = 0) -> dict[str, str]:
    group = f"sys/fs/cgroup/{folder}"
    return {
        f"{group}/memory.max": f"{limit}\n",
        f"{group}/memory.current": f"{use}\n",
        f"{group}/memory.stat": f"anon {use - files}\nfile {files}\ninactive_file {files // 2}\n"
        f"active_file {files - files // 2}\nshmem 0\n",
    }


def version_1(folder: str, limit: int, use: int, files: int = 0) -> dict[str, str]:
    group = f"sys/fs/cgroup/memory/{folder}"
    return {
        f"{group}/memory.limit_in_bytes": f"{limit}\n",
        f"{group}/memory.usage_in_bytes": f"{use}\n",
        f"{group}/memory.stat": f"cache 1\nrss 2\ninactive_file 0\ntotal_inactive_file {files}\ntotal_active_file 0\n",
    }


UNLIMITED_1 = 9223372036854771712
V1_LINES = "4:cpu,cpuacct:/jobs/7\n3:memory:/jobs/7\n1:name=systemd:/\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        # Inside a container the process's group is the root; what files occupy can be had back.
        ("0::/\n", version_2("", 512 * MIB, 200 * MIB, files=50 * MIB), 362 * MIB),
        ("0::/\n", version_2("", "max", 200 * MIB), None),
        ("0::/\n", version_2("", 100 * MIB, 200 * MIB), 0),
        # On a machine: the limits of all groups above bind too.
        (
            "0::/jobs/7\n",
            {**version_2("jobs", 300 * MIB, 250 * MIB), **version_2("jobs/7", 200 * MIB, 100 * MIB)},
            50 * MIB,
        ),
        (
            "0::/jobs/7\n",
            {**version_2("jobs", "max", 250 * MIB), **version_2("jobs/7", 200 * MIB, 100 * MIB)},
            100 * MIB,
        ),
        # A path of the host, of which the container sees only its own group.
        ("0::/docker/abc\n", version_2("", 512 * MIB, 12 * MIB), 500 * MIB),
        (
            V1_LINES,
            {**version_1("", UNLIMITED_1, 900 * MIB), **version_1("jobs/7", 400 * MIB, 300 * MIB, files=10 * MIB)},
            110 * MIB,
        ),
        ("4:memory:/docker/abc\n", version_1("", 400 * MIB, 300 * MIB), 100 * MIB),
        # Another system, and files that hold something else.
        ("", {}, None),
        ("0::/\n", {}, None),
        ("0::/\n", {**version_2("", 512 * MIB, 200 * MIB), "sys/fs/cgroup/memory.current": "?"}, None),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, membership: str, files: dict[str, str], expected: int | None) -> None:
    root = write(tmp_path, {"proc/self/cgroup": membership, **files})
    assert container_memory(root) == expected


def test_the_tighter_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "container_memory", lambda: None)
    machine = free_memory(CPU)
    assert machine is not None and machine > MIB
    monkeypatch.setattr(module, "container_memory", lambda: MIB)
    assert free_memory(CPU) == MIB
    monkeypatch.setattr(module, "container_memory", lambda: 2**62)
    assert MIB < free_memory(CPU) < 2**62
