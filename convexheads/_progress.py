"""Progress bars, where tqdm is installed."""

from __future__ import annotations

from typing import Any


class _NullProgressBar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> _NullProgressBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, _: int) -> None: ...


def progress_bar(total: int, title: str, progress: bool) -> Any:
    """Return a progress bar to be used in a `with` statement; it shows nothing unless `progress` and tqdm is there."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=total, desc=title, leave=False)
    return _NullProgressBar()
