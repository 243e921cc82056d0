"""Heads with hyperparameters that need no tuning, and heads with those of the papers or of their authors' code.

Differences from the papers and their code: problems are solved to optimality, and the scale stays positive, whereas it
may become negative in the code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from convexheads._validation import check_choice
from convexheads.heads import ClassificationHead, LogisticHead, PrototypeHead, RidgeHead, SVMHead
from convexheads.hyperparameters import Learnable
from convexheads.kernels import Linear, UnitScale

Variant = Literal["paper", "reference_code"]
"""Which settings a preset has: those of the paper, or those of the code that its authors published."""


def metaoptnet_svm(variant: Variant = "paper") -> SVMHead:
    """MetaOptNet-SVM (Lee et al. 2019): C = 0.1 and a learnable scale that starts at 1.

    Set `head.solver = QpthSolver(max_iterations=3)` to stop after 3 steps, as in the paper; the code runs 15.

    Use it when you reproduce MetaOptNet. For your own training loop, use `unit_scale_svm`, whose scale suits Adam too.

    Args:
        variant: "paper" is Eq. 10 with the settings of Section 4.1; "reference_code" adds 1 to the dual's diagonal
            (`smoothing=1`), as the authors' code does.

    Example:
        `head = metaoptnet_svm(variant="reference_code")`
    """
    return SVMHead(C=0.1, smoothing=1.0 if _is_reference_code(variant) else 0.0, scale=Learnable(1.0))


def unit_scale_svm() -> SVMHead:
    """An SVM that needs no tuning, for training a backbone and for frozen features.

    Its C and its smoothing are in units of the features' squared length (`UnitScale`), so that they suit every
    backbone. Its learnable logit scale starts at 10: with this scale, probabilities are nearly calibrated, and the
    cross-entropy has a useful gradient from the first step. The paper's scale starts at 1, which is too small for Adam
    at its usual learning rate: a step changes it by at most 0.1%.

    Use it in place of the prototypes in your own training loop, with Adam, AdamW or SGD, or on the features of a
    foundation model. `metaoptnet_svm` has the settings of the paper.

    The settings were chosen by accuracy and calibration on validation classes of CIFAR-FS. `python -m benchmarks.swap`
    and `python -m benchmarks.image_models` compare the head with others.

    Example:
        `head = unit_scale_svm()`
    """
    return SVMHead(C=30.0, smoothing=0.3, kernel=UnitScale(), scale=Learnable(10.0))


def unit_scale_ridge() -> RidgeHead:
    """Ridge regression that needs no tuning: like `unit_scale_svm`, with a closed form.

    Use it when you would use `unit_scale_svm` and want the fastest head.

    Example:
        `head = unit_scale_ridge()`
    """
    return RidgeHead(0.3, kernel=UnitScale(), scale=Learnable(10.0))


def unit_scale_logistic() -> LogisticHead:
    """Logistic regression that needs no tuning: like `unit_scale_svm`, with the likelihood as its loss.

    The likelihood is that of the logits before the scale is applied.

    Use it when you would use `unit_scale_svm` and probabilities matter most.

    Example:
        `head = unit_scale_logistic()`
    """
    return LogisticHead(0.1, kernel=UnitScale(), scale=Learnable(3.0))


def metaoptnet_ridge(variant: Variant = "paper") -> RidgeHead:
    """MetaOptNet-RR (Lee et al. 2019): lambda = 50 and a learnable scale that starts at 1.

    Use it when you reproduce MetaOptNet-RR, or when a training step has to be fast.

    Args:
        variant: "paper" is Eq. 11 (without its misprinted constants); "reference_code" returns twice its scores, as the
            authors' code does, with a scale that starts at 2.
    """
    return RidgeHead(50.0, scale=Learnable(2.0 if _is_reference_code(variant) else 1.0))


def protonet() -> PrototypeHead:
    """ProtoNet as the baseline of Lee et al. 2019: squared distances, divided by d, and a learnable scale.

    Use it when you compare with this baseline; Snell et al. 2017 neither divide nor scale, and neither does
    `PrototypeHead()`.
    """
    return PrototypeHead(kernel=Linear(normalize=True), scale=Learnable(1.0))


def r2d2(variant: Variant = "paper") -> RidgeHead:
    """R2-D2 (Bertinetto et al. 2019): ridge regression on one-hot targets with a learnable adjustment.

    Differences from R2-D2's own code: the logarithm of lambda is learned, and there is no bias. In that code, the bias
    is the same for all classes, so it has no effect on the softmax cross-entropy.

    Use it when you reproduce R2-D2.

    Args:
        variant: "paper" learns lambda and a scale, which start at 1 and 1e-4; "reference_code" is the R2-D2 head in the
            code of Lee et al. 2019: lambda = 50, fixed, and a learnable scale that starts at 1.
    """
    if _is_reference_code(variant):
        return RidgeHead(50.0, scale=Learnable(1.0))
    return RidgeHead(Learnable(1.0), scale=Learnable(1e-4))


TRAINING_HEADS: dict[str, Callable[[], ClassificationHead]] = {
    "svm": metaoptnet_svm,
    "svm-unit-scale": unit_scale_svm,
    "ridge": metaoptnet_ridge,
    "prototypes": protonet,
    # Smoothing adds to the diagonal of the Gram matrix, which is 150 to 300 for the features of these backbones.
    "svm-smoothed": lambda: SVMHead(C=0.1, smoothing=100.0, scale=Learnable(1.0)),
}
"""The functions that `build_head` calls, by name."""


def build_head(name: str) -> ClassificationHead:
    """Build a head for training a backbone, with a learnable scale of its logits.

    Args:
        name: One of `TRAINING_HEADS`: "svm", "svm-unit-scale", "ridge" and "prototypes" are `metaoptnet_svm`,
            `unit_scale_svm`, `metaoptnet_ridge` and `protonet`. "svm-smoothed" smooths the hinge loss as the reference
            code of MetaOptNet does, but a hundred times more strongly.
    """
    return TRAINING_HEADS[check_choice("head", name, TRAINING_HEADS)]()


def _is_reference_code(variant: str) -> bool:
    return check_choice("variant", variant, get_args(Variant)) == "reference_code"
