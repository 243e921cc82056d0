"""Backbones from the literature: Conv-4, the network of R2D2, and ResNet-12 with DropBlock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convexheads._validation import check_choice, check_fraction, check_positive_int, describe_shape
from convexheads.errors import InputError
from convexheads.models.backbone import Backbone

_NEGATIVE_SLOPE = 0.1  # of the leaky ReLUs of Lee et al. 2019 (Section 4.1)


class Conv4(Backbone):
    """Four blocks of 3 x 3 convolution with 64 filters, batch normalization, ReLU and 2 x 2 max pooling.

    This is the network of Vinyals et al. 2016 and Snell et al. 2017. It has 256 features for images of 32 x 32 pixels
    and 1,600 for 84 x 84. The layers and their names are those of learn2learn's `CNN4Backbone`; the initial weights are
    PyTorch's defaults.

    Use it when training has to be fast, or to compare with published results for Conv-4. The arguments `in_channels`,
    `image_size` (at least 16), `mean` and `std` are those of `Backbone`.

    Example:
        `features = Conv4(in_channels=1)(torch.rand(8, 1, 32, 32))`
    """

    def make_layers(self) -> tuple[nn.Module, int]:
        blocks = nn.Sequential()
        for in_channels in (self.in_channels, 64, 64, 64):
            conv, norm = nn.Conv2d(in_channels, 64, 3, padding=1), nn.BatchNorm2d(64)
            # The ReLU is after the pooling: the same values and gradients, from a quarter of the numbers.
            blocks.append(nn.Sequential(OrderedDict(conv=conv, normalize=norm, pool=nn.MaxPool2d(2), relu=nn.ReLU())))
        return blocks.to(memory_format=torch.channels_last), 64 * self._num_positions(4)


class R2D2Network(Backbone):
    """The network of R2D2 (Bertinetto et al. 2019): 96, 192, 384 and 512 filters, outputs of the last two blocks.

    A block is a 3 x 3 convolution, batch normalization, 2 x 2 max pooling and a leaky ReLU, in this order. As in the
    code of Lee et al. 2019, the last two blocks have dropout of 0.1 and 0.3. Unlike in the code of Bertinetto et al.,
    there is no activation after the last block; with one, R2D2's accuracy is not reproduced. The network has 8,192
    features for images of 32 x 32 pixels and 51,200 for 84 x 84. In the code of Bertinetto et al., both blocks also
    have the same rate of dropout, and the last poolings have stride 1, so that there are 8,064 and 72,576 features.

    Use it when you compare with published results for R2-D2. The arguments `in_channels`, `image_size` (at least 16),
    `mean` and `std` are those of `Backbone`.

    Example:
        `features = R2D2Network()(torch.rand(8, 3, 32, 32))`
    """

    def make_layers(self) -> tuple[nn.Module, int]:
        sizes = (self.in_channels, 96, 0.0), (96, 192, 0.0), (192, 384, 0.1), (384, 512, 0.3)
        blocks = _ConcatLastTwo()
        for in_channels, out_channels, rate in sizes:
            layers = nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.MaxPool2d(2)
            activation = nn.LeakyReLU(_NEGATIVE_SLOPE) if out_channels < 512 else nn.Identity()
            blocks.append(nn.Sequential(*layers, activation, nn.Dropout(rate)))
        return blocks, 384 * self._num_positions(3) + 512 * self._num_positions(4)


class _ConcatLastTwo(nn.Sequential):
    def forward(self, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        *first, last = self
        for module in first:
            value = module(value)
        return torch.cat([value.flatten(1), last(value).flatten(1)], 1)


class ResNet12(Backbone):
    """Four residual blocks of 64, 160, 320 and 640 filters, each of three 3 x 3 convolutions.

    This is the network of Lee et al. 2019 (Section 4.1). Each block ends with 2 x 2 max pooling and DropBlock. There
    is no global average pooling: the network has 2,560 features for images of 32 x 32 pixels and 16,000 for 84 x 84.
    Weights are initialized by Kaiming's method, as in the authors' code.

    Use it when accuracy matters most and you train on a GPU.

    Args:
        in_channels: See `Backbone`, also for `image_size` (at least 16), `mean` and `std`.
        dropblock: "paper" drops 10% of the units after every block: single units (dropout) after the first two,
            square blocks after the last two. "reference_code" increases the rate of the last two from 0 to 10% over
            40,000 forward passes in training; in the authors' code, evaluation counts too, and a step counts as two
            passes. "none" drops nothing.
        block_size: Height and width of a dropped block in units of the feature maps; by default 5 for images of at
            least 84 x 84 pixels and 2 for smaller ones, as in the authors' code for ImageNet and for CIFAR.
        average_pool: Whether to average over positions, which leaves 640 features.

    Example:
        `features = ResNet12(image_size=84)(torch.rand(8, 3, 84, 84))`
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        *,
        dropblock: str = "paper",
        block_size: int | None = None,
        average_pool: bool = False,
    ) -> None:
        check_choice("dropblock", dropblock, ("paper", "reference_code", "none"))
        # These are set first, because the base class calls `make_layers`.
        self.dropblock, self.block_size, self.average_pool = dropblock, block_size, average_pool
        super().__init__(in_channels, image_size, mean, std)

    def make_layers(self) -> tuple[nn.Module, int]:
        num_positions = self._num_positions(4)
        block_size = (5 if min(self.image_size) >= 84 else 2) if self.block_size is None else self.block_size
        warmup_steps = 40_000 if self.dropblock == "reference_code" else 0
        blocks: list[nn.Module] = []
        for in_channels, out_channels in pairwise((self.in_channels, 64, 160, 320, 640)):
            drop = nn.Dropout(0.1) if out_channels < 320 else DropBlock(block_size, warmup_steps=warmup_steps)
            drop = nn.Identity() if self.dropblock == "none" else drop
            blocks += [_ResidualBlock(in_channels, out_channels), nn.MaxPool2d(2), drop]
        layers = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1) if self.average_pool else nn.Identity())
        for module in layers.modules():
            if isinstance(module, nn.Conv2d):
                # As in the reference code, the gain is that for a slope of 0, although the slope is 0.1.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
        return layers, 640 * (1 if self.average_pool else num_positions)


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels, out_channels):
            convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(out_channels), nn.LeakyReLU(_NEGATIVE_SLOPE)]
        self.branch = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.activation = layers[-1]

    def forward(self, value: Tensor) -> Tensor:
        return self.activation(self.branch(value) + self.shortcut(value))


