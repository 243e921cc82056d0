"""The networks of Lee et al. 2019: from uint8 images (n, channels, height, width) to features (n, d).

Pixels are standardised first, by constants of example images, which checkpoints keep.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from convexheads._validation import check_positive_ints
from convexheads.errors import InputError, MissingDependencyError

SLOPE = 0.1
"""Of leaky ReLUs, in Lee et al. 2019 (Section 4.1)."""


class Backbone(nn.Module):
    """Standardises pixels, applies `layers`, which a subclass sets, and flattens.

    Args:
        examples: uint8 images (m, channels, height, width) whose mean and deviation by channel are the constants.

    Attributes:
        mean: of the pixels of each channel, `(1, channels, 1, 1)`, kept by checkpoints.
        deviation: likewise their standard deviation, `(1, channels, 1, 1)`.
        layers: from standardised images to features of any shape.
    """

    mean: Tensor
    deviation: Tensor
    layers: nn.Module

    def __init__(self, examples: Tensor) -> None:
        super().__init__()
        deviation, mean = torch.std_mean(examples.float(), dim=(0, 2, 3), keepdim=True)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, images: Tensor) -> Tensor:
        """From images to features.

        Args:
            images: uint8 pixels from 0 to 255, `(n, channels, height, width)`, of as many channels as the examples.

        Returns:
            Features, `(n, d)`.

        Raises:
            InputError: images that are not uint8, or not of that many channels or dimensions.
        """
        channels = self.mean.shape[1]
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
            got = f"shape {tuple(images.shape)} of {images.dtype}"
            raise InputError("images", f"(n, {channels}, height, width) of torch.uint8, from 0 to 255", got)
        images = images.contiguous(memory_format=torch.channels_last)  # a fifth faster on CPU
        return self.layers((images - self.mean) / self.deviation).flatten(1)


class Conv4(Backbone):
    """Four blocks of 3 x 3 convolution with 64 filters, batch normalisation, ReLU and 2 x 2 max-pooling.

    256 features of 32 x 32 images, 1,600 of 84 x 84. The network of Vinyals et al. 2016 and Snell et al. 2017. The
    layers and their names are those of learn2learn's `CNN4Backbone`; what differs: the initial weights are PyTorch's
    (learn2learn draws the scale of the normalisation between 0 and 1, which leaves some channels all but dead).
    Images have at least 16 x 16 pixels.

    Args:
        examples: uint8 images (m, channels, height, width) whose mean and deviation by channel are the constants.
    """

    def __init__(self, examples: Tensor) -> None:
        super().__init__(examples)
        blocks = [
            nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(before, 64, 3, padding=1),
                    normalize=nn.BatchNorm2d(64),
                    pool=nn.MaxPool2d(2),
                    relu=nn.ReLU(),  # after the pooling: the same values and gradients, from a quarter of the numbers
                )
            )
            for before in (examples.shape[1], 64, 64, 64)
        ]
        self.layers = nn.Sequential(*blocks).to(memory_format=torch.channels_last)


class R2D2Network(Backbone):
    """The network of R2D2 (Bertinetto et al. 2019): 96, 192, 384 and 512 filters, outputs of the last two blocks.

    Blocks of 3 x 3 convolution, batch normalisation, 2 x 2 max-pooling, leaky ReLU, in this order; as in the code of
    Lee et al. 2019 with dropout of 0.1 and 0.3 in the last two, and without the very last activation, which they needed
    to come to R2D2's accuracy. 8,192 features of 32 x 32 images, 51,200 of 84 x 84. What differs: the code of
    Bertinetto et al. has that activation and one rate of dropout in both blocks, and pools both outputs with stride 1
    instead: 8,064 and 72,576.

    Args:
        examples: uint8 images (m, channels, height, width) whose mean and deviation by channel are the constants.
    """

    def __init__(self, examples: Tensor) -> None:
        super().__init__(examples)
        widths = (examples.shape[1], 96, 192, 384, 512)
        dropout = (0.0, 0.0, 0.1, 0.3)
        blocks = [
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.MaxPool2d(2),
                nn.LeakyReLU(SLOPE) if after < 512 else nn.Identity(),
                nn.Dropout(share),
            )
            for (before, after), share in zip(pairwise(widths), dropout, strict=True)
        ]
        self.layers = _LastTwo(*blocks)


class _LastTwo(nn.Sequential):
    """The flat outputs of the last two modules, one beside the other."""

    def forward(self, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        *first, last = self
        for module in first:
            value = module(value)
        return torch.cat([value.flatten(1), last(value).flatten(1)], 1)


class ResNet12(Backbone):
    """Four residual blocks of 64, 160, 320 and 640 filters, each of three 3 x 3 convolutions.

    As Lee et al. 2019 have it (Section 4.1). Each ends with 2 x 2 max-pooling and DropBlock; there is no global average
    pooling: 2,560 features of 32 x 32 images, 16,000 of 84 x 84. Initial weights are Kaiming's, as in the published
    code. learn2learn's `ResNet12Backbone` computes the same in evaluation, but counts the steps of DropBlock in a plain
    integer, which checkpoints lose, hence layers of our own.

    Args:
        examples: uint8 images (m, channels, height, width) whose mean and deviation by channel are the constants.
        dropblock: "paper", the default: one unit in ten dropped after every block, single ones (dropout) after the
            first two. "official": as in the published code, whose share grows from nothing to one in ten in the last
            two, over 40,000 forward passes in training. The published counter is at fault: it counts evaluation too, is
            lost on resumption and stays at zero with several GPUs. It gets two passes a training step, support and
            query images apart; passed together they get to the full share after 40,000 steps, not 20,000. "none".
        block_size: of what is dropped after the last two, in units of the feature maps; None, the default: 5, as for
            the derivatives of ImageNet, for images of 84 x 84, and 2, as for those of CIFAR, for smaller ones.
        average_pool: 640 features, the means over positions. Default False.

    Raises:
        InputError: no such variant of DropBlock, or blocks of nothing; and by calls, as of every `Backbone`.
    """

    def __init__(
        self,
        examples: Tensor,
        *,
        dropblock: str = "paper",
        block_size: int | None = None,
        average_pool: bool = False,
    ) -> None:
        super().__init__(examples)
        if dropblock not in ("paper", "official", "none"):
            raise InputError("dropblock", "one of paper, official, none", repr(dropblock))
        if block_size is None:
            block_size = 5 if min(examples.shape[-2:]) >= 84 else 2
        if block_size < 1:
            raise InputError("block_size", "1 or more", block_size)
        widths = (examples.shape[1], 64, 160, 320, 640)
        blocks: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths)):
            drop: nn.Module = nn.Identity()
            if dropblock != "none":
                drop = nn.Dropout(0.1) if number < 2 else DropBlock(block_size, grow=dropblock == "official")
            blocks += [_Residual(before, after), nn.MaxPool2d(2), drop]
        self.layers = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1) if average_pool else nn.Identity())
        for module in self.layers.modules():
            if isinstance(module, nn.Conv2d):
                # of a slope of 0, not 0.1: so does the published code
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")


class _Residual(nn.Module):
    """Three convolutions, and a fourth around them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (before, after, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(SLOPE)]
        self.through = nn.Sequential(*layers[:-1])
        self.around = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
        self.activation = layers[-1]

    def forward(self, value: Tensor) -> Tensor:
        return self.activation(self.through(value) + self.around(value))


