"""Every notebook runs from its first cell to its last, on results that the tree holds."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
# Whatever stands here replaces a notebook's defaults; names that it does not have are an error.
OUTPUTS = {"figures"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    notebook = jupytext.read(path)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1, f"{path.name} needs one cell tagged as parameters"
    namespace: dict[str, object] = {}
    exec(cells[0].source, namespace)
    assert namespace.keys() >= OUTPUTS, f"{path.name}'s parameters do not say where figures go"
    cells[0].source += f"\nfigures = {str(tmp_path)!r}"
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert any(tmp_path.rglob("*.png")) and any(tmp_path.rglob("*.csv"))


def test_notebooks_hold_no_logic() -> None:
    """What they compute stands in the packages, where it is tested: no classes, and only short functions."""
    for path in NOTEBOOKS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.ClassDef), path.name
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5, f"{path.name}: {node.name}"
