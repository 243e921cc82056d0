"""The precision policy: problems are solved in float64, and results have at least float32, whatever the features."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it (Apple's mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results for features of a `dtype`: float32 for lower precision, in which distances overflow."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context manager that disables autocast on `device`."""
    return torch.autocast(device.type, enabled=False)
