"""Run kernels by a simulated team of threads, as on a GPU, and look for races.

With `on_this_gpu`, the solvers believe that problems on the CPU are on a GPU, and launch their kernels here. In a simulated
team, kernels run as plain Python. Each thread of the team is a thread here, and arrays remember which thread read or wrote an
entry, and when. Two threads race if both use an entry, one of them writes it, and no barrier that both pass is between.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from convexheads import _looks
from convexheads.solvers import problem
from convexheads.solvers.native import active_set, cuda_team, numba_backend, numba_kernels, numba_kkt, team

_TIMEOUT = 60


class RaceError(AssertionError):
    """Two threads used the same entry of an array at the same time, or did not meet at the same barrier."""


class Team:
    """A team of `warps` warps of `lanes` threads each.

    Attributes:
        primitives: the replacements of the functions of `convexheads.solvers.native.team`, by name.
    """

    def __init__(self, warps: int, lanes: int) -> None:
        self.warps, self.lanes = warps, lanes
        self._own = threading.local()
        self._lock = threading.Lock()
        self._values = [0.0] * (warps * lanes)
        self._log: dict[int, Any] = {}  # the last write and the later reads of each address
        self._sites: dict[int | None, set[tuple[str, int]]] = {}
        self._barriers: dict[int | None, threading.Barrier] = {None: self._barrier(None, warps * lanes)}
        self._barriers |= {w: self._barrier(w, lanes) for w in range(warps)}
        self.primitives: dict[str, Callable[..., Any]] = {
            "thread": lambda: self._own.thread,
            "threads": lambda: warps * lanes,
            "lane": lambda: self._own.thread % lanes,
            "lanes": lambda: lanes,
            "warp": lambda: self._own.thread // lanes,
            "warps": lambda: warps,
            "wait_for_team": lambda: self._wait(None),
            "wait_for_warp": lambda: self._wait(self._own.thread // lanes),
            "sum_of_team": lambda value, memory: self._combine(value, sum),
            "max_of_team": lambda value, memory: self._combine(value, max),
            "multiply": cuda_team.multiply,
        }
        assert set(self.primitives) == {function.__name__ for function in team.PRIMITIVES}

    def run(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a kernel in all threads; its arrays are watched. Returns the result of each thread."""
        watched, results, errors = self._watch(arguments), [None] * (self.warps * self.lanes), []

        def work(number: int) -> None:
            self._own.thread, self._own.clock = number, (0, 0)
            try:
                with np.errstate(all="ignore"):
                    results[number] = kernel(*watched)
                self._wait(None)
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                errors.append(error)
                for barrier in self._barriers.values():
                    barrier.abort()

        workers = [threading.Thread(target=work, args=(number,)) for number in range(len(results))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
        if any(barrier.broken for barrier in self._barriers.values()):
            raise RaceError("the threads did not meet at a barrier")
        return results

    def touch(self, address: int, *, writes: bool) -> None:
        """Record that this thread uses an entry of an array; raise `RaceError` if it races with another one."""
        me, clock = self._own.thread, self._own.clock
        with self._lock:
            last_write, reads = self._log.get(address, (None, {}))
            others = ([last_write] if last_write else []) + (list(reads.items()) if writes else [])
            for other, when in others:
                same_warp = other // self.lanes == me // self.lanes
                if other != me and when[0] == clock[0] and not (same_warp and when[1] != clock[1]):
                    raise RaceError(f"threads {other} and {me} of {self.warps} x {self.lanes} use the same entry")
            self._log[address] = ((me, clock), {}) if writes else (last_write, reads | {me: clock})

    def _watch(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._watch, value))
        if isinstance(value, np.ndarray):
            addresses = value.ctypes.data + value.itemsize * np.arange(value.size).reshape(value.shape)
            return Watched(self, value, addresses)
        return value

    def _barrier(self, name: int | None, parties: int) -> threading.Barrier:
        def check() -> None:
            if len(self._sites.pop(name)) > 1:
                raise RaceError("threads wait at different barriers")

        return threading.Barrier(parties, check, _TIMEOUT)

    def _wait(self, name: int | None) -> None:
        frame = sys._getframe(2)
        with self._lock:
            self._sites.setdefault(name, set()).add((frame.f_code.co_name, frame.f_lineno))
        self._barriers[name].wait()
        team_clock, warp_clock = self._own.clock
        self._own.clock = (team_clock + (name is None), warp_clock + 1)

    def _combine(self, value: float, combine: Callable[[list[float]], float]) -> float:
        self._values[self._own.thread] = value
        self._wait(None)
        result = combine(self._values)
        self._wait(None)
        return result


class Watched:
    """An array, or a part of one, whose entries are watched."""

    def __init__(self, team: Team, array: np.ndarray, addresses: np.ndarray) -> None:
        self._team, self._array, self._addresses = team, array, addresses
        self.shape = array.shape

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        addresses = self._addresses[index]
        if isinstance(addresses, np.ndarray):
            return Watched(self._team, self._array[index], addresses)
        self._team.touch(int(addresses), writes=False)
        return self._array[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._team.touch(int(self._addresses[index]), writes=True)
        self._array[index] = value


@contextmanager
def simulated(team: Team):
    """Let the kernels run as plain Python in the threads of the team."""
    saved = [(module, dict(vars(module))) for module in (numba_kernels, numba_kkt, cuda_team)]
    try:
        for module, values in saved:
            for name, value in values.items():
                if name in team.primitives:
                    setattr(module, name, team.primitives[name])
                elif isinstance(value, Dispatcher):
                    setattr(module, name, value.py_func)
        yield
    finally:
        for module, values in saved:
            vars(module).update(values)


@contextmanager
def on_this_gpu(make_team: Callable[[], Team] | None = None):
    """Launch kernels for GPUs here: each team of a launch is one that `make_team` makes, or one compiled thread."""

    def launch(kernel: Any, warps: int, *arguments: Any) -> None:
        *arguments, memory = cuda_team._as_arrays(arguments)
        for t in range(len(arguments[0][0])):
            one = None if make_team is None else make_team()
            n = arguments[0][0].shape[-1]
            local = np.empty((1 if one is None else one.warps, n))
            with nullcontext() if one is None else simulated(one):
                if kernel is cuda_team._factorize_tasks:
                    work, body = local, numba_kkt.factorize_tasks_of_team
                elif kernel is cuda_team._solve_tasks:
                    matrices, vectors, _, flat, inverse = (part[t] for part in memory)
                    work = numba_kernels.divide_memory(matrices, vectors, local, flat, inverse, np.empty(warps))
                    body = numba_kernels.solve_tasks_of_team
                else:
                    residual, sums, _, change, total = (part[t] for part in memory)
                    work, body = (residual, sums, (local, change, total)), numba_kkt.solve_systems_of_team
                (body if one is None else partial(one.run, body))(t, t + 1, *arguments, work)

    def as_array(tensor: Any, **_: bool) -> np.ndarray:
        assert not tensor.requires_grad, "numba-cuda takes no tensors with a gradient"
        return tensor.numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_team, "launch", launch)
        patch.setattr(cuda_team.cuda, "as_cuda_array", as_array)
        patch.setattr(numba_backend, "_is_on_cpu", lambda tensor: False)
        patch.setattr(problem, "_check_order", lambda *bounds: None)  # only values on the CPU are checked
        patch.setattr(_looks, "_waits", lambda flag: True)
        patch.setattr(active_set, "_is_on_gpu", lambda tensor: True)
        yield
