"""Features of text files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexheads.cli._files import read
from convexheads.cli._packages import loading
from convexheads.errors import InputError, MissingDependencyError


def packaged() -> Callable[[Sequence[Path]], Tensor]:
    """The encoder that the package wordllama contains."""
    try:
        import wordllama
    except ImportError as error:
        raise MissingDependencyError("wordllama", "text", "FolderClassifier(features='text')") from error

    (folder,) = map(Path, wordllama.__path__)

    class Packaged(wordllama.WordLlama):
        """The model that the package contains, so that nothing is downloaded. Its path differs before version 0.4."""

        @staticmethod
        def get_cache_dir(is_tokenizer_config: bool = False) -> Path:
            return folder / ("tokenizers" if is_tokenizer_config else "weights")

    model = Packaged.load(cache_dir=folder, disable_download=True)
    return lambda paths: torch.from_numpy(model.embed(_read_all(paths)))


def sentence_transformers(name: str) -> Callable[[Sequence[Path]], Tensor]:
    """A model of the package sentence-transformers, by its name or folder."""
    features = f"sentence-transformers:{name}"
    with loading(features, package="sentence-transformers", extra="sentence-transformers"):
        package: Any = import_module("sentence_transformers")
        model = package.SentenceTransformer(name)
    return lambda paths: model.encode(_read_all(paths), convert_to_tensor=True, show_progress_bar=False).cpu()


def _read_all(paths: Sequence[Path]) -> list[str]:
    expected = "text in UTF-8 (for images, set features, or --features, to images)"
    documents = [read(path, lambda path: path.read_text(encoding="utf-8"), expected) for path in paths]
    if empty := [path for path, document in zip(paths, documents, strict=True) if not document.strip()]:
        raise InputError("file", "a file that contains text", f"{empty[0]} without any text")
    return documents
