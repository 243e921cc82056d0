"""The structured KKT system that interior point, active set and gradient share.

Up to its diagonal, the Hessian of the dual is the same n x n matrix for each class, so the system falls into one block
a class, tied together by the row sums only:

    (gram + diag(diagonal_c)) x_c + shift = right_c  for every class c,     sum_c x_c = sums

Eliminating the blocks leaves n x n matrices throughout: one Cholesky a class and one for the shift, never (nk)^2.
Tensors here are class-major, `(tasks, k, n)`, so that classes are one more batch dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from convexheads.solvers.batch import Batch

# Blocks are made smaller where the rows in them are at most this share of all.
_WORTH_GATHERING = 0.75


class KKT(Batch, ABC):
    """A factorised KKT system. All that it consists of are tensors, tasks first."""

    @abstractmethod
    def solve(
        self, right: Float[Tensor, "tasks k n"], sums: Float[Tensor, "tasks n"], *, refinements: int
    ) -> tuple[Float[Tensor, "tasks k n"], Float[Tensor, "tasks n"]]:
        """Return `(x, shift)`, refined against the unregularised system."""


@dataclass(frozen=True)
class BlockKKT(KKT):
    """The factors of one such system for each task; a block that can't be factorised gives NaN for its task alone.

    Attributes:
        gram: shared by the classes.
        diagonal: added to each class's block; None for nothing.
        inverse: of the regularised blocks.
        schur: the Cholesky factor of the system for the shift; None without row sums.
        index: the rows that each block consists of, padded; None for all n.
        inside: which entries take part at all, 1 or 0; by block where there is an `index`. None for all.
    """

    gram: Float[Tensor, "tasks n n"]
    diagonal: Float[Tensor, "tasks k n"] | None
    inverse: Float[Tensor, "tasks k m m"]
    schur: Float[Tensor, "tasks n n"] | None
    index: Int[Tensor, "tasks k m"] | None = None
    inside: Float[Tensor, "tasks k m"] | None = None

    @classmethod
    def factorise(
        cls,
        gram: Float[Tensor, "tasks n n"],
        *,
        diagonal: Float[Tensor, "tasks k n"] | None = None,
        free: Bool[Tensor, "tasks k n"] | None = None,
        row_sum: bool,
        regulariser: float,
    ) -> BlockKKT:
        """Factorise.

        Args:
            gram: shared by the classes.
            diagonal: added to each class's block; None for nothing.
            free: the entries that may move; the others are held at zero and their equations dropped. None for all.
            row_sum: whether the row sums tie the classes together.
            regulariser: added to the diagonal, in units of it. It keeps singular blocks factorisable; refinement
                against the unregularised system takes its effect out of the answer again.
        """
        n = gram.shape[-1]
        block = gram.unsqueeze(1)
        added = torch.full_like(block[:, :, 0], max(regulariser, 4 * torch.finfo(gram.dtype).eps))
        if diagonal is not None:
            added = added + diagonal
        index = inside = None
        if free is not None:
            size = int(free.sum(-1).amax()) if free.shape[1] > 1 else n
            if size <= _WORTH_GATHERING * n:  # the largest block: the classes' own rows, and few others
                index = (~free).to(torch.uint8).argsort(dim=-1, stable=True)[..., :size]
                free_in_block = free.gather(-1, index)
                task = torch.arange(len(gram), device=gram.device)[:, None, None, None]
                block = gram[task, index.unsqueeze(-1), index.unsqueeze(-2)]
                added = added.expand(free.shape).gather(-1, index)
            else:
                free_in_block = free
            inside = free_in_block.to(gram.dtype)
            block = block * inside.unsqueeze(-1) * inside.unsqueeze(-2)
            added = torch.where(free_in_block, added, 1.0)
        inverse = torch.cholesky_inverse(cholesky(block + torch.diag_embed(added)))
        if inside is not None:
            inverse = inverse * inside.unsqueeze(-1)
        schur = None
        if row_sum:
            schur = inverse.sum(1) if index is None else _assemble(inverse, index, n)
            if free is not None:  # a row without a free entry has no equation left
                schur = schur + torch.diag_embed((~free.any(1)).to(schur.dtype))
            schur = cholesky(schur)
        return cls(gram, diagonal, inverse, schur, index, inside)

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
            x, shift = self._eliminate(right, sums)
        else:
            x, shift = start
            refinements += 1
        for _ in range(refinements):
            image = x @ self.gram
            if self.diagonal is not None:
                image = image + self.diagonal * x
            more, shift_more = self._eliminate(right - image - shift.unsqueeze(1), sums - x.sum(1))
            x, shift = x + more, shift + shift_more
        return x, shift

    def with_tasks(self, chosen: Bool[Tensor, " tasks"], by: BlockKKT) -> BlockKKT:
        size = max(self.inverse.shape[-1], by.inverse.shape[-1])
        new = by._padded(size).tensors()
        return self._padded(size).map(lambda name, value: value.index_put((chosen,), new[name]))

    def _eliminate(self, right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        x = self._by_block(right)
        if self.schur is None:
            return x, torch.zeros_like(sums)
        shift = torch.cholesky_solve((x.sum(1) - sums).unsqueeze(-1), self.schur).squeeze(-1)
        return x - self._by_block(shift.unsqueeze(1)), shift

    def _by_block(self, value: Tensor) -> Tensor:
        """The blocks' inverses times the parts of `value`, zero at entries that don't take part."""
        if self.index is None:
            value = value if self.inside is None else value * self.inside
            return (self.inverse @ value.unsqueeze(-1)).squeeze(-1)
        value = value.expand(*self.index.shape[:-1], -1)
        part = (self.inverse @ value.gather(-1, self.index).unsqueeze(-1)).squeeze(-1)
        return torch.zeros_like(value).scatter_add(-1, self.index, part)

    def _padded(self, size: int) -> BlockKKT:
        """The same with an index, and blocks of that size: what is added does nothing."""
        tasks, k, m, _ = self.inverse.shape
        index = torch.arange(m, device=self.gram.device).expand(tasks, k, m) if self.index is None else self.index
        inside = torch.ones_like(self.inverse[..., 0]) if self.inside is None else self.inside
        more = size - m
        return replace(
            self,
            inverse=functional.pad(self.inverse, (0, more, 0, more)),
            index=functional.pad(index, (0, more)),
            inside=functional.pad(inside, (0, more)),
        )


def _assemble(inverse: Tensor, index: Tensor, n: int) -> Tensor:
    """The sum over classes of gathered blocks, back at their rows; one class at a time, so that it is deterministic."""
    total = inverse.new_zeros(len(inverse), n, n)
    task = torch.arange(len(inverse), device=inverse.device)[:, None, None]
    for c in range(index.shape[1]):
        place = (task, index[:, c, :, None], index[:, c, None, :])
        total[place] += inverse[:, c]
    return total


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor; NaN in the matrices that have none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)
