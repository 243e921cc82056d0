"""Progress bars, where tqdm is installed."""

from __future__ import annotations

from typing import Any


class _NullProgressBar:
    def __enter__(self) -> _NullProgressBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, _: int) -> None: ...


def progress_bar(total: int, title: str, progress: bool) -> Any:
    """Return a progress bar for a `with` statement; it shows nothing if `progress` is False or tqdm is missing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _NullProgressBar()
    return tqdm(total=total, desc=title, leave=False, disable=not progress)
