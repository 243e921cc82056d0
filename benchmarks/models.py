"""The backbones and heads that the benchmarks compare, and their weights on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from learn2learn.vision.models import CNN4Backbone
from safetensors.torch import save_file
from torch import Tensor, nn

import convexheads as ch

HEADS = ("svm", "ridge", "prototypes")
"""The heads that every run evaluates."""


class Conv4(nn.Module):
    """Four blocks of 3 x 3 convolution with 64 filters, batch normalisation, ReLU and 2 x 2 max-pooling.

    Maps uint8 images (n, channels, height, width) to features (n, 64 * (height // 16) * (width // 16)): 256 of them for
    CIFAR. The layers are learn2learn's `CNN4Backbone`; the initial weights are PyTorch's (learn2learn draws the scale
    of the normalisation between 0 and 1, which leaves some channels all but dead). Pixels are standardised first, by
    constants that checkpoints keep.

    Args:
        examples: uint8 images (m, channels, height, width) whose mean and deviation by channel are the constants.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, examples: Tensor) -> None:
        super().__init__()
        deviation, mean = torch.std_mean(examples.float(), dim=(0, 2, 3), keepdim=True)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        layers = CNN4Backbone(hidden_size=64, channels=examples.shape[1], max_pool=True)
        for layer in layers.modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layer.reset_parameters()
        self.layers = layers.to(memory_format=torch.channels_last)  # a fifth faster on CPU

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return self.layers((images - self.mean) / self.deviation)


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


class Pixels(nn.Module):
    """No backbone at all: uint8 images (n, channels, height, width) as rows of numbers from 0 to 1.

    What a head reaches on these is the level that a backbone has to beat.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 255


def make_backbone(name: str, examples: Tensor) -> nn.Module:
    assert name == "conv4"
    return Conv4(examples)


def save_weights(module: nn.Module, settings: dict[str, Any], path: Path) -> None:
    """Write the weights of a backbone and a head as safetensors, with the settings of their training.

    The file is complete or not there at all: it is written under another name first.
    """
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    part = path.with_suffix(".part")
    save_file(state, part, metadata={"settings": json.dumps(settings)})
    part.replace(path)
