"""The default solver: plain torch, structured, certified."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads._functorch import compute_without_grad, is_transforming
from convexheads._validation import check_real
from convexheads.errors import InputError
from convexheads.solvers import active_set, implicit
from convexheads.solvers.active_set import ActiveSet
from convexheads.solvers.base import OnFailure, Solved, Solver
from convexheads.solvers.interior_point import Relaxed, central_path, interior_point
from convexheads.solvers.kkt import BlockKKT, find_root
from convexheads.solvers.problem import QP, Certificate, Solution, Status
from convexheads.solvers.splitting import proximal_step, splitting

_ENOUGH_ROUNDS = 12
# Rows and columns from which on a start by splitting saves more than it costs, and how long it is.
_WORTH_SPLITTING = 500
_STEPS = 10
_ENOUGH_ITERATIONS = 100
# Both go further than the tolerance: until the active set is right, on which the gradient depends.
_AIM = 1e-3
# The matrices of all classes may have so many entries together; for a task that has more, none are formed.
_LARGEST_BLOCKS = 2**28
# For such a task, so many times `_STEPS` of splitting, tried out by so many rounds of the search, first at this gap.
_ENOUGH_STARTS = 60
_FEW_ROUNDS = 3
_WORTH_SEARCHING = 1e-3
# Of a GPU, problems of up to so many entries are copied to the compiled loops: several times as fast at 5 ways, half as
# fast with eight times as many.
_WORTH_COPYING = 2**23
# A root of the Gram matrix is looked for from so many examples on, and of use up to this share of them as its rank.
_WORTH_A_ROOT = 256
_LOW_RANK = 0.25


@cache
def numba_is_installed() -> bool:
    """Whether Numba is there, and scipy, whose BLAS it uses; looked for once."""
    return None not in map(find_spec, ("numba", "scipy"))


def can_be_compiled(qp: QP) -> bool:
    """Whether Numba is installed, and the problem one for `solvers/compiled.py`, here or copied from a GPU."""
    tasks, n, k = qp.linear.shape
    largest = {"cpu": _LARGEST_BLOCKS, "cuda": _WORTH_COPYING}.get(qp.linear.device.type, 0)
    return qp.linear.dtype == torch.float64 and tasks * k * n * n <= largest and numba_is_installed()


Gradient = Literal["exact", "smoothed", "truncated"]
"""Which gradient `NativeSolver` gives."""
_RELAXATION = 1e-3


class NativeSolver(Solver):
    """Active-set Newton, and a structured interior point for the tasks that it doesn't solve.

    The first is the primal-dual active set method (Hintermueller, Ito & Kunisch 2002), the second Mehrotra's
    predictor-corrector (1992). Nothing larger than n x n is ever formed: k + 1 Choleskys a round, all tasks at once, on
    any device. The gradient is exact at the solution (the implicit function theorem on the KKT conditions, Eq. 8 of Lee
    et al. 2019), to any order, and batches are as good as loops: a task that is hard or degenerate changes nothing for
    its neighbours.

    With `max_iterations` the interior point is stopped there: the coefficients are its iterate's, made feasible, and
    the gradient is that of the problem with the active set which the iterate shows.

    With Numba installed (the extra `numba`), problems on the CPU are solved compiled, many times
    faster; those on a GPU too, copied to the CPU and back, unless the batch is a large one. The first call compiles,
    for some fifteen seconds; the result is kept on disk. Where a block of n x n for each class would be too large,
    splitting (ADMM, Boyd et al. 2011) carries on until the search ends certified. With many more examples than
    features, interior point and splitting work with r x r matrices, r the rank of the Gram matrix.

    Args:
        max_iterations: stop the interior point after so many; None, the default: until converged.
        tolerance: certified relative duality gap at which a task counts as converged. Default 1e-6; it goes on to a
            thousandth of that.
        on_failure: what happens when a task is not certified to it: "raise" (default), "warn" or "return".
        gradient: "exact", the default: that of the optimum with its active set (or, with `max_iterations`, of the
            active set which the iterate shows). "smoothed": that of the point where every slack times its multiplier is
            `relaxation` (as qpax, Tracy & Manchester 2024), which is free of the kinks at weakly active bounds.
            "truncated", with `max_iterations` only: that of the KKT conditions at the very iterate, slacks and
            multipliers as they are, as OptNet (Amos & Kolter 2017) and so Lee et al. have it. The last two have no
            second derivative.
        relaxation: slack times multiplier for "smoothed", in units in which coefficients and multipliers are around
            one. Default 1e-3.
        compiled: whether problems are solved compiled. None, the default: where that is possible. False: never, and
            problems on a GPU are solved there.

    Raises:
        InputError: an argument is outside its range, or `gradient` and `max_iterations` don't go together. Solving
            raises what `Solver.solve` does.
    """

    default_tolerance: ClassVar[float] = 1e-6

    def __init__(
        self,
        *,
        max_iterations: int | None = None,
        tolerance: float | None = None,
        on_failure: OnFailure = "raise",
        gradient: Gradient = "exact",
        relaxation: float = _RELAXATION,
        compiled: Literal[False] | None = None,
    ) -> None:
        super().__init__(max_iterations=max_iterations, tolerance=tolerance, on_failure=on_failure)
        if not isinstance(gradient, str) or gradient not in get_args(Gradient):
            raise InputError("NativeSolver(gradient)", f"one of {get_args(Gradient)}", repr(gradient))
        if (gradient == "truncated") is (max_iterations is None) and gradient != "exact":
            expected = "a number" if gradient == "truncated" else "None"
            raise InputError("NativeSolver(max_iterations)", f"{expected} with gradient={gradient!r}", max_iterations)
        self.gradient: Gradient = gradient
        self.relaxation = check_real("NativeSolver(relaxation)", relaxation, positive=True)
        if compiled is not None and compiled is not False:
            raise InputError("NativeSolver(compiled)", "False, or None for where that is possible", repr(compiled))
        self.compiled = compiled

    def __repr__(self) -> str:
        shown = {"gradient": "exact", "relaxation": _RELAXATION, "compiled": None}
        own = [f"{name}={value!r}" for name, default in shown.items() if (value := getattr(self, name)) != default]
        text = super().__repr__()[:-1]
        return text + (", " if own and not text.endswith("(") else "") + ", ".join(own) + ")"

    def _solution(self, qp: QP) -> Solution:
        """Solved without autograd, where values can be looked at; the gradient comes afterwards."""
        if not len(qp.linear):
            return super()._solution(qp)
        if qp.linear.is_cuda and self._is_compiled(qp):
            # Matrices of n x n are copied in less time than a GPU needs to be told of the first few steps.
            solution = self._solution(qp.map(lambda _, value: value.cpu()))
            return solution.map(lambda _, value: value.to(qp.linear.device))
        if is_transforming():
            solution, scale, found = self._transformed(qp)
        else:
            with torch.no_grad():
                solution, scale, found = self._answer(qp)
        assert found is not None
        return replace(solution, coef=implicit.attach(qp, found._replace(coef=solution.coef), scale))

    def _transformed(self, qp: QP) -> tuple[Solution, Float[Tensor, " tasks"], ActiveSet | Relaxed]:
        """As `_answer`, inside the transforms of `torch.func`."""
        like: list[tuple[Solution, ActiveSet | Relaxed]] = []

        def solve(*values: Tensor) -> tuple[Tensor, ...]:
            problem = replace(qp, **dict(zip(names, values, strict=True)))
            batch = problem.linear.shape[:-2]
            solution, scale, found = self._answer(problem.flatten())
            assert found is not None
            like.append((solution, found))
            parts = *solution.tensors().values(), scale, *found[1:-1], *found.kkt.tensors().values()
            return tuple(part.reshape((*batch, *part.shape[1:])) for part in parts)

        names = qp.tensors()
        parts = iter(compute_without_grad(solve, *names.values()))
        solution, found = like[-1]
        solution = solution.map(lambda *_: next(parts))
        scale = next(parts)
        own = [found.coef, *(next(parts) for _ in found[1:-1]), found.kkt.map(lambda *_: next(parts))]
        return solution, scale, type(found)._make(own)

    def _answer(self, qp: QP) -> tuple[Solution, Float[Tensor, " tasks"], ActiveSet | Relaxed | None]:
        if not self._is_compiled(qp):
            return super()._answer(qp)
        from convexheads.solvers import compiled

        solution, scale, found = compiled.solve(qp, aim=_AIM * self.tolerance, max_rounds=_ENOUGH_ROUNDS)
        hard = solution.status != Status.CONVERGED
        if hard.any():
            solved, own_scale, own = super()._answer(qp.tasks(hard))
            assert isinstance(own, ActiveSet)
            assert isinstance(own.kkt, BlockKKT)
            own = own._replace(kkt=compiled.CompiledKKT.like(own.kkt, ~(own.at_upper | own.at_lower)))
            solution, found = solution.with_tasks(hard, solved), found.with_tasks(hard, own)
            scale = scale.index_put((hard,), own_scale)
        return solution, scale, found

    def _is_compiled(self, qp: QP) -> bool:
        as_ever = self.max_iterations is None and self.gradient == "exact" and self.compiled is None
        return as_ever and len(qp.linear) > 0 and can_be_compiled(qp)

    def _coefficients(self, qp: QP) -> Solved:
        if self.max_iterations is not None:
            qp = _with_root(qp)
            inside = interior_point(qp, tolerance=_AIM * self.tolerance, max_iterations=self.max_iterations)
            found, certificate = active_set.polish(qp, inside.point, move=False)
            iterations = inside.iterations
            if self.gradient == "truncated":
                found = inside.gradient_for(qp, certificate.feasible)
        else:
            found, certificate, iterations = self._optimum(qp)
            if self.gradient == "smoothed":
                qp = _with_root(qp)
                inside = central_path(qp, complementarity=self.relaxation, max_iterations=_ENOUGH_ITERATIONS)
                found = inside.gradient_for(qp, certificate.feasible)
        # What is returned is the projection that the certificate is about.
        certificate = replace(certificate, residual=certificate.violation)
        return Solved(certificate.feasible, iterations, certificate, found)

    def _optimum(self, qp: QP) -> tuple[ActiveSet, Certificate, Int[Tensor, " tasks"]]:
        if self._is_compiled(qp):  # then the search has failed already, compiled
            return self._from_inside(qp)
        aim = _AIM * self.tolerance
        _, n, k = qp.linear.shape
        if many := k * n * n > _LARGEST_BLOCKS:
            qp = _with_root(qp)
            found, certificate, iterations = self._by_splitting(qp, aim)
        else:
            start = proximal_step(qp) if n * k < _WORTH_SPLITTING else next(splitting(qp, steps=_STEPS))
            found, iterations = active_set.search(qp, start, max_rounds=_ENOUGH_ROUNDS)
            certificate = qp.certify(found.coef)
        hard = ~(certificate.within(aim) & certificate.shows_active_set())
        rank = n if qp.root is None else qp.root.shape[-1]
        if hard.any() and not (many and k * n * rank > _LARGEST_BLOCKS):
            polished, certified, needed = self._from_inside(qp.tasks(hard))
            found, certificate = found.with_tasks(hard, polished), certificate.with_tasks(hard, certified)
            iterations = iterations.index_put((hard,), needed)
        return found, certificate, iterations

    def _from_inside(self, qp: QP) -> tuple[ActiveSet, Certificate, Int[Tensor, " tasks"]]:
        """By the interior point, and the active set that it ends at."""
        qp = _with_root(qp)
        inside = interior_point(qp, tolerance=_AIM * self.tolerance, max_iterations=_ENOUGH_ITERATIONS)
        return *active_set.polish(qp, inside.point), inside.iterations

    def _by_splitting(self, qp: QP, aim: float) -> tuple[ActiveSet, Certificate, Int[Tensor, " tasks"]]:
        """For very many classes: splitting until a round or two of the search ends certified; nothing of k n^2.

        What is never certified comes back as splitting left it, with the active set that it shows.
        """
        near = _WORTH_SEARCHING
        for starts, start in enumerate(splitting(qp, steps=_STEPS), 1):
            last = starts == _ENOUGH_STARTS
            if not last and (qp.certify(start.coef).gap > near).any():
                continue
            found, rounds = active_set.search(qp, start, max_rounds=_FEW_ROUNDS)
            certificate = qp.certify(found.coef)
            proven = certificate.within(aim) & certificate.shows_active_set()
            if last and not proven.all():  # the search led nowhere: its start is better
                polished, certified = active_set.polish(qp.tasks(~proven), start.coef[~proven])
                found, certificate = found.with_tasks(~proven, polished), certificate.with_tasks(~proven, certified)
            if last or proven.all():
                return found, certificate, starts * _STEPS + rounds
            near /= 10
        raise AssertionError("splitting goes on for ever")


def _with_root(qp: QP) -> QP:
    """With a root of the Gram matrix where one is of use; one that is known is kept."""
    n = qp.gram.shape[-1]
    if qp.root is not None or n < _WORTH_A_ROOT:
        return qp
    return replace(qp, root=find_root(qp.gram, most=int(_LOW_RANK * n)))
