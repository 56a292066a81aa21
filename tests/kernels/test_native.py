import ctypes
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from engram.kernels import choose, native
from engram.kernels.causal_attention import causal_attention
from engram.kernels.choose import Implementation, ImplementationUnavailable, MachineObstacle
from engram.kernels.engram_gate_conv import engram_gate_conv
from engram.kernels.engram_lookup import gather_rows
from engram.kernels.mhc_pre_post import mhc_post, mhc_pre
from engram.kernels.moe_experts import moe_experts
from engram.kernels.native import NativeUnavailable, NothingNative, load_library, native_obstacle
from engram.kernels.ngram_hash import ngram_hash
from engram.kernels.sinkhorn_momentum import sinkhorn_momentum_
from engram.kernels.table_update import plan_rows, sum_rows

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
    message = f"^native kernels need a compiler, and none of .* was found: install one, or name it in {variable}$"
    with pytest.raises(NothingNative, match=message):
        load_library(source)
    reason = native_obstacle(source)
    assert isinstance(reason, MachineObstacle) and reason.startswith("native kernels need a compiler")


def test_the_compiler_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(folder, '#ifndef ASKED\n#error "not asked"\n#endif\n' + ADD_ONE)
    monkeypatch.setenv("CXX", "c++ -DASKED")
    assert load_library(source).answer(1) == 2
    for wrong, message in (
        ("no-such-compiler", "^CXX names no-such-compiler, which does not exist$"),
        ("c++ '", "which is no command: No closing quotation"),
        ("false", "^false does not work .name another compiler in CXX.: .* it ended with status 1 in silence$"),
        (
            "c++ --no-such-option",
            r"(?s)^c\+\+ does not work .* it ended with status 1: .*no-such-option",
        ),
    ):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(NothingNative, match=message):
            _again(source)


def test_a_broken_source_names_the_error(folder: Path) -> None:
    source = _source(folder, 'extern "C" int answer() { return undeclared; }\n')
    message = r"(?s) failed on op/native.cpp: it ended with status 1: .*undeclared"
    with pytest.raises(NativeUnavailable, match=message) as raised:
        load_library(source)
    # Other sources may be whole.
    assert not isinstance(raised.value, NothingNative)
    reason = native_obstacle(source)
    assert reason is not None and not isinstance(reason, MachineObstacle) and str(source) in reason
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
    with pytest.raises(NothingNative, match="native kernels cannot be built in .*file.*; XDG_CACHE_HOME names another"):
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


Call = Callable[[Implementation], object]


def _calls() -> dict[str, Call]:
    """Every operation that has C++ code, at a size of its own."""
    half, ids = torch.randn(1, 1, 3, 16).bfloat16(), torch.zeros(3, 2, dtype=torch.int64)
    recipe = torch.ones(1, 2, dtype=torch.int64), torch.full((1, 1, 2), 5), torch.zeros(1, 2, dtype=torch.int64)
    streams, table = torch.randn(1, 3, 2, 16), torch.randn(4, 16)
    mixing = torch.randn(8, 32), torch.ones(3), torch.zeros(8)
    h_post, h_res = torch.ones(1, 3, 2), torch.ones(1, 3, 2, 2)
    experts = torch.randn(2, 2, 16, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()
    balance: dict[str, float] = dict(lr=0.1, beta=0.9, threshold=0.0, update_rms=0.1)
    return {
        "ngram_hash": lambda impl: ngram_hash(ids, None, *recipe, pad_id=0, stop_at_pad=False, impl=impl),
        "gather_rows": lambda impl: gather_rows(table, ids, impl=impl),
        "plan_rows": lambda impl: plan_rows(ids, impl=impl),
        "sum_rows": lambda impl: sum_rows(torch.randn(6, 16), plan_rows(ids, impl="reference"), impl=impl),
        "sinkhorn_momentum_": lambda impl: sinkhorn_momentum_(
            table, torch.zeros(4, 16), table[:1], torch.tensor([1]), **balance, steps=3, impl=impl
        ),
        "engram_gate_conv": lambda impl: engram_gate_conv(
            streams,
            streams[:, :, 0],
            ids[None, :, 0] == 0,
            None,
            None,
            None,
            gate=None,
            eps=1e-6,
            conv_eps=1e-6,
            impl=impl,
        ),
        "mhc_pre": lambda impl: mhc_pre(streams, *mixing, steps=2, eps=1e-6, impl=impl),
        "mhc_post": lambda impl: mhc_post(streams, streams[:, :, 0].contiguous(), h_post, h_res, impl=impl),
        "moe_experts": lambda impl: moe_experts(half[0, 0], ids, torch.ones(3, 2), *experts, impl=impl),
        "causal_attention": lambda impl: causal_attention(half, half, half, None, 0.25, impl=impl),
    }


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about this machine, and said, before the test and after it."""

    def forget() -> None:
        for function in (load_library, native_obstacle, native.products_obstacle, choose._warn_once):
            function.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_a_machine_without_a_compiler_says_so_once_for_all_operations(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler, runs = tmp_path / "compiler", tmp_path / "runs"
    if kind == "broken":
        compiler.write_text(f"#!/bin/sh\necho run >> {runs}\necho no cc1plus >&2\nexit 4\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reason = {
        "missing": f"CXX names {compiler}, which does not exist",
        "broken": f"{compiler} does not work (name another compiler in CXX): on an empty program it ended with status "
        "4: no cc1plus",
    }[kind]
    calls = _calls()
    with caplog.at_level(logging.WARNING):
        for call in (*calls.values(), *calls.values()):
            call("auto")
    assert [record.getMessage() for record in caplog.records] == [
        "everything runs on torch's own operations, which is slower, because no native kernel can run here: " + reason
    ]
    for op, call in calls.items():
        with pytest.raises(ImplementationUnavailable) as raised:
            call("native")
        assert str(raised.value) == f"{op}: the native implementation was asked for, but {reason}"
    # It is not tried again for each operation.
    assert not runs.exists() or runs.read_text() == "run\n"
