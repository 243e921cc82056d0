"""The settings of heads, kernels and solvers are the arguments of their constructors."""

from __future__ import annotations

import inspect
from functools import cache


@cache
def constructor_arguments(kind: type) -> dict[str, inspect.Parameter]:
    """The named arguments of the constructor of `kind`, and those of base classes that it passes on through `**`."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        arguments = list(inspect.signature(base.__init__).parameters.values())[1:]
        named = {a.name: a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}
        found |= {name: argument for name, argument in named.items() if name not in found}
        if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
            break
    return found
