"""How far an answer is from the optimum, from features and coefficients alone, in extended precision.

Each judge writes down the primal and the dual objective of its base learner from the literature (see the user guide),
makes the coefficients feasible in a way of its own, and returns the relative duality gap, by which the optimum is at
most better. Nothing of the library is used, so that its certificates are judged too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np

Array = np.ndarray
# Weights a little longer take rounding errors out of the slacks, which C would multiply.
_STRETCHES = (0.0, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6)


def _gap(primal: Callable[[Array], Array], dual: Array, weights: Array) -> float:
    least = min([primal((1 + stretch) * weights) for stretch in _STRETCHES] + [primal(0 * weights)])
    if not np.isfinite(least) or not np.isfinite(dual):
        return np.inf
    return 0.0 if least == 0 else float(max(least - dual, 0) / least)


def _extended(*values: Array) -> list[Array]:
    return [np.asarray(value, dtype=np.longdouble) for value in values]


def _one_hot(labels: Array, ways: int) -> Array:
    return labels[:, None] == np.arange(ways)


def crammer_singer(x: Array, labels: Array, ways: int, C: float, coef: Array) -> float:
    """Of `SVMHead`."""
    x, a = _extended(x, coef)
    own = _one_hot(labels, ways)
    others = np.where(own, 0, np.minimum(a, 0))
    total = -others.sum(1, keepdims=True)
    others *= np.minimum(1, C / np.maximum(total, np.longdouble(1e-300)))
    a = np.where(own, -others.sum(1, keepdims=True), others)
    weights = x.T @ a

    def primal(w: Array) -> Array:
        scores = x @ w
        slack = (1 - own + scores - (scores * own).sum(1, keepdims=True)).max(1)
        return (w**2).sum() / 2 + C * slack.sum()

    return _gap(primal, (a * own).sum() - (weights**2).sum() / 2, weights)


def weston_watkins(x: Array, labels: Array, ways: int, C: float, coef: Array) -> float:
    """Of `WestonWatkinsSVMHead` with a margin of 2."""
    x, a = _extended(x, coef)
    own = _one_hot(labels, ways)
    others = np.where(own, 0, np.clip(a, -C, 0))
    a = np.where(own, -others.sum(1, keepdims=True), others)
    weights = x.T @ a

    def primal(w: Array) -> Array:
        scores = x @ w
        slack = np.maximum(0, 2 - (scores * own).sum(1, keepdims=True) + scores) * ~own
        return (w**2).sum() / 2 + C * slack.sum()

    return _gap(primal, 2 * (a * own).sum() - (weights**2).sum() / 2, weights)


def one_vs_rest(x: Array, labels: Array, ways: int, C: float, coef: Array) -> float:
    """Of `OneVsRestSVMHead`."""
    x, a = _extended(x, coef)
    sign = 2 * _one_hot(labels, ways) - 1
    a = sign * np.clip(sign * a, 0, C)
    weights = x.T @ a

    def primal(w: Array) -> Array:
        return (w**2).sum() / 2 + C * np.maximum(0, 1 - sign * (x @ w)).sum()

    return _gap(primal, (sign * a).sum() - (weights**2).sum() / 2, weights)


def simplified(x: Array, labels: Array, ways: int, C: float, coef: Array) -> float:
    """Of `SimplifiedSVMHead`."""
    x, a = _extended(x, coef)
    own = _one_hot(labels, ways)
    code = np.where(own, 1, -1 / np.longdouble(max(ways - 1, 1)))
    a = np.clip((a * own).sum(1, keepdims=True), 0, C)
    weights = x.T @ (a * code)

    def primal(w: Array) -> Array:
        return (w**2).sum() / 2 + C * np.maximum(0, 1 - ((x @ w) * code).sum(1)).sum()

    return _gap(primal, a.sum() - (weights**2).sum() / 2, weights)


def support_vector_regression(x: Array, values: Array, C: float, epsilon: float, coef: Array) -> float:
    """Of `SupportVectorRegressionHead`, for one output."""
    x, a, y = _extended(x, coef, values)
    a = np.clip(a[:, 0], -C, C)
    weights = x.T @ a

    def primal(w: Array) -> Array:
        return (w**2).sum() / 2 + C * np.maximum(0, np.abs(y - x @ w) - epsilon).sum()

    return _gap(primal, (y * a).sum() - epsilon * np.abs(a).sum() - (weights**2).sum() / 2, weights)


def ridge(x: Array, targets: Array, weight: float, coef: Array, from_weights: Array | None = None) -> float:
    """Of `RidgeHead`, from the weights `(d, k)` if it computes scores from them, and of Gaussian processes' means."""
    x, a, y = _extended(x, coef, targets)
    if from_weights is not None:
        (from_weights,) = _extended(from_weights)
        best, system = from_weights, (x.T @ x + weight * np.eye(x.shape[1])).astype(float)
        for _ in range(5):  # a dual solution close to the optimum, whichever weights are judged
            step = np.linalg.solve(system, (x.T @ (y - x @ best) - weight * best).astype(float))
            best = best + step
        a = (y - x @ best) / weight
    weights = x.T @ a

    def primal(w: Array) -> Array:
        return ((x @ w - y) ** 2).sum() / 2 + weight * (w**2).sum() / 2

    quadratic = (weights**2).sum() + weight * (a**2).sum()
    return _gap(primal, weight * ((y * a).sum() - quadratic / 2), weights if from_weights is None else from_weights)