class DropBlock(nn.Module):
    """Drops square blocks of each channel in training (Ghiasi et al. 2018), one unit in ten.

    `torchvision.ops.DropBlock2d` takes odd sizes only; for these it is equal in distribution. As there, what is left is
    scaled by its share of the whole batch, so that the mean stays, and blocks that overlap drop a little less.

    Args:
        size: height and width of a block, at least 1; on smaller maps, theirs.
        grow: whether the share grows from nothing over 40,000 forward passes in training, as in the code published by
            Lee et al. 2019.

    Raises:
        InputError: `size` is not such a number.
    """

    steps: Tensor
    share, growth = 0.1, 40_000

    def __init__(self, size: int, *, grow: bool) -> None:
        super().__init__()
        check_positive_ints(size=size)
        self.size, self.grow = size, grow
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # of training; checkpoints keep it

    def forward(self, value: Tensor) -> Tensor:
        """Maps with blocks dropped in training, and as they are in evaluation.

        Args:
            value: feature maps, `(n, channels, height, width)`.

        Returns:
            `(n, channels, height, width)`.
        """
        if not self.training:
            return value
        self.steps += 1
        share = self.share * (self.steps / self.growth).clamp(max=1) if self.grow else self.share
        size, (height, width) = min(self.size, *value.shape[-2:]), value.shape[-2:]
        places = height - size + 1, width - size + 1
        rate = share * height * width / (size**2 * places[0] * places[1])
        corners = (torch.rand(*value.shape[:2], *places, device=value.device) < rate).to(value.dtype)
        kept = 1 - functional.max_pool2d(functional.pad(corners, [size - 1] * 4), size, stride=1)
        return value * (kept / kept.mean().clamp_min(1e-6))  # not by a sum, which half precision can't hold

    def extra_repr(self) -> str:
        return f"{self.size}, grow={self.grow}"


class WRN28(Backbone):
    """The wide residual network WRN-28-10 (Zagoruyko & Komodakis 2016): 640 features, the means over positions.

    The layers of learn2learn's `WRN28Backbone`, whose last pooling is for images of 84 x 84 and whose first convolution
    is for three channels, made fit for any; it needs that package. What differs from the paper is as there:
    convolutions have biases, weights begin as PyTorch's, and the statistics of the last normalisation have a momentum
    of 0.9: they are all but those of the last batch.

    Args:
        examples: uint8 images (m, channels, height, width) whose mean and deviation by channel are the constants.

    Raises:
        InputError: by calls, as of every `Backbone`.
        MissingDependencyError: learn2learn is not installed.
    """

    def __init__(self, examples: Tensor) -> None:
        super().__init__(examples)
        try:
            from learn2learn.vision.models import WRN28Backbone
        except ImportError as error:
            raise MissingDependencyError("learn2learn", "learn2learn", "WRN28") from error
        network = WRN28Backbone()
        first = nn.Conv2d(examples.shape[1], 16, 3, padding=1)
        last = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(first, network.layer1, network.layer2, network.layer3, network.bn1, *last)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "conv4": Conv4,
    "r2d2": R2D2Network,
    "resnet12": ResNet12,
    "wrn28": WRN28,
}
"""By name, for `make_backbone`."""


def make_backbone(name: str, examples: Tensor, **settings: object) -> Backbone:
    """The backbone of that name.

    Args:
        name: one of `BACKBONES`: "conv4", "r2d2", "resnet12", "wrn28".
        examples: uint8 images (m, channels, height, width) whose mean and deviation by channel standardise pixels.
        settings: further arguments of its class.

    Returns:
        A new backbone, in training mode.

    Raises:
        InputError: no such backbone, or no such setting of it.
        MissingDependencyError: "wrn28", and learn2learn is not installed.
    """
    if not isinstance(name, str) or name not in BACKBONES:
        raise InputError("backbone", f"one of {', '.join(BACKBONES)}", repr(name))
    try:
        return BACKBONES[name](examples, **settings)
    except TypeError as error:
        raise InputError("backbone", "settings that it has", f"{name} with {settings} ({error})") from error
