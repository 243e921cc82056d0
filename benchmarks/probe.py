"""Time linear probes with a grid of regularizations: our `tune`, scikit-learn in a loop, and L-BFGS in PyTorch.

python -m benchmarks.probe --data-root DIR

The protocol is the few-shot evaluation of DINOv2 and DINOv3: 1, 2, 4, 8 and 16 shots, several tries, and logistic
regression with 45 values of C, of which the validation accuracy chooses one for each try. Other rows choose by
cross-validation, tune ridge regression and linear SVMs, or fit logistic regression once.

A run takes about ten minutes per data set. With --append, data sets and protocols can be run one after the other.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas
import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, image_models, report
from benchmarks.data import load
from convexheads.hyperparameters import PerTask

C = 10.0 ** torch.linspace(-6, 5, 45, dtype=torch.float64)
"""The 45 values of DINOv2 and DINOv3."""
SHOTS = (1, 2, 4, 8, 16)
HELD_OUT = 15
"""Validation examples per class, and as many test examples."""
SYNTHETIC = {f"synthetic, {d} features": d for d in (384, 768, 1024)}
REAL = {"CIFAR-FS": "cifar-fs", "FC100": "fc100", "miniImageNet": "miniimagenet"}
OURS, HEAD = "tune", "LogisticHead"
"""The names of our methods: with a grid, and of one fit."""
ONE_FIT = "logistic, one fit"


class Split(NamedTuple):
    """Examples of all tries: support `(tries, n, d)`, validation and test `(tries, m, d)`, with labels of one try."""

    support: Tensor
    labels: Tensor
    validation: Tensor
    test: Tensor
    held_out_labels: Tensor


class Found(NamedTuple):
    """What a method found: its test accuracy, the weights `(tries, values, k, d)` and biases, if it has them."""

    accuracy: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    gap: float | None = None


def synthetic(d: int, ways: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features of overlapping classes, `(examples, d)`, of length one, and their labels."""
    count = max(SHOTS) + 2 * HELD_OUT
    labels = torch.arange(ways).repeat_interleave(count)
    means = torch.randn(ways, d, generator=generator, dtype=torch.float64)
    features = means[labels] + 3 * torch.randn(len(labels), d, generator=generator, dtype=torch.float64)
    return functional.normalize(features, dim=-1), labels


def draw(features: Tensor, labels: Tensor, ways: int, shots: int, tries: int, generator: torch.Generator) -> Split:
    """Random examples of the same random classes in each try, in float32 as features usually are."""
    classes = labels.unique()
    chosen = classes[torch.randperm(len(classes), generator=generator)[:ways]]
    members = [(labels == label).nonzero().squeeze(-1) for label in chosen]
    picks = []
    for _ in range(tries):
        rows = [own[torch.randperm(len(own), generator=generator)[: shots + 2 * HELD_OUT]] for own in members]
        picks.append(features[torch.stack(rows)].float())
    drawn = torch.stack(picks)  # (tries, ways, examples, d)
    support, validation, test = drawn.split([shots, HELD_OUT, HELD_OUT], 2)
    held_out = torch.arange(len(chosen)).repeat_interleave(HELD_OUT)
    labels = torch.arange(len(chosen)).repeat_interleave(shots)
    return Split(support.flatten(1, 2), labels, validation.flatten(1, 2), test.flatten(1, 2), held_out)


def ours(head: ch.ClassificationHead, grid: dict[str, Tensor], cv: Any = None) -> Callable[[Split], Found]:
    """All tries, values and folds in one call."""

    def run(split: Split) -> Found:
        labels = split.held_out_labels.expand(len(split.support), -1)
        chosen = (split.validation, labels) if cv is None else cv
        tuned = ch.tune(head, grid, split.support, split.labels, cv=chosen, progress=False)
        right = tuned.fitted(split.test).argmax(-1) == labels
        return Found(right.double().mean().item(), gap=None if tuned.gap is None else tuned.gap.max().item())

    return run


def loop(make: Callable[[float], Any]) -> Callable[[Split], Found]:
    """One fit of scikit-learn for each try and value."""

    def run(split: Split) -> Found:
        accuracies, weights, biases = [], [], []
        truth = split.held_out_labels.numpy()
        for support, validation, test in zip(split.support, split.validation, split.test, strict=True):
            best, chosen, models = -1.0, None, []
            for value in C.tolist():
                model = make(value).fit(support.numpy(), split.labels.numpy())
                models.append(model)
                if (score := model.score(validation.numpy(), truth)) > best:
                    best, chosen = score, model
            accuracies.append(cast("Any", chosen).score(test.numpy(), truth))
            weights.append(torch.from_numpy(np.stack([model.coef_ for model in models])))
            biases.append(torch.from_numpy(np.stack([model.intercept_ for model in models])))
        return Found(float(np.mean(accuracies)), torch.stack(weights).double(), torch.stack(biases).double())

    return run


