"""Who may import whom, read from the source; and what importing must not cost."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import of ours, besides itself. The first prefix that fits a module is its room.
ALLOWED: dict[str, set[str]] = {
    "engram.config_file": set(),
    "engram.config_base": set(),
    "engram.config_model": {"engram.config_base"},
    "engram.config_distributed": {"engram.config_base"},
    "engram.config_identity": {"engram.config"},
    "engram.config": {"engram.config_file", "engram.config_base", "engram.config_model", "engram.config_distributed"},
    "engram.report": set(),
    "engram.kernels": set(),
    "engram.memory": {"engram.kernels", "engram.config"},
    # Counting needs the sizes of tables, and neither torch nor the model.
    "engram.model.accounting": {"engram.config", "engram.memory.primes"},
    "engram.model": {"engram.memory", "engram.kernels", "engram.config"},
    "engram.optim": {"engram.kernels", "engram.config"},
    "engram.data": {"engram.kernels", "engram.config"},
    "engram.distributed": {"engram.model", "engram.optim", "engram.memory", "engram.kernels", "engram.config"},
    "engram.training": {
        "engram.config",
        "engram.config_identity",
        "engram.kernels",
        "engram.memory",
        "engram.model",
        "engram.optim",
        "engram.data",
        "engram.distributed",
        # How numbers are shown; never figures, which take long to import.
        "engram.report.text",
    },
    "engram.inference": {"engram.model", "engram.memory", "engram.config"},
    "engram.interop": {"engram.model", "engram.memory", "engram.config"},
    "engram.sweep": {
        "engram.config",
        "engram.config_file",
        "engram.config_identity",
        "engram.model.accounting",
        "engram.report",
    },
    "eval": {
        "engram.config",
        # A suite's file is read and explained like a config.
        "engram.config_file",
        "engram.model",
        "engram.data",
        "engram.inference",
        # What a run leaves behind: its checkpoints and its metrics. Never the trainer.
        "engram.training.checkpoint",
        "engram.training.checkpoint_files",
        "engram.training.files",
        "engram.training.provenance",
        "engram.training.metrics",
        "engram.report",
    },
}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("engram", "eval")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def imports(module: str) -> Iterator[str]:
    """Every module that `module` imports anywhere in its source, also inside functions."""
    path = SOURCES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from a import b` may name the module a.b.
            yield from (name if (name := f"{source}.{alias.name}") in SOURCES else source for alias in node.names)


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "engram"])
def test_dependencies_point_downwards(module: str) -> None:
    room = next((room for room in ALLOWED if within(module, room)), None)
    assert room, f"{module} belongs to no room of ALLOWED"
    for imported in imports(module):
        if not (within(imported, "engram") or within(imported, "eval")):
            continue
        assert any(within(imported, allowed) for allowed in (room, *ALLOWED[room])), f"{module} imports {imported}"


def test_only_one_file_imports_deepspeed() -> None:
    users = {module for module in SOURCES for name in imports(module) if within(name, "deepspeed")}
    assert users <= {"engram.distributed.deepspeed"}


def test_no_file_is_too_long() -> None:
    paths = [path for folder in ("engram", "eval", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


@pytest.mark.parametrize("module", ["engram.config", "engram.model.accounting"])
def test_settings_and_counts_need_no_torch(module: str) -> None:
    """A sweep plans thousands of models and a typo is reported at once: neither waits for torch."""
    script = f"import sys, {module}; sys.exit(' '.join({{'torch', 'numpy'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_have_no_side_effects() -> None:
    """Importing every module writes nothing, prints nothing and leaves torch's global settings alone."""
    modules = [module for module in SOURCES if not module.endswith("__main__")]
    script = f"""
import importlib, torch
def state():
    numerics = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads(), numerics
before = state()
for name in {modules}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # An optional package; a missing module of ours is a mistake.
        if error.name.split(".")[0] in ("engram", "eval"):
            raise
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
