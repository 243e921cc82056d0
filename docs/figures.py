"""Draws the pictures and tables of the documentation at each build, with heads or from committed results.

python -m docs.figures    # draw the picture of README.md anew, for light and for dark pages
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy
import torch
from matplotlib import rcParams
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from convexheads import (
    ClassificationHead,
    LogisticHead,
    PrototypeHead,
    RegressionHead,
    RidgeHead,
    SupportVectorRegressionHead,
    SVMHead,
)
from convexheads.heads import FittedGaussianProcess
from convexheads.kernels import RBF
from convexheads.solvers import InteriorPointSolver, NativeSolver, Solver

ASSETS = Path(__file__).parent / "assets"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
COLORS = ("#4c8dd6", "#e58a2e", "#3fae6a", "#c85fb0", "#9a8cf0", "#b5a13c", "#8a8f98")

# In the page, this color is replaced by that of the text, which differs between the light and the dark scheme.
_TEXT = "#010203"
rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "convexheads",
        "font.size": 11,
        "legend.labelcolor": _TEXT,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT),
    }
)


def new(columns: int = 1, rows: int = 1, *, width: float = 8.0, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure in the style of the pages, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for each in numpy.ravel(axes):
        each.spines[["top", "right"]].set_visible(False)
        each.set_facecolor("none")
    return figure, axes


def picture(figure: Figure, caption: str) -> str:
    """The figure as HTML: inline SVG in the page's own font and text color."""
    svg = _svg(figure).replace(_TEXT, "currentColor").replace("\n", " ")
    mark = f"{crc32(svg.encode()):x}"  # makes ids unique, because a page may have several pictures
    svg = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>p{mark}-", svg)
    said = html.escape(caption, quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1)
    return f'<figure class="picture">{svg}<figcaption>{said}</figcaption></figure>'


def _svg(figure: Figure) -> str:
    text = StringIO()
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def five_heads() -> Figure:
    """The boundaries of five heads, as on the first page and in README.md."""
    return boundaries(
        {
            "prototypes": PrototypeHead(),
            "ridge regression": RidgeHead(1.0),
            "logistic regression": LogisticHead(0.1),
            "SVM": SVMHead(C=0.5),
            "SVM, RBF kernel": SVMHead(C=5.0, kernel=RBF(1.0)),
        }
    )


def boundaries(heads: Mapping[str, ClassificationHead], *, ways: int = 3, shots: int = 7, seed: int = 5) -> Figure:
    """The decisions of heads in the plane, fitted on the same support set; support vectors are ringed.

    Colors are the classes, stronger where the best logit is further ahead of the second.
    """
    support, labels = _blobs(ways, shots, seed)
    reach, resolution = 2.2, 160
    line = torch.linspace(-reach, reach, resolution)
    plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
    columns = min(len(heads), 5)
    figure, axes = new(columns, width=2.1 * columns + 0.2, height=2.45)
    palette = numpy.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS[:ways]])
    for panel, (name, head) in zip(numpy.atleast_1d(axes), heads.items(), strict=True):
        with torch.no_grad():
            fitted = head.fit(support, labels)
            logits = fitted(plane)
        best, second = logits.topk(2).values.unbind(-1)
        lead = (best - second) / (best - second).quantile(0.9)
        image = numpy.empty((resolution, resolution, 4))
        chosen = logits.argmax(-1).view(resolution, resolution).numpy()
        image[..., :3] = palette[chosen]
        image[..., 3] = (0.12 + 0.4 * lead.clamp(0, 1)).view(resolution, resolution).numpy()
        panel.imshow(image, origin="lower", extent=(-reach, reach, -reach, reach), interpolation="bilinear")
        panel.scatter(*support.T, c=[COLORS[label] for label in labels], s=16, zorder=2, edgecolors="none")
        if fitted.solution is not None and fitted.solution.bound_multipliers is not None:
            vectors = support[fitted.expansion.coef.abs().amax(-1) > 1e-9]
            panel.scatter(*vectors.T, s=60, facecolors="none", edgecolors=_TEXT, linewidths=0.8, zorder=3)
        panel.set(xticks=[], yticks=[], title=name)
        panel.title.set_fontsize(10)
        panel.spines[:].set_visible(False)
    return figure


