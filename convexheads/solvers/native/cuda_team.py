"""The kernels on a GPU, and the functions of `team` there. A team is a block of threads; a launch has many teams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch
from numba import cuda, float64
from numba.cuda import dispatcher
from numba.extending import overload
from torch import Tensor

from convexheads.solvers.native import team
from convexheads.solvers.native.numba_kernels import MATRICES, VECTORS, divide_memory, solve_tasks_of_team
from convexheads.solvers.native.numba_kkt import factorize_tasks_of_team, solve_systems_of_team
from convexheads.solvers.native.team import thread, threads, wait_for_team

LANES = 32
"""The number of threads in a warp."""
MAX_WARPS = 16
"""The largest number of warps in a team."""
_ALL_LANES = 0xFFFFFFFF
# With more, fewer than 16 warps would fit; with fewer, values move to slower memory.
MAX_REGISTERS = 128


@no_type_check
def _thread():
    return cuda.threadIdx.x


@no_type_check
def _threads():
    return cuda.blockDim.x


@no_type_check
def _lane():
    return cuda.threadIdx.x % LANES


@no_type_check
def _lanes():
    return LANES


@no_type_check
def _warp():
    return cuda.threadIdx.x // LANES


@no_type_check
def _warps():
    return cuda.blockDim.x // LANES


@no_type_check
def _wait_for_team():
    cuda.syncthreads()


@no_type_check
def _wait_for_warp():
    cuda.syncwarp()


@no_type_check
def _combine(value, memory, adds):
    """The sum or the maximum of the values of a team."""
    offset = LANES // 2
    while offset > 0:
        other = cuda.shfl_down_sync(_ALL_LANES, value, offset)
        value = value + other if adds else max(value, other)
        offset //= 2
    cuda.syncthreads()  # the memory has been read
    if cuda.threadIdx.x % LANES == 0:
        memory[cuda.threadIdx.x // LANES] = value
    cuda.syncthreads()
    result = memory[0]
    for w in range(1, cuda.blockDim.x // LANES):
        result = result + memory[w] if adds else max(result, memory[w])
    return result


_combine_on_gpu = cuda.jit(device=True)(_combine)


@no_type_check
def _sum_of_team(value, memory):
    return _combine_on_gpu(value, memory, True)


@no_type_check
def _max_of_team(value, memory):
    return _combine_on_gpu(value, memory, False)


@no_type_check
def multiply(left, right, result):
    """`team.multiply`, entry by entry."""
    inner, columns = right.shape
    for entry in range(thread(), left.shape[0] * columns, threads()):
        row, column = entry // columns, entry % columns
        total = 0.0
        for p in range(inner):
            total += left[row, p] * right[p, column]
        result[row, column] = total
    wait_for_team()


ON_GPU: dict[Callable[..., Any], Callable[..., Any]] = {
    team.thread: _thread,
    team.threads: _threads,
    team.lane: _lane,
    team.lanes: _lanes,
    team.warp: _warp,
    team.warps: _warps,
    team.wait_for_team: _wait_for_team,
    team.wait_for_warp: _wait_for_warp,
    team.sum_of_team: _sum_of_team,
    team.max_of_team: _max_of_team,
    team.multiply: multiply,
}
"""The implementation of each function of `team`."""


def _compile_for_gpu(function: Callable[..., Any], implementation: Callable[..., Any]) -> None:
    overload(function, target="cuda", strict=False)(lambda *_: implementation)


for _function, _implementation in ON_GPU.items():
    _compile_for_gpu(_function, _implementation)


@cuda.jit(cache=True, max_registers=MAX_REGISTERS)
@no_type_check
def _solve_tasks(problem, options, results, system, factors, work):
    matrices, vectors, local, flat, inverse = work
    t = cuda.blockIdx.x
    memory = cuda.shared.array(LANES, float64)
    memory_of_team = divide_memory(matrices[t], vectors[t], local[t], flat[t], inverse[t], memory)
    solve_tasks_of_team(t, t + 1, problem, options, results, system, factors, memory_of_team)


@cuda.jit(cache=True, max_registers=MAX_REGISTERS)
@no_type_check
def _solve_systems(system, equations, options, unknowns, factors, work):
    residual, row_sum_residual, local, change, total = work
    t = cuda.blockIdx.x
    work_of_team = residual[t], row_sum_residual[t], (local[t], change[t], total[t])
    solve_systems_of_team(t, t + 1, system, equations, options, unknowns, factors, work_of_team)


@cuda.jit(cache=True, max_registers=MAX_REGISTERS)
@no_type_check
def _factorize_tasks(system, side, rows_sum_to_zero, factors, regularization, work):
    (local,) = work
    t = cuda.blockIdx.x
    factorize_tasks_of_team(t, t + 1, system, side, rows_sum_to_zero, factors, regularization, local[t])


def solve_tasks(problem, options, results, system, factors) -> None:
    """`numba_kernels.solve_tasks` for tensors on a GPU, in one launch."""
    tasks, n, k = problem[1].shape
    warps, new = _warps_for(n, k), problem[1].new_empty
    matrices, vectors, local = new(tasks, MATRICES, n, k), new(tasks, VECTORS, n), new(tasks, warps, n)
    inverse = new(tasks, n, n)
    work = matrices, vectors, local, inverse.view(tasks, n * n), inverse
    launch(_solve_tasks, warps, problem, options, results, system, factors, work)


def solve_systems(system, equations, options, unknowns, factors) -> None:
    """`numba_kkt.solve_systems` for tensors on a GPU, in one launch."""
    tasks, n, k = equations[0].shape
    warps, new = _warps_for(n, k), equations[0].new_empty
    work = new(tasks, n, k), new(tasks, n), new(tasks, warps, n), new(tasks, n, k), new(tasks, n)
    launch(_solve_systems, warps, system, equations, options, unknowns, factors, work)


def factorize_tasks(system, side, rows_sum_to_zero, factors, regularization) -> None:
    """`numba_kkt.factorize_tasks` for tensors on a GPU, in one launch."""
    tasks, n, k = side.shape
    warps = _warps_for(n, k)
    work = (system[0].new_empty(tasks, warps, n),)
    launch(_factorize_tasks, warps, system, side, rows_sum_to_zero, factors, regularization, work)


def launch(kernel: Any, warps: int, *arguments: Any) -> None:
    """Launch a kernel with a team per task on the current stream of PyTorch, without waiting for it."""
    first = arguments[0][0]
    with cuda.gpus[first.device.index]:
        stream = cuda.external_stream(torch.cuda.current_stream(first.device).cuda_stream)
        configure(kernel, len(first), warps, stream)(*map(_as_arrays, arguments))


def configure(kernel: Any, teams: int, warps: int, stream: Any) -> Any:
    """The function that launches a kernel. Numba's advice to launch at least 128 teams is not passed on to the user."""
    # A filter of warnings would be one of the whole process, and slow.
    config: Any = dispatcher.config  # pyright: ignore[reportPrivateImportUsage]
    before, config.CUDA_LOW_OCCUPANCY_WARNINGS = config.CUDA_LOW_OCCUPANCY_WARNINGS, 0
    try:
        return kernel[teams, LANES * warps, stream]
    finally:
        config.CUDA_LOW_OCCUPANCY_WARNINGS = before


def _warps_for(n: int, k: int) -> int:
    """The number of warps of a team: one per class, and at least one thread per example, within the limit."""
    return min(max(k, -(-n // LANES)), MAX_WARPS)


def _as_arrays(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_as_arrays, argument))
    return cuda.as_cuda_array(argument.detach(), sync=False) if isinstance(argument, Tensor) else argument