def logistic(
    x: Array, labels: Array, ways: int, weight: float, coef: Array, from_weights: Array | None = None
) -> float:
    """Of `LogisticHead`, from the weights `(d, k)` if it computes scores from them."""
    x, a = _extended(x, coef)
    own = _one_hot(labels, ways)
    if from_weights is None:
        share = np.maximum(own - weight * a, 0)  # the probabilities that the coefficients stand for
    else:
        (from_weights,) = _extended(from_weights)
        scores = x @ from_weights
        share = np.exp(scores - scores.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    # Of an example that is certainly right, one minus the probability of its label would have no digits.
    wrong = np.where(own, 0, share)
    a = np.where(own, wrong.sum(1, keepdims=True), -share) / weight
    weights = x.T @ a

    def primal(w: Array) -> Array:
        scores = x @ w
        margins = scores - (scores * own).sum(1, keepdims=True)
        top = np.maximum(margins.max(1, keepdims=True), 0)
        # The logarithm of the sum of exponentials, of which one is 1, is zero for the label.
        rest = np.where(own, 0, np.exp(margins - top)).sum(1)
        losses = np.where(top[:, 0] > 0, top[:, 0] + np.log(np.exp(-top[:, 0]) + rest), np.log1p(rest))
        return weight * (w**2).sum() / 2 + losses.sum()

    entropy = -(wrong * np.log(np.where(wrong > 0, wrong, 1))).sum()
    certain = np.minimum(wrong.sum(1), 1)
    entropy -= ((1 - certain) * np.log1p(np.where(certain < 1, -certain, 0))).sum()
    dual = entropy - weight * (weights**2).sum() / 2
    return _gap(primal, dual, weights if from_weights is None else from_weights)


def gaussian_classes(
    x: Array, labels: Array, ways: int, query: Array, logits: Array, covariances: Covariances
) -> float:
    """Of heads that score by a Gaussian of each class: the largest error of a logit, relative to its largest part.

    What is the same for all classes doesn't count.

    Args:
        x: support, `(n, d)`.
        labels: `(n,)`.
        ways: of each at least one example.
        query: `(q, d)`.
        logits: `(q, ways)`.
        covariances: from the centered examples of each class, and of the task, to the covariance of each class and what
            is to be added to its logit.
    """
    with mpmath.workdps(60):
        rows = [[mpmath.matrix(row.tolist()) for row in x[labels == c]] for c in range(ways)]
        means = [_mean(own) for own in rows]
        centered = [[row - mean for row in own] for own, mean in zip(rows, means, strict=True)]
        everyone = [row for own in rows for row in own]
        matrices, constants = covariances(centered, [row - _mean(everyone) for row in everyone])
        inverses = [matrix**-1 for matrix in matrices]
        error = largest = mpmath.mpf(0)
        for given, found in zip(query.tolist(), logits.tolist(), strict=True):
            q = mpmath.matrix(given)
            classes = list(zip(means, inverses, constants, strict=True))
            parts = [_form(part, inverse) for mean, inverse, _ in classes for part in (q, mean)]
            wanted = [constant - _form(q - mean, inverse) / 2 for mean, inverse, constant in classes]
            off = [value - mpmath.mpf(own) for value, own in zip(wanted, found, strict=True)]
            error = max(error, max(off) - min(off))
            largest = max(largest, *parts, *map(abs, constants))
        return float(error / largest) if largest > 0 else float(error)


Covariances = Callable[[list[list[Any]], list[Any]], tuple[list[Any], list[Any]]]
"""In matrices of mpmath."""


def prototypes(centered: list[list[Any]], task: list[Any]) -> tuple[list[Any], list[Any]]:
    """Of `PrototypeHead`: half the identity, so that half the squared distance is the whole."""
    return [mpmath.eye(len(task[0])) / 2] * len(centered), [mpmath.mpf(0)] * len(centered)


def linear_discriminant(shrinkage: float, variance: float) -> Covariances:
    """Of `LinearDiscriminantHead` with that variance."""

    def covariances(centered: list[list[Any]], task: list[Any]) -> tuple[list[Any], list[Any]]:
        pooled = _scatter([row for own in centered for row in own]) / len(task)
        shared = (1 - mpmath.mpf(shrinkage)) * pooled + mpmath.mpf(shrinkage) * mpmath.mpf(variance) * mpmath.eye(
            pooled.rows
        )
        return [shared] * len(centered), [mpmath.log(mpmath.mpf(len(own)) / len(task)) for own in centered]

    return covariances


def mahalanobis(beta: float) -> Covariances:
    """Of `MahalanobisHead`."""

    def covariances(centered: list[list[Any]], task: list[Any]) -> tuple[list[Any], list[Any]]:
        whole = _scatter(task) / max(len(task) - 1, 1)
        matrices = []
        for own in centered:
            share = mpmath.mpf(len(own)) / (len(own) + 1)
            of_class = _scatter(own) / max(len(own) - 1, 1)
            matrices.append(share * of_class + (1 - share) * whole + mpmath.mpf(beta) * mpmath.eye(whole.rows))
        return matrices, [mpmath.mpf(0)] * len(centered)

    return covariances


def _mean(rows: list[Any]) -> Any:
    return sum(rows[1:], rows[0]) / len(rows)


def _scatter(rows: list[Any]) -> Any:
    return sum((row * row.T for row in rows), mpmath.zeros(rows[0].rows))


def _form(value: Any, matrix: Any) -> Any:
    return (value.T * matrix * value)[0]
