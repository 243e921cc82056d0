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
    """The lower Cholesky factor; NaN where a matrix is not positive definite, if that is not an error.

    Args:
        matrix: symmetric, `(*batch, n, n)`.
        name: of the matrix, for the error.
        validate: whether to check that all matrices are positive definite, which waits for a GPU.
        per_class: whether the last dimension of `batch` is that of the classes of a task. Defaults to False.

    Raises:
        SolverError: a matrix is not positive definite, and `validate`.
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
    """The dual coefficients `(gram + regularization * I)^-1 targets`, `(*batch, n, k)`.

    Args:
        support: of a batch of tasks.
        regularization: lambda.
        name: of the head, for the error.

    Raises:
        SolverError: as `cholesky`.
    """
    *_, n, d = support.features.shape
    penalty = as_tensor(regularization, support.features)
    name = f"{name}: the Gram matrix plus the regularization on its diagonal"
    kernel = support.kernel
    if isinstance(kernel, Linear) and type(kernel) is Linear and n > d:  # not a subclass, which may be another kernel
        features = kernel.feature_map(support.features)
        return _primal_ridge_regression(features, support.targets, penalty, name=name, validate=support.validate)
    factor = cholesky(add_to_diagonal(support.gram, penalty), name=name, validate=support.validate)
    return torch.cholesky_solve(support.targets, factor)


def _primal_ridge_regression(
    features: Float[Tensor, "*batch n d"],
    targets: Float[Tensor, "*batch n k"],
    penalty: Float[Tensor, ""],
    *,
    name: str,
    validate: bool,
) -> Float[Tensor, "*batch n k"]:
    """The same for the linear kernel by a d x d system, the smaller one for fewer features than examples."""
    factor = cholesky(add_to_diagonal(features.mT @ features, penalty), name=name, validate=validate)

    def solve(right: Tensor) -> Tensor:
        return (right - features @ torch.cholesky_solve(features.mT @ right, factor)) / penalty

    coef = solve(targets)
    # The difference above loses digits where the penalty is small; one step of refinement brings them back.
    return coef + solve(targets - features @ (features.mT @ coef) - penalty * coef)
