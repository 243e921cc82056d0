"""Quadratic programs whose solutions are known beforehand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from convexheads.solvers import DualProblem


def known_problem(
    tasks: int,
    n: int,
    k: int,
    *,
    seed: int,
    bounds: str,
    smoothing: str,
    rows_sum_to_zero: bool,
    rank: int | None = None,
):
    """A random DualProblem built around a solution chosen beforehand, with strictly complementary multipliers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(tasks, *shape, generator=generator, dtype=torch.float64)

    root = torch.randn(tasks, n, rank or n + 3, generator=generator, dtype=torch.float64)
    gram = root @ root.mT / n
    coef = 2 * random(n, k) - 1
    if rows_sum_to_zero:
        coef = coef - coef.mean(-1, keepdim=True)
    side = torch.randint(0, 3, (tasks, n, k), generator=generator)
    side[..., 0] = 0  # an entry in each row is free
    held_above = (side == 1) & (bounds != "lower")
    held_below = (side == 2) & (bounds != "upper")
    upper = coef + torch.where(held_above, 0.0, 0.1 + random(n, k))
    lower = coef - torch.where(held_below, 0.0, 0.1 + random(n, k))
    pull = torch.where(held_above, 0.1 + random(n, k), 0.0) - torch.where(held_below, 0.1 + random(n, k), 0.0)
    smoothed = None if smoothing == "none" else 0.1 + random(n, k)
    if smoothed is not None and smoothing == "some":
        smoothed = smoothed * (random(n, k) < 0.5)
    linear = gram @ coef + pull
    if smoothed is not None:
        linear = linear + smoothed * coef
    if rows_sum_to_zero:
        linear = linear + torch.randn(tasks, n, 1, generator=generator, dtype=torch.float64)
    qp = DualProblem(
        gram,
        linear,
        lower=None if bounds == "upper" else lower,
        upper=None if bounds == "lower" else upper,
        smoothing=smoothed,
        rows_sum_to_zero=rows_sum_to_zero,
    )
    return qp, coef, pull


known = given(
    n=st.integers(1, 8),
    k=st.integers(2, 5),
    seed=st.integers(0, 2**31),
    bounds=st.sampled_from(["upper", "lower", "both"]),
    smoothing=st.sampled_from(["none", "some", "all"]),
    rows_sum_to_zero=st.booleans(),
)
