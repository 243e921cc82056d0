"""The points of a grid, and which of them are solved in one batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexheads import _validation
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, LossHead
from convexheads.hyperparameters import PerTask


class Group(NamedTuple):
    """Points of a grid that differ only in settings that can be solved in one batch.

    Groups of the same family differ only in settings that each task may choose for itself.
    """

    indices: list[int]
    settings: dict[str, Any]
    batched: dict[str, list[float]]
    family: int


def check_grid(head: ClassificationHead, grid: object) -> dict[str, list[Any]]:
    """The values of each setting, as lists."""
    expected = "a dictionary from the names of settings to one or more values, such as {'C': [0.1, 1.0]}"
    if not isinstance(grid, Mapping) or not grid:
        raise InputError("grid", expected, _validation.describe(grid))
    known, found = head.get_params(), {}
    for name, values in grid.items():
        if name not in known:
            raise InputError("grid", f"names among {sorted(known)}", repr(name))
        if isinstance(values, Tensor) or hasattr(values, "tolist"):
            values = values.tolist()
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError("grid", expected, f"{name}: {values!r}")
        trial = copy.deepcopy(head)
        for value in values:
            trial.set_params(**{name: value})  # raises an `InputError` for an unusable value
        found[name] = list(values)
    return found


def _is_own_number(name: str, values: Sequence[Any]) -> bool:
    """Whether a setting is a positive number of the head, which each task may choose for itself."""
    if name == "scale" or "__" in name:
        return False
    return all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values)


def _is_batched(head: ClassificationHead, name: str) -> bool:
    """Whether the values of such a setting can differ between the tasks of one batch."""
    if not isinstance(head, LossHead):
        return False
    try:
        return isinstance(head.checks[name](name, PerTask(torch.ones(1))), PerTask)
    except InputError:
        return False


def group_points(head: ClassificationHead, points: list[dict[str, Any]]) -> list[Group]:
    """Divide the points of a grid into groups that are solved in one batch."""
    own = [name for name in points[0] if _is_own_number(name, [point[name] for point in points])]
    batched = [name for name in own if _is_batched(head, name)]
    groups: list[Group] = []
    places: dict[tuple[Any, ...], int] = {}
    known: dict[tuple[Any, ...], int] = {}
    for number, point in enumerate(points):
        # Values such as kernels are the same objects in all points that share them.
        keys = [
            tuple(id(value) if callable(value) else repr(value) for name, value in point.items() if name not in names)
            for names in (batched, own)
        ]
        settings = {name: value for name, value in point.items() if name not in batched}
        known.setdefault(keys[1], len(known))
        if keys[0] not in places:
            places[keys[0]] = len(groups)
            groups.append(Group([], settings, {name: [] for name in batched}, known[keys[1]]))
        group = groups[places[keys[0]]]
        group.indices.append(number)
        for name in batched:
            group.batched[name].append(float(point[name]))
    return [_in_order(group) for group in groups]


def _in_order(group: Group) -> Group:
    """The group from the largest C to the smallest one, because SVMs begin each point at the solution of the last."""
    names = sorted(group.batched, key=lambda name: name == "C")
    columns = [group.batched[name] for name in names]
    order = sorted(range(len(group.indices)), key=lambda place: [column[place] for column in columns], reverse=True)
    batched = {name: [values[place] for place in order] for name, values in group.batched.items()}
    return group._replace(indices=[group.indices[place] for place in order], batched=batched)
