"""The structured KKT system that interior point and gradient share.

Up to its diagonal, the Hessian of the dual is the same n x n matrix for each class, so the system falls into one block
a class, tied together by the row sums only:

    (gram + diag(diagonal_c)) x_c + shift = right_c  for every class c,     sum_c x_c = sums

Eliminating the blocks leaves n x n matrices throughout: one Cholesky a class and one for the shift, never (nk)^2.
Tensors here are class-major, `(batch, k, n)`, so that classes are one more batch dimension.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class KKT(Protocol):
    """A factorised KKT system."""

    def solve(
        self, right: Float[Tensor, "tasks k n"], sums: Float[Tensor, "tasks n"], *, refinements: int
    ) -> tuple[Float[Tensor, "tasks k n"], Float[Tensor, "tasks n"]]:
        """Return `(x, shift)`."""
        ...


class BlockKKT:
    """The factors of one such system for each task; a block that can't be factorised gives NaN for its task alone.

    Args:
        gram: shared by the classes.
        diagonal: added to each class's block; None for nothing.
        free: the entries that may move; the others are held at zero and their equations dropped. None for all.
        row_sum: whether the row sums tie the classes together.
        regulariser: added to the diagonal, in units of it. It keeps singular blocks factorisable; refinement against
            the unregularised system takes its effect out of the answer again.
    """

    def __init__(
        self,
        gram: Float[Tensor, "tasks n n"],
        *,
        diagonal: Float[Tensor, "tasks k n"] | None = None,
        free: Bool[Tensor, "tasks k n"] | None = None,
        row_sum: bool,
        regulariser: float,
    ) -> None:
        self.gram, self.diagonal, self.row_sum = gram, diagonal, row_sum
        self.free: Tensor | None = None
        block = gram.unsqueeze(1)
        added = torch.full_like(block[:, :, 0], max(regulariser, 4 * torch.finfo(gram.dtype).eps))
        if diagonal is not None:
            added = added + diagonal
        if free is None:
            self.inverse = _inverse(block + torch.diag_embed(added))
        else:
            self.free = free.to(gram.dtype)
            block = block * self.free.unsqueeze(-1) * self.free.unsqueeze(-2)
            block = block + torch.diag_embed(torch.where(free, added, 1.0))
            self.inverse = _inverse(block) * self.free.unsqueeze(-1)
        if row_sum:
            schur = self.inverse.sum(1)
            if free is not None:  # a row without a free entry has no equation left
                schur = schur + torch.diag_embed((~free.any(1)).to(schur.dtype))
            self.schur = cholesky(schur)

    def solve(
        self,
        right: Float[Tensor, "tasks k n"],
        sums: Float[Tensor, "tasks n"],
        *,
        refinements: int,
        start: tuple[Float[Tensor, "tasks k n"], Float[Tensor, "tasks n"]] | None = None,
    ) -> tuple[Float[Tensor, "tasks k n"], Float[Tensor, "tasks n"]]:
        """Return `(x, shift)`, refined against the unregularised system.

        A singular system (duplicates, n > d) has many solutions: the one closest to `start` (zero by default) is found.
        """
        if start is None:
            x, shift = self._eliminate(self._restrict(right), sums)
        else:
            x, shift = start
            refinements += 1
        for _ in range(refinements):
            image = x @ self.gram
            if self.diagonal is not None:
                image = image + self.diagonal * x
            more, shift_more = self._eliminate(self._restrict(right - image - shift.unsqueeze(1)), sums - x.sum(1))
            x, shift = x + more, shift + shift_more
        return x, shift

    def _eliminate(self, right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        x = _multiply(self.inverse, right)
        if not self.row_sum:
            return x, torch.zeros_like(sums)
        shift = torch.cholesky_solve((x.sum(1) - sums).unsqueeze(-1), self.schur).squeeze(-1)
        return x - _multiply(self.inverse, shift.unsqueeze(1)), shift

    def _restrict(self, value: Tensor) -> Tensor:
        return value if self.free is None else value * self.free


def _multiply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor; NaN in the matrices that have none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(cholesky(matrix))
