"""The contenders: all heads on the native solver, the paper's SVM on all solvers, two solvers without our adapters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import convexheads as ch
from benchmarks.honesty import judges
from benchmarks.honesty.tasks import HardTask
from convexheads.heads import FittedClassifier, MulticlassSVM
from convexheads.solvers import to_dense


class Answer(NamedTuple):
    """The answer of a contender to a task.

    Attributes:
        gap: the error that the judge measures.
        solved: whether the contender reports that it has solved the task.
        gradient_error: the relative error of a directional derivative; None if it was not checked.
    """

    gap: float
    solved: bool
    gradient_error: float | None = None


class Contender(NamedTuple):
    """A head with a solver, or a solver alone, that is tried on tasks.

    Attributes:
        answer: from a task to an answer. A documented error counts as flagged, any other error as a crash.
        peer: whether the solver is not ours, so that it is tried on few tasks.
        largest: the examples times classes above which it is left out because it would take minutes or gigabytes.
        documented: the errors that it is documented to raise.
        suits: whether it is made for a task.
    """

    answer: Callable[[HardTask], Answer]
    peer: bool = False
    largest: float = math.inf
    documented: tuple[type[Exception], ...] = (ch.ConvexHeadsError,)
    suits: Callable[[HardTask], bool] = lambda _: True


def contenders() -> dict[str, Contender]:
    """All contenders by name."""
    exact: dict[str, Any] = {
        "largest": 300,
        "suits": lambda task: _has_every_class(task) and task.support.shape[-1] <= 12,
    }
    return {
        "SVM": Contender(partial(_svm, ch.SVMHead, judges.crammer_singer)),
        "Weston-Watkins SVM": Contender(partial(_svm, ch.WestonWatkinsSVMHead, judges.weston_watkins)),
        "one-vs-rest SVM": Contender(partial(_svm, ch.OneVsRestSVMHead, judges.one_vs_rest)),
        "simplified SVM": Contender(partial(_svm, ch.SimplifiedSVMHead, judges.simplified)),
        "SVM, in torch": Contender(_on(ch.solvers.NativeSolver(backend="torch"))),
        "logistic regression": Contender(_logistic),
        "ridge regression": Contender(_ridge),
        "Gaussian process": Contender(_gaussian_process),
        "support vector regression": Contender(_support_vector_regression),
        "prototypes": Contender(_prototypes, **exact),
        "linear discriminant": Contender(_linear_discriminant, **exact),
        "Mahalanobis": Contender(_mahalanobis, **exact),
        "SVM on qpth, by our adapter": Contender(_on(ch.solvers.QpthSolver(tolerance=1e-6)), peer=True, largest=300),
        "SVM on cvxpylayers, by our adapter": Contender(
            _on(ch.solvers.CvxpylayersSolver(tolerance=1e-6)), peer=True, largest=150
        ),
        "SVM on Moreau, by our adapter": Contender(
            _on(ch.solvers.MoreauSolver(tolerance=1e-6)), peer=True, largest=1000
        ),
        "SVM on qpth alone": Contender(_qpth, peer=True, largest=300, documented=(RuntimeError,)),
        "SVM on cvxpylayers alone": Contender(_cvxpylayers, peer=True, largest=150, documented=_cvxpylayers_errors()),
    }


def _on(solver: ch.solvers.Solver) -> Callable[[HardTask], Answer]:
    return partial(_svm, partial(ch.SVMHead, solver=solver), judges.crammer_singer)


def _has_every_class(task: HardTask) -> bool:
    return len(task.labels.unique()) == task.ways


def _arrays(task: HardTask) -> tuple[np.ndarray, np.ndarray, int]:
    return _numpy(task.support), _numpy(task.labels), task.ways


def _numpy(value: Tensor) -> np.ndarray:
    """In float64, if it is not of integers."""
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()


def _svm(head: Callable[..., MulticlassSVM], judge: Callable[..., float], task: HardTask) -> Answer:
    made = head(task.C)
    fitted = made.fit(task.support, task.labels, ways=task.ways, allow_missing_classes=True)
    assert fitted.solution is not None
    gap = judge(*_arrays(task), task.C, _numpy(fitted.expansion.coef))
    error = _gradient_error_of(made, task) if _can_be_differenced(task) and _is_regular(made, fitted, task) else None
    return Answer(gap, bool(fitted.solution.converged), error)


def _logistic(task: HardTask) -> Answer:
    head = ch.LogisticHead(1 / task.C)
    fitted = head.fit(task.support, task.labels, ways=task.ways, allow_missing_classes=True)
    assert fitted.solution is not None
    weight = fitted.expansion.weight
    weights = None if weight is None else _numpy(weight).T
    gap = judges.logistic(*_arrays(task), 1 / task.C, _numpy(fitted.expansion.coef), weights)
    error = _gradient_error_of(head, task) if _can_be_differenced(task) else None
    return Answer(gap, bool(fitted.solution.converged), error)


def _ridge(task: HardTask) -> Answer:
    head = ch.RidgeHead(1 / task.C)
    expansion = head.fit(task.support, task.labels, ways=task.ways, allow_missing_classes=True).expansion
    support, labels, ways = _arrays(task)
    weights = None if expansion.weight is None else _numpy(expansion.weight).T
    gap = judges.ridge(support, np.eye(ways)[labels], 1 / task.C, _numpy(expansion.coef), weights)
    return Answer(gap, True, _gradient_error_of(head, task) if _can_be_differenced(task) else None)


def _gaussian_process(task: HardTask) -> Answer:
    fitted = ch.GaussianProcessHead(1 / task.C, kernel=ch.kernels.Linear()).fit(task.support, task.values)
    targets = _numpy(task.values[:, None])
    return Answer(judges.ridge(_numpy(task.support), targets, 1 / task.C, _numpy(fitted.expansion.coef)), True)


def _support_vector_regression(task: HardTask) -> Answer:
    fitted = ch.SupportVectorRegressionHead(task.C, epsilon=0.1).fit(task.support, task.values)
    assert fitted.solution is not None
    support, coef = _numpy(task.support), _numpy(fitted.expansion.coef)
    gap = judges.support_vector_regression(support, _numpy(task.values), task.C, 0.1, coef)
    return Answer(gap, bool(fitted.solution.converged.all()))


def _gaussians(head: ch.ClassificationHead, covariances: judges.Covariances, task: HardTask) -> Answer:
    support, query = task.support.double(), task.query.double()
    logits = head(support, task.labels, query, ways=task.ways, allow_missing_classes=True)
    return Answer(judges.gaussian_classes(*_arrays(task), _numpy(query), _numpy(logits), covariances), True)


def _prototypes(task: HardTask) -> Answer:
    return _gaussians(ch.PrototypeHead(), judges.prototypes, task)


def _linear_discriminant(task: HardTask) -> Answer:
    head = ch.LinearDiscriminantHead(0.5, variance=1 / task.C)
    return _gaussians(head, judges.linear_discriminant(0.5, 1 / task.C), task)


def _mahalanobis(task: HardTask) -> Answer:
    return _gaussians(ch.MahalanobisHead(1 / task.C), judges.mahalanobis(1 / task.C), task)


def _problem(task: HardTask) -> tuple[Tensor, Tensor, Tensor]:
    """Features with gradient, their Gram matrix, and one-hot labels, in float64: what one would write down by hand."""
    support = task.support.double().clone().requires_grad_()
    return support, support @ support.mT, functional.one_hot(task.labels, task.ways).double()


def _qpth(task: HardTask) -> Answer:
    """Call qpth as MetaOptNet's code does, without the 1 that it adds to the diagonal."""
    from qpth.qp import QPFunction

    _, gram, own = _problem(task)
    dense = to_dense(ch.solvers.DualProblem(gram[None], own[None], upper=task.C * own[None]))
    coef = QPFunction(verbose=-1)(*dense).detach().view(own.shape)
    return Answer(judges.crammer_singer(*_arrays(task), task.C, _numpy(coef)), bool(coef.isfinite().all()))


