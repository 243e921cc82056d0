"""Letters of eleven scripts, drawn with the DejaVu fonts of matplotlib: a data set without a download.

The splits share no script, so that a backbone is tested on scripts that it was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import unicodedata
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
import PIL
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.data.images import ImageSet
from convexheads import _storage

SCRIPTS = {
    "train": ("LATIN", "CYRILLIC", "CANADIAN SYLLABICS", "ARABIC LETTER"),
    "val": ("GREEK", "LAO"),
    "test": ("GEORGIAN", "ARMENIAN", "HEBREW", "TIFINAGH", "NKO"),
}
"""The scripts of each split: how the Unicode names of their letters begin."""
STYLES = ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "SansMono")
"""The fonts to draw letters with. The first one has all letters."""
SIZE = 28
"""Height and width of an image in pixels."""

_VERSION = 1  # increase with every change of the images
_KEY = "glyphs"
_CANVAS, _EM, _LARGEST = 2 * SIZE, 46, 42  # images are drawn at twice their size: canvas, font, largest letter
_ROTATION, _SCALE, _ASPECT, _SHEAR, _SHIFT = 0.35, 0.25, 0.1, 0.3, 4.0  # largest absolute values


def load_glyphs(
    *, max_per_script: int = 150, images_per_class: int = 20, seed: int = 0, progress: bool = False
) -> dict[str, ImageSet]:
    """The three splits: loaded from a cache file, or drawn within seconds and then cached.

    A class is a letter, with its Unicode name, such as "GEORGIAN LETTER AN". Its images (white on black) cycle through
    the fonts that have the letter; each is rotated, scaled, sheared and shifted at random.

    Args:
        max_per_script: maximum number of letters per script: the first ones in the order of Unicode.
        images_per_class: images per letter.
        seed: seed of the random transforms.
        progress: whether to show a progress bar while drawing.
    """
    options = {"max_per_script": max_per_script, "images_per_class": images_per_class, "seed": seed}
    path = cache_file(options)
    try:
        images, classes = _storage.load(path, key=_KEY, needed_by="glyphs")
    except (OSError, LookupError, ValueError):  # missing or damaged
        letters = choose_letters(max_per_script)
        total = sum(map(len, letters.values()))
        with tqdm(total=total, desc="drawing letters", unit="class", disable=not progress) as bar:
            images = {split: _draw_split(chosen, images_per_class, seed, bar) for split, chosen in letters.items()}
        classes = {split: [unicodedata.name(letter) for letter in chosen] for split, chosen in letters.items()}
        with suppress(OSError):  # without a cache, the next call draws again
            path.parent.mkdir(parents=True, exist_ok=True)
            _storage.save(path, images, classes, key=_KEY, needed_by="glyphs")
    return {
        split: ImageSet(images[split], torch.arange(len(names)).repeat_interleave(images_per_class), tuple(names))
        for split, names in classes.items()
    }


def cache_file(options: dict[str, int]) -> Path:
    """The cache file of images drawn with these options and the installed versions of matplotlib and Pillow."""
    key = json.dumps([_VERSION, matplotlib.__version__, PIL.__version__, SCRIPTS, STYLES, SIZE, options])
    home = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    folder = Path(home) if home else Path.home() / ".cache"
    return folder / "convexheads" / f"glyphs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def choose_letters(max_per_script: int) -> dict[str, list[str]]:
    """The letters of each split, script by script.

    Letters that Unicode decomposes, such as those with an accent, are left out. So is a letter that looks like an
    earlier one of any split: the Greek capital alpha, for example, looks like a Latin A.
    """
    candidates = [letter for letter in map(chr, sorted(_fonts()[0][1])) if _is_plain_letter(letter)]
    seen: set[tuple[tuple[int, int], bytes]] = set()
    chosen: dict[str, list[str]] = {}
    for split, scripts in SCRIPTS.items():
        chosen[split] = []
        for script in scripts:
            letters = []
            for letter in candidates:
                if len(letters) == max_per_script or not unicodedata.name(letter).startswith(f"{script} "):
                    continue
                ink = _ink(letter, _fonts()[0][0])
                if ink is None or (look := (ink.size, ink.tobytes())) in seen:
                    continue
                seen.add(look)
                letters.append(letter)
            chosen[split] += letters
    return chosen


def draw_class(letter: str, count: int, seed: int) -> Tensor:
    """Images of a letter, uint8 of shape (count, 1, 28, 28), white on black; they depend on the arguments only."""
    draw = Random(f"{seed} {letter}")  # noqa: S311
    inks = [ink for font, codes in _fonts() if ord(letter) in codes and (ink := _ink(letter, font))]
    images = [_transform(inks[number % len(inks)], draw) for number in range(count)]
    return torch.from_numpy(np.stack(images)).unsqueeze(1)


def _draw_split(letters: list[str], images_per_class: int, seed: int, bar: tqdm) -> Tensor:
    classes = []
    for letter in letters:
        classes.append(draw_class(letter, images_per_class, seed))
        bar.update()
    return torch.cat(classes)


@cache
def _fonts() -> list[tuple[ImageFont.FreeTypeFont, frozenset[int]]]:
    """The font of each style, and the code points that it has glyphs for."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [str(folder / f"DejaVu{style}.ttf") for style in STYLES]
    fonts = [ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC) for path in paths]
    return [(font, frozenset(FT2Font(path).get_charmap())) for font, path in zip(fonts, paths, strict=True)]


def _is_plain_letter(character: str) -> bool:
    return unicodedata.category(character) in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(character)


def _ink(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The letter as a grayscale image, cropped to the ink; None if there is no ink."""
    left, top, right, bottom = font.getbbox(letter)
    image = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(image).text((4 - left, 4 - top), letter, 255, font)
    box = image.getbbox()
    return image.crop(box) if box else None


def _transform(ink: Image.Image, draw: Random) -> np.ndarray:
    """The letter centered in an image, then rotated, scaled, sheared and shifted at random."""
    rotation, scale, aspect, shear, right, down = (
        draw.uniform(-most, most) for most in (_ROTATION, _SCALE, _ASPECT, _SHEAR, _SHIFT, _SHIFT)
    )
    # Pillow expects the map from the image to the letter: rotation first, then shear and scale.
    fit, cos, sin = max(1.0, *(side / _LARGEST for side in ink.size)), math.cos(rotation), math.sin(rotation)
    wide, high = fit * math.exp(scale + aspect), fit * math.exp(scale - aspect)
    xx, xy, yx, yy = wide * (cos + shear * sin), wide * (shear * cos - sin), high * sin, high * cos
    source, x, y = ImageOps.expand(ink, 2), _CANVAS / 2 + right, _CANVAS / 2 + down
    matrix = (xx, xy, source.width / 2 - xx * x - xy * y, yx, yy, source.height / 2 - yx * x - yy * y)
    # Rounded, because the last bits of a cosine differ between machines.
    rounded = tuple(round(value, 6) for value in matrix)
    image = source.transform((_CANVAS, _CANVAS), Image.Transform.AFFINE, rounded, Image.Resampling.BILINEAR)
    return np.asarray(image.reduce(2))
