"""The heads that the benchmarks compare, and trained weights on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import convexheads as ch
from benchmarks.backbones import make_backbone
from benchmarks.data.datasets import CATALOGUE

HEADS = ("svm", "ridge", "prototypes")
"""The heads that every run evaluates."""


def make_head(name: str, *, learn_scale: bool = False) -> ch.Head:
    """The head of that name; optionally with a scale of the logits that is learned.

    "svm", "ridge" and "prototypes" have the paper's hyper-parameters. "svm-smoothed" smooths the hinge loss, as the
    authors' published code does, strongly enough to matter: features learn faster through it.

    Raises:
        InputError: no such head.
    """
    scale = ch.Learnable(1.0) if learn_scale else 1.0
    if name == "svm":
        return ch.SVMHead(C=0.1, scale=scale)
    if name == "svm-smoothed":
        # Smoothing counts relative to the Gram matrix, whose diagonal the kernel brings to about 1.
        return ch.SVMHead(C=1.0, smoothing=1.0, kernel=ch.Linear(normalize=True), scale=scale)
    if name == "ridge":
        return ch.RidgeHead(regularization=50.0, scale=scale)
    if name == "prototypes":
        return ch.PrototypeHead(scale=scale, kernel=ch.Linear(normalize=True))
    raise ch.InputError("head", repr(name), f"one of {', '.join(HEADS)}, svm-smoothed")


def make_trained_backbone(settings: dict[str, Any], examples: Tensor) -> nn.Module:
    """The backbone that a training with these settings (`benchmarks.options.Options`, by name) begins with."""
    own = {"dropblock": settings["dropblock"]} if settings["backbone"] == "resnet12" else {}
    return make_backbone(settings["backbone"], examples, **own)


class Trained(NamedTuple):
    """What `load_weights` reads.

    Attributes:
        backbone: in evaluation mode.
        head: that it was trained through.
        settings: of its training, by the names of `benchmarks.options.Options`.
    """

    backbone: nn.Module
    head: ch.Head
    settings: dict[str, Any]


def save_weights(module: nn.Module, settings: dict[str, Any], path: Path) -> None:
    """Write the weights of a backbone and a head as safetensors, with the settings of their training.

    The file is complete or not there at all: it is written under another name first.
    """
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    part = path.with_suffix(".part")
    save_file(state, part, metadata={"settings": json.dumps(settings)})
    part.replace(path)


def load_weights(path: Path) -> Trained:
    """Read what `save_weights` wrote. Nothing is unpickled.

    Raises:
        InputError: there is no such file, it is damaged, or its weights are those of another architecture.
    """
    wanted = "a complete model.safetensors of benchmarks.train"
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})["settings"])
            state = {name: file.get_tensor(name) for name in list(file.keys())}
        size = CATALOGUE[dataset].size if (dataset := settings["dataset"]) in CATALOGUE else 32
        examples = torch.zeros(2, state["backbone.mean"].shape[1], size, size, dtype=torch.uint8)
        backbone = make_trained_backbone(settings, examples)
        head = make_head(settings["head"], learn_scale=True)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ch.InputError("weights", f"{path} ({error})", wanted) from error
    try:
        for name, module in (("backbone.", backbone), ("head.", head)):
            module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
    except RuntimeError as error:
        raise ch.InputError("weights", f"{path}, not those of a {settings['backbone']}", wanted) from error
    return Trained(backbone.eval(), head.eval(), settings)
