"""Every notebook runs from its first cell to its last: on results in the tree, or on the runs that are checked in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    import jupytext
    import nbclient

    notebook = jupytext.read(path)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1, f"{path.name} needs one cell tagged as parameters"
    defaults: dict[str, object] = {}
    exec(cells[0].source, defaults)
    values = {
        "figures": str(tmp_path),
        "checkpoints": ["tests/fixtures/runs/engram"],
        "baselines": ["tests/fixtures/runs/moe"],
        "tokens": 3000,
    }
    assert "figures" in defaults
    cells[0].source += "".join(f"\n{name} = {value!r}" for name, value in values.items() if name in defaults)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert any(tmp_path.rglob("*.png")) and any(tmp_path.rglob("*.csv"))


def test_notebooks_hold_no_logic() -> None:
    """What they compute stands in the packages, where it is tested: no classes, and only short functions."""
    for path in NOTEBOOKS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.ClassDef), path.name
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5, f"{path.name}: {node.name}"
