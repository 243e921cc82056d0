"""The architecture of the package: dependencies point down only, and there are no cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import convexheads

ROOT = Path(convexheads.__file__).parent
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "_looks", "_untraced"),
    ("_compiler", "_functorch", "_gram", "_storage"),
    ("_validation",),
    ("precision",),
    ("hyperparameters",),
    ("kernels",),
    ("solvers",),
    ("heads",),
    ("episodes", "_sampling"),
    ("calibration", "tuning"),
    ("loader", "evaluation", "training"),
    ("models",),
    ("",),  # the package itself, whose `__init__` exports the public names
    ("integrations",),
    ("cli",),
    ("__main__",),
)
"""Modules and sub-packages of each layer, from the bottom to the top. Those of the same layer do not import each other."""

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("errors", "solvers.problem"): "the type of `SolverError.solution`",
}
"""Imports of a higher layer that are still there, with the reason."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The path of each module, by its name without that of the package."""
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in paths.items()}


def imports(text: str, names: set[str]) -> Iterator[str]:
    """The modules of the package that a source imports anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(text)):
        found: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not understood here"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        for path in found:
            package, _, name = path.partition(".")
            if package == "convexheads":
                yield name if name in names else name.rpartition(".")[0]


def layer_of(module: str) -> tuple[int, str]:
    """The number of a module's layer, and the module or sub-package of the layer to which it belongs."""
    top = module.partition(".")[0]
    found = [(number, name) for number, names in enumerate(LAYERS) for name in names if name == top]
    assert len(found) == 1, f"expected {top!r} in one of the layers, found it in {len(found)}"
    return found[0]


def upward(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The imports of a module of a higher layer, or of another module or sub-package of the same layer."""
    pairs = ((module, other) for module, others in graph.items() for other in others)
    return [
        (module, other)
        for module, other in pairs
        if layer_of(other) != layer_of(module) and layer_of(other)[0] >= layer_of(module)[0]
    ]


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """A cycle of imports, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = modules()
    names = set(paths)
    return {name: {*imports(path.read_text(encoding="utf-8"), names)} for name, path in paths.items()}


def test_every_module_is_seen(graph: dict[str, set[str]]) -> None:
    assert {"", "errors", "heads.base", "integrations.lightning.module"} <= graph.keys()
    assert "heads" in graph["cli.folder"]
    assert "_storage" in graph["models.pretrained"]


def test_no_layer_imports_a_higher_one(graph: dict[str, set[str]]) -> None:
    assert {*upward(graph)} == {*EXCEPTIONS}


def test_there_are_no_cycles(graph: dict[str, set[str]]) -> None:
    allowed = {
        module: {other for other in others if (module, other) not in EXCEPTIONS} for module, others in graph.items()
    }
    assert not cycle(allowed)


def test_wrong_directions_are_found() -> None:
    names = {"", "errors", "heads.base", "heads.svm", "solvers.base"}
    text = """
        from typing import TYPE_CHECKING
        import torch
        if TYPE_CHECKING:
            from convexheads.heads.base import ClassificationHead
        def late():
            from convexheads import InputError, errors
            import convexheads.heads.svm
    """
    found = {*imports("\n".join(line[8:] for line in text.splitlines()), names)}
    assert found == {"", "errors", "heads.base", "heads.svm"}
    wrong = {"solvers.base": found, "heads.base": {"heads.svm"}, "heads.svm": {"heads.base"}}
    assert {*upward(wrong)} == {("solvers.base", name) for name in found - {"errors"}}
    assert {*cycle(wrong)} == {"heads.base", "heads.svm"}
