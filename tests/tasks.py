"""Tasks for tests, and the table of what each solver reaches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from convexheads.solvers import DualProblem
from convexheads.solvers.certificate import certify
from convexheads.solvers.rescaling import rescale

if TYPE_CHECKING:
    from benchmarks.data import Episodes

ROOT = Path(__file__).parent.parent
"""The checkout."""


def examples(count: int, *, nightly: int) -> settings:
    """How many examples Hypothesis draws: `count`, or `nightly` in the profile of that name."""
    return settings(max_examples=nightly if settings.get_current_profile_name() == "nightly" else count)


class Task(NamedTuple):
    support: Tensor
    labels: Tensor
    query: Tensor
    ways: int


class Precision(NamedTuple):
    """Largest relative difference to the native solver, see docs/solvers.md."""

    coef: float
    logits: float
    gradient: float


# For C times the mean squared length of the features between 1e-3 and 1e3, and a dual with one solution (n <= d, or
# smoothing > 0). Elsewhere a backend is held to its own certificate only. docs/solvers.md shows this table.
PRECISION = {
    "native": Precision(0.0, 0.0, 0.0),
    "qpth": Precision(1e-5, 1e-5, 1e-2),
    "cvxpylayers": Precision(1e-3, 1e-4, 1e-1),
    "moreau": Precision(1e-6, 1e-6, 1e-3),
}
COMFORTABLE = (1e-3, 1e3)


def task(
    *batch: int,
    shots: tuple[int, ...] = (2, 3, 1),
    queries: int = 4,
    d: int = 12,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Task:
    """A batch of random tasks, uneven shots, labels in random order, a different one in each task."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(shots)), torch.tensor(shots))
    tasks = torch.Size(batch).numel()
    labels = torch.stack([labels[torch.randperm(len(labels), generator=generator)] for _ in range(tasks)])
    support = scale * torch.randn(*batch, labels.shape[-1], d, generator=generator, dtype=torch.float64)
    query = scale * torch.randn(*batch, queries, d, generator=generator, dtype=torch.float64)
    return Task(support.to(dtype), labels.reshape(*batch, -1), query.to(dtype), len(shots))


def crammer_singer(support: Tensor, labels: Tensor, C: float | Tensor, smoothing: float = 0.0) -> DualProblem:
    """The paper's DualProblem, written down from Eq. 10 and not through the head."""
    targets = functional.one_hot(labels).to(support)
    smoothed = torch.full_like(targets, smoothing) if smoothing else None
    return DualProblem(support @ support.mT, linear=targets, upper=C * targets, smoothing=smoothed)


def gap_without_rounding(problem: DualProblem, coef: Tensor) -> Tensor:
    """The relative gap of coefficients, for the Gram matrix as it is."""
    rescaled, coef_scale, _ = rescale(problem)
    return certify(rescaled, coef.detach() / coef_scale[..., None, None]).gap


def close(value: Tensor, reference: Tensor, scale: Tensor | float = 0.0) -> float:
    """Largest difference, relative to the largest entry of the reference or to `scale`, whichever is larger."""
    size = max(reference.abs().max().item(), float(scale), 1e-300)
    return (value - reference).abs().max().item() / size


def indefinite(x: Tensor, y: Tensor) -> Tensor:
    """A kernel that is neither definite nor a distance: 0.6 for equal examples, and 0.4 or -0.4 for others."""
    sign = x[..., :1].sign() @ y[..., :1].sign().mT
    return (x.unsqueeze(-2) == y.unsqueeze(-3)).all(-1).to(x) - 0.4 * sign


@st.composite
def tasks(draw, *, max_shots: int = 4) -> tuple[Task, float]:
    """The issue's range: ways 1-10, uneven shots, d 1-64, C and feature scale 1e-3 to 1e3. Returns task and C."""
    shots = draw(st.lists(st.integers(1, max_shots), min_size=1, max_size=10))
    scale, C = (10.0 ** draw(st.floats(-3, 3)) for _ in range(2))
    drawn = task(
        shots=tuple(shots), queries=3, d=draw(st.integers(1, 64)), scale=scale, seed=draw(st.integers(0, 2**31))
    )
    return drawn, C


def clusters(classes: int = 8, each: int = 30, d: int = 6, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of classes that differ by their centers, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, d, generator=generator)
    labels = torch.arange(classes).repeat(each)
    return centers[labels] + noise * torch.randn(len(labels), d, generator=generator), labels


def images_of_step(episodes: Episodes, step: int) -> Tensor:
    """The images of a training step by task, `(tasks, n, channels, height, width)`."""
    return episodes(episodes.draw(step)).unflatten(0, tuple(episodes.labels.shape))
