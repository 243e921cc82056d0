"""How the threads of a team divide the work of a kernel. A team solves one task.

On the CPU, a team is one thread, so that the loops below are ordinary loops and waiting costs nothing. On a GPU, a team
is a block of several warps of 32 threads (`cuda_backend` has that version of these functions). So each kernel is
written once:

- All threads of a team call the same kernels, with the same arguments, in the same order.
- Work is divided by rows or entries, `for i in range(thread(), n, threads())`, or by classes, one warp for each,
  `for c in range(warp(), k, warps())`, and then `lane()` and `lanes()` divide what the warp does.
- A kernel may read what other threads wrote only after `wait_for_team()`, or after `wait_for_warp()` where they are in
  the same warp. A kernel that writes to an array waits before it returns.

Numba keeps machine code on disk, and does not notice that it is out of date when only a file has changed that the
kernel imports. If you change this file or `numba_kkt.py` or, where there is a GPU, `numba_kernels.py`, delete
`__pycache__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np
from numba.extending import overload

# Sums may be reordered, so that they can be vectorized; NaN and infinity keep their meaning.
kernel = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


def thread() -> int:
    """The number of this thread in its team."""
    return 0


def threads() -> int:
    """The number of threads in a team."""
    return 1


def lane() -> int:
    """The number of this thread in its warp."""
    return 0


def lanes() -> int:
    """The number of threads in a warp."""
    return 1


def warp() -> int:
    """The number of this thread's warp in its team."""
    return 0


def warps() -> int:
    """The number of warps in a team."""
    return 1


def wait_for_team() -> None:
    """Wait until all threads of the team are here, and see what they wrote."""


def wait_for_warp() -> None:
    """Wait until all threads of the warp are here, and see what they wrote."""


@no_type_check
def sum_of_team(value, memory):
    """The sum of the values of all threads of the team, in each of them. It needs `memory` for a number per warp."""
    return value


@no_type_check
def max_of_team(value, memory):
    """The largest of the values of all threads of the team, in each of them. It needs `memory` like `sum_of_team`."""
    return value


@no_type_check
def multiply(left, right, result):
    """Write the product of two matrices to `result`."""
    np.dot(left, right, result)


PRIMITIVES: tuple[Callable[..., Any], ...] = (
    thread,
    threads,
    lane,
    lanes,
    warp,
    warps,
    wait_for_team,
    wait_for_warp,
    sum_of_team,
    max_of_team,
    multiply,
)
"""The functions of this module that a kernel may call."""


def _compile_for_cpu(function: Callable[..., Any]) -> None:
    """Let compiled code for the CPU call a function as it stands here."""
    overload(function, target="cpu", strict=False)(lambda *_: function)


for _function in PRIMITIVES:
    _compile_for_cpu(_function)
