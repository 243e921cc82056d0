"""Frozen dataclasses of tensors that all have the tasks as their leading dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

_R = TypeVar("_R", bound="TensorRecord")


@dataclass(frozen=True, eq=False, repr=False)
class TensorRecord:
    """A dataclass of tensors, tasks first, and of records of such tensors. All tasks share the other fields."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without the fields that are None; those of an inner record as `record.name`."""
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, TensorRecord):
                found |= {f"{name}.{inner}": tensor for inner, tensor in value.tensors().items()}
        return found

    def map(self: _R, function: Callable[[str, Tensor], Tensor]) -> _R:
        """A copy with `function(name, tensor)` in the place of every tensor, in the order of `tensors()`.

        Args:
            function: takes a name as in `tensors()` and the tensor, and returns another tensor.
        """
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = function(name, value)
            elif isinstance(value, TensorRecord):
                value = value.map(lambda inner, tensor, name=name: function(f"{name}.{inner}", tensor))
            values[name] = value
        return type(self)(**values)

    def detach(self: _R) -> _R:
        """A copy without gradient."""
        return self.map(lambda _, value: value.detach())

    def to(self: _R, device: torch.device | str) -> _R:
        """A copy on another device; gradients flow through the copy.

        Args:
            device: where the tensors are to be.
        """
        return self.map(lambda _, value: value.to(device))

    def select(self: _R, chosen: slice | Bool[Tensor, " tasks"]) -> _R:
        """The chosen tasks of a flat batch.

        Args:
            chosen: a slice, or a mask of the tasks, `(tasks,)` of bool.
        """
        return self.map(lambda _, value: value[chosen])

    def replace_tasks(self: _R, chosen: Bool[Tensor, " tasks"], values: _R) -> _R:
        """A copy of a flat batch in which the chosen tasks are replaced.

        Args:
            chosen: a mask of the tasks, `(tasks,)` of bool.
            values: as many tasks as are chosen, of the same sizes and with the same fields.
        """
        new = values.tensors()
        return self.map(lambda name, value: value.index_put((chosen,), new[name]))

    def __repr__(self) -> str:
        shown = (
            f"{name}={tuple(value.shape) if isinstance(value, Tensor) else repr(value)}"
            for name, value in vars(self).items()
            if value is not None
        )
        return f"{type(self).__name__}({', '.join(shown)})"
