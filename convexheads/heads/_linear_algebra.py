"""The linear system of heads with a closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from convexheads._functorch import inspect_values, is_transforming
from convexheads._looks import can_look, refuse
from convexheads._validation import describe_first_task
from convexheads.errors import SolverError


def per_matrix(values: Tensor) -> Tensor:
    """One value per task, `()` or `(*batch,)`, to be multiplied by matrices `(*batch, n, k)`."""
    return values.unsqueeze(-1).unsqueeze(-1) if values.ndim else values


def shifted_cholesky(matrix: Tensor, shift: Tensor, *, name: str, validate: bool, per_class: bool = False) -> Tensor:
    """Factorize matrices plus `shift` on their diagonals, as heads with a closed form do.

    Args:
        matrix: symmetric matrices, `(*batch, n, n)`, such as `SupportSet.gram`.
        shift: number to add to each diagonal, `(*batch,)` or `()`.
        name: what the error calls the matrix.
        validate: whether to raise an error if a matrix plus its shift is not positive definite (the check synchronizes
            with a GPU). If False, the factor of such a matrix is NaN. Heads pass `SupportSet.validate`.
        per_class: whether the last dimension of the batch is that of classes; the error names the task, but not the
            class. Defaults to False.

    Returns:
        The lower Cholesky factors, `(*batch, n, n)`.

    Raises:
        SolverError: a matrix plus its shift is not positive definite (with `validate`); the error names the task.

    Example:
        `factor = shifted_cholesky(support.gram, penalty, name="the Gram matrix", validate=support.validate)`
    """
    factor = cholesky_or_nan(matrix, shift, validate=validate)
    if validate:
        failed = factor.diagonal(dim1=-2, dim2=-1).isnan().any(-1)
        inspect_values(_check_factor, failed.any(-1) if per_class else failed, name)
    return factor


def cholesky_or_nan(matrix: Tensor, shift: Tensor, *, validate: bool) -> Tensor:
    """The lower Cholesky factors of matrices plus `shift` on their diagonals; NaN where there is none.

    With `validate`, values may be looked at, which takes less time than replacing nothing by NaN.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(torch.addcmul(matrix, per_matrix(shift), eye))
    if validate and can_look(info) and not is_transforming() and not info.any():
        return factor
    return factor.masked_fill(per_matrix(info > 0), torch.nan)


def _check_factor(failed: Tensor, name: str) -> None:
    refuse(failed, lambda: SolverError(f"{name} is not positive definite in {describe_first_task(failed)}"))
