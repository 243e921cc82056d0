"""The linear system of heads with a closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._validation import describe_first_task
from convexheads.errors import SolverError


def shifted_cholesky(matrix: Tensor, shift: Tensor, *, name: str, validate: bool, per_class: bool = False) -> Tensor:
    """The lower Cholesky factors of matrices `(*batch, n, n)` plus `shift`, `(*batch,)` or `()`, on their diagonals.

    Pass `per_class=True` if the last batch dimension indexes classes. If a sum is not positive definite, the function
    raises `SolverError` with `validate` (which waits for a GPU), and returns NaN without it.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(matrix + shift[..., None, None] * eye)
    if not validate:
        return factor.masked_fill((info > 0)[..., None, None], torch.nan)
    inspect_values(_check_factor, info.any(-1) if per_class else info, name)
    return factor


def _check_factor(info: Tensor, name: str) -> None:
    if info.any():
        raise SolverError(f"{name} is not positive definite in {describe_first_task(info)}")
