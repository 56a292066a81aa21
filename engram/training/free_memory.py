"""How much memory is free: of a GPU, of the machine, and below the limits of containers and batch systems."""

from pathlib import Path

import torch

# Files of a control group, version 2 and version 1: limit, use, and the part of the use that files occupy which the
# kernel gives up when memory is short.
_VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the operating system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [free for free in (_machine_memory(), container_memory()) if free is not None]
    return min(known, default=None)


def container_memory(root: Path = Path("/")) -> int | None:
    """Bytes left below the tightest limit of this process's control groups; None where there is no limit.

    Containers and batch systems kill a process that exceeds it, however much memory the machine has. `root`: where
    /proc and /sys are found.
    """
    left = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = mounted / path.lstrip("/")
        # A group is bound by the limits of all groups above it. Inside a container the path may be one outside of it,
        # which does not exist; then the container's own group is what is mounted.
        groups = [folder for folder in (group, *group.parents) if folder.is_relative_to(mounted)]
        left += [free for folder in groups if (free := _left_in(folder, version_1=bool(controllers))) is not None]
    return min(left, default=None)


def _left_in(group: Path, version_1: bool) -> int | None:
    limit_name, use_name, file_names = _VERSION_1 if version_1 else _VERSION_2
    limit, use = _read(group / limit_name).strip(), _read(group / use_name).strip()
    # Version 2 writes "max" for no limit, version 1 a number beyond any memory.
    if not limit.isdecimal() or not use.isdecimal():
        return None
    statistics = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    reclaimable = sum(int(statistics.get(name, 0)) for name in file_names)
    return max(0, int(limit) - int(use) + reclaimable)


def _machine_memory() -> int | None:
    lines = _read(Path("/proc/meminfo")).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _read(path: Path) -> str:
    """The file's text; nothing where it is not there or not ours to read."""
    try:
        return path.read_text()
    except OSError:
        return ""
