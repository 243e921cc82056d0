"""Linear systems of heads with a closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._validation import describe_first_task
from convexheads.errors import SolverError
from convexheads.heads.base.support_set import SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor
from convexheads.kernels import Linear


def cholesky(
    matrix: Float[Tensor, "*batch n n"], *, name: str, validate: bool, per_class: bool = False
) -> Float[Tensor, "*batch n n"]:
    """The lower Cholesky factor, `per_class` if the last batch dimension is that of classes.

    A matrix that is not positive definite raises `SolverError` with `validate`, which waits for a GPU, and else is NaN.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not validate:
        return factor.masked_fill((info > 0)[..., None, None], torch.nan)
    inspect_values(_check_factor, info.any(-1) if per_class else info, name)
    return factor


def _check_factor(info: Tensor, name: str) -> None:
    if info.any():
        raise SolverError(f"{name} is not positive definite in {describe_first_task(info)}")


def add_to_diagonal(
    matrix: Float[Tensor, "*batch n n"], value: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch n n"]:
    """The matrix plus a multiple of the identity."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + value[..., None, None] * eye


def ridge_regression(support: SupportSet, regularization: Hyperparameter, *, name: str) -> Float[Tensor, "*batch n k"]:
    """The dual coefficients `(gram + regularization * I)^-1 targets`; `name` is that of the head, for the error."""
    *_, n, d = support.features.shape
    penalty = as_tensor(regularization, support.features)
    name = f"{name}: the Gram matrix plus the regularization on its diagonal"
    kernel, targets = support.kernel, support.targets
    if not (isinstance(kernel, Linear) and type(kernel) is Linear and n > d):  # a subclass may be another kernel
        factor = cholesky(add_to_diagonal(support.gram, penalty), name=name, validate=support.validate)
        return torch.cholesky_solve(targets, factor)
    # The d x d system of the primal is smaller.
    features = kernel.feature_map(support.features)
    factor = cholesky(add_to_diagonal(features.mT @ features, penalty), name=name, validate=support.validate)

    def solve(right: Tensor) -> Tensor:
        return (right - features @ torch.cholesky_solve(features.mT @ right, factor)) / penalty

    coef = solve(targets)
    # The difference above loses digits where the penalty is small; one step of refinement recovers them.
    return coef + solve(targets - features @ (features.mT @ coef) - penalty * coef)
