"""Tasks that are hard in the ways in which few-shot tasks are, each a function of its seed alone."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Set = Literal["hard", "other", "beyond"]
"""Which tasks: those that every solver ought to solve, of two makes, or some with C beyond what float64 can express."""


class HardTask(NamedTuple):
    """A task.

    Attributes:
        seed: with `of`, all that it depends on.
        support: features, `(n, d)`, in float64, float32 or bfloat16.
        labels: `(n,)`, some of the classes 0 to ways - 1.
        query: features, `(5, d)`.
        values: to regress on, `(n,)`, in float64.
        ways: the number of classes.
        C: weight of slacks; one over the weight of a regularizer.
        kinds: what makes it hard.
    """

    seed: int
    support: Tensor
    labels: Tensor
    query: Tensor
    values: Tensor
    ways: int
    C: float
    kinds: tuple[str, ...]

    @property
    def size(self) -> int:
        """Examples times classes."""
        return len(self.labels) * self.ways

    def to(self, device: str) -> HardTask:
        """The same task there."""
        names = ("support", "labels", "query", "values")
        return self._replace(**{name: getattr(self, name).to(device) for name in names})


def hard_task(seed: int, of: Set = "hard") -> HardTask:
    """Draw a task of a set."""
    return _other_task(seed) if of == "other" else _hard_task(seed, of)


def _other_task(seed: int) -> HardTask:
    """Draw a task of another make, so that nothing is tuned to one generator.

    1 to 20 ways, uneven shots, 1 to 300 features: counts, other integers, binary or heavy-tailed numbers, clusters, or
    spectra that fall to 1e-8; with near duplicates down to 1e-12, or rows whose scales differ by six orders of
    magnitude. C is drawn from 1e-5 to 1e7 in units of one over their mean squared length.
    """
    draw = np.random.default_rng([20261128, seed])
    ways, d = int(draw.integers(1, 21)), round(math.exp(draw.uniform(0, math.log(300))))
    labels = np.repeat(np.arange(ways), np.minimum(draw.geometric(0.25, ways), 15))
    n = len(labels)
    kind = ("counts", "integers", "binary", "heavy tails", "clusters", "spectrum")[draw.integers(6)]
    if kind == "counts":
        x = draw.poisson(draw.gamma(0.5, 4, (ways, d))[labels]).astype(float)
    elif kind == "integers":
        x = draw.integers(-255, 256, (n, d)).astype(float)
    elif kind == "binary":
        x = (draw.random((n, d)) < draw.beta(0.3, 1, (ways, d))[labels]).astype(float)
    elif kind == "heavy tails":
        x = np.clip(draw.standard_t(1.2, (n, d)), -1e4, 1e4)
    elif kind == "clusters":
        x = draw.normal(size=(ways, d))[labels] + 10 ** draw.uniform(-3, 1) * draw.normal(size=(n, d))
    else:
        turn = np.linalg.qr(draw.normal(size=(d, d)))[0]
        x = (draw.normal(size=(n, d)) * np.logspace(0, -8, d)) @ turn
    kinds = [kind]
    if draw.random() < 0.3:
        kinds.append("near duplicates")
        where = draw.integers(0, n, max(1, n // 3))
        x[where] = x[draw.integers(0, n, len(where))] + 10.0 ** -draw.integers(6, 13) * draw.normal(
            size=(len(where), d)
        )
    if draw.random() < 0.3:
        kinds.append("row scales")
        x *= 10 ** draw.uniform(-3, 3, (n, 1))
    query = x[draw.integers(0, n, 5)] + x.std() * draw.normal(size=(5, d))
    return _task(seed, draw, x, labels, query, ways, kinds, (-5, 7))


def _hard_task(seed: int, of: Set) -> HardTask:
    """Draw a task of the sets "hard" and "beyond".

    1 to 50 ways, 1 to 20 shots per class, uneven, 1 to 2,048 features, small numbers more often than large ones. The
    features have a scale from 1e-6 to 1e6. C is drawn from 1e-6 to 1e6 in units of one over their mean squared length,
    on which alone the difficulty depends, so that C itself goes from 1e-18 to 1e18; with `of="beyond"`, from
    1e8 to 1e18 in these units. Spectra fall to 1e-7, so that the Gram matrix's condition goes up to 1e14.
    """
    draw = np.random.default_rng([20261124, seed, of == "beyond"])

    def sometimes(share: float, kind: str) -> bool:
        if draw.random() < share:
            kinds.append(kind)
            return True
        return False

    def some(share: float) -> np.ndarray:
        return draw.integers(0, n, max(1, int(share * n)))

    kinds: list[str] = []
    ways, most, d = (round(math.exp(draw.uniform(0, math.log(largest)))) for largest in (50, 20, 2048))
    labels = np.repeat(np.arange(ways), draw.integers(1, most + 1, ways))
    n = len(labels)
    x = 10 ** draw.uniform(-1, 1) * draw.normal(size=(ways, d))[labels] + draw.normal(size=(n, d))
    if sometimes(0.1, "collinear"):
        rank = max(1, min(n, d) // 3)
        x = draw.normal(size=(n, rank)) @ draw.normal(size=(rank, d))
    if sometimes(0.1, "ill-conditioned"):
        left, spectrum, right = np.linalg.svd(x, full_matrices=False)
        x = left * np.logspace(0, -draw.uniform(2, 7), len(spectrum)) @ right
    if sometimes(0.15, "duplicates"):
        x[some(0.25)] = x[draw.integers(n)]
    if sometimes(0.1, "near-ties"):
        where = some(0.25)
        x[where] = x[draw.integers(0, n, len(where))] * (1 + 10.0 ** -draw.integers(4, 13))
    if sometimes(0.1, "zeros"):
        x[some(0.15)] = 0
    if sometimes(0.02, "all zero"):
        x[:] = 0
    if sometimes(0.2, "label noise"):
        where = some(0.3)
        labels[where] = draw.integers(0, ways, len(where))
    if sometimes(0.03, "one class"):
        labels[:] = draw.integers(ways)
    scale = 10 ** draw.uniform(-6, 6)
    x = scale * x
    query = x[draw.integers(0, n, 5)] + scale * draw.normal(size=(5, d))
    return _task(seed, draw, x, labels, query, ways, kinds, (8, 18) if of == "beyond" else (-6, 6))


def _task(
    seed: int,
    draw: np.random.Generator,
    x: np.ndarray,
    labels: np.ndarray,
    query: np.ndarray,
    ways: int,
    kinds: list[str],
    strengths: tuple[float, float],
) -> HardTask:
    """The task of these features and labels. The logarithm of C times their squared length is between `strengths`."""
    kind = [torch.float64, torch.float32, torch.bfloat16][draw.choice(3, p=[0.6, 0.25, 0.15])]
    support = torch.from_numpy(x).to(kind)
    length = support.double().square().sum(-1).mean().item()
    strength = draw.uniform(*strengths)
    return HardTask(
        seed=seed,
        support=support,
        labels=torch.from_numpy(labels),
        query=torch.from_numpy(query).to(kind),
        values=torch.from_numpy(draw.normal(size=len(labels))),
        ways=ways,
        C=10**strength / (length if length > 0 else 1.0),
        kinds=tuple(kinds),
    )
