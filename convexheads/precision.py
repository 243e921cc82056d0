"""The precision policy: problems are solved in float64, and results have at least float32, whatever the features."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from convexheads._validation import check_bool

_float32 = False


class use_float32:  # noqa: N801  # like torch.no_grad
    """Solve problems in float32 rather than in float64, until the end of a block or, called alone, from now on.

    Use it on devices with slow float64, such as GPUs for gaming, where it has a small fraction of the speed of float32;
    on the CPU, iterative solvers are slower, because compiled kernels are for float64. Logits then have four to six
    digits, and gradients three to five (`python -m benchmarks.float32`), and fewer if the problem is badly conditioned,
    as with tiny penalties. Certificates are weaker, too: the smallest tolerance of a solver is 5e-4. They assume that
    products are computed in float32, so leave TF32 off on a GPU, as it is by default in PyTorch. Apple's mps devices
    always use float32.

    It holds for all threads of the process. A fitted head keeps the precision of its fit.

    Args:
        enabled: Whether to use float32. Defaults to True.

    Raises:
        InputError: `enabled` is no bool.

    Example:
        `with use_float32(): logits = SVMHead()(support, labels, query)`
    """

    def __init__(self, enabled: bool = True) -> None:
        global _float32
        self._before, self._enabled = _float32, check_bool("enabled", enabled)
        _float32 = self._enabled

    def __enter__(self) -> use_float32:
        global _float32
        _float32 = self._enabled
        return self

    def __exit__(self, *_: object) -> None:
        global _float32
        _float32 = self._before


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 with `use_float32` and on a device that lacks float64 (Apple's mps)."""
    return torch.float32 if _float32 or device.type == "mps" else torch.float64


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results for features of a `dtype`: float32 for lower precision, in which distances overflow."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context manager that disables autocast on `device`."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
