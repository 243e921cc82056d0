"""Linear systems of base learners in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads.errors import SolverError
from convexheads.heads.inputs import first


def cholesky(matrix: Float[Tensor, "*batch n n"], *, of: str, each_class: bool = False) -> Float[Tensor, "*batch n n"]:
    """The lower Cholesky factor; on a GPU, which nobody waits for, NaN where a matrix is not positive definite.

    Raises:
        SolverError: on the CPU, a matrix is not positive definite; `of` says whose, and the last dimension of tasks
            are classes with `each_class`.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if matrix.device.type != "cpu":
        return factor.masked_fill((info > 0)[..., None, None], torch.nan)
    inspect_values(_check_factor, info.any(-1) if each_class else info, of)
    return factor


def _check_factor(info: Tensor, of: str) -> None:
    if info.any():
        raise SolverError(f"{of} is not positive definite in {first(info)}")


def plus_diagonal(matrix: Float[Tensor, "*batch n n"], value: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch n n"]:
    """The matrix plus a multiple of the identity."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + value[..., None, None] * eye


def ridge(
    gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"], weight: Float[Tensor, ""], *, of: str
) -> Float[Tensor, "*batch n k"]:
    """Dual coefficients of ridge regression, `(gram + weight I)^-1 targets`."""
    return torch.cholesky_solve(targets, cholesky(plus_diagonal(gram, weight), of=of))


def ridge_primal(
    features: Float[Tensor, "*batch n d"], targets: Float[Tensor, "*batch n k"], weight: Float[Tensor, ""], *, of: str
) -> Float[Tensor, "*batch n k"]:
    """The same for the linear kernel, by a d x d system: with fewer features than examples the smaller one."""
    factor = cholesky(plus_diagonal(features.mT @ features, weight), of=of)

    def solve(right: Tensor) -> Tensor:
        return (right - features @ torch.cholesky_solve(features.mT @ right, factor)) / weight

    coef = solve(targets)
    # The difference above loses digits where the weight is small; one step of refinement brings them back.
    return coef + solve(targets - features @ (features.mT @ coef) - weight * coef)
