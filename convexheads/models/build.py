"""Build backbones and heads by the names that configurations and saved weights contain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from convexheads._validation import check_choice
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, SVMHead
from convexheads.hyperparameters import Learnable
from convexheads.models.backbone import Backbone
from convexheads.models.networks import WRN28, Conv4, R2D2Network, ResNet12
from convexheads.models.presets import metaoptnet_ridge, metaoptnet_svm, protonet

BACKBONES: dict[str, type[Backbone]] = {"conv4": Conv4, "r2d2": R2D2Network, "resnet12": ResNet12, "wrn28": WRN28}
"""The classes that `build_backbone` knows, by name."""


HEADS: dict[str, Callable[[], ClassificationHead]] = {
    "svm": metaoptnet_svm,
    "ridge": metaoptnet_ridge,
    "prototypes": protonet,
    # Smoothing adds to the diagonal of the Gram matrix, which is 150 to 300 for the features of these backbones.
    "svm-smoothed": lambda: SVMHead(C=0.1, smoothing=100.0, scale=Learnable(1.0)),
}
"""The functions that `build_head` calls, by name."""


def build_backbone(name: str, images: Tensor | None = None, **settings: Any) -> Backbone:
    """Build a backbone by its name.

    Args:
        name: One of `BACKBONES`: "conv4", "r2d2", "resnet12", "wrn28".
        images: Example images for `Backbone.from_images`, `(n, channels, height, width)`; by default, the number of
            channels, the size, the mean and the standard deviation are settings.
        settings: Arguments of the backbone's class.

    Raises:
        MissingDependencyError: The backbone is "wrn28" and learn2learn is not installed.

    Example:
        `backbone = build_backbone("resnet12", image_size=84, dropblock="none")`
    """
    backbone = BACKBONES[check_choice("backbone", name, BACKBONES)]
    try:
        return backbone(**settings) if images is None else backbone.from_images(images, **settings)
    except TypeError as error:
        raise InputError("backbone", f"settings of {name}", f"{settings} ({error})") from error


def build_head(name: str) -> ClassificationHead:
    """Build a head for training a backbone, with a learnable scale of its logits.

    Args:
        name: One of `HEADS`: "svm", "ridge" and "prototypes" are `metaoptnet_svm`, `metaoptnet_ridge` and `protonet`.
            "svm-smoothed" smooths the hinge loss as the reference code of MetaOptNet does, but a hundred times more;
            features are then learned faster.
    """
    return HEADS[check_choice("head", name, HEADS)]()


def build_model(
    config: dict[str, Any], images: Tensor | None = None, **settings: Any
) -> tuple[Backbone, ClassificationHead]:
    """Build the backbone and the head with which a training run starts.

    Args:
        config: The names of the "backbone" and the "head"; for a "resnet12", also its "dropblock".
        images: Example images, as for `build_backbone`.
        settings: Further arguments of the backbone's class.

    Example:
        `backbone, head = build_model({"backbone": "conv4", "head": "svm"}, images)`
    """
    if missing := {"backbone", "head"} - config.keys():
        raise InputError("config", "the names of a backbone and of a head", f"no {' and no '.join(sorted(missing))}")
    if config["backbone"] == "resnet12":
        settings = {"dropblock": config.get("dropblock", "paper")} | settings
    return build_backbone(config["backbone"], images, **settings), build_head(config["head"])
