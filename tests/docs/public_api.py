"""The public names of the package, read from its source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import griffe

PACKAGE = griffe.load("convexheads", search_paths=[Path(__file__).parents[2]])
MODULES = [PACKAGE, *PACKAGE.modules.values(), *PACKAGE["integrations"].modules.values()]
INTERNAL = {
    "_gram",
    "_validation",
    "precision",
    "storage",
    "training",
    "transforms",
}  # besides what the `__all__` of a package leaves out
FOREIGN = {"extra_repr", "TaskSampler"}  # described by torch; with the arguments of easyfsl's


def _public() -> Iterator[griffe.Object]:
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


PUBLIC = {item.path: item for item in _public() if item.name not in FOREIGN}
