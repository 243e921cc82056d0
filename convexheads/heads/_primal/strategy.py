"""Solve tasks in the weights: which steps suit their sizes, in which basis, and what happens where they stall."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convexheads._compiler import operator
from convexheads.heads._losses import LOSSES, CrossEntropy
from convexheads.heads._primal import steps
from convexheads.heads._primal.basis import Basis
from convexheads.heads._primal.minimize import minimize, minimize_gradually, minimize_grid
from convexheads.heads._primal.problem import Point, Problem, evaluate, group_members
from convexheads.heads._sharing import is_shared, shared_from

# Up to this number of weights, d k, the Hessian is factorized.
MAX_UNKNOWNS = 256
# Steps by conjugate gradients, after which a problem with active examples is solved by factorizations.
_MAX_INEXACT = 20
# Where conjugate gradients stall above this gap, matrices are factorized, as many at once as have so few entries.
_STALLED, _MAX_ENTRIES = 1e-8, 2**26
_DATA = "Tensor features, Tensor targets, Tensor sample_weight, Tensor offset, Tensor penalty"
_SCHEMA = f"({_DATA}, Tensor? start=None, *, str loss, bool intercept, float tolerance, int max_steps) -> "
_SCHEMA += "(Tensor, Tensor, Tensor, Tensor)"


def _without_values(
    features: Tensor, targets: Tensor, *_: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = features.new_empty((*features.shape[:-2], features.shape[-1], targets.shape[-1]))
    tasks = features.new_empty(features.shape[:-2])
    return weight, tasks, tasks.clone(), torch.empty_like(tasks, dtype=torch.long)


@operator("solve_primal", _SCHEMA, _without_values)
def solve(
    features: Tensor,
    targets: Tensor,
    sample_weight: Tensor,
    offset: Tensor,
    penalty: Tensor,
    start: Tensor | None = None,
    *,
    loss: str,
    intercept: bool,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve tasks `(*batch, n, d)` by damped Newton steps until each error is below `tolerance` or stops falling.

    The steps begin at zero or at the weights `start`, `(*batch, d, k)`. Returns the weights, `(*batch, d, k)`, their
    certified relative duality gap and error (as in `PrimalFit`), and the number of steps.
    """
    batch, (_, d), k = features.shape[:-2], features.shape[-2:], targets.shape[-1]
    groups = shared_from(features, len(batch))
    data = (features, targets, sample_weight, offset, penalty)
    grouped = [group_members(part, groups, len(batch)) for part in data]
    problem = Problem(*grouped, loss=LOSSES[loss], intercept=intercept)
    last = len(batch) - 1
    is_grid = groups <= last and is_shared(sample_weight, [last]) and (penalty == penalty[(0,) * last]).all()
    if start is not None:
        start = start.reshape(*problem.penalty.shape, d, k)
    point, taken = _minimize_all(problem, start, batch[-1] if is_grid else 1, tolerance, max_steps)
    gap, error, taken = (part.reshape(batch) for part in (point.gap, point.error, taken))
    return point.weight.reshape(*batch, d, k), gap, error, taken


