"""C and C++ sources beside the operations, built for this processor at first use and kept in the user's cache folder.

C++ sources may use OpenMP, which shares torch's thread pool, functions of libtorch that they declare themselves, and
the headers beside this file.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from engram.kernels.choose import MachineObstacle

FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
HEADERS = Path(__file__).parent
# Uses what every source does: a compiler that fails on this one fails on all.
PROBE = {".cpp": "#include <omp.h>\n#include <vector>\nint main() { return 0; }\n", ".c": "int main() { return 0; }\n"}


class NativeUnavailable(RuntimeError):
    """A native implementation was asked for and cannot be had; the message says why."""


class NothingNative(NativeUnavailable):
    """The machine builds no source at all."""


@functools.cache
def load_library(source: Path) -> ctypes.CDLL:
    """The shared library of one C or C++ file. Raises NativeUnavailable: it cannot be built or loaded."""
    command = (*_compiler(source), *FLAGS, *(_cpp_flags() if source.suffix == ".cpp" else ()))
    headers = (header.read_text() for header in sorted(HEADERS.glob("*.hpp")))
    recipe = (source.read_text(), *headers, *command, platform.machine(), _processor())
    digest = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    library = _cache_folder() / f"{source.parent.name}_{source.stem}_{digest}.so"
    if not library.exists():
        _build(command, source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailable(f"{source.name} was built, but does not load: {error}") from error


@functools.cache
def native_obstacle(source: Path) -> str | None:
    """Why `load_library` fails here, a MachineObstacle where it would for any source; None where it works."""
    try:
        load_library(source)
    except NothingNative as error:
        return MachineObstacle(str(error))
    except NativeUnavailable as error:
        return str(error)
    return None


@functools.cache
def products_obstacle(source: Path) -> str | None:
    """Why a source that includes brgemm.hpp cannot run here; None where it can."""
    if reason := native_obstacle(source):
        return reason
    if load_library(source).products_missing():
        return "torch has no products of packed bfloat16 blocks for this processor (they need AVX-512)"
    return None


def _variable(source: Path) -> str:
    return "CXX" if source.suffix == ".cpp" else "CC"


def _compiler(source: Path) -> list[str]:
    variable = _variable(source)
    names = ("c++", "g++", "clang++") if source.suffix == ".cpp" else ("cc", "gcc", "clang")
    if chosen := os.environ.get(variable):
        try:
            command = shlex.split(chosen)
        except ValueError as error:
            raise NothingNative(f"{variable} is {chosen!r}, which is no command: {error}") from error
        if shutil.which(command[0]) is None:
            raise NothingNative(f"{variable} names {command[0]}, which does not exist")
        return command
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise NothingNative(
            f"native kernels need a compiler, and none of {', '.join(names)} was found: install one, or name it in "
            f"{variable}"
        )
    return [found]


def _cpp_flags() -> tuple[str, ...]:
    # Found, not imported: the shared libraries are in the process already.
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    libraries = Path(spec.origin).parent / "lib"
    header = f"-I{HEADERS}"
    # The library of this name that torch loaded serves us too: a second one would be a second pool of spinning threads.
    return ("-std=c++17", "-fopenmp", header, f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}")


def _build(command: tuple[str, ...], source: Path, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # Built aside and renamed: processes that start together never load half a file.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            if failure := _failure_of_compiler(command, source.suffix, library.parent):
                raise NothingNative(
                    f"{command[0]} does not work (name another compiler in {_variable(source)}): on an empty program "
                    f"it {failure}"
                )
            built = Path(folder) / library.name
            if failure := _compile(command, source, built):
                raise NativeUnavailable(f"{command[0]} failed on {source.parent.name}/{source.name}: it {failure}")
            built.rename(library)
    except OSError as error:
        raise NothingNative(
            f"native kernels cannot be built in {library.parent}: {error}; XDG_CACHE_HOME names another cache folder"
        ) from error


# Asked before the first source is built: to fail on each of them in turn can take minutes.
@functools.cache
def _failure_of_compiler(command: tuple[str, ...], suffix: str, folder: Path) -> str | None:
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        source = Path(inside) / f"probe{suffix}"
        source.write_text(PROBE[suffix])
        return _compile(command, source, source.with_suffix(".so"))


def _compile(command: tuple[str, ...], source: Path, built: Path) -> str | None:
    """Builds a library; where that fails, says what the compiler did instead."""
    # The source stands before the libraries that it needs.
    full = [command[0], str(source), *command[1:], "-o", str(built), "-lm"]
    done = subprocess.run(full, capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    said = done.stderr.strip()[-1000:]
    return f"ended with status {done.returncode}: {said}" if said else f"ended with status {done.returncode} in silence"


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