def _cvxpylayers(task: HardTask) -> Answer:
    """As its README does."""
    import cvxpy
    from cvxpylayers.torch.cvxpylayer import CvxpyLayer

    _, gram, own = _problem(task)
    values, vectors = torch.linalg.eigh(gram.detach())
    root = (vectors * values.clamp_min(0).sqrt()).mT
    coef, factor = cvxpy.Variable(own.shape), cvxpy.Parameter(root.shape)
    constraints = [coef <= task.C * _numpy(own), cvxpy.sum(coef, axis=1) == 0]
    value = cvxpy.sum_squares(factor @ coef) / 2 - cvxpy.sum(cvxpy.multiply(_numpy(own), coef))
    layer = CvxpyLayer(cvxpy.Problem(cvxpy.Minimize(value), constraints), parameters=[factor], variables=[coef])
    (found,) = layer(root)
    gap = judges.crammer_singer(*_arrays(task), task.C, _numpy(found))
    return Answer(gap, bool(found.isfinite().all()))


def _cvxpylayers_errors() -> tuple[type[Exception], ...]:
    from cvxpy.error import SolverError
    from diffcp import SolverError as ConeSolverError

    return SolverError, ConeSolverError


_SMALL = 300
# An entry is clearly free or held above this slack, relative to the largest coefficient, or this relative multiplier.
_CLEAR = 1e-3
_DEFINITE = 1e-7


