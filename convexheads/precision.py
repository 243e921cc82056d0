"""The precision policy: convex problems are solved in float64, whatever the dtype of the features."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it (Apple's mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context manager that disables autocast on `device`."""
    return torch.autocast(device.type, enabled=False)
