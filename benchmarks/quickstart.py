"""Learn to read unseen alphabets from one example of each letter: a table and two pictures in two minutes.

python -m benchmarks.quickstart              # what `make quickstart` runs
python -m benchmarks.quickstart --seed 1     # or any other option of benchmarks.train
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from rich.console import Console
from torch import Tensor, nn

import convexheads as ch
from benchmarks import report, train
from benchmarks.data import ImageSet, load
from benchmarks.data.glyphs import SCRIPTS
from benchmarks.options import Options

TASKS = ((5, 1), (5, 5), (20, 1))
"""Ways and shots of the episodes that heads are compared on."""
HEADS: dict[str, ch.ClassificationHead] = {
    "svm": ch.SVMHead(C=1.0, smoothing=5.0),
    "ridge": ch.RidgeHead(10.0),
    "prototypes": ch.PrototypeHead(),
}
"""The heads that are compared. Their settings were chosen by accuracy on the validation scripts."""
TITLES = {"NKO": "N'Ko"}
GREEN, RED, INK = "#1a7f37", "#c62828", "#24292f"
EXPLANATION = """The network was trained on Latin, Cyrillic, Arabic and
Canadian syllabics. It has never seen these scripts.
It is shown one example of each of ten letters;
"taken for" is the example that it chose for the new image.

{right} of {all} are right. With pixels in place of
the network's features, {pixels} are."""


class QuickstartOptions(Options):
    """Options with the defaults of the quickstart."""

    program: ClassVar[str] = "benchmarks.quickstart"
    defaults: ClassVar[dict[str, Any]] = {
        "dataset": "glyphs",
        "ways": 10,
        "shots": 1,
        "queries": 3,
        "tasks": 4,
        "validate_every": 60,
        "validation_episodes": 100,
        "validation_shots": 1,
        "checkpoint_every": 40,
        "test_episodes": 400,
        "output": Path("runs/quickstart"),
    }


def compare(options: Options, data: ImageSet, backbones: Mapping[str, nn.Module]) -> list[report.Row]:
    """Evaluate all heads on the features of every backbone, but only prototypes on those of the untrained backbone.

    The features of an untrained backbone are so small that the other heads would need settings of their own.
    """
    rows = []
    for name, backbone in backbones.items():
        heads = {"prototypes": HEADS["prototypes"]} if name == "untrained" else HEADS
        rows += train.measure(options, data, name, backbone, heads, TASKS)
    return rows


def run(options: QuickstartOptions) -> None:
    """Train, or continue an interrupted run; compare the heads; draw the letters."""
    if options.checkpoint.is_file() and not (options.folder / "result.json").is_file():
        options = replace(options, resume=True)
    folder, console = options.folder, Console()
    console.print("The SVM's solver is compiled once, which takes about fifteen seconds.")
    train.run(options, compare)
    backbone, unseen = ch.load_pretrained(folder).backbone, load("glyphs", splits=["test"])["test"]
    draw_letters(backbone, HEADS["svm"], unseen, folder / "letters.png", seed=options.seed)
    lines = (
        f"Table: {folder / 'result.md'}",
        f"Letters never seen before, and what they were taken for: {folder / 'letters.png'}",
        f"The table as a picture: {folder / 'accuracy.png'}",
        f"Weights: {folder / 'model.safetensors'}, for convexheads.load_pretrained({str(folder)!r})",
        "Next: docs/quickstart.md does the same in your own loop;",
        "      python -m benchmarks.quickstart --help lists what can be changed, such as --head ridge.",
    )
    console.print(*lines, sep="\n", soft_wrap=True, highlight=False)


def draw_letters(
    backbone: nn.Module, head: ch.ClassificationHead, data: ImageSet, path: Path, *, ways: int = 10, seed: int = 0
) -> None:
    """Draw an episode of each script: the examples, a new image of each letter, and the example it was taken for.

    Args:
        backbone: the trained one.
        head: fitted to the examples, one of each letter.
        data: letters of several scripts.
        path: path of the picture.
        ways: letters of an episode.
        seed: seed of the choice of letters and images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scripts = [script for script in SCRIPTS["test"] if any(name.startswith(script) for name in data.classes)]
    figure = Figure(figsize=(13, 2.4 * ((len(scripts) + 2) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    panels, generator = figure.subplots((len(scripts) + 2) // 2, 2).flatten(), torch.Generator().manual_seed(seed)
    for panel in panels:
        panel.set(xlim=(-1.6, ways), ylim=(3.5, -0.6), aspect="equal")
        panel.set_axis_off()
    counts = torch.zeros(3, dtype=torch.long)
    for panel, script in zip(panels, scripts, strict=False):
        own = torch.tensor([label for label, name in enumerate(data.classes) if name.startswith(script)])
        chosen = own[torch.randperm(len(own), generator=generator)[:ways]]
        pairs = [(data.labels == label).nonzero().flatten() for label in chosen]
        pairs = torch.stack([each[torch.randperm(len(each), generator=generator)[:2]] for each in pairs])
        examples, queries = data.images[pairs].unbind(1)
        labels, guesses = list(range(len(chosen))), []
        for features in (backbone, train.Pixels()):
            support, query = (ch.embed(features, images, progress=False) for images in (examples, queries))
            with torch.no_grad():
                guesses.append(head(support, torch.tensor(labels), query).argmax(-1).tolist())
        right, right_by_pixels = (sum(map(operator.eq, each, labels)) for each in guesses)
        counts += torch.tensor([right, right_by_pixels, len(labels)])
        title = f"{TITLES.get(script, script.title())}: {right} of {len(labels)} right"
        panel.text(0, -0.25, title, fontsize=13, fontweight="bold", color=INK)
        for row, text in enumerate(("one example", "new image", "taken for")):
            panel.text(-0.15, row + 0.45, text, ha="right", va="center", fontsize=9, color=INK)
        for label, guess in enumerate(guesses[0]):
            _tile(panel, label, 0, examples[label])
            _tile(panel, label, 1, queries[label])
            _tile(panel, label, 2, examples[guess], GREEN if guess == label else RED)
            mark, color = ("✓", GREEN) if guess == label else ("✗", RED)
            panel.text(label + 0.45, 3.15, mark, ha="center", va="center", fontsize=12, fontweight="bold", color=color)
    text = EXPLANATION.format(right=counts[0], pixels=counts[1], all=counts[2])
    panels[len(scripts)].text(0, 0, text, fontsize=11, va="top", linespacing=1.5, color=INK)
    figure.savefig(path, dpi=120)


def _tile(panel: Any, column: int, row: int, image: Tensor, frame: str = "#c9d1d9") -> None:
    """Draw an image, dark on light, with a frame."""
    ink = (image.squeeze(0) / 255).unsqueeze(-1)
    pixels = 1 - ink * (1 - torch.tensor(to_rgb(INK)))
    extent = (column, column + 0.9, row + 0.9, row)
    panel.imshow(pixels.numpy(), extent=extent, interpolation="bilinear", zorder=1)
    width = 1 if frame == "#c9d1d9" else 2.5
    panel.add_patch(Rectangle((column, row), 0.9, 0.9, fill=False, edgecolor=frame, linewidth=width, zorder=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `QuickstartOptions`."""
    train.main(arguments, kind=QuickstartOptions, run=run, description=(__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    main()
