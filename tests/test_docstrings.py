"""The API reference is complete, and its docstrings name what the code has: arguments, shapes, errors, sources."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import griffe
import pytest
from mkdocstrings import Inventory

import convexheads
from convexheads.__main__ import main

ROOT = Path(__file__).parent.parent
PACKAGE = griffe.load("convexheads", search_paths=[ROOT])
MODULES = [PACKAGE, *PACKAGE.modules.values(), *PACKAGE["integrations"].modules.values()]
INTERNAL = {"precision", "storage", "transforms"}  # besides what the `__all__` of a package leaves out
FOREIGN = {"extra_repr", "TaskSampler"}  # described by torch; with the arguments of easyfsl's
SHAPE = re.compile(r"\(\*?\w+,[^)]*\)|`\(\)`")
ERRORS = re.compile(r"\b[Rr]aises?\b|\berrors\b|`\w+Error`|\bchecked\b")
SOURCE = re.compile(r"\b(19|20)\d\d\b|Eq\. \d")


def _public():
    """All public classes and functions, what else an `__all__` names, and the classes' methods."""
    for scope in (scope for scope in MODULES if scope.name not in INTERNAL):
        for name, member in scope.members.items():
            exported = name in (scope.exports or ())
            item = member.final_target if member.is_alias and exported else member
            if exported or (member.is_public and not scope.is_init_module and (item.is_class or item.is_function)):
                yield item
                methods = item.members.values() if item.is_class else ()
                methods = (each for each in methods if each.is_function or each.has_labels("property"))
                yield from (each for each in methods if each.name[0] != "_" or each.name == "__call__")


def _docstring(item):
    """An item's own, or that of the method which it overrides."""
    overridden = [base.members.get(item.name) for base in item.parent.mro()] if item.parent.is_class else []
    return next((each.docstring for each in (item, *overridden) if each and each.docstring), None)


def _is_container(item):
    return item.is_class and ("dataclass" in item.labels or "NamedTuple" in map(str, item.bases))


def _arguments(item):
    """With their annotations; of a class those of its constructor, or its fields."""
    values = item.parameters if item.is_class or item.is_function else ()
    if _is_container(item):
        values = (each for each in item.members.values() if each.is_attribute and not each.has_labels("property"))
    return {value.name: str(value.annotation) for value in values if value.name not in ("self", "cls")}


def _entries(path, *sections):
    found = [section for section in DOCSTRINGS[path].parse("google") if section.kind.value in sections]
    return [entry for section in found for entry in section.value]


PUBLIC = {item.path: item for item in _public() if item.name not in FOREIGN}
DOCSTRINGS = {path: docstring for path, item in PUBLIC.items() if (docstring := _docstring(item))}


def test_every_public_name_has_a_docstring():
    assert len(PUBLIC) > 150
    assert not PUBLIC.keys() - DOCSTRINGS.keys()


@pytest.mark.parametrize("path", DOCSTRINGS)
def test_arguments_are_those_of_the_code(path):
    arguments, entries = set(_arguments(PUBLIC[path])), _entries(path, "parameters", "attributes")
    text = " ".join(entry.description for entry in entries) if entries else DOCSTRINGS[path].value
    assert not arguments - {entry.name for entry in entries} - set(re.findall(r"`(\w+)`", text))
    assert not {entry.name for entry in _entries(path, "parameters")} - arguments


@pytest.mark.parametrize("path", DOCSTRINGS)
def test_tensors_have_shapes(path):
    item, text = PUBLIC[path], DOCSTRINGS[path].value
    told = {entry.name: entry.description for entry in _entries(path, "parameters", "attributes")}
    values = [(told.get(name, text), annotation) for name, annotation in _arguments(item).items()]
    returned = [entry.description for entry in _entries(path, "returns")]
    assert len(returned) <= 1  # a line of its own is another value, unless it is indented
    if not item.is_class:
        values.append(("".join(returned) or text, str(item.returns if item.is_function else item.annotation)))
    for description, annotation in values:
        assert "Tensor" not in annotation or "Callable" in annotation or SHAPE.search(description)


@pytest.mark.parametrize("path", DOCSTRINGS)
def test_errors_are_told(path):
    silent = _is_container(PUBLIC[path]) or not _arguments(PUBLIC[path])
    assert silent or ERRORS.search(DOCSTRINGS[path].value)
    assert {str(entry.annotation) for entry in _entries(path, "raises")} <= {*dir(convexheads), *dir(builtins)}


def test_sources_are_named():
    kinds = {"BaseLearner", "Composable", "Solver"}
    own = [p for p, item in PUBLIC.items() if item.is_class and kinds & {base.name for base in (item, *item.mro())}]
    own += [path for path in PUBLIC if path.startswith("convexheads.presets.")]
    assert len(own) > 30
    assert not [path for path in own if not SOURCE.search(DOCSTRINGS[path].value)]


def test_everything_is_on_the_site(site):
    with (site / "objects.inv").open("rb") as file:
        inventory = Inventory.parse_sphinx(file, domain_filter=["py"])
    assert not {path for path, item in PUBLIC.items() if item.docstring} - inventory.keys()


@pytest.mark.parametrize("command", ["", "fit", "predict"])
def test_command_line_is_described(capsys, command):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    words = re.findall(r"^ {2,4}([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    page = (ROOT / "docs" / "api" / "integrations.md").read_text()
    assert words
    assert not [word for word in words if f"`{word}`" not in page and f"`convexheads {word}`" not in page]
