"""Augmentation of whole batches of training images, on the device of the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from convexheads.errors import InputError

AUGMENTATIONS = ("none", "flip-crop", "flip-crop-jitter")
"""The names of the augmentations; the last one follows Section 4.1 of Lee et al. 2019."""

STRENGTH = 0.4
"""The largest relative change of brightness, contrast and saturation, as in the authors' published code."""

BRIGHTNESS, CONTRAST, SATURATION = range(3)

COLUMNS = ("top", "left", "flipped", "brightness", "contrast", "saturation", "first", "second", "third")
"""The random numbers of an image: the corner of the crop in the padded image, whether to flip it (0 or 1), the factors
of brightness, contrast and saturation (1 changes nothing), and the order in which these three are applied."""


@dataclass(frozen=True)
class Augmentation:
    """Random crop after padding with zeros, color jitter and horizontal flip, drawn for each image separately.

    Distributed as torchvision's `RandomCrop(size, padding=height // 8)`, `ColorJitter(0.4, 0.4, 0.4)` and
    `RandomHorizontalFlip()` one after the other. With the same random numbers the values are the same too, but for an
    occasional rounding by one level. The difference: torchvision draws once for a whole batch.

    Args:
        jitter: whether to change brightness, contrast and saturation.
    """

    jitter: bool

    def draw(self, count: int, height: int, width: int, random: np.random.Generator) -> Tensor:
        """Draw `COLUMNS` for `count` images of that height and width: float64 `(count, 9)`, on the CPU."""
        places = 2 * (height // 8) + 1
        factors, order = np.ones((count, 3)), np.tile(np.arange(3), (count, 1))
        corners = random.integers(places, size=(2, count))
        flipped = random.random(count) < 0.5
        if self.jitter:
            factors = random.uniform(1 - STRENGTH, 1 + STRENGTH, (count, 3))
            order = random.permuted(order, axis=1)
        return torch.from_numpy(np.column_stack([*corners, flipped, factors, order]))

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Augment images.

        Args:
            images: uint8 `(n, channels, height, width)`, with 1 or 3 channels.
            drawn: what `draw` returned, `(n, 9)`, on the device of the images.

        Returns:
            The same shape and type, in PyTorch's memory format `channels_last`.
        """
        height, width = images.shape[-2:]
        top, left, flipped = drawn[:, :3].long().unbind(1)
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        columns = torch.where(flipped[:, None] > 0, width - 1 - columns, columns)
        rows, columns = top[:, None] + rows, left[:, None] + columns
        each = torch.arange(len(images), device=images.device)[:, None, None]
        padded = functional.pad(images, [height // 8] * 4)
        cropped = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return self._jittered(cropped, drawn[:, 3:6], drawn[:, 6:].long()) if self.jitter else cropped

    def _jittered(self, images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """Blend each image with black, its mean gray and its grayscale version, in the order that was drawn.

        Values are rounded down to whole levels after each change, as in torchvision.
        """
        values = images.float()
        for change in order.unbind(1):
            factor = factors.gather(1, change[:, None])[:, 0]
            if values.shape[1] == 1:  # grayscale images have no saturation
                gray = values
                factor = torch.where(change == SATURATION, 1, factor)
            else:
                red, green, blue = values.unbind(1)
                gray = red.mul(0.2989).add(green, alpha=0.587).add(blue, alpha=0.114).floor().unsqueeze(1)
            change, factor = change[:, None, None, None], factor[:, None, None, None]
            mean = gray.mean((1, 2, 3), keepdim=True)
            other = torch.where(change == CONTRAST, mean, gray).masked_fill(change == BRIGHTNESS, 0)
            values = torch.addcmul(values * factor.float(), other, (1 - factor).float()).clamp(0, 255).floor()
        return values.to(torch.uint8)


def augmentation(name: str) -> Augmentation | None:
    """The augmentation of that name; None for "none".

    Raises:
        InputError: the augmentation is unknown.
    """
    if name not in AUGMENTATIONS:
        raise InputError("augment", f"one of {', '.join(AUGMENTATIONS)}", repr(name))
    return None if name == "none" else Augmentation(jitter=name.endswith("jitter"))
