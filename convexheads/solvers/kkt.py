"""The structured KKT system that the interior-point solver, active-set Newton and the gradient share.

Up to its diagonal, the Hessian of the dual is the same n x n matrix for each class, so the system consists of one block
per class, and only the row sums couple the blocks:

    (gram + diag(diagonal_c)) x_c + row_multipliers = right_c  for every class c,     sum_c x_c = sums

Eliminating the blocks leaves only n x n matrices, with one Cholesky factorization per class and one for the row
multipliers, and never an nk x nk matrix. If the rank r of the Gram matrix is small, for instance because there are many
more examples than features, a class costs one Cholesky factorization of an r x r matrix, by the Sherman-Morrison-
Woodbury identity. Tensors here are class-major, `(tasks, k, n)`, so that classes are one more batch dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from convexheads.solvers.problem import DualProblem, TensorRecord

# Free rows are gathered into smaller blocks if they are at most this fraction of all rows.
_MAX_FREE_FRACTION_TO_GATHER = 0.75
# The number of columns after which the pivoted Cholesky factorization checks whether it is complete.
_CHECK_EVERY = 16
# A factor of the Gram matrix saves time if there are at least this number of examples, and its rank is at most this
# fraction of that number.
_MIN_EXAMPLES_FOR_LOW_RANK = 256
_MAX_RANK_FRACTION = 0.25


class KKT(TensorRecord, ABC):
    """A factorized KKT system."""

    @abstractmethod
    def solve(
        self, right: Float[Tensor, "tasks k n"], sums: Float[Tensor, "tasks n"], *, refinements: int
    ) -> tuple[Float[Tensor, "tasks k n"], Float[Tensor, "tasks n"]]:
        """Return `(x, row_multipliers)`, refined against the unregularized system."""


@dataclass(frozen=True, eq=False, repr=False)
class FactorizedKKT(KKT):
    """The factors of one KKT system per task. A block that cannot be factorized gives NaN for its task only."""

    gram: Float[Tensor, "tasks n n"]
    diagonal: Float[Tensor, "tasks k n"] | None
    schur: Float[Tensor, "tasks n n"] | None  # the Cholesky factor of the row multipliers' system

    def solve(self, right: Tensor, sums: Tensor, *, refinements: int) -> tuple[Tensor, Tensor]:
        return self.refine(right, sums, *self._eliminate(right, sums), steps=refinements)

    def refine(
        self, right: Tensor, sums: Tensor, x: Tensor, row_multipliers: Tensor, *, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Solve by refinement of `(x, row_multipliers)`.

        If the system is singular (duplicate examples, n > d), the result is the solution that is closest to the given
        `x` and `row_multipliers`.
        """
        for _ in range(steps):
            image = x @ self.gram
            if self.diagonal is not None:
                image = image + self.diagonal * x
            residual = right - image - row_multipliers.unsqueeze(1)
            change, multiplier_change = self._eliminate(residual, sums - x.sum(1))
            x, row_multipliers = x + change, row_multipliers + multiplier_change
        return x, row_multipliers

    def _eliminate(self, right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        x = self._by_block(right)
        if self.schur is None:
            return x, torch.zeros_like(sums)
        row_multipliers = torch.cholesky_solve((x.sum(1) - sums).unsqueeze(-1), self.schur).squeeze(-1)
        return x - self._by_block(row_multipliers.unsqueeze(1)), row_multipliers

    @abstractmethod
    def _by_block(self, value: Tensor) -> Tensor:
        """The inverses of the blocks times the parts of `value`, zero at fixed entries."""


@dataclass(frozen=True, eq=False, repr=False)
class BlockKKT(FactorizedKKT):
    """A system with the inverse of every regularized block, which consists of all n rows or of those in its `index`.

    `free_mask` is 1 for the free entries of each block and 0 for the fixed entries, or None if all entries are free.
    """

    inverse: Float[Tensor, "tasks k m m"]
    index: Int[Tensor, "tasks k m"] | None = None
    free_mask: Float[Tensor, "tasks k m"] | None = None

    @classmethod
    def factorize(
        cls,
        problem: DualProblem,
        *,
        diagonal: Float[Tensor, "tasks k n"] | None,
        free: Bool[Tensor, "tasks k n"] | None = None,
        regularization: float,
    ) -> BlockKKT:
        """Factorize the system of the `free` entries; the others are fixed at zero, and their equations dropped.

        The regularization of the diagonal, relative to the mean diagonal of the Gram matrix, makes singular blocks
        factorizable. Refinement against the unregularized system removes its effect.
        """
        gram, n = problem.gram, problem.gram.shape[-1]
        block = gram.unsqueeze(1)
        added = _scaled(regularization, gram).expand_as(block[:, :, 0])
        if diagonal is not None:
            added = added + diagonal
        index = free_mask = None
        if free is not None:
            size = int(free.sum(-1).amax()) if free.shape[1] > 1 else n
            if size <= _MAX_FREE_FRACTION_TO_GATHER * n:
                index = (~free).to(torch.uint8).argsort(dim=-1, stable=True)[..., :size]
                free_in_block = free.gather(-1, index)
                task = torch.arange(len(gram), device=gram.device)[:, None, None, None]
                block = gram[task, index.unsqueeze(-1), index.unsqueeze(-2)]
                added = added.expand(free.shape).gather(-1, index)
            else:
                free_in_block = free
            free_mask = free_in_block.to(gram.dtype)
            block = block * free_mask.unsqueeze(-1) * free_mask.unsqueeze(-2)
            added = torch.where(free_in_block, added, 1.0)
        inverse = torch.cholesky_inverse(cholesky(block + torch.diag_embed(added)))
        if free_mask is not None:
            inverse = inverse * free_mask.unsqueeze(-1)
        schur = None
        if problem.rows_sum_to_zero:
            schur = inverse.sum(1) if index is None else _assemble(inverse, index, n)
            if free is not None:  # a row without a free entry has no equation left
                schur = schur + torch.diag_embed((~free.any(1)).to(schur.dtype))
            schur = cholesky(schur)
        return cls(gram, diagonal, schur, inverse, index, free_mask)

    def _by_block(self, value: Tensor) -> Tensor:
        if self.index is None:
            value = value if self.free_mask is None else value * self.free_mask
            return (self.inverse @ value.unsqueeze(-1)).squeeze(-1)
        value = value.expand(*self.index.shape[:-1], -1)
        part = (self.inverse @ value.gather(-1, self.index).unsqueeze(-1)).squeeze(-1)
        return torch.zeros_like(value).scatter_add(-1, self.index, part)


def _assemble(inverse: Tensor, index: Tensor, n: int) -> Tensor:
    """The sum of the gathered blocks over the classes, one class at a time, so that it is deterministic."""
    total = inverse.new_zeros(len(inverse), n, n)
    task = torch.arange(len(inverse), device=inverse.device)[:, None, None]
    for c in range(index.shape[1]):
        place = (task, index[:, c, :, None], index[:, c, None, :])
        total[place] += inverse[:, c]
    return total


@dataclass(frozen=True, eq=False, repr=False)
class LowRankKKT(FactorizedKKT):
    """A system with a Gram matrix of small rank r: the inverse of a block is a diagonal minus a low-rank matrix."""

    inverse_diagonal: Float[Tensor, "tasks k n"]
    low_rank_factor: Float[Tensor, "tasks k r n"]

    @classmethod
    def factorize(
        cls, problem: DualProblem, *, diagonal: Float[Tensor, "tasks k n"], regularization: float
    ) -> LowRankKKT:
        """Factorize the system of all entries of a problem with a `gram_factor`, as `BlockKKT.factorize` does."""
        gram, gram_factor = problem.gram, problem.gram_factor
        assert gram_factor is not None
        inverse_diagonal = 1 / (diagonal + _scaled(regularization, gram))
        scaling = inverse_diagonal.sqrt().unsqueeze(2)
        columns = gram_factor.mT.unsqueeze(1) * scaling
        small = columns @ columns.mT + torch.eye(gram_factor.shape[-1], dtype=gram.dtype, device=gram.device)
        low_rank_factor = torch.linalg.solve_triangular(cholesky(small), columns, upper=False) * scaling
        schur = None
        if problem.rows_sum_to_zero:
            stacked = low_rank_factor.flatten(1, 2)
            schur = cholesky(torch.diag_embed(inverse_diagonal.sum(1)) - stacked.mT @ stacked)
        return cls(gram, diagonal, schur, inverse_diagonal, low_rank_factor)

    def _by_block(self, value: Tensor) -> Tensor:
        product = self.low_rank_factor.mT @ (self.low_rank_factor @ value.unsqueeze(-1))
        return self.inverse_diagonal * value - product.squeeze(-1)


def _scaled(regularization: float, gram: Tensor) -> Float[Tensor, "tasks 1 1"]:
    """The regularization in units of the Gram matrix, which is tiny in a rescaled problem with a small C."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return max(regularization, 4 * torch.finfo(gram.dtype).eps) * torch.where(mean > 0, mean, 1)


def pivoted_cholesky(gram: Float[Tensor, "tasks n n"], *, max_rank: int) -> Float[Tensor, "tasks n r"] | None:
    """A factor with `factor @ factor.mT == gram` up to rounding; None if it would need more than `max_rank` columns.

    The Cholesky factorization with pivoting (Higham 1990) ends when the diagonal of the residual is zero.
    """
    tasks, n, _ = gram.shape
    residual_diagonal = gram.diagonal(dim1=-2, dim2=-1).clone()
    tolerance = n * torch.finfo(gram.dtype).eps * residual_diagonal.amax(-1, keepdim=True)
    factor = gram.new_zeros(tasks, n, max_rank)
    task = torch.arange(tasks, device=gram.device)
    for rank in range(max_rank):
        if rank and rank % _CHECK_EVERY == 0 and (residual_diagonal <= tolerance).all():
            return factor[..., :rank].contiguous()
        pivot = residual_diagonal.argmax(-1)
        column = gram[task, pivot] - (factor[..., :rank] @ factor[task, pivot, :rank].unsqueeze(-1)).squeeze(-1)
        value = residual_diagonal.gather(-1, pivot.unsqueeze(-1))
        column = torch.where(value > tolerance, column / value.sqrt(), 0)
        factor[..., rank] = column
        residual_diagonal = (residual_diagonal - column.square()).scatter(-1, pivot.unsqueeze(-1), 0)
    return factor if (residual_diagonal <= tolerance).all() else None


def with_gram_factor(problem: DualProblem) -> DualProblem:
    """Add a factor of the Gram matrix to a problem with many examples and a small rank. A given factor is kept."""
    n = problem.gram.shape[-1]
    if problem.gram_factor is not None or n < _MIN_EXAMPLES_FOR_LOW_RANK:
        return problem
    return replace(problem, gram_factor=pivoted_cholesky(problem.gram, max_rank=int(_MAX_RANK_FRACTION * n)))


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor, and NaN for matrices that have none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)
