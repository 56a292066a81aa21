import ctypes
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from engram.kernels import native
from engram.kernels.native import NativeUnavailable, load_library, native_obstacle

ADD_ONE = '#include "native.hpp"\nextern "C" int answer(int x) { return x + 1; }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for sources; the cache and the headers are the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "native.hpp").write_text((native.HEADERS / "native.hpp").read_text())
    monkeypatch.setattr(native, "HEADERS", headers)
    # What this process loaded stays known to it: each test starts as a process of its own would.
    load_library.cache_clear()
    native_obstacle.cache_clear()
    sources = tmp_path / "op"
    sources.mkdir()
    return sources


def _source(folder: Path, text: str, name: str = "native.cpp") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _libraries(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "engram" / "native").glob("*"))


def _again(source: Path) -> ctypes.CDLL:
    load_library.cache_clear()
    return load_library(source)


def test_a_source_is_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(folder, ADD_ONE)
    assert load_library(source).answer(41) == 42
    assert load_library(source) is load_library(source)
    assert [path.name.rsplit("_", 1)[0] for path in _libraries(folder)] == ["op_native"]
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("built a second time"))
    assert _again(source).answer(41) == 42


def test_c_has_its_own_compiler(folder: Path) -> None:
    source = _source(folder, "int answer(int x) { int new = x; return new + 1; }\n", "native.c")
    assert load_library(source).answer(41) == 42


def test_what_changes_is_built_anew(folder: Path) -> None:
    source = _source(folder, ADD_ONE)
    load_library(source)
    source.write_text(ADD_ONE.replace("x + 1", "x + 2"))
    assert _again(source).answer(40) == 42
    for name in ("native.hpp", "other.hpp"):
        header = native.HEADERS / name
        header.write_text((header.read_text() if header.exists() else "") + "\n// changed\n")
        _again(source)
    assert len(_libraries(folder)) == 4


def test_a_header_is_found_and_its_change_takes_effect(folder: Path) -> None:
    header = native.HEADERS / "other.hpp"
    source = _source(folder, '#include "other.hpp"\nextern "C" int answer() { return ANSWER; }\n')
    for value in (1, 2):
        header.write_text(f"#define ANSWER {value}\n")
        assert _again(source).answer() == value


def test_flags_and_processor_are_part_of_the_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(folder, ADD_ONE)
    load_library(source)
    monkeypatch.setattr(native, "_processor", lambda: "another")
    _again(source)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    _again(source)
    assert len(_libraries(folder)) == 3


def test_threads_are_those_of_torch(folder: Path) -> None:
    text = '#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert load_library(_source(folder, text)).threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "variable"), [("native.cpp", "CXX"), ("native.c", "CC")])
def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, variable: str) -> None:
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    source = _source(folder, ADD_ONE, name)
    with pytest.raises(NativeUnavailable, match=f"^op/{name} needs a compiler, and none of .* name it in {variable}$"):
        load_library(source)
    reason = native_obstacle(source)
    assert reason is not None and reason.startswith(f"op/{name} needs a compiler")


def test_the_compiler_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(folder, '#ifndef ASKED\n#error "not asked"\n#endif\n' + ADD_ONE)
    monkeypatch.setenv("CXX", "c++ -DASKED")
    assert load_library(source).answer(1) == 2
    for wrong, message in (
        ("no-such-compiler", "^CXX names no-such-compiler, which does not exist$"),
        ("c++ '", "which is no command: No closing quotation"),
        ("false", "false failed on op/native.cpp with status 1: and said nothing"),
    ):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(NativeUnavailable, match=message):
            _again(source)


def test_a_broken_source_names_the_error(folder: Path) -> None:
    source = _source(folder, 'extern "C" int answer() { return undeclared; }\n')
    with pytest.raises(NativeUnavailable, match=r"(?s) failed on op/native.cpp with status 1: .*undeclared"):
        load_library(source)
    reason = native_obstacle(source)
    assert reason is not None and str(source) in reason
    # Nothing half-built stays behind.
    assert _libraries(folder) == []


def test_a_library_that_does_not_load(folder: Path) -> None:
    source = _source(folder, 'extern "C" int missing(); extern "C" int answer() { return missing(); }\n')
    with pytest.raises(NativeUnavailable, match="native.cpp was built, but does not load: .*missing"):
        load_library(source)


def test_a_cache_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = folder / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(
        NativeUnavailable, match="op/native.cpp cannot be built in .*file.*; XDG_CACHE_HOME names another"
    ):
        load_library(_source(folder, ADD_ONE))


def test_processes_that_build_together(folder: Path) -> None:
    """Two processes and two threads want a library that is not there: each gets a whole one."""
    source = _source(folder, ADD_ONE)
    program = (
        "import sys; from pathlib import Path; from engram.kernels.native import load_library;"
        "sys.stdin.readline(); print(load_library(Path(sys.argv[1])).answer(41))"
    )
    command = [sys.executable, "-c", program, str(source)]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["42\n", "42\n"]
    assert len(_libraries(folder)) == 1

    for library in _libraries(folder):
        library.unlink()
    barrier = threading.Barrier(2)

    def load(_: int) -> int:
        barrier.wait()
        return load_library.__wrapped__(source).answer(41)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(load, range(2))) == [42, 42]
    assert len(_libraries(folder)) == 1