def _minimize_all(
    problem: Problem, start: Tensor | None, grid: int, tolerance: float, max_steps: int
) -> tuple[Point, Tensor]:
    """The point of the optimal weights and the number of steps.

    A warm start is used where it is better than zero.
    """
    k = problem.targets.shape[-1]
    if not problem.loss.is_coupled and k > 1:
        each, taken = _minimize_all(*_split_classes(problem, start, grid), grid, tolerance, max_steps)
        weight = _join_classes(each.weight, k, grid).squeeze(-2)
        return evaluate(problem, weight), _join_classes(taken, k, grid).amax(-1)
    (groups, members), (n, d) = problem.penalty.shape, problem.features.shape[-2:]
    # The memory has the order in which a group is multiplied.
    zero = problem.features.new_zeros((groups, d, members, k)).transpose(1, 2)
    run = minimize_gradually
    if start is not None:
        is_better = evaluate(problem, start).value < evaluate(problem, zero).value
        zero, run = start.where(is_better[..., None, None], 0), minimize
    if d * k <= MAX_UNKNOWNS:
        weight, taken = run(problem, zero, steps.by_cholesky, tolerance, max_steps)
        return evaluate(problem, weight), taken
    basis = Basis.of(problem)
    rotated = replace(problem, features=basis.change(problem.features))
    inside = zero.new_zeros((groups, rotated.features.shape[-1], members, k)).transpose(1, 2)
    if start is not None:
        inside.copy_(basis.enter(zero))
    find_change, most = steps.by_conjugate_gradients, max_steps
    if problem.loss.has_active_set:  # which inexact steps find slowly
        if n < min(4 * d, steps.MAX_ACTIVE):
            find_change = steps.by_active_examples
        else:
            most = min(max_steps, _MAX_INEXACT)
    if grid > 2:
        found = minimize_grid(rotated, inside, grid, find_change, tolerance, most)
    else:
        found = run(rotated, inside, find_change, tolerance, most)
    point, taken = evaluate(problem, basis.leave(found[0])), found[1]
    # The rotation rounds the features, which matters where weights are huge.
    stalled = (point.error > _STALLED).nonzero()
    if len(stalled) and (k * n * n <= _MAX_ENTRIES or not problem.loss.is_coupled):
        weight = point.weight.clone()
        # Each of these tasks becomes a group of its own, as many at once as fit into memory.
        for places in stalled.split(max(1, _MAX_ENTRIES // (k * n * max(n, d)))):
            chosen = tuple(places.unbind(-1))

            def choose(value: Tensor, chosen: tuple[Tensor, ...] = chosen) -> Tensor:
                return value.expand(groups, members, *value.shape[2:])[chosen].unsqueeze(1)

            own, begin = basis.map(choose), choose(found[0])
            better = _factorize_all(problem.map(choose), rotated.map(choose), begin, own, tolerance, max_steps)
            weight[chosen] = better.squeeze(1)
        point = evaluate(problem, weight)
    return point, taken


def _factorize_all(
    problem: Problem, rotated: Problem, inside: Tensor, basis: Basis, tolerance: float, max_steps: int
) -> Tensor:
    """The weights of problems with one member, by factorizations in every step.

    They begin at the weights `inside` of the problems in terms of the basis.
    """
    if isinstance(problem.loss, CrossEntropy):
        return minimize(problem, basis.leave(inside), steps.by_cholesky_in_dual, tolerance, max_steps)[0]
    return basis.leave(minimize_gradually(rotated, inside, steps.by_cholesky, tolerance, max_steps)[0])


def _split_classes(problem: Problem, start: Tensor | None, grid: int) -> tuple[Problem, Tensor | None]:
    """The problem and its start, with a member for each class, whose loss does not depend on the others.

    Grids stay together.
    """
    groups, members = problem.penalty.shape
    k = problem.targets.shape[-1]

    def split(value: Tensor, *, has_classes: bool) -> Tensor:
        value = value.expand(groups, members, *value.shape[2:]).unflatten(1, (-1, grid))
        if has_classes:
            value = value.movedim(-1, 2).unsqueeze(-1)
        else:
            value = value.unsqueeze(2).expand(groups, value.shape[1], k, *value.shape[2:])
        return value.flatten(1, 3)

    changed = replace(
        problem,
        targets=split(problem.targets, has_classes=True),
        offset=split(problem.offset, has_classes=True),
        sample_weight=weight if (weight := problem.sample_weight).shape[1] == 1 else split(weight, has_classes=False),
        penalty=split(problem.penalty, has_classes=False),
    )
    return changed, None if start is None else split(start, has_classes=True)


def _join_classes(value: Tensor, k: int, grid: int) -> Tensor:
    """The members of `_split_classes` as members with a last dimension of classes; weights lose their own one."""
    value = value.unflatten(1, (-1, k, grid)).movedim(2, 3)
    return value.flatten(1, 2) if value.ndim == 4 else value.flatten(1, 2).movedim(2, -1)
