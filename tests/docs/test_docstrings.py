"""Every public name has a docstring, which names the arguments that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from public_api import PUBLIC

from convexheads_cli import main

ROOT = Path(__file__).parents[2]


def _docstring(item):
    """An item's own, or that of the method which it overrides."""
    overridden = [base.members.get(item.name) for base in item.parent.mro()] if item.parent.is_class else []
    return next((each.docstring for each in (item, *overridden) if each and each.docstring), None)


def _is_container(item):
    return item.is_class and ("dataclass" in item.labels or "NamedTuple" in map(str, item.bases))


def _arguments(item):
    """The names of a function's arguments; of a class those of its constructor, or its fields."""
    values = item.parameters if item.is_class or item.is_function else ()
    if _is_container(item):
        values = (each for each in item.members.values() if each.is_attribute and not each.has_labels("property"))
    return {value.name for value in values} - {"self", "cls"}


def _entries(path, *sections):
    found = [section for section in DOCSTRINGS[path].parse("google") if section.kind.value in sections]
    return [entry for section in found for entry in section.value]


DOCSTRINGS = {path: docstring for path, item in PUBLIC.items() if (docstring := _docstring(item))}


def test_every_public_name_has_a_docstring():
    assert len(PUBLIC) > 150
    assert not PUBLIC.keys() - DOCSTRINGS.keys()


@pytest.mark.parametrize("path", DOCSTRINGS)
def test_arguments_are_those_of_the_code(path):
    arguments, entries = _arguments(PUBLIC[path]), _entries(path, "parameters", "attributes")
    text = " ".join(entry.description for entry in entries) if entries else DOCSTRINGS[path].value
    assert not arguments - {entry.name for entry in entries} - set(re.findall(r"`(\w+)`", text))
    assert not {entry.name for entry in _entries(path, "parameters")} - arguments


@pytest.mark.parametrize("command", ["", "fit", "predict"])
def test_command_line_is_described(capsys, command):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    words = re.findall(r"^ {2,4}([a-z-]+)", capsys.readouterr().out.partition("positional arguments:")[2], re.M)
    page = (ROOT / "docs" / "api" / "integrations.md").read_text(encoding="utf-8")
    assert words
    assert not [word for word in words if f"`{word}`" not in page and f"`convexheads {word}`" not in page]
