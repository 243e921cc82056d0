"""Compare settings of the heads that a backbone is trained through, in short training runs of a Conv-4.

python -m benchmarks.head_settings --data-root DIR --steps 1000
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report
from benchmarks.data import ImageSet, load
from benchmarks.loop import Training
from benchmarks.options import Options
from benchmarks.processes import Processes
from benchmarks.train import episodes
from convexheads import Learnable, PrototypeHead, RidgeHead, SVMHead
from convexheads.evaluation import embed, evaluate
from convexheads.hyperparameters import as_tensor
from convexheads.kernels import Kernel
from convexheads.models import build_model
from convexheads.solvers import InteriorPointSolver

RECIPE = "table2/cifar-fs/conv4/svm"


class UnitLength(Kernel):
    """The dot product divided by the mean squared length of a task's support features."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.mT

    def condition_on(self, support: Tensor, mask: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        unit = support.square().sum(-1).mean(-1)
        return lambda x, y: x @ y.mT / unit[..., None, None]


class Apart(Training):
    """A training run that passes support and query images through the backbone one after the other.

    Each of the two has its own batch statistics, as in the code that Lee et al. 2019 published.
    """

    def features(self, drawn: Tensor) -> Tensor:
        by_class = self.episodes(drawn).unflatten(0, (len(self.episodes.labels), self.episodes.ways, -1))
        shots, found = self.episodes.shots, []
        for part in (by_class[:, :, :shots], by_class[:, :, shots:]):
            features = self.backbone(part.flatten(0, 2))
            found.append(features.unflatten(0, tuple(part.shape[:3])))
        return torch.cat(found, 2).flatten(1, 2)


@dataclass(frozen=True)
class Setting:
    """A head, and how a backbone is trained through it.

    Attributes:
        make: makes a new head.
        training: the class of the training loop.
        changes: options of the run that differ from the recipe.
    """

    make: Callable[[], ch.ClassificationHead]
    training: type[Training] = Training
    changes: dict[str, Any] = field(default_factory=dict)


def _svm(scale: float = 1.0, **settings: Any) -> SVMHead:
    return SVMHead(scale=Learnable(scale), **settings)


SETTINGS: dict[str, Setting] = {
    "ridge, lambda = 50": Setting(lambda: RidgeHead(50.0, scale=Learnable(1.0))),
    "prototypes / d": Setting(lambda: PrototypeHead(kernel=ch.kernels.Linear(normalize=True), scale=Learnable(1.0))),
    "SVM, C = 0.1": Setting(partial(_svm, C=0.1)),
    "SVM, C = 0.1, smoothing 30": Setting(partial(_svm, C=0.1, smoothing=30.0)),
    "SVM, C = 0.1, smoothing 100": Setting(partial(_svm, C=0.1, smoothing=100.0)),
    "SVM, C = 0.1, smoothing 300": Setting(partial(_svm, C=0.1, smoothing=300.0)),
    "SVM, C = 0.01": Setting(partial(_svm, C=0.01)),
    "SVM, C = 0.01, smoothing 30": Setting(partial(_svm, C=0.01, smoothing=30.0)),
    "SVM, C = 0.001": Setting(partial(_svm, C=0.001)),
    "SVM, C = 0.001, scale from 10": Setting(partial(_svm, 10.0, C=0.001)),
    "SVM, C = 0.1, scale from 10": Setting(partial(_svm, 10.0, C=0.1)),
    "SVM, squared hinge, C = 0.1": Setting(partial(_svm, C=0.1, squared_hinge=True)),
    "SVM, squared hinge, C = 0.01": Setting(partial(_svm, C=0.01, squared_hinge=True)),
    "SVM, squared hinge, C = 0.001": Setting(partial(_svm, C=0.001, squared_hinge=True)),
    "SVM, unit length, C = 30": Setting(lambda: _svm(C=30.0, kernel=UnitLength())),
    "SVM, unit length, C = 30, smoothing 0.1": Setting(lambda: _svm(C=30.0, smoothing=0.1, kernel=UnitLength())),
    "SVM, unit length, C = 30, smoothing 0.3": Setting(lambda: _svm(C=30.0, smoothing=0.3, kernel=UnitLength())),
    "SVM, unit length, C = 30, smoothing 1": Setting(lambda: _svm(C=30.0, smoothing=1.0, kernel=UnitLength())),
    "SVM, C = 0.1, 3 iterations": Setting(lambda: _svm(C=0.1, solver=InteriorPointSolver(max_iterations=3))),
    "SVM, C = 0.1, statistics apart": Setting(partial(_svm, C=0.1), Apart),
    "SVM, C = 0.1, smoothing 30, statistics apart": Setting(partial(_svm, C=0.1, smoothing=30.0), Apart),
    "ridge, statistics apart": Setting(lambda: RidgeHead(50.0, scale=Learnable(1.0)), Apart),
    "SVM, C = 0.1, learning rate 0.03": Setting(partial(_svm, C=0.1), changes={"learning_rate": 0.03}),
    "SVM, C = 0.1, learning rate 0.3": Setting(partial(_svm, C=0.1), changes={"learning_rate": 0.3}),
    "SVM, C = 0.1, smoothing 30, learning rate 0.3": Setting(
        partial(_svm, C=0.1, smoothing=30.0), changes={"learning_rate": 0.3}
    ),
    "logistic, lambda = 1": Setting(lambda: ch.LogisticHead(1.0, scale=Learnable(1.0))),
}


def measure(name: str, options: Options, data: dict[str, ImageSet], test_episodes: int) -> dict[str, Any]:
    """Train through a head; then evaluate that head, ridge regression and prototypes on validation classes."""
    setting = SETTINGS[name]
    options = Options(**(vars(options) | setting.changes))
    torch.manual_seed(options.seed)
    backbone, _ = build_model(options.record(), data["train"].images)
    training = setting.training(
        options, backbone, setting.make(), episodes(data["train"], options, Processes()), Processes()
    )
    begin = time.perf_counter()
    for step in tqdm(range(options.total_steps), desc=name, leave=False, mininterval=1):
        training.take(training.episodes.draw(step))
        if training.step % training.interval == 0:
            training.read()
    seconds = time.perf_counter() - begin
    accuracies = [row["accuracy"] for step, row in training.rows.items() if step >= options.total_steps // 2]
    features = embed(training.backbone, data["val"].images.to(training.device), progress=False)
    labels, result = data["val"].labels.to(training.device), {}
    heads = {"itself": training.head, "ridge": RidgeHead(50.0), "prototypes": PrototypeHead()}
    for head, own in heads.items():
        for shots in (1, 5):
            found = evaluate(own, features, labels, shots=shots, episodes=test_episodes, progress=False)
            result[f"{head}, {shots}-shot"] = 100 * found.accuracy
    return {
        "setting": name,
        "training accuracy": sum(accuracies) / max(1, len(accuracies)),
        "squared length": features.square().sum(1).mean().item(),
        "scale": as_tensor(training.head.scale, features).item(),
        "failures": len(training.failures),
        "seconds": seconds,
        **result,
    }


def main() -> None:
    """The command line."""
    parser = experiment.parser("head_settings", __doc__, "data_root", "threads", "output")
    parser.add_argument("--dataset", type=Literal["cifar-fs", "fc100"], default="cifar-fs", help="data to train on")
    parser.add_argument(
        "--settings", type=list[str], default=list(SETTINGS), help="settings to train with; default: all"
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps; the learning rate follows one cosine")
    parser.add_argument("--episodes", type=int, default=1000, help="episodes of the evaluation, on validation classes")
    parser.add_argument("--seeds", type=list[int], default=[0], help="seeds of the weights and the episodes")
    parser.add_argument("--minutes", type=float, default=1e6, help="time limit, after which no training run starts")
    chosen = parser.parse_args()
    experiment.refuse_unknown("settings", chosen.settings, SETTINGS)
    torch.set_num_threads(chosen.threads)
    end, path = time.monotonic() + 60 * chosen.minutes, chosen.output / "head_settings.json"
    base = Options.from_recipe(RECIPE, dataset=chosen.dataset, steps=chosen.steps, data_root=chosen.data_root)
    data = load(chosen.dataset, base.root, splits=["train", "val"], progress=True)
    known = {"steps": chosen.steps, "episodes": chosen.episodes, "dataset": chosen.dataset}
    rows: list[dict[str, Any]] = []
    if path.is_file():  # an earlier run is continued
        saved = json.loads(path.read_text())
        if saved["sizes"] != known:
            raise SystemExit(f"error: output: expected results with {known}, got {saved['sizes']} in {path}")
        rows = saved["results"]
    done = {(row["setting"], row["seed"]) for row in rows}
    for seed in chosen.seeds:
        options = Options(**(vars(base) | {"seed": seed, "on_failure": "skip", "compile": "none"}))
        for name in chosen.settings:
            if (name, seed) in done or time.monotonic() > end:
                continue
            rows.append(measure(name, options, data, chosen.episodes) | {"seed": seed})
            record = {"sizes": known, "results": rows, **report.provenance()}
            report.write_json(record, path)
    if not rows:
        raise SystemExit("error: minutes: expected enough for one training run, got no finished run")
    columns = [name for name in rows[0] if name not in ("setting", "seed", "failures", "seconds")]
    title = f"Conv-4 after {chosen.steps} steps on {chosen.dataset}, by training head"
    table = report.new_table(title, ["setting", "seed", *columns], left=["setting"])
    for row in rows:
        digits = {"training accuracy": 3, "squared length": 0}
        table.add_row(row["setting"], str(row["seed"]), *(f"{row[name]:.{digits.get(name, 1)}f}" for name in columns))
    machine = report.provenance()["machine"]
    note = (
        "Training accuracy: mean over the second half of the steps. Other accuracies: in %, over "
        f"{chosen.episodes:,} episodes of the validation classes, 15 queries per class, by the head itself, by ridge "
        "regression (lambda = 50) and by prototypes on the same features. 8 episodes of 5-way 5-shot per step, 6 "
        "queries per class, SGD with learning rate 0.1 and one cosine. "
        f"{machine['accelerator'] or machine['processor']}. Made by `python -m benchmarks.head_settings`."
    )
    Console(width=max(160, Console().width)).print(table, note)
    report.write_markdown(table, note, chosen.output / "head_settings.md")


if __name__ == "__main__":
    main()
