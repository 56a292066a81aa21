"""C sources beside the operations, built for this processor at first use and kept in the user's cache folder."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")


class NativeUnavailable(RuntimeError):
    """A native implementation was asked for and cannot be had; the message says why."""


@functools.cache
def load_library(source: Path) -> ctypes.CDLL:
    """The shared library of one C file. Raises NativeUnavailable: no compiler, or it failed."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NativeUnavailable(f"{source.name} needs a C compiler, and neither cc nor gcc was found")
    recipe = (source.read_text(), compiler, *FLAGS, platform.machine(), _processor())
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    library = _cache_folder() / f"{source.parent.name}_{digest}.so"
    if not library.exists():
        _build(compiler, source, library)
    return ctypes.CDLL(str(library))


@functools.cache
def is_available(source: Path) -> bool:
    """Whether `load_library` works here; says once in the log if it does not."""
    try:
        load_library(source)
    except (NativeUnavailable, OSError) as error:
        logger.warning("the native %s is not available, the slower torch code runs: %s", source.parent.name, error)
        return False
    return True


def _build(compiler: str, source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed: processes that start together never load half a file.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [*shlex.split(compiler), *FLAGS, str(source), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NativeUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        built.rename(library)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "engram" / "native"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
