"""Meta-trained backbones with their heads, stored as safetensors: nothing is downloaded or unpickled."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexheads import _storage
from convexheads._validation import describe, describe_type
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead
from convexheads.heads.base.classification import check_head
from convexheads.models.backbone import Backbone
from convexheads.models.networks import build_backbone
from convexheads.models.presets import build_head

WEIGHTS_DIR = Path(__file__).parent / "weights"
"""The folder of the weights that the package contains."""


class Pretrained(NamedTuple):
    """A backbone and the head with which it was meta-trained, as `load_pretrained` returns them.

    Attributes:
        backbone: The backbone in evaluation mode, from images `(n, channels, height, width)` to features `(n, d)`.
        head: The head, with its learned scale.
        settings: The settings of the training run, named like the options of the repository's benchmarks.
    """

    backbone: Backbone
    head: ClassificationHead
    settings: dict[str, Any]


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
    if not isinstance(config, dict) or not {"backbone", "head"} <= config.keys():
        raise InputError("config", "a dictionary with a backbone and a head", config)
    if config["backbone"] == "resnet12":
        settings = {"dropblock": config.get("dropblock", "paper")} | settings
    return build_backbone(config["backbone"], images, **settings), build_head(config["head"])


def list_pretrained() -> list[str]:
    """List the names of the weights that the package contains, for `load_pretrained`."""
    return sorted(path.stem for path in WEIGHTS_DIR.glob("*.safetensors"))


def load_pretrained(name: str | Path) -> Pretrained:
    """Load a meta-trained backbone and its head, on the CPU.

    Args:
        name: One of `list_pretrained`, such as "conv4-cifar-fs-svm" (architecture, data set, head); a file that
            `save_pretrained` wrote; or a folder that contains one as "model.safetensors".

    Raises:
        InputError: There are no such weights, or the file is damaged or belongs to another architecture.
        MissingDependencyError: safetensors is not installed.

    Example:
        `backbone, head, _ = load_pretrained("conv4-cifar-fs-svm")`, then
        `head(backbone(support_images), labels, backbone(query_images))` with 32 x 32 images.
    """
    if not isinstance(name, str | Path):
        raise InputError("name", "a name or a path", describe(name))
    places = WEIGHTS_DIR / f"{name}.safetensors", Path(name) / "model.safetensors", Path(name)
    path = next(filter(os.path.isfile, places), None)  # unlike Path's method, accepts names of any length
    if path is None:
        expected = f"a file or folder of trained weights, or one of {', '.join(list_pretrained())}"
        raise InputError("name", expected, repr(str(name)))
    try:
        state, settings = _storage.load(path, key="settings", needed_by="load_pretrained")
        backbone, head = _build(settings, state["backbone.mean"].shape[1])
        try:
            nn.ModuleDict({"backbone": backbone, "head": head}).load_state_dict(state)
        except RuntimeError as error:  # whose message names every parameter
            raise RuntimeError(f"not the weights of a {settings['backbone']}") from error
    except (OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError("name", "a complete file written by `save_pretrained`", f"{path} ({error})") from error
    return Pretrained(backbone.eval(), head.eval(), settings)


def save_pretrained(path: str | Path, backbone: nn.Module, head: ClassificationHead, settings: dict[str, Any]) -> None:
    """Write weights for `load_pretrained`, under a temporary name until the file is complete.

    Args:
        path: Path of the file, in an existing folder.
        backbone: A backbone that `build_model` makes from these `settings`; `SyncBatchNorm` is saved as `BatchNorm2d`.
        head: A head that `build_model` makes from these `settings`; `solver`, `validate` and hooks are not saved.
        settings: The names of the "backbone" and the "head", and the "image_size" in pixels; and any other values that
            JSON can represent, to describe the training run.

    Raises:
        InputError: `settings` lacks a key, or `build_model` makes another backbone or another head from it.
        OSError: The file cannot be written; an older one is unchanged.
        MissingDependencyError: safetensors is not installed.

    Example:
        `save_pretrained("model.safetensors", backbone, head, {"backbone": "conv4", "head": "svm", "image_size": 32})`
    """
    if not isinstance(backbone, Backbone):
        raise InputError("backbone", "a `Backbone`, without a wrapper such as DataParallel", describe_type(backbone))
    model = nn.ModuleDict({"backbone": backbone, "head": check_head(head)})
    for (name, part), built in zip(model.items(), _build(settings, backbone.in_channels), strict=True):
        if _structure(part) != _structure(built):
            raise InputError(name, f"what `build_model` makes from {settings}", f"another {type(part).__name__}")
    _storage.save(path, model.state_dict(), settings, key="settings", needed_by="save_pretrained")


def _build(settings: dict[str, Any], in_channels: int) -> tuple[Backbone, ClassificationHead]:
    if not isinstance(settings, dict) or not {"backbone", "head", "image_size"} <= settings.keys():
        raise InputError("settings", "a dictionary with a backbone, a head and an image_size", settings)
    with torch.random.fork_rng([]):  # for initial weights that are replaced
        return build_model(settings, in_channels=in_channels, image_size=settings["image_size"])


def _structure(model: nn.Module) -> dict[str, Any]:
    """The classes and the settings of all parts of a model, and the names of its weights."""
    structure: dict[str, Any] = dict.fromkeys(model.state_dict())
    for name, part in model.named_modules(remove_duplicate=False):
        structure[name] = nn.BatchNorm2d if isinstance(part, nn.SyncBatchNorm) else type(part), part.extra_repr()
    settings = model.get_params() if isinstance(model, ClassificationHead) else {}
    constants = {name: value for name, value in settings.items() if not isinstance(value, nn.Module)}
    return structure | constants | {"solver": None, "validate": None}  # which are not saved
