"""Backbones that were meta-trained through a head, kept as safetensors: nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexheads import storage
from convexheads._validation import describe
from convexheads.backbones import Backbone, make_backbone
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, SVMHead
from convexheads.hyperparameters import Learnable
from convexheads.kernels import Linear
from convexheads.presets import metaoptnet_ridge, metaoptnet_svm, protonet

ZOO = Path(__file__).parent / "weights"
"""The weights that come with the package."""


def _svm_smoothed() -> SVMHead:
    # Smoothing counts relative to the Gram matrix, whose diagonal the kernel brings to about 1.
    return SVMHead(C=1.0, smoothing=1.0, kernel=Linear(normalize=True), scale=Learnable(1.0))


HEADS: dict[str, Callable[[], ClassificationHead]] = {
    "svm": metaoptnet_svm,
    "ridge": metaoptnet_ridge,
    "prototypes": protonet,
    "svm-smoothed": _svm_smoothed,
}
"""By name, for `make_head`."""


def make_head(name: str) -> ClassificationHead:
    """A head to train a backbone through, with a learnable scale of its logits.

    Args:
        name: "svm", "ridge" and "prototypes" are `metaoptnet_svm`, `metaoptnet_ridge` and `protonet`. "svm-smoothed"
            smooths the hinge loss, as the authors' published code does, strongly enough to matter: features learn
            faster through it.

    Returns:
        A new head.

    Raises:
        InputError: no such head.
    """
    if not isinstance(name, str) or name not in HEADS:
        raise InputError("head", f"one of {', '.join(HEADS)}", repr(name))
    return HEADS[name]()


class Pretrained(NamedTuple):
    """A backbone and the head that it was meta-trained through. `load_pretrained` makes it.

    Attributes:
        backbone: from uint8 images (n, channels, height, width) to features (n, d); in evaluation mode.
        head: with the scale that it learned.
        settings: of the training: data set, steps, shots, seed and so on, as `benchmarks.train --help` has them.
    """

    backbone: Backbone
    head: ClassificationHead
    settings: dict[str, Any]


def make_untrained(settings: dict[str, Any], examples: Tensor) -> tuple[Backbone, ClassificationHead]:
    """The backbone and the head that a training with these settings begins with.

    Args:
        settings: "backbone" and "head" by name; and, for "resnet12", "dropblock".
        examples: uint8 images (m, channels, height, width) whose mean and deviation by channel standardise pixels.

    Returns:
        Both, new, in training mode.

    Raises:
        InputError: no such backbone, head or variant.
        MissingDependencyError: the backbone is "wrn28", and learn2learn is not installed.
    """
    if missing := {"backbone", "head"} - settings.keys():
        raise InputError("settings", "the names of a backbone and of a head", f"no {' and no '.join(sorted(missing))}")
    own = {"dropblock": settings.get("dropblock", "paper")} if settings["backbone"] == "resnet12" else {}
    return make_backbone(settings["backbone"], examples, **own), make_head(settings["head"])


def names() -> list[str]:
    """The names of the weights that come with the package, for `load_pretrained`."""
    return sorted(path.stem for path in ZOO.glob("*.safetensors"))


def load_pretrained(name: str | Path) -> Pretrained:
    """Load a meta-trained backbone and its head, on the CPU. Nothing is downloaded, nothing unpickled.

    Args:
        name: of weights that come with the package, such as "conv4-cifar-fs-svm" (architecture, data set, head); or a
            folder that `benchmarks.train` left behind; or a file that `save_pretrained` wrote.

    Returns:
        The backbone in evaluation mode, the head with the scale that it learned, and the settings of the training.

    Raises:
        InputError: there are no such weights, they are damaged, or they are those of another architecture.
        MissingDependencyError: safetensors is not installed; or learn2learn, for a "wrn28".

    Example:
        `backbone, head, _ = load_pretrained("conv4-cifar-fs-svm")`, then
        `head(backbone(support_images), labels, backbone(query_images))` with 32 x 32 images.
    """
    if not isinstance(name, str | Path):
        raise InputError("name", "a name or a path", describe(name))
    try:
        places = ZOO / f"{name}.safetensors", Path(name) / "model.safetensors", Path(name)
        path = next((path for path in places if path.is_file()), None)
    except OSError:  # too long for a name
        path = None
    if path is None:
        expected = f"a file or folder of trained weights, or one of {', '.join(names())}"
        raise InputError("name", expected, repr(str(name)))
    expected = "a complete file of `save_pretrained`"
    try:
        state, settings = storage.load(path, key="settings", needed_by="load_pretrained")
        channels, size = state["backbone.mean"].shape[1], settings["image_size"]
        modules = make_untrained(settings, torch.zeros(2, channels, size, size, dtype=torch.uint8))
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError("name", expected, f"{path} ({error})") from error
    try:
        for prefix, module in zip(("backbone.", "head."), modules, strict=True):
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            module.load_state_dict(own)
    except RuntimeError as error:
        raise InputError("name", expected, f"{path}, not the weights of a {settings['backbone']}") from error
    backbone, head = modules
    return Pretrained(backbone.eval(), head.eval(), settings)


def save_pretrained(path: Path, backbone: nn.Module, head: ClassificationHead, settings: dict[str, Any]) -> None:
    """Write weights for `load_pretrained`.

    The file is complete or not there at all: it is written under another name first.

    Args:
        path: of the file, in a folder that exists.
        backbone: one of `convexheads.backbones`.
        head: one of `make_head`.
        settings: "backbone" and "head", their names, and "image_size", pixels; whatever else is worth knowing about
            the training, as JSON has it. `load_pretrained` refuses a file without these three.

    Raises:
        OSError: the file cannot be written.
        TypeError: `settings` hold something that JSON doesn't have.
        MissingDependencyError: safetensors is not installed.
    """
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    storage.save(path, state, settings, key="settings", needed_by="save_pretrained")
