"""Where a result came from: code, versions, command and machine. Imports no torch."""

import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Commit, digest of uncommitted changes, versions, command and machine of this process."""
    commit = _git("rev-parse", "HEAD")
    diff = _git("diff", "HEAD")
    return {
        "commit": commit.strip() if commit else None,
        "uncommitted_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "numpy": importlib.metadata.version("numpy"),
        "host": socket.gethostname(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
    }


def origin() -> dict[str, Any]:
    """Provenance of a result that is passed on: no name of the host, and of the command what was asked for."""
    facts = provenance()
    return {key: value for key, value in facts.items() if key != "host"} | {"command": sys.argv[1:]}


def cpu_name() -> str:
    """Model name of the processor, as the operating system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str | None:
    """Output of a git command on this package's checkout, or None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=10, text=True, errors="replace").stdout
    except (OSError, subprocess.SubprocessError):
        return None
