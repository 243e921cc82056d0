"""Progress bars, where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

_T = TypeVar("_T")


def track(batches: Iterable[_T], title: str, progress: bool, *, total: int | None = None) -> Iterable[_T]:
    """Iterate over batches with a progress bar; there is none if `progress` is False or tqdm is missing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, title, total, leave=False, disable=not progress, unit="batch")
