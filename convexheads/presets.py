"""Heads with the hyper-parameters of the literature, each in the paper's and in the published code's version."""

from __future__ import annotations

from typing import Literal, get_args

from convexheads.errors import InputError
from convexheads.heads import PrototypeHead, RidgeHead, SVMHead
from convexheads.hyperparameters import Learnable
from convexheads.kernels import Linear

Version = Literal["paper", "official"]
"""Which settings: those of the paper, or those of the code that its authors published."""


def metaoptnet_svm(version: Version = "paper") -> SVMHead:
    """MetaOptNet-SVM (Lee et al. 2019): C = 0.1 and a learnable scale that starts at 1.

    What differs from both versions: the dual is solved to optimality. The paper stops qpth after 3 iterations, the code
    after 15; `head.solver = QpthSolver(max_iterations=3)` does so. The code's scale may become negative, here it can't.

    Args:
        version: "paper", the default, is Eq. 10 as Section 4.1 sets it; "official" adds 1 to the dual's diagonal
            (`smoothing=1`), as the authors' published code does.

    Returns:
        A new head.

    Raises:
        InputError: an unknown version.
    """
    return SVMHead(C=0.1, smoothing=1.0 if _official(version) else 0.0, scale=Learnable(1.0))


def metaoptnet_ridge(version: Version = "paper") -> RidgeHead:
    """MetaOptNet-RR (Lee et al. 2019): lambda = 50 and a learnable scale that starts at 1.

    What differs from both versions: the closed form in the place of an iterative solver. The code's scale may become
    negative, this one can't.

    Args:
        version: "paper", the default, is Eq. 11 (without its misprinted constants); "official" returns twice its
            scores, as the authors' published code does, here by a scale that starts at 2.

    Returns:
        A new head.

    Raises:
        InputError: an unknown version.
    """
    return RidgeHead(50.0, scale=Learnable(2.0 if _official(version) else 1.0))


def protonet(version: Version = "paper") -> PrototypeHead:
    """Prototypes as the baseline of Lee et al. 2019: squared distances divided by d, a learnable scale from 1 on.

    What differs: the scale of the published code may become negative, this one can't. Snell et al. 2017, who introduced
    prototypes, neither divide nor scale: that is `PrototypeHead()`.

    Args:
        version: "paper", the default, and "official" are the same here.

    Returns:
        A new head.

    Raises:
        InputError: an unknown version.
    """
    _official(version)
    return PrototypeHead(kernel=Linear(normalize=True), scale=Learnable(1.0))


def r2d2(version: Version = "paper") -> RidgeHead:
    """R2-D2 (Bertinetto et al. 2019): ridge regression on one-hot targets with a learnable adjustment.

    What differs from R2-D2's own code: the scale can't become negative, and lambda is learnt as its logarithm.

    Args:
        version: "paper", the default, learns lambda, a scale and a bias, which start at 1, 1e-4 and 0; "official" is
            the R2-D2 head in the code published by Lee et al. 2019: lambda = 50, fixed, a learnable scale that starts
            at 1, no bias.

    Returns:
        A new head.

    Raises:
        InputError: an unknown version.
    """
    if _official(version):
        return RidgeHead(50.0, scale=Learnable(1.0))
    return RidgeHead(Learnable(1.0), bias=Learnable(0.0, positive=False), scale=Learnable(1e-4))


def _official(version: str) -> bool:
    if not isinstance(version, str) or version not in get_args(Version):
        raise InputError("version", "'paper' or 'official'", repr(version))
    return version == "official"
