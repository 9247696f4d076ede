"""No import cycles, imports inside functions and for type checkers included; no long files."""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE = 400
MOST_LOOSE_FILES = 8
"""Its constructors `from_activations` and `from_weights` import the estimators of `calibration` when they are called:
the one exception, as in the import contract in pyproject.toml.
"""


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """The modules of a package that each of its modules imports anywhere in its file."""
    files = {path.relative_to(root).with_suffix("").parts: path for path in sorted((root / package).rglob("*.py"))}
    modules = {".".join(parts).removesuffix(".__init__"): path for parts, path in files.items()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        inside = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parents = inside[: len(inside) - node.level + 1] if node.level else []
                source = ".".join([*parents, *([node.module] if node.module else [])])
                names = {f"{source}.{alias.name}" for alias in node.names}
                targets |= {name if name in modules else source for name in names}
        graph[module] = (targets & modules.keys()) - {module}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", ["benchmarks", "examples", "peft_safety"])
def test_there_is_no_import_cycle(package):
    graph = imports(ROOT, package)
    assert any(graph.values()), "imports are seen"
    assert not cycle(graph)


@pytest.mark.parametrize("folder", ["core", "data", "calibration", "layers", "ops"])
def test_what_the_methods_import_does_not_import_peft_first(folder):
    """Importing PEFT registers the methods, which import these modules: they would be there in part only."""
    paths = sorted((ROOT / "peft_safety" / folder).rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] in ("peft", "trl")], path


def test_files_are_short_and_few_lie_at_the_top():
    listing = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    files = [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in files}
    assert "tests/unit/test_structure.py" in lengths
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
    assert len(list((ROOT / "peft_safety").glob("*.py"))) <= MOST_LOOSE_FILES


@pytest.mark.parametrize(
    "line",
    ["import p.b", "from p import b", "from p.b import x", "from . import b", "from .b import x"],
)
@pytest.mark.parametrize("place", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_a_cycle_is_seen_wherever_the_import_is(line, place, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").touch()
    (tmp_path / "p" / "a.py").write_text(place.format(line) + "\n")
    (tmp_path / "p" / "b.py").write_text("from p.a import x\n")
    graph = imports(tmp_path, "p")
    assert graph["p.b"] == {"p.a"}
    assert set(cycle(graph)) == {"p.a", "p.b"}