class DropBlock(nn.Module):
    """Drops square blocks of each channel in training (Ghiasi et al. 2018).

    For odd sizes, it has the same distribution as `torchvision.ops.DropBlock2d`, which requires them. Kept units are
    scaled so that the mean of the batch stays the same.

    Use it when you build a residual network of your own; `ResNet12` contains it.

    Args:
        block_size: Height and width of a block, at least 1; reduced on maps that are smaller.
        drop_prob: Fraction of units that would be dropped if blocks did not overlap, in [0, 1).
        warmup_steps: Number of forward passes in training over which the fraction increases from 0 to `drop_prob`.

    Example:
        `maps = DropBlock(block_size=5, drop_prob=0.1)(torch.randn(8, 64, 21, 21))`
    """

    steps: Tensor

    def __init__(self, block_size: int, *, drop_prob: float = 0.1, warmup_steps: int = 0) -> None:
        super().__init__()
        self.block_size = check_positive_int("block_size", block_size)
        self.warmup_steps = warmup_steps and check_positive_int("warmup_steps", warmup_steps)
        self.drop_prob = check_fraction("drop_prob", drop_prob)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # a buffer, so that checkpoints contain it

    def forward(self, value: Tensor) -> Tensor:
        """Drop blocks of feature maps, `value` `(n, channels, height, width)`; in evaluation, return them unchanged."""
        if value.ndim != 4:
            raise InputError("value", "feature maps, (n, channels, height, width)", describe_shape(value))
        if not self.training:
            return value
        self.steps += 1
        warmup = (self.steps / self.warmup_steps).clamp(max=1) if self.warmup_steps else 1
        height, width = value.shape[-2:]
        size = min(self.block_size, height, width)
        places = height - size + 1, width - size + 1
        rate = self.drop_prob * warmup * height * width / (size**2 * places[0] * places[1])
        corners = (torch.rand(*value.shape[:2], *places, device=value.device) < rate).to(value.dtype)
        kept = 1 - functional.max_pool2d(functional.pad(corners, [size - 1] * 4), size, stride=1)
        return value * (kept / kept.mean().clamp_min(1e-6))  # a mean, because a sum may overflow in half precision

    def extra_repr(self) -> str:
        return f"{self.block_size}, drop_prob={self.drop_prob}, warmup_steps={self.warmup_steps}"


BACKBONES: dict[str, type[Backbone]] = {"conv4": Conv4, "r2d2": R2D2Network, "resnet12": ResNet12}
"""The classes that `build_backbone` knows, by name."""


def build_backbone(name: str, images: Tensor | None = None, **settings: Any) -> Backbone:
    """Build a backbone by its name.

    Args:
        name: One of `BACKBONES`: "conv4", "r2d2", "resnet12".
        images: Example images for `Backbone.from_images`, `(n, channels, height, width)`; without them, the
            number of channels, the size, the mean and the standard deviation come from `settings`.
        settings: Arguments of the backbone's class.

    Example:
        `backbone = build_backbone("resnet12", image_size=84, dropblock="none")`
    """
    backbone = BACKBONES[check_choice("backbone", name, BACKBONES)]
    try:
        return backbone(**settings) if images is None else backbone.from_images(images, **settings)
    except TypeError as error:
        raise InputError("backbone", f"settings of {name}", f"{settings} ({error})") from error
