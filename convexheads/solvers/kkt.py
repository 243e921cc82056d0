"""The structured KKT system that interior point, active set and gradient share.

Up to its diagonal, the Hessian of the dual is the same n x n matrix for each class, so the system falls into one block
a class, tied together by the row sums only:

    (gram + diag(diagonal_c)) x_c + shift = right_c  for every class c,     sum_c x_c = sums

Eliminating the blocks leaves n x n matrices throughout: one Cholesky a class and one for the shift, never (nk)^2. With
many more examples than features, or whatever else makes the rank r of the Gram matrix small, a class costs one
Cholesky of r x r, by the identity of Sherman, Morrison and Woodbury.
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
# Columns of a root after which it is looked whether that is all.
_LOOK_EVERY = 16


class KKT(Batch, ABC):
    """A factorised KKT system. All that it consists of are tensors, tasks first."""

    @abstractmethod
    def solve(
        self, right: Float[Tensor, "tasks k n"], sums: Float[Tensor, "tasks n"], *, refinements: int
    ) -> tuple[Float[Tensor, "tasks k n"], Float[Tensor, "tasks n"]]:
        """Return `(x, shift)`, refined against the unregularised system."""


@dataclass(frozen=True)
class FactorisedKKT(KKT):
    """The factors of one such system for each task; a block that can't be factorised gives NaN for its task alone.

    Attributes:
        gram: shared by the classes.
        diagonal: added to each class's block; None for nothing.
        schur: the Cholesky factor of the system for the shift; None without row sums.
    """

    gram: Float[Tensor, "tasks n n"]
    diagonal: Float[Tensor, "tasks k n"] | None
    schur: Float[Tensor, "tasks n n"] | None

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

    def _eliminate(self, right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        x = self._by_block(right)
        if self.schur is None:
            return x, torch.zeros_like(sums)
        shift = torch.cholesky_solve((x.sum(1) - sums).unsqueeze(-1), self.schur).squeeze(-1)
        return x - self._by_block(shift.unsqueeze(1)), shift

    @abstractmethod
    def _by_block(self, value: Tensor) -> Tensor:
        """The blocks' inverses times the parts of `value`, zero at entries that don't take part."""


@dataclass(frozen=True)
class BlockKKT(FactorisedKKT):
    """With an inverse for every block.

    Attributes:
        gram: as in `FactorisedKKT`.
        diagonal: likewise.
        schur: likewise.
        inverse: of the regularised blocks.
        index: the rows that each block consists of, padded; None for all n.
        inside: which entries take part at all, 1 or 0; by block where there is an `index`. None for all.
    """

    inverse: Float[Tensor, "tasks k m m"]
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
        return cls(gram, diagonal, schur, inverse, index, inside)

    def with_tasks(self, chosen: Bool[Tensor, " tasks"], by: BlockKKT) -> BlockKKT:
        size = max(self.inverse.shape[-1], by.inverse.shape[-1])
        new = by._padded(size).tensors()
        return self._padded(size).map(lambda name, value: value.index_put((chosen,), new[name]))

    def _by_block(self, value: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class LowRankKKT(FactorisedKKT):
    """With every block's inverse as a diagonal minus a product of r x n matrices, for a Gram matrix of small rank r.

    Attributes:
        gram: as in `FactorisedKKT`.
        diagonal: likewise.
        schur: likewise.
        weight: the diagonal.
        half: the matrices.
    """

    weight: Float[Tensor, "tasks k n"]
    half: Float[Tensor, "tasks k r n"]

    @classmethod
    def factorise(
        cls,
        gram: Float[Tensor, "tasks n n"],
        root: Float[Tensor, "tasks n r"],
        *,
        diagonal: Float[Tensor, "tasks k n"],
        row_sum: bool,
        regulariser: float,
    ) -> LowRankKKT:
        """Factorise; `root @ root.mT` is the Gram matrix, the rest as for `BlockKKT`."""
        weight = 1 / (diagonal + max(regulariser, 4 * torch.finfo(gram.dtype).eps))
        columns = root.mT.unsqueeze(1) * weight.sqrt().unsqueeze(2)
        small = columns @ columns.mT + torch.eye(root.shape[-1], dtype=gram.dtype, device=gram.device)
        half = torch.linalg.solve_triangular(cholesky(small), columns, upper=False) * weight.sqrt().unsqueeze(2)
        schur = None
        if row_sum:
            together = half.flatten(1, 2)
            schur = cholesky(torch.diag_embed(weight.sum(1)) - together.mT @ together)
        return cls(gram, diagonal, schur, weight, half)

    def _by_block(self, value: Tensor) -> Tensor:
        return self.weight * value - (self.half.mT @ (self.half @ value.unsqueeze(-1))).squeeze(-1)


def find_root(gram: Float[Tensor, "tasks n n"], *, most: int) -> Float[Tensor, "tasks n r"] | None:
    """`root` with `root @ root.mT` the Gram matrix, to rounding; None where that takes more than `most` columns.

    By the Cholesky factorisation with pivoting (Higham 1990), which ends when nothing is left of the diagonal: its cost
    is that of r columns, whatever the kernel.
    """
    tasks, n, _ = gram.shape
    left = gram.diagonal(dim1=-2, dim2=-1).clone()
    nothing = n * torch.finfo(gram.dtype).eps * left.amax(-1, keepdim=True)
    root = gram.new_zeros(tasks, n, most)
    task = torch.arange(tasks, device=gram.device)
    for column in range(most):
        if column and column % _LOOK_EVERY == 0 and (left <= nothing).all():
            return root[..., :column].contiguous()
        pivot = left.argmax(-1)
        found = gram[task, pivot] - (root[..., :column] @ root[task, pivot, :column].unsqueeze(-1)).squeeze(-1)
        size = left.gather(-1, pivot.unsqueeze(-1))
        found = torch.where(size > nothing, found / size.sqrt(), 0)
        root[..., column] = found
        left = (left - found.square()).scatter(-1, pivot.unsqueeze(-1), 0)
    return root if (left <= nothing).all() else None


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor; NaN in the matrices that have none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)
