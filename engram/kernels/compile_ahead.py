"""Triton kernels compiled for GPUs that are not here, with the registers, shared memory and spills of each.

    python -m engram.kernels.compile_ahead [OP ...] [--arch 80 90 100] [--json]

Every operation's triton.py lists its kernels in `builds()`, as the shipped configs launch them. Exit 1 if one spills or
wants more shared memory than its GPU has.
"""

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engram.kernels.choose import is_interpreted

ARCHITECTURES = (80, 90, 100)
# The largest shared memory of one block in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Build:
    """One kernel as a launch specialises it.

    `signature` gives the Triton type of each runtime argument in order ("*bf16", "i32", "fp32"); `constants` the values
    of its tl.constexpr arguments. Pointers, and the arguments named in `divisible`, are known to be multiples of 16.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor, per thread (registers, stack in bytes) and block (shared)."""

    op: str
    label: str
    arch: int
    warps: int
    registers: int
    # Local memory that register spills (or arrays indexed at run time) go to.
    stack: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.stack == 0 and self.shared <= SHARED_LIMIT[self.arch]


def record(label: str, launch: Callable[[], object]) -> list[Build]:
    """The builds that `launch`, a call with tensors on the meta device, asks for: nothing is compiled or run."""
    from triton.runtime.jit import JITFunction

    builds: list[Build] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        declared = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        # A launch makes constants of arguments declared so, of None, and of the integer 1.
        runtime = {
            name: value
            for name, value in given.items()
            if name not in declared and value is not None and not (type(value) is int and value == 1)
        }
        builds.append(
            Build(
                f"{label} {kernel.__name__}",
                kernel,
                signature={name: _triton_type(value) for name, value in runtime.items()},
                constants={name: value for name, value in given.items() if name not in runtime},
                divisible=tuple(n for n, value in runtime.items() if type(value) is int and value % 16 == 0),
                # Triton's own defaults for NVIDIA.
                **{"num_warps": 4, "num_stages": 3} | options,
            )
        )

    with patch.object(JITFunction, "run", note):
        launch()
    return builds


def _triton_type(value: Any) -> str:
    """The type of a runtime argument: "*bf16" of a tensor, "i32" of a small integer."""
    from triton._utils import canonicalize_dtype

    if isinstance(value, torch.Tensor):
        return "*" + canonicalize_dtype(value.dtype)
    if isinstance(value, (bool, float)):
        return "u1" if isinstance(value, bool) else "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_build(op: str, build: Build, arch: int) -> Resources:
    """Raises triton's own errors where the kernel does not compile for `arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in build.signature and name not in build.constants]
    assert not missing, f"{build.label}: neither a type nor a value for {missing}"
    aligned = [name for name, kind in build.signature.items() if kind.startswith("*") or name in build.divisible]
    source = ASTSource(
        build.kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(op, build.label, arch, build.num_warps, usage["REG"], usage["STACK"], compiled.metadata.shared)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers (REG), stack and local bytes as the toolkit's own disassembler counts them."""
    import triton

    tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", printed)}


def operations() -> list[str]:
    """Every operation that has Triton kernels."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(operations())} (default: all)")
    parser.add_argument(
        "--arch",
        nargs="+",
        type=int,
        choices=sorted(SHARED_LIMIT),
        default=ARCHITECTURES,
        help="compute capabilities, as in sm_90",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of a table")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(operations()):
        parser.error(f"no Triton kernels are in {', '.join(sorted(unknown))}: choose from {', '.join(operations())}")
    if is_interpreted():
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed: it comes with `pip install triton`, on Linux")

    work = [
        (op, build, arch)
        for op in arguments.ops or operations()
        for build in _distinct(importlib.import_module(f"engram.kernels.{op}.triton").builds())
        for arch in arguments.arch
    ]
    steps = track(work, description="compiling", console=Console(stderr=True), transient=True)
    results = [_compile(op, build, arch) for op, build, arch in steps]
    if arguments.json:
        for each in results:
            print(json.dumps(asdict(each)))
    else:
        # A file has no width to fit: lines as long as they are.
        Console(width=None if sys.stdout.isatty() else 200).print(_table(results, arguments.arch))
    return 0 if all(each.fits for each in results) else 1


def _compile(op: str, build: Build, arch: int) -> Resources:
    try:
        return compile_build(op, build, arch)
    except Exception as error:
        error.add_note(f"while compiling {op}: {build.label} for sm_{arch}")
        raise


def _distinct(builds: list[Build]) -> list[Build]:
    """Without those that differ in their label only: two configs may launch the same kernel."""
    distinct: list[Build] = []
    for build in builds:
        if all(replace(build, label=other.label) != other for other in distinct):
            distinct.append(build)
    return distinct


def _table(results: list[Resources], architectures: Sequence[int]) -> Table:
    """One line per kernel, one column per architecture; `results` hold the architectures of a kernel side by side."""
    table = Table(title="Triton kernels: registers of a thread, shared memory of a block, bytes spilled")
    for column in ("op", "kernel", "warps", *(f"sm_{arch}" for arch in architectures)):
        table.add_column(column, justify="left" if column in ("op", "kernel") else "right")
    for start in range(0, len(results), len(architectures)):
        line = results[start : start + len(architectures)]
        table.add_row(line[0].op, line[0].label, str(line[0].warps), *map(_cell, line))
    return table


def _cell(result: Resources) -> str:
    cell = f"{result.registers}, {result.shared / 1024:.1f} KiB" + (f", {result.stack} spilled" if result.stack else "")
    return cell if result.fits else f"[red]{cell}[/red]"


if __name__ == "__main__":
    sys.exit(main())