def single(fit: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]) -> Callable[[Split], Found]:
    """One fit with C = 1 for each try, by a function of examples and labels that returns one of queries."""

    def run(split: Split) -> Found:
        tests = zip(split.support, split.test, strict=True)
        right = [fit(x, split.labels)(queries) == split.held_out_labels for x, queries in tests]
        return Found(torch.stack(right).double().mean().item())

    return run


def fit_ours(support: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A fit for `single`."""
    with torch.no_grad():
        fitted = ch.LogisticHead(1.0, intercept=True).fit(support, labels)
    return lambda queries: fitted(queries).argmax(-1)


def fit_by_scikit_learn(tolerance: float) -> Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]:
    """A fit for `single`."""
    from sklearn.linear_model import LogisticRegression

    def fit(support: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        model = LogisticRegression(tol=tolerance, max_iter=10_000).fit(support.numpy(), labels.numpy())
        return lambda queries: torch.from_numpy(model.predict(queries.numpy()))

    return fit


def search(make: Callable[[], Any]) -> Callable[[Split], Found]:
    """One search of scikit-learn for each try."""

    def run(split: Split) -> Found:
        truth, pairs = split.held_out_labels.numpy(), zip(split.support, split.test, strict=True)
        return Found(
            float(np.mean([make().fit(x.numpy(), split.labels.numpy()).score(q.numpy(), truth) for x, q in pairs]))
        )

    return run


def lbfgs(split: Split) -> Found:
    """L-BFGS of PyTorch on a linear layer, as people write it, for each try and value."""
    accuracies, device = [], split.support.device
    truth, labels = split.held_out_labels.to(device), split.labels.to(device)
    for support, validation, test in zip(split.support, split.validation, split.test, strict=True):
        best, accuracy = -1.0, 0.0
        for value in C.tolist():
            layer = torch.nn.Linear(support.shape[-1], int(labels.max()) + 1, device=device)
            optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

            def closure(layer=layer, optimizer=optimizer, support=support, value=value) -> Tensor:
                optimizer.zero_grad()
                loss = functional.cross_entropy(layer(support), labels, reduction="sum")
                loss = loss + layer.weight.square().sum() / (2 * value)
                loss.backward()
                return loss

            optimizer.step(closure)
            with torch.no_grad():
                score = (layer(validation).argmax(-1) == truth).double().mean().item()
                if score > best:
                    best, accuracy = score, (layer(test).argmax(-1) == truth).double().mean().item()
        accuracies.append(accuracy)
    return Found(float(np.mean(accuracies)))


Methods = dict[str, dict[str, Callable[[Split], Found]]]


def methods(*, intelex: bool) -> Methods:
    """The methods by protocol; the first one of each protocol is ours."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifierCV
    from sklearn.svm import LinearSVC

    loops = {
        "LogisticRegression(tol=1e-12)": lambda value: LogisticRegression(C=value, tol=1e-12, max_iter=1000),
        "LogisticRegression()": lambda value: LogisticRegression(C=value, max_iter=1000),
    }
    if intelex:
        from sklearnex.linear_model import LogisticRegression as Patched  # pyright: ignore[reportMissingImports]

        loops["LogisticRegression() of scikit-learn-intelex"] = lambda value: Patched(C=value, max_iter=1000)
    validated = {name: loop(make) for name, make in loops.items()} | {"torch L-BFGS": lbfgs}
    others: Methods = {
        "logistic, validation set": validated,
        "logistic, 5 folds": {
            "LogisticRegressionCV()": search(
                lambda: LogisticRegressionCV(
                    Cs=cast("Any", C.numpy()),
                    cv=5,
                    max_iter=1000,
                    scoring="accuracy",
                    l1_ratios=cast("Any", (0,)),
                    use_legacy_attributes=cast("Any", False),
                )
            )
        },
        "ridge, leave one out": {"RidgeClassifierCV()": search(lambda: RidgeClassifierCV(alphas=1 / C.numpy()))},
        "SVM, validation set": {"LinearSVC()": loop(lambda value: LinearSVC(C=value, max_iter=10_000))},
        ONE_FIT: {
            "LogisticRegression()": single(fit_by_scikit_learn(1e-4)),
            "LogisticRegression(tol=1e-8)": single(fit_by_scikit_learn(1e-8)),
        },
    }
    return {protocol: own | others[protocol] for protocol, own in our_methods().items()}


def our_methods() -> Methods:
    """Our method for each protocol."""
    penalties, logistic = {"regularization": 1 / C}, ch.LogisticHead(intercept=True)
    svm = ch.OneVsRestSVMHead(squared_hinge=True, intercept=True)
    return {
        "logistic, validation set": {OURS: ours(logistic, penalties)},
        "logistic, 5 folds": {OURS: ours(logistic, penalties, cv=5)},
        "ridge, leave one out": {OURS: ours(ch.RidgeHead(intercept=True), penalties, cv="loo")},
        "SVM, validation set": {OURS: ours(svm, {"C": C})},
        ONE_FIT: {HEAD: single(fit_ours)},
    }


def objective(split: Split, weight: Tensor, bias: Tensor) -> Tensor:
    """The objective of logistic regression at weights `(tries, values, k, d)`, divided by C, `(tries, values)`."""
    scores = split.support.double().unsqueeze(1) @ weight.mT + bias.unsqueeze(-2)
    labels = split.labels.expand(scores.shape[:-1])
    loss = functional.cross_entropy(scores.flatten(0, 2), labels.flatten(), reduction="none").reshape(labels.shape)
    return loss.sum(-1) + weight.square().sum((-2, -1)) / (2 * C)


def optimum(split: Split) -> Tensor:
    """The smallest objective, certified to 1e-12, `(tries, values)`."""
    found = []
    for support in split.support:
        x = support.double().cpu()
        head = ch.LogisticHead(PerTask(1 / C), intercept=True)
        fitted = head.fit(x.expand(len(C), *x.shape), split.labels.cpu())
        one = split._replace(support=x.unsqueeze(0), labels=split.labels.cpu())
        assert fitted.solution is not None
        assert fitted.solution.gap.max() < 1e-12
        found.append(objective(one, fitted.weight.unsqueeze(0), fitted.bias.unsqueeze(0))[0])
    return torch.stack(found)


def compare(data: dict[str, tuple[Tensor, Tensor]], options: Any, generator: torch.Generator) -> pandas.DataFrame:
    """One row per data set, number of shots, protocol and method."""
    rows: list[dict[str, Any]] = []
    table = our_methods() if options.ours else methods(intelex=options.intelex)
    work = [(name, shots) for name in data for shots in options.shots]
    bar = tqdm(work)
    for name, shots in bar:
        features, labels = data[name]
        split = draw(features, labels, options.ways, shots, options.tries, generator)
        best = optimum(split)
        for protocol, entries in table.items():
            if protocol not in options.protocols or ("folds" in protocol and shots < 5):
                continue
            for method, run in entries.items():
                bar.set_description(f"{name}, {shots} shots, {method}")
                on = options.device if method in (OURS, HEAD, "torch L-BFGS") else "cpu"
                moved = Split(*(part.to(on) for part in split))
                repeats = options.repeats if method == OURS or protocol == ONE_FIT else 1
                seconds, found = [], Found(0.0)
                for _ in range(repeats):
                    start = report.now(moved.support)
                    found = run(moved)
                    seconds.append(report.now(moved.support) - start)
                row = {"data": name, "features": features.shape[-1], "shots": shots, "protocol": protocol}
                row |= {"method": method, "seconds": float(np.median(seconds)), "accuracy": found.accuracy}
                row["certified gap"] = found.gap
                if found.weight is not None and found.bias is not None and protocol.startswith("logistic"):
                    excess = objective(split, found.weight, found.bias) / best - 1
                    row["excess"], row["below"] = excess.max().item(), excess.min().item()
                rows.append(row)
    return pandas.DataFrame(rows)


def format_seconds(seconds: float) -> str:
    """Seconds or milliseconds, rounded."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def show(rows: pandas.DataFrame) -> Table:
    """Seconds by shots, and how many times as long as ours a method takes."""
    records = rows.to_dict("records")
    shots = sorted({row["shots"] for row in records})
    columns = ("data", "protocol", "method", *(f"{count} shots" for count in shots), "accuracy, %", "objective excess")
    table = report.new_table("Linear probes", columns, left=["data", "protocol", "method"], no_wrap=True)
    first = [row for row in records if row["method"] in (OURS, HEAD)]
    base = {(row["data"], row["protocol"], row["shots"]): row["seconds"] for row in first}
    for case in dict.fromkeys((row["data"], row["protocol"], row["method"]) for row in records):
        own = [row for row in records if (row["data"], row["protocol"], row["method"]) == case]
        seconds = {row["shots"]: row["seconds"] for row in own}
        cells = []
        for count in shots:
            cell = format_seconds(seconds[count]) if count in seconds else ""
            if cell and case[2] not in (OURS, HEAD):
                cell += f" ({seconds[count] / base[case[0], case[1], count]:.1f} x)"
            cells.append(cell)
        key = "certified gap" if case[2] in (OURS, HEAD) else "excess"
        excess = [
            row[key] for row in own if row.get(key) is not None and row[key] == row[key]
        ]  # neither missing nor NaN
        accuracy = f"{100 * float(np.mean([row['accuracy'] for row in own])):.2f}"
        table.add_row(*map(str, case), *cells, accuracy, f"{max(excess):.0e}" if excess else "")
    return table


def join(old: pandas.DataFrame, new: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of both tables in the usual order; new protocols of a data set replace old ones."""
    replaced = set(zip(new["data"], new["protocol"], strict=True))
    kept = [row for row in old.to_dict("records") if (row["data"], row["protocol"]) not in replaced]
    order = [*SYNTHETIC, *REAL], list(our_methods())
    rows = [*kept, *new.to_dict("records")]
    rows.sort(key=lambda row: (order[0].index(row["data"]), row["shots"], order[1].index(row["protocol"])))
    return pandas.DataFrame(rows)


def draw_times(rows: pandas.DataFrame, path: Path) -> None:
    """Seconds by shots with a validation set, one panel per data set."""
    own = [row for row in rows.to_dict("records") if row["protocol"] == "logistic, validation set"]
    names, shots = list(dict.fromkeys(row["data"] for row in own)), sorted({row["shots"] for row in own})
    figure, panels = report.panels(len(names), width=2.2 + 2.4 * len(names), height=3.6, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        for method in dict.fromkeys(row["method"] for row in own):
            line = [row for row in own if (row["data"], row["method"]) == (name, method)]
            width = 2.5 if method == OURS else 1.2
            axes.plot(
                [row["shots"] for row in line],
                [row["seconds"] for row in line],
                marker="o",
                label=str(method),
                linewidth=width,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(shots, [str(count) for count in shots])
        axes.set_xlabel("shots")
        axes.set_title(str(name), fontsize=10, loc="left")
    panels[0].set_ylabel("seconds, 45 values of C, all tries")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command line."""
    parser = experiment.parser("probe", __doc__, "data_root", "device", "seed", "threads", "output")
    parser.add_argument("--ways", type=int, default=20, help="classes")
    parser.add_argument("--tries", type=int, default=5, help="random draws of the examples")
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS), help="examples per class")
    parser.add_argument("--data", nargs="+", default=[*SYNTHETIC, *REAL], help="names of data sets")
    parser.add_argument("--repeats", type=int, default=3, help="runs of tune, of which the median counts")
    parser.add_argument("--intelex", action="store_true", help="also time scikit-learn-intelex, if it is installed")
    parser.add_argument("--protocols", nargs="+", default=list(our_methods()), help="names of protocols")
    parser.add_argument("--append", action="store_true", help="keep the other rows of probe.json in the output folder")
    parser.add_argument("--ours", action="store_true", help="time only our own methods")
    parser.add_argument("--cache", type=Path | None, help="folder that keeps the features of images, for a second run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings, earlier = {"ways": options.ways, "tries": options.tries, "seed": options.seed}, None
    if options.append and (path := options.output / "probe.json").exists():
        earlier = json.loads(path.read_text())
        if earlier["settings"] != settings:
            parser.error(f"expected the settings of {path}, {earlier['settings']}, got {settings}")
    generator = torch.Generator().manual_seed(options.seed)
    with experiment.input_errors_end_the_script():
        data: dict[str, tuple[Tensor, Tensor]] = {}
        for name in options.data:
            if name in SYNTHETIC:
                data[name] = synthetic(SYNTHETIC[name], options.ways, generator)
            else:
                images = load(REAL[name], options.data_root, splits=["test"], progress=True)["test"]
                data[name] = image_models.features("images", REAL[name], images, options.cache), images.labels
    warnings.simplefilter("ignore")  # of fits that do not converge
    rows = compare(data, options, generator)
    if earlier is not None:
        rows = join(pandas.DataFrame(earlier["results"]), rows)
    origin = report.provenance()
    note = (
        f"Seconds for {len(C)} values of C from 1e-6 to 1e5 and {options.tries} tries with up to {options.ways} "
        "classes, or for one fit with C = 1 in each try; in parentheses, as a multiple of ours in the same run. "
        "Accuracies are means over tries and shots of the values that the protocol chose. The objective excess is the "
        "largest one over all tries, values and shots, relative to an optimum that is certified to 1e-12; for ours, it "
        "is the certified gap of the fits on the grid. LIBLINEAR regularizes the intercept, so its objective is "
        f"another one. {experiment.place(origin, options.device)}. Made by `python -m benchmarks.probe`."
    )
    record = {"settings": settings, **origin, "results": report.records(rows)}
    experiment.write(options.output, "probe", show(rows), note, record=record, rows=rows, width=250)
    draw_times(rows, options.output / "probe.png")


if __name__ == "__main__":
    main()
