"""Every Triton kernel compiled for GPUs that need not be here: it must not spill and must fit their shared memory."""

import json
import os
import subprocess
import sys

import pytest

from engram.kernels.compile_ahead import ARCHITECTURES, SHARED_LIMIT, Resources, operations


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The interpreter, under which the other tests run, stands where the compiler would.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "engram.kernels.compile_ahead", *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", operations())
def test_no_kernel_spills(op: str, arch: int) -> None:
    done = _run(op, "--json", "--arch", str(arch))
    assert done.stdout, done.stderr
    results = [Resources(**json.loads(line)) for line in done.stdout.splitlines()]
    assert {(each.op, each.arch) for each in results} == {(op, arch)}
    for each in results:
        assert each.stack == 0, f"{each.label} spills {each.stack} bytes a thread on sm_{arch}"
        assert 0 < each.registers <= 255
        assert each.shared <= SHARED_LIMIT[arch], f"{each.label} wants {each.shared} bytes on sm_{arch}"
    assert done.returncode == 0, done.stderr


def test_the_limits_are_those_of_the_architectures() -> None:
    assert [SHARED_LIMIT[arch] for arch in ARCHITECTURES] == [163 * 1024, 227 * 1024, 227 * 1024]


def test_the_table_names_every_kernel() -> None:
    done = _run("linear_cross_entropy", "--arch", "90")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "129280 bfloat16 gradient _cross_entropy_kernel" in line)
    assert "KiB" in line and "spilled" not in line and "sm_90" in done.stdout


def test_what_makes_a_kernel_fail() -> None:
    fine = Resources("op", "kernel", 80, 4, 255, stack=0, shared=163 * 1024)
    assert fine.fits
    assert not Resources("op", "kernel", 80, 4, 255, stack=8, shared=0).fits
    assert not Resources("op", "kernel", 80, 4, 255, stack=0, shared=163 * 1024 + 1).fits


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["no_such_op"], {}, "no Triton kernels are in no_such_op: choose from"),
        (["linear_cross_entropy", "--arch", "70"], {}, "invalid choice: 70 (choose from 80, 86, 89, 90, 100, 120)"),
        (["linear_cross_entropy"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1 replaces the compiler: unset it"),
    ],
)
def test_bad_input(arguments: list[str], environment: dict[str, str], message: str) -> None:
    done = _run(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
