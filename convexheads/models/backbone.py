"""The interface of the backbones: from a batch of images to a batch of feature vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convexheads._functorch import is_transforming
from convexheads._validation import check_positive_int, describe_shape, describe_type, is_dense, is_float_tensor
from convexheads.errors import InputError

_FAR_OUTSIDE = 0.5  # interpolation exceeds [0, 1] by less than this, standardized or uint8-valued pixels by more
_Own = TypeVar("_Own", bound="Backbone")


class Backbone(nn.Module):
    """Base class of the networks: standardizes pixels, applies the layers of `make_layers` and flattens the result.

    Args:
        in_channels: Number of channels of an image.
        image_size: Height and width of the images in pixels; one number, or a pair where they differ.
        mean: Mean of the pixels in [0, 1], as for torchvision's `Normalize`; one number, or one per channel.
        std: Standard deviation of the pixels in [0, 1]; one number, or one per channel.

    Attributes:
        num_features: Number of features per image of size `image_size`.
        mean: Mean per channel in units of uint8 pixels (0 to 255), a buffer `(1, in_channels, 1, 1)`; likewise `std`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__()
        height, width = image_size if isinstance(image_size, Sequence) and len(image_size) == 2 else [image_size] * 2
        self.image_size = check_positive_int("image_size", height), check_positive_int("image_size", width)
        self.in_channels = check_positive_int("in_channels", in_channels)
        for name, values, sign in (("mean", mean, ""), ("std", std, "positive ")):
            pixels = torch.tensor(math.nan, device="cpu")
            with suppress(TypeError, ValueError, RuntimeError, OverflowError):
                # In float64, the product undoes the division by 255 in `from_images` without rounding errors.
                pixels = (255 * torch.as_tensor(values, dtype=torch.float64, device="cpu")).float()
            if pixels.shape not in ((), (in_channels,)) or not pixels.isfinite().all() or (sign and pixels.min() <= 0):
                raise InputError(name, f"a {sign}finite number, or one for each of {in_channels} channels", values)
            buffer = torch.tensor(pixels.expand(in_channels).tolist(), dtype=torch.float32)  # on the default device
            self.register_buffer(name, buffer.view(1, -1, 1, 1))
        self.layers, self.num_features = self.make_layers()

    def make_layers(self) -> tuple[nn.Module, int]:
        """Return the module from standardized images to features of any shape, and the number of features.

        The constructor calls this method. A subclass therefore assigns its own settings before `super().__init__()`.
        """
        raise NotImplementedError

    @classmethod
    def from_images(cls: type[_Own], images: Tensor, **settings: Any) -> _Own:
        """Make a backbone with the size and the channels of example images, and the statistics of their pixels.

        Args:
            images: Training images, `(n, channels, height, width)`: uint8, or floating-point values in [0, 1].
            settings: Further arguments of the class, which replace the values that the images have.

        Example:
            `backbone = Conv4.from_images(images)`
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            raise InputError("images", "(n, channels, height, width), with at least one image", describe_shape(images))
        std, mean = torch.std_mean(_as_pixels(images, images.shape[1:]).float(), dim=(0, 2, 3))
        std = std.where(std > 0, 1)  # a constant channel carries no scale
        mean, std = ((statistic.double() / 255).tolist() for statistic in (mean, std))
        found = {"in_channels": images.shape[1], "image_size": images.shape[2:], "mean": mean, "std": std}
        return cls(**found | settings)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of `images` `(n, in_channels, *image_size)`, a tensor `(n, num_features)`.

        Raises:
            InputError: The images have another shape or dtype or, in eager mode, floating-point values outside [0, 1].
        """
        pixels = _as_pixels(images, (self.in_channels, *self.image_size))
        if not is_transforming():  # `vmap` does not support this format, which is about 20% faster on a CPU
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.layers(((pixels - self.mean) / self.std).to(self.mean.dtype)).flatten(1)

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}"

    def _num_positions(self, num_poolings: int) -> int:
        if min(self.image_size) < 2**num_poolings:
            raise InputError("image_size", f"at least {2**num_poolings} pixels", self.image_size)
        return math.prod(side // 2**num_poolings for side in self.image_size)


def _as_pixels(images: Tensor, shape: Sequence[int]) -> Tensor:
    """The images in units of uint8 pixels."""
    if not (is_float_tensor(images) or (is_dense(images) and images.dtype == torch.uint8)) or images.shape[1:] != shape:
        got = f"shape {tuple(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else describe_type(images)
        raise InputError("images", f"(n, {', '.join(map(str, shape))}) of torch.uint8 or of floats from 0 to 1", got)
    if images.dtype == torch.uint8:
        return images
    if images.numel() and not (images.is_meta or torch.compiler.is_compiling() or is_transforming()):
        low, high = (value.item() for value in images.detach().aminmax())
        if low < -_FAR_OUTSIDE or high > 1 + _FAR_OUTSIDE:
            raise InputError("images", "uint8, or floats from 0 to 1", f"values from {low:.3g} to {high:.3g}")
    return 255 * images
