"""Ridge regression on one-hot targets."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.errors import SolverError
from convexheads.heads.base import Dual, Head
from convexheads.hyperparameters import Hyperparameter, display, positive, value_of
from convexheads.kernels import Kernel


class RidgeHead(Head):
    r"""Ridge regression on one-hot targets, Eq. 11 of Lee et al. 2019; R2D2 of Bertinetto et al. 2019.

    Primal: \(\min_W \frac12 |XW - Y|^2 + \frac{\lambda}{2} |W|^2\). Dual: \(\alpha = (K + \lambda I)^{-1} Y\), one
    Cholesky of n x n for all classes.

    This is the paper's Eq. 11 up to the constants printed there. The authors' published ridge code returns twice these
    coefficients, which their learnable scale absorbs; their R2D2 code returns these.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Default 50, the paper's.
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all logits (Eq. 12's gamma), a float or `Learnable`; default 1.

    Raises:
        InputError: an argument is unusable.
    """

    def __init__(
        self,
        regularization: Hyperparameter = 50.0,
        *,
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale)
        self.regularization = positive("regularization", regularization)

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(gram + value_of(self.regularization, gram) * eye)
        failed = (info != 0).nonzero().tolist()
        if failed:
            raise SolverError(
                f"RidgeHead: the Gram matrix plus {display(self.regularization)} on its diagonal is not positive "
                f"definite in task {tuple(failed[0])}; wanted a positive semi-definite kernel, or a larger "
                "regularization"
            )
        return Dual(torch.cholesky_solve(targets, factor))

    def _settings(self) -> list[str]:
        return [f"regularization={display(self.regularization)}", *super()._settings()]
