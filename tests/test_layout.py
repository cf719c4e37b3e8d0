"""The house: imports point one way, files stay small, and the README's tree is true."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "revprop"
FILES = sorted(SOURCE.rglob("*.py"))

# a module may import from earlier lines only; one of a package is the package, and imports freely within it
LEVELS = [
    {"errors", "samples"},
    {
        "segment",
        "inputs",
        "failures",
        "linear_map",
        "krylov",
        "windows",
        "certificate",
        "recipe",
        "networks",
        "datasets",
        "runs",
        "hardware",
        "workers",
    },
    {"outputs"},
    {"export"},
    {"program"},
    {"graph", "convolution", "sweep", "families"},
    {"columns", "structural_map", "affine"},
    {"rules", "embedding", "folding", "held"},
    {"regions", "completion", "heads", "live_run", "receptive"},
    {"mirror_steps", "shared_rows"},
    {"mirror"},
    {"tasks"},
    {"global_solve", "gauss_newton"},
    {"modes"},
    {"reverse", "settings"},
    {"refine"},
    {"reconstruction"},
    {"training"},
    {"closed_form", "prefix"},
    {
        "diagnosis",
        "post_training",
        "adjoint",
        "racecar",
        "stylisation",
        "alignment",
        "orthogonality",
        "information",
        "spectrum",
    },
    {"completeness", "attribution"},
    {"experiments"},
    {"report"},
    {"command_model"},
    {"align_command", "explain_command", "racecar_command"},
    {"cli", "__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
CORE = {name for names in LEVELS[: LEVELS.index({"reconstruction"}) + 1] for name in names} - {"datasets", "runs"}


def unit(path: Path) -> str:
    """The module or package of revprop that a file belongs to; "" for revprop/__init__.py, which collects the names."""
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, also within functions, but not for type checking only."""
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        stack.extend(ast.iter_child_nodes(node))


def relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    here = unit(path)
    if not here:
        return
    assert here in LEVEL, f"{here}: say in LEVELS where it belongs"
    for name in imports(path):
        if name.split(".")[0] == "revprop":
            there = name.split(".")[1]
            assert there in LEVEL, f"{relative(path)} imports {name} through the package instead of its module"
            assert there == here or LEVEL[there] < LEVEL[here], f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if unit(path) in CORE], ids=relative)
def test_the_core_knows_no_model_zoo(path: Path) -> None:
    assert {name.split(".")[0] for name in imports(path)} & {"torchvision", "timm", "transformers"} == set()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_small_and_named_for_what_they_hold(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_hooked_onto_a_users_model(path: Path) -> None:
    assert ".register_forward" not in path.read_text(encoding="utf-8")
    assert ".register_full_backward" not in path.read_text(encoding="utf-8")


def test_the_tree_in_the_readme_names_every_file() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md yet")
    tree = readme.read_text(encoding="utf-8").partition("## The tree")[2].partition("\n## ")[0].split()
    named = {word for word in tree if word.endswith(".py")}
    there = {path.name for path in FILES if path.name != "__init__.py"} | {"__init__.py"}
    outside = {path.name for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py")}
    assert there - named == set(), "files that the README's tree lacks"
    assert named - there - outside == set(), "files that the README's tree names and that do not exist"
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages <= {word.rstrip("/") for word in tree if word.endswith("/")}