def _blobs(ways: int, shots: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes around a circle, one broader than the others, with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways).repeat_interleave(shots)
    angle = 2 * torch.pi * torch.arange(ways) / ways + 0.5
    centers = 1.05 * torch.stack([angle.cos(), angle.sin()], -1)
    spread = torch.linspace(0.3, 0.62, ways)
    return centers[labels] + spread[labels, None] * torch.randn(len(labels), 2, generator=generator), labels


def curves(heads: Mapping[str, RegressionHead], *, points: int = 9, seed: int = 3) -> Figure:
    """Predictions of regression heads from the same few points of a sinusoid, with a band if they have a variance."""
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.rand(points, 1, generator=generator) - 5
    y = 2 * (x[:, 0] - 1).sin() + 0.15 * torch.randn(points, generator=generator)
    line = torch.linspace(-5, 5, 200)[:, None]
    figure, axes = new(len(heads), width=3.2 * len(heads), height=2.6)
    for panel, (name, head) in zip(numpy.atleast_1d(axes), heads.items(), strict=True):
        with torch.no_grad():
            fitted = head.fit(x, y)
            mean = fitted(line)
            if isinstance(fitted, FittedGaussianProcess):
                deviation = fitted.variance(line).sqrt()
                low, high = mean - 2 * deviation, mean + 2 * deviation
                panel.fill_between(line[:, 0], low, high, color=COLORS[0], alpha=0.2, linewidth=0)
            if isinstance(head, SupportVectorRegressionHead):
                epsilon = float(head.epsilon)
                panel.fill_between(line[:, 0], mean - epsilon, mean + epsilon, color=COLORS[0], alpha=0.2, linewidth=0)
        panel.plot(line[:, 0], mean, color=COLORS[0])
        panel.plot(line[:, 0], 2 * (line[:, 0] - 1).sin(), ":", color=_TEXT, linewidth=1)
        panel.plot(x[:, 0], y, "o", color=COLORS[1], markersize=5)
        panel.set(title=name, ylim=(-4, 4))
        panel.title.set_fontsize(10)
    return figure


