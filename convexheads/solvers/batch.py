"""Dataclasses of tensors that all have the tasks as their leading dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxtyping import Bool
from torch import Tensor

_B = TypeVar("_B", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """A dataclass some of whose fields are tensors, tasks first; what else it has is the same for all tasks."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without what is absent."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def map(self: _B, function: Callable[[str, Tensor], Tensor]) -> _B:
        """The same with `function(name, tensor)` in the place of every tensor.

        Args:
            function: from a field's name and its tensor to another tensor.
        """
        values: dict[str, Any] = {
            name: function(name, value) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return type(self)(**values)

    def detach(self: _B) -> _B:
        """The same outside the graph."""
        return self.map(lambda _, value: value.detach())

    def tasks(self: _B, chosen: slice | Bool[Tensor, " tasks"]) -> _B:
        """The chosen tasks of a flat batch.

        Args:
            chosen: a slice, or which tasks, `(tasks,)` of bool.
        """
        return self.map(lambda _, value: value[chosen])

    def with_tasks(self: _B, chosen: Bool[Tensor, " tasks"], by: _B) -> _B:
        """A flat batch with those of `by` in the place of the chosen tasks.

        Args:
            chosen: which tasks, `(tasks,)` of bool.
            by: as many tasks as are chosen, of the same sizes and with the same fields.
        """
        new = by.tensors()
        return self.map(lambda name, value: value.index_put((chosen,), new[name]))
