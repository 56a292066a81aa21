"""Triton kernels compiled for GPUs that are not here, with the registers, shared memory and spills of each.

    python -m engram.kernels.compile_ahead [OP ...] [--arch 80 90 100] [--json]

Every operation's triton.py lists its kernels in `builds()`, as the shipped configs launch them. Exit 1 if
one spills.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from engram.kernels.choose import is_interpreted

ARCHITECTURES = (80, 90, 100)


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
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES, help="compute capabilities, as in sm_90")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of a table")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(operations()):
        parser.error(f"no Triton kernels are in {', '.join(sorted(unknown))}: choose from {', '.join(operations())}")
    if is_interpreted():
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")

    work = [
        (op, build, arch)
        for op in arguments.ops or operations()
        for build in importlib.import_module(f"engram.kernels.{op}.triton").builds()
        for arch in arguments.arch
    ]
    steps = track(work, description="compiling", console=Console(stderr=True), transient=True)
    results = [compile_build(op, build, arch) for op, build, arch in steps]
    if arguments.json:
        for each in results:
            print(json.dumps(asdict(each)))
    else:
        Console().print(_table(results))
    return 1 if any(each.stack for each in results) else 0


def _table(results: list[Resources]) -> Table:
    table = Table(title="Triton kernels, compiled ahead of time")
    for column in ("op", "kernel", "sm", "warps", "registers", "spilled bytes", "shared bytes"):
        table.add_column(column, justify="left" if column in ("op", "kernel") else "right")
    for each in results:
        figures = (each.arch, each.warps, each.registers, each.stack, each.shared)
        table.add_row(each.op, each.label, *map(str, figures))
    return table


if __name__ == "__main__":
    sys.exit(main())