def _is_regular(head: MulticlassSVM, fitted: FittedClassifier, task: HardTask) -> bool:
    """Whether there is a derivative on both sides.

    Each entry is clearly free or clearly held (strict complementarity), and the free ones are determined by the
    problem: its Hessian is definite on them (second-order sufficiency). For example, a support example of zeros has
    the same score for all classes, and its slightest move decides which of them counts.
    """
    assert fitted.solution is not None
    if task.ways == 1:  # all coefficients are zero
        return False
    coef, pull = fitted.solution.coef, fitted.solution.bound_multipliers
    assert pull is not None
    qp = _dual(head, fitted)
    size, free = coef.abs().max().clamp_min(torch.finfo(coef.dtype).tiny), torch.ones_like(coef, dtype=torch.bool)
    for bound, sign in ((qp.upper, 1), (qp.lower, -1)):
        if bound is not None:
            slack, multiplier = sign * (bound - coef) / size, (sign * pull).clamp_min(0) / qp.linear.abs().max()
            if ((slack < _CLEAR) & (multiplier < _CLEAR)).any():
                return False
            free &= slack >= _CLEAR
    n, k = coef.shape
    hessian = torch.kron(qp.gram, torch.eye(k).to(coef))[free.flatten()][:, free.flatten()]
    if qp.rows_sum_to_zero:
        sums = torch.kron(torch.eye(n), torch.ones(1, k)).to(coef)[:, free.flatten()]
        rows = sums.any(1)
        _, _, basis = torch.linalg.svd(sums[rows])
        basis = basis[int(rows.sum()) :]
        hessian = basis @ hessian @ basis.mT
    if not len(hessian):
        return True
    values = torch.linalg.eigvalsh(hessian)
    return bool(values[0] > _DEFINITE * values[-1])


def _dual(head: MulticlassSVM, fitted: FittedClassifier) -> ch.solvers.DualProblem:
    """The problem that a head passes to its solver."""
    head, recorder = copy.copy(head), _Recorder(on_failure="return")
    head.solver = recorder
    head.solve(fitted.support)
    return recorder.problem


class _Recorder(ch.solvers.NativeSolver):
    """A solver that keeps the last problem."""

    problem: ch.solvers.DualProblem

    def solve(self, qp: ch.solvers.DualProblem) -> ch.solvers.Solution:
        self.problem = qp
        return super().solve(qp)


def _can_be_differenced(task: HardTask) -> bool:
    return task.support.dtype == torch.float64 and task.size <= _SMALL


def _gradient_error_of(head: ch.ClassificationHead, task: HardTask) -> float:
    return _gradient_error(
        lambda support: head(support, task.labels, task.query, ways=task.ways, allow_missing_classes=True), task.support
    )


def _gradient_error(logits: Callable[[Tensor], Tensor], support: Tensor) -> float:
    """The error of a directional derivative of the logits: the smallest over central differences with several steps."""
    generator = torch.Generator().manual_seed(0)
    support = support.clone().requires_grad_()
    out = logits(support)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out)
    weights /= out.detach().abs().max() or 1.0
    (gradient,) = torch.autograd.grad((out * weights).sum(), support)
    random = torch.randn(support.shape, generator=generator, dtype=support.dtype).to(support)
    # Mostly along the gradient, so that the derivative is not small, but not only along it.
    steepest = gradient / gradient.norm() if gradient.norm() > 0 else torch.zeros_like(gradient)
    direction = steepest + 0.1 * random / random.norm()
    slope = (gradient * direction).sum().item()
    size, errors = support.detach().norm().item() or 1.0, []
    with torch.no_grad():
        for step in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
            ahead, behind = (
                (logits(support + sign * step * size * direction) * weights).sum().item() for sign in (1, -1)
            )
            difference = (ahead - behind) / (2 * step * size)
            # The rounding error of a difference of two numbers around one.
            noise = 1e-9 / (step * size)
            errors.append(max(abs(difference - slope) - noise, 0) / max(abs(difference), abs(slope), 1e-300))
    return min(errors)
