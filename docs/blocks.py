"""Executes the Python blocks of a page. `docs/hooks.py` calls it in separate processes."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from types import ModuleType


def execute(codes: Sequence[str]) -> tuple[list[str], str]:
    """Execute blocks one after another in an empty module.

    Args:
        codes: the source of each block.

    Returns:
        The output of each block before the first that failed, and the traceback of that block or an empty string.
    """
    module = ModuleType("page")
    sys.modules["page"] = module  # where dataclasses and pickle look for what a block defines
    outputs: list[str] = []
    for number, code in enumerate(codes, 1):
        name = f"<block {number}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # for the traceback
        with redirect_stdout(StringIO()) as printed:
            try:
                exec(compile(code, name, "exec", dont_inherit=True), vars(module))  # noqa: S102 -- the site's own code
            except Exception:
                return outputs, traceback.format_exc()
        outputs.append(printed.getvalue())
    return outputs, ""
