"""The archive in which results travel home from a machine with a GPU."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

from convexheads import _storage

PART = 15_000_000
"""The largest size of a file of packed results, in bytes."""


def pack_results(output: Path, folder: Path) -> list[Path]:
    """Pack all results except checkpoints into one archive, split into parts; large weights become float16.

    Returns:
        The parts, `part-NN` in the folder, in place of those that were there.
    """
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(output.rglob("*")):
            name = path.relative_to(output)
            is_part = path.parent == folder and path.name.startswith("part-")
            stays = is_part or path.name[0] == "." or {"checkpoints", "tensorboard", "home"} & set(name.parts)
            if stays or not path.is_file():
                continue
            content = _in_half_precision(path) if path.name == "model.safetensors" else path.read_bytes()
            information = tarfile.TarInfo(str(name))
            information.size = len(content)
            tar.addfile(information, BytesIO(content))
    content = archive.getvalue()
    new = {f"part-{number:02}": start for number, start in enumerate(range(0, len(content), PART))}
    folder.mkdir(parents=True, exist_ok=True)
    for name, start in new.items():
        (folder / f".{name}").write_bytes(content[start : start + PART])
    for old in folder.glob("part-*"):
        old.unlink()
    return [(folder / f".{name}").rename(folder / name) for name in new]


def unpack_results(folder: Path, output: Path) -> list[str]:
    """Unpack the parts that `pack_results` wrote, and return the names of the files."""
    parts = sorted(folder.glob("part-*"))
    if not parts:
        raise SystemExit(f"error: {folder}: expected files that are named part-00 and so on, got none")
    content = b"".join(path.read_bytes() for path in parts)
    with tarfile.open(fileobj=BytesIO(content), mode="r:") as tar:
        tar.extractall(output, filter="data")
        return tar.getnames()


def _in_half_precision(path: Path) -> bytes:
    """A file of weights, with all matrices and filters in float16, that `load_pretrained` can read."""
    key = {"key": "settings", "needed_by": "benchmarks.gpu"}
    tensors, settings = _storage.load(path, **key)
    half = {
        name: value.half() if value.ndim > 1 and value.is_floating_point() else value for name, value in tensors.items()
    }
    small = path.with_name(".half.safetensors")
    try:
        _storage.save(small, half, settings, **key)
        return small.read_bytes()
    finally:
        small.unlink(missing_ok=True)
