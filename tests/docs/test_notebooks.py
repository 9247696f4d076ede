"""The notebooks: small, without outputs, and each runs on a tiny model and draws its picture."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, ROOT
from tests.docs.shell import check
from tests.docs.world import Store

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MOST_CELLS = 12
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook: Path) -> list[dict[str, Any]]:
    return list(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


def code(notebook: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code"]


@pytest.fixture
def on_tiny(here: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SAFETY_NOTEBOOK_MODEL", str(store.aligned))
    monkeypatch.setenv("PEFT_SAFETY_NOTEBOOK_SIZE", "24 2")


def test_there_are_notebooks_and_the_documents_link_them() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md")))
    assert NOTEBOOKS
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name})" not in text] == []


@each
def test_a_notebook_has_no_outputs_and_no_metadata_of_a_machine(notebook: Path) -> None:
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    assert whole["metadata"] == METADATA
    assert len(whole["cells"]) <= MOST_CELLS
    for cell in whole["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@each
@pytest.mark.usefixtures("on_tiny")
def test_a_notebook_runs_and_draws(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, cell after cell; the last expression of a cell counts for nothing."""
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
    install, *rest = code(notebook)
    check(install.removeprefix("%"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(rest, 2):
        exec(compile(source, f"{notebook.stem}, code cell {number}", "exec"), namespace)
    assert drawn
    for figure in drawn:
        assert any(axis.get_title() for axis in figure.axes)
        assert any(axis.lines or axis.patches or axis.images for axis in figure.axes)
        plt.close(figure)


@each
@pytest.mark.slow
@pytest.mark.usefixtures("on_tiny")
def test_a_notebook_runs_in_jupyter(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, whose backend shows the picture. Its first cell, which installs, is left out."""
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    monkeypatch.delenv("MPLBACKEND", raising=False)
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    book.cells = [cell for cell in book.cells if not cell.source.startswith("%pip ")]
    client(book, timeout=280).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each
def test_the_first_cell_of_code_installs_what_the_notebook_imports(notebook: Path) -> None:
    install, *rest = code(notebook)
    assert install.startswith("%pip install ")
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for source in rest
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= {"os", "matplotlib", "torch", "datasets", "peft", "peft_safety", "transformers", "trl"}