def speed() -> Figure:
    """The time of both passes for each size of the task, from the committed result of `benchmarks.solvers`."""
    rows = _result("solvers/cpu")["results"]
    names = {
        "native": "convexheads",
        "ridge": "ridge regression (closed form)",
        "moreau": "Moreau",
        "published code": "code of Lee et al., with qpth",
        "qpth": "qpth through our adapter",
        "cvxpylayers": "cvxpylayers",
        "learn2learn": "learn2learn",
    }
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, axes = new(height=3.6)
    for number, (contender, name) in enumerate(names.items()):
        own = [row for row in rows if row["contender"] == contender]
        strong = {"linewidth": 2.5, "zorder": 3} if contender == "native" else {"linewidth": 1.2}
        style = "--" if contender == "ridge" else "-"
        places = [sizes.index(row["size"]) for row in own]
        axes.semilogy(
            places, [1e3 * row["both"] for row in own], style, marker="o", color=COLORS[number], label=name, **strong
        )
    axes.set_xticks(range(len(sizes)), [size.replace("w", "-way\n").replace("s", "-shot") for size in sizes])
    axes.set_ylabel("forward and backward,\n8 tasks, ms")
    axes.grid(axis="y", linewidth=0.3)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def probe_times() -> Figure:
    """The time of a grid of 45 values by the number of shots, from the committed result of `benchmarks.probe`."""
    rows = [row for row in _result("probe/cpu")["results"] if row["protocol"] == "logistic, validation set"]
    data = list(dict.fromkeys(row["data"] for row in rows))
    shots = sorted({row["shots"] for row in rows})
    columns = min(3, len(data))
    figure, axes = new(columns, -(-len(data) // columns), width=9.5, height=6.4)
    panels = numpy.ravel(axes)
    for panel, name in zip(panels, data, strict=False):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if (row["data"], row["method"]) == (name, method)]
            strong = {"linewidth": 2.5, "zorder": 3} if method == "tune" else {"linewidth": 1.2}
            places, seconds = [shots.index(row["shots"]) for row in own], [row["seconds"] for row in own]
            panel.semilogy(places, seconds, marker="o", color=COLORS[number], label=method, **strong)
        panel.set_xticks(range(len(shots)), [str(count) for count in shots])
        panel.set_ylim(*(limit(row["seconds"] for row in rows) * factor for limit, factor in ((min, 0.7), (max, 1.4))))
        panel.set(title=name, xlabel="shots")
        panel.grid(axis="y", linewidth=0.3)
    for panel in panels[::columns]:
        panel.set_ylabel("seconds, all tries and values")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def speed_table(of: str = "solvers/cpu") -> str:
    """The speedup of the native solver over the others, as Markdown, from a result of `benchmarks.solvers`."""
    times = {(row["contender"], row["size"]): row["both"] for row in _result(of)["results"]}
    sizes = ("5w1s", "5w5s", "5w15s", "20w1s", "20w5s")
    lines = ["| | " + " | ".join(s.replace("w", "-way ").replace("s", "-shot") for s in sizes) + " |", "|---" * 6 + "|"]
    own = {
        "ours, ms": "native",
        "ridge regression, the floor, ms": "ridge",
        "ours without Numba, ms": "native in torch",
    }
    for title, name in own.items():
        lines.append(f"| {title} | " + " | ".join(_digits(1e3 * times[name, size]) for size in sizes) + " |")
    peers = {
        "faster than the code of Lee et al., with qpth": "published code",
        "faster than qpth through our adapter": "qpth",
        "faster than Moreau": "moreau",
        "faster than cvxpylayers": "cvxpylayers",
        "faster than learn2learn's `SVClassifier`": "learn2learn",
    }
    for title, name in peers.items():
        if not any((name, size) in times for size in sizes):
            continue
        ratios = [times[name, s] / times["native", s] if (name, s) in times else None for s in sizes]
        lines.append(
            f"| {title} | "
            + " | ".join(f"{_digits(r)} \N{MULTIPLICATION SIGN}" if r else "not timed" for r in ratios)
            + " |"
        )
    return "\n".join(lines)


def precision_table() -> str:
    """The errors of each solver in the same run, as Markdown: the largest over sizes, of logits and of gradients."""
    rows = _result("solvers/cpu")["results"]
    lines = ["| solver | logits | gradients |", "|---|---|---|"]
    for name in ("native", "qpth", "cvxpylayers"):
        errors = [
            max(row[kind] for row in rows if row["contender"] == name and row[kind] is not None)
            for kind in ("logits_error", "gradient_error")
        ]
        lines.append(f"| `{name}` | {errors[0]:.0e} | {errors[1]:.0e} |")
    return "\n".join(lines)


def kinks() -> Figure:
    """A query's logit while one support example moves: its value, and its derivative computed in three ways."""
    support, labels = _blobs(3, 5, seed=2)
    support, query = support.double(), torch.tensor([[0.3, -0.2]], dtype=torch.float64)

    def logit(position: torch.Tensor, solver: Solver) -> torch.Tensor:
        moved = support.repeat(len(position), 1, 1)
        moved[:, 0] = torch.stack([position, torch.zeros_like(position)], -1)
        head = SVMHead(C=0.7, kernel=RBF(1.0), solver=solver)
        return head(moved, labels.expand(len(position), -1), query.expand(len(position), 1, 2))[:, 0, 0]

    def slope(position: torch.Tensor, solver: Solver) -> torch.Tensor:
        position = position.clone().requires_grad_()
        return torch.autograd.grad(logit(position, solver).sum(), position)[0]

    figure, (left, right) = new(2, width=9.0, height=3.0)
    fine, coarse = (torch.linspace(-2, 2.5, count, dtype=torch.float64) for count in (400, 28))
    exact, relaxed = NativeSolver(), InteriorPointSolver(gradient="relaxed", complementarity=0.005)
    left.plot(fine, logit(fine, exact).detach(), color=COLORS[0])
    left.set(xlabel="position of a support example", ylabel="logit of the query")
    right.plot(fine, slope(fine, exact), color=COLORS[0], label='"exact"')
    right.plot(fine, slope(fine, relaxed), "--", color=COLORS[1], label='"relaxed"')
    differences = (logit(coarse + 1e-6, exact) - logit(coarse - 1e-6, exact)) / 2e-6
    right.plot(coarse, differences, "o", color=COLORS[2], markersize=4, label="central differences")
    right.set(xlabel="position of a support example", ylabel="its derivative")
    right.legend(frameon=False, fontsize=9)
    return figure


CALL_PATH = (
    ("heads", "ClassificationHead.forward"),
    ("heads", "ClassificationHead.fit"),
    ("heads", "SVMHead.solve"),
    ("heads", "MulticlassSVM.solve_dual"),
    ("solvers", "Solver.solve"),
    ("solvers", "Solver._solve_flat"),
    ("solvers", "Solver._solve_alone"),
    ("no autograd", "ActiveSetSolver._solve_numerically"),
    ("solvers", "ActiveSet.attach"),
    ("solvers", "handle_failures"),
    ("heads", "FittedClassifier.__call__"),
)
"""The functions that one call of `SVMHead` passes, in order, each with the part of the library that it belongs to."""
BACKWARD_PATH = (
    ("heads", "scores and cross-Gram matrix (autograd)"),
    ("solvers", "_ImplicitSolve.backward"),
    ("no autograd", "KKT.solve"),
    ("heads", "Gram matrix and kernel (autograd)"),
)
"""The steps of the backward pass of such a call, in order."""


def call_path() -> Figure:
    """The path of one call, from features to logits and from their gradient to that of the features."""
    lanes = {"heads": 0.0, "solvers": 1.0, "no autograd": 2.0}
    figure, axes = new(width=9.0, height=6.4)
    steps = [*CALL_PATH, *BACKWARD_PATH]
    rows = [-number - (1.2 if number >= len(CALL_PATH) else 0.0) for number in range(len(steps))]
    for number, ((lane, name), row) in enumerate(zip(steps, rows, strict=True), 1):
        color = COLORS[0] if number <= len(CALL_PATH) else COLORS[1]
        box = {"boxstyle": "round,pad=0.35", "facecolor": "none", "edgecolor": color}
        axes.text(lanes[lane], row, f"{number}  {name}", ha="center", va="center", fontsize=9, bbox=box)
        if number not in (len(CALL_PATH), len(steps)):
            end = (lanes[steps[number][0]], rows[number] + 0.3)
            axes.annotate("", end, (lanes[lane], row - 0.3), arrowprops={"arrowstyle": "->", "color": color})
    titles = ("heads: features to dual problem", "solvers: dual problem to solution", "numbers only, without autograd")
    for title, place in zip(titles, lanes.values(), strict=True):
        axes.text(place, 1.1, title, ha="center", fontsize=10, fontweight="bold")
    axes.text(-0.55, rows[len(CALL_PATH)] + 1.0, "backward", fontsize=10, fontweight="bold")
    axes.set(xlim=(-0.6, 2.6), ylim=(rows[-1] - 0.8, 1.6))
    axes.axis("off")
    return figure


def _result(name: str) -> dict[str, Any]:
    (path,) = (RESULTS / name).glob("*.json")
    return json.loads(path.read_text())


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


if __name__ == "__main__":
    drawing = _svg(five_heads())
    for scheme, color in (("light", "#1f2328"), ("dark", "#f0f6fc")):
        (ASSETS / f"heads-{scheme}.svg").write_text(drawing.replace(_TEXT, color), encoding="utf-8")
