"""Damped Newton steps until the certificate is small enough, for one penalty per task or for a grid of penalties."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convexheads.heads._logistic_newton import PATIENCE, take_step
from convexheads.heads._losses import CrossEntropy
from convexheads.heads._primal.problem import Point, Problem, Remaining, evaluate
from convexheads.heads._primal.steps import by_conjugate_gradients
from convexheads.solvers.best_iterate import BestIterate
from convexheads.solvers.native.active_set import numba_is_installed

# Up to this product of the numbers of examples, features and classes, a single task is solved by compiled kernels.
_MAX_COMPILED = 2**23
# The ratio of successive penalties, and the gap for all but the last one.
_EASIER, _AIM_OF_EASIER = 10, 0.1
# Of a grid of penalties, every n-th one is solved first. The others start between the solutions of their neighbors, of
# which these many determine a polynomial.
_FIRST, _NEIGHBORS = 8, 4


def minimize(
    problem: Problem,
    weight: Tensor,
    find_change: Callable[[Problem, Point], Tensor],
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Take damped Newton steps, which `find_change` computes from a point.

    Returns the weights of the smallest error, and the number of steps, of each task.
    """
    if find_change is by_conjugate_gradients and _fits_numba(problem):
        from convexheads.heads._primal import compiled

        return compiled.minimize(problem, weight, tolerance, max_steps)
    found = weight.clone(), torch.zeros_like(problem.penalty, dtype=torch.long)
    remaining = Remaining(weight.shape, weight.device)
    point = evaluate(problem, weight)
    best = BestIterate(point.weight, patience=PATIENCE)
    best.update(0, point.error, point.is_solved(tolerance), point.weight)
    for step in range(1, max_steps + 1):
        if best.done.all():
            break
        if (kept := remaining.needed(~best.done)) is not None:
            _store(remaining, best, found)
            choose = remaining.choose(kept)
            problem, point = problem.map(choose), point.map(choose)
            best.select(choose)
            remaining.places = remaining.places[kept]
        change = find_change(problem, point)

        def step_to(length: Tensor, problem=problem, start=point, change=change) -> tuple[Tensor, Point]:
            reached = evaluate(problem, torch.addcmul(start.weight, length[..., None, None], change))
            return reached.value, reached

        point, is_stuck = take_step(point.value, step_to)
        best.update(step, point.error, point.is_solved(tolerance) | is_stuck, point.weight)
    _store(remaining, best, found)
    return found


def _fits_numba(problem: Problem) -> bool:
    """Whether kernels that Numba compiles are faster. For a single large task, PyTorch uses threads."""
    features, tasks = problem.features, problem.penalty.numel()
    size = features.shape[-2:].numel() * problem.targets.shape[-1]
    if not (features.is_cpu and features.dtype == torch.float64 and isinstance(problem.loss, CrossEntropy)):
        return False
    return tasks > 0 and (size <= _MAX_COMPILED or tasks >= torch.get_num_threads()) and numba_is_installed()


def _store(remaining: Remaining, best: BestIterate, found: tuple[Tensor, Tensor]) -> None:
    for value, target in zip((best.tensors[0], best.iterations), found, strict=True):
        remaining.store(value, target)


def minimize_gradually(
    problem: Problem,
    start: Tensor,
    find_change: Callable[[Problem, Point], Tensor],
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Like `minimize`, but it begins with larger penalties if only some examples are going to be active.

    Each penalty changes the state of few examples. Otherwise, it is that of most examples, a few in each step.
    """
    steps = 0
    if problem.loss.has_active_set:
        size = (problem.sample_weight * problem.features.square().sum(-1)).sum(-1) / problem.features.shape[-1]
        penalty = size.expand_as(problem.penalty)
        while (penalty > problem.penalty).any():
            easier = replace(problem, penalty=penalty.maximum(problem.penalty))
            start, taken = minimize(easier, start, find_change, _AIM_OF_EASIER, max_steps)
            penalty, steps = penalty / _EASIER, steps + taken
    weight, taken = minimize(problem, start, find_change, tolerance, max_steps)
    return weight, steps + taken


def minimize_grid(
    problem: Problem,
    start: Tensor,
    size: int,
    find_change: Callable[[Problem, Point], Tensor],
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Solve a grid of `size` penalties, from coarse to fine; members are grids, one after the other.

    Where grids are smooth, the solutions of neighbors determine where the others start.
    """
    grids = len(problem.penalty[0]) // size
    logs = problem.penalty[0, :size].log()
    order = logs.argsort().tolist()
    found = start.clone(), torch.zeros_like(problem.penalty, dtype=torch.long)
    known: list[int] = []
    step = _FIRST
    while len(known) < size:
        new = [place for place in (*range(0, size, step), size - 1) if place not in known]
        step //= 2
        new = list(dict.fromkeys(new))
        if not new:
            continue
        members = torch.tensor([grid * size + order[place] for grid in range(grids) for place in new])
        members = members.to(start.device)
        if known:
            for place in new:
                neighbors = sorted(known, key=lambda other, place=place: abs(other - place))[:_NEIGHBORS]
                weights = _polynomial([logs[order[other]].item() for other in neighbors], logs[order[place]].item())
                for grid in range(grids):
                    values = (found[0][:, grid * size + order[other]] for other in neighbors)
                    start[:, grid * size + order[place]] = sum(
                        weight * value for weight, value in zip(weights, values, strict=True)
                    )

        def choose(value: Tensor, members: Tensor = members) -> Tensor:
            return value.index_select(1, members) if value.shape[1] > 1 else value

        run = minimize if known else minimize_gradually
        part = run(problem.map(choose), choose(start), find_change, tolerance, max_steps)
        for value, target in zip(part, found, strict=True):
            target.index_copy_(1, members, value)
        known += new
    return found


def _polynomial(known: Sequence[float], place: float) -> list[float]:
    """The weights of the values at the `known` places in the polynomial through them, at another place (Lagrange)."""
    weights = []
    for own in known:
        factors = ((place - other) / (own - other) for other in known if other != own)
        weights.append(math.prod(factors))
    return weights
