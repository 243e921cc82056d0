"""The training loop: asynchronous steps, metrics, validation and checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.data import Episodes, ImageSet
from benchmarks.options import Options
from benchmarks.processes import Processes
from convexheads import _storage
from convexheads.episodes import Episode
from convexheads.errors import ConvexHeadsError, InputError, SolverError
from convexheads.evaluation import embed, evaluate
from convexheads.heads import ClassificationHead, MulticlassSVM
from convexheads.kernels import Linear
from convexheads.solvers import NativeSolver
from convexheads.training import SCHEDULES, EpisodeLoss, episode_loss, format_step, non_finite_tasks, raise_failure

METRICS = ("loss", "accuracy", "gap", "certified", "iterations")
"""The metrics of a step, of which a head may have only some; see `convexheads.training.EpisodeLoss`."""
INTERVAL = 10
"""Steps between two reads of the metrics from the device."""
KIND = {"key": "training", "needed_by": "benchmarks.train"}
"""Identifies a file as a checkpoint, for `convexheads._storage`."""

_log = logging.getLogger(__name__)


class Training:
    """The state of a training run, which checkpoints save, and its steps.

    The metrics of a step stay on the device until `read`. A step with a non-finite loss or gradient changes no
    parameter, and no buffer unless `options.on_failure` is "raise". Unless such steps are skipped, later steps change
    no parameter either, so that `read` finds the parameters from before the failed step.

    Args:
        options: the options of the run.
        backbone: maps images to features; moved to the device, like the head.
        head: fitted to every episode; its learnable parameters are trained too.
        episodes: makes the batch of each step.
        processes: this process's rank, and how many processes share each step.

    Attributes:
        step: the number of steps taken.
        rows: the log, which has values by name, keyed by the number of the step after which they were logged.
        failures: the failed steps, each a dictionary with the keys "step", "tasks" (numbered across all processes, as
            `EpisodeLoader` distributes them) and "cause".
        best: the highest accuracy on validation classes so far.
        averages: with `options.average`, the moving averages of weights and statistics, keyed by the names that
            checkpoints use; they are validated and saved.
        seconds: the training time so far, including the time before the run was resumed.
        gram_on_host: whether only the Gram matrix of the features is copied from the GPU and the CPU does the rest of
            the work of the head. True for SVMs with a linear kernel, whose solver runs on the CPU: the GPU then
            waits for far fewer small operations.
        interval: steps between two rows of the log.
        stopped: whether a step failed and `options.on_failure` is "stop".
    """

    def __init__(
        self, options: Options, backbone: nn.Module, head: ClassificationHead, episodes: Episodes, processes: Processes
    ) -> None:
        self.options, self.episodes, self.processes = options, episodes, processes
        self.device = episodes.device
        self.backbone = backbone.train().to(self.device).to(memory_format=torch.channels_last)
        self.head = head.to(self.device).train()
        if processes.count > 1 and self.device.type == "cuda":
            self.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(self.backbone)
        torch.backends.cudnn.benchmark = True  # all steps have the same shapes
        self.network: Callable[[Tensor], Tensor] = nn.Sequential(episodes, self.backbone)
        if (mode := options.compilation(self.device)) != "none":
            self.network = torch.compile(self.network, mode=mode)
        linear = isinstance(head.kernel, Linear) and not head.kernel.normalize
        solved_on_host = isinstance(head, MulticlassSVM) and options.backend in ("auto", "numba")
        self.gram_on_host = self.device.type == "cuda" and solved_on_host and linear
        if isinstance(head, MulticlassSVM) and options.backend != "auto":
            # Reading a status would wait for the GPU. There, the metric "certified" says how many tasks were solved.
            on_failure = "return" if options.backend == "cuda" else "raise"
            head.solver = NativeSolver(backend=options.backend, on_failure=on_failure)
        if self.device.type == "cuda" and not self.gram_on_host:
            self.head.validate = False  # checks would wait for the device, and a step that fails is found anyway
        self.parameters = dict(_named(self.backbone, self.head, nn.Module.named_parameters))
        self.buffers = dict(_named(self.backbone, self.head, nn.Module.named_buffers))
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            lr=options.learning_rate,
            momentum=0.9,
            weight_decay=options.weight_decay,
            nesterov=True,
            fused=True,
        )
        for value in self.parameters.values():  # otherwise undefined if the first step is skipped
            self.optimizer.state[value]["momentum_buffer"] = torch.zeros_like(value)
        state = self._state() if options.average else {}
        self._latest = {name: value for name, value in state.items() if value.is_floating_point()}
        self.averages = {name: value.clone() for name, value in self._latest.items()}
        self.step, self.seconds, self.best = 0, 0.0, -1.0
        self.interval, self.stopped = min(INTERVAL, options.total_steps), False
        self.rows: dict[int, dict[str, float]] = {}
        self.failures: list[dict[str, Any]] = []
        self._trained: list[str] = []  # names of the parameters that have a gradient
        self._unread: list[tuple[int, Tensor]] = []  # steps with their metrics on the device
        self._pending: list[dict[str, float]] = []  # metrics that were read and are not in a row yet
        self._errors: dict[int, dict[str, Any]] = {}  # by step: why this process's head failed
        self._stuck = torch.zeros((), device=self.device)  # 1 after a failed step, unless such steps are skipped

    # Steps

    def take(self, drawn: Tensor) -> None:
        """Take a step on the batch that `episodes.draw` has drawn; only the head may wait for the device."""
        options = self.options
        before = [value.clone() for value in self.buffers.values()] if options.on_failure != "raise" else []
        seed = _seed(options.seed, self.step, self.processes.rank)  # for dropout: a resumed run draws the same masks
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace per absent accelerator
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * SCHEDULES[options.schedule](self.step / options.total_steps)
        features = self.features(drawn)
        result = self._loss(features)
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        with torch.no_grad():
            gradients = {name: value.grad for name, value in self.parameters.items() if value.grad is not None}
            self._trained = list(gradients)
            norms = torch._foreach_norm(list(gradients.values()))  # pyright: ignore[reportPrivateImportUsage]
            nonfinite = ~torch.stack(norms).isfinite()
            failed = (nonfinite.any() | ~result.loss.isfinite()).float()
            self.processes.average([*gradients.values(), failed])
            failed = failed.ceil()
            if options.on_failure != "skip":
                failed = self._stuck.copy_(torch.maximum(self._stuck, failed))
            self.optimizer.found_inf = failed  # pyright: ignore[reportAttributeAccessIssue] # see torch.amp.GradScaler
            self.optimizer.step()
            for value, old in zip(self.buffers.values(), before, strict=bool(before)):
                value.copy_(torch.where(failed > 0, old, value))
            if self.averages:
                self._average(failed)
            self._unread.append((self.step, self._numbers(result, features, nonfinite, failed)))
        self.step += 1

    def _average(self, failed: Tensor) -> None:
        """Move the averages toward the weights, unless the step failed."""
        decay = min(self.options.average, (1 + self.step) / (10 + self.step))  # averages only a few steps at first
        averages = list(self.averages.values())
        change = torch._foreach_sub(list(self._latest.values()), averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(change, (1 - decay) * (1 - failed))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, change)  # pyright: ignore[reportPrivateImportUsage]

    def features(self, drawn: Tensor) -> Tensor:
        """The features of a batch, `(tasks, n, d)`, in the precision of the backbone and at least in float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            features = self.network(drawn)
        features = features.unflatten(0, tuple(self.episodes.labels.shape))
        return features.float() if features.dtype.itemsize < 4 else features  # logits have this precision too

    def _loss(self, features: Tensor) -> EpisodeLoss:
        """The loss. If the head can't be fitted to these values, the loss is NaN and the error is kept."""
        options, episode = self.options, self.episodes.split(features)
        settings = {"ways": options.ways, "label_smoothing": options.label_smoothing}
        try:
            if self.gram_on_host:
                return _loss_on_host(self.head, features, self.episodes, **settings)
            return episode_loss(self.head, episode, **settings)
        except (InputError, SolverError) as error:
            tasks = non_finite_tasks(1, features)
            if isinstance(error, InputError) and not tasks:
                raise  # not caused by the values
            if isinstance(error, SolverError) and error.solution is not None:
                tasks = (~error.solution.converged).flatten().nonzero().flatten().tolist()
            self._errors[self.step] = {"tasks": tasks, "cause": str(error)}
            values = (features, *self.parameters.values())
            loss = torch.nan * torch.stack([value.sum().to(features.dtype) for value in values]).sum()
            return EpisodeLoss(loss, {"loss": loss.detach()}, episode.query)

    def _numbers(self, result: EpisodeLoss, features: Tensor, nonfinite: Tensor, failed: Tensor) -> Tensor:
        """One row for `_report`: metrics, whether the step failed, the non-finite gradient, and sums of each task."""
        metrics = result.metrics | {"loss": result.loss.detach()}
        unknown = torch.full((), torch.nan, device=self.device)
        gradient = torch.where(nonfinite.any(), nonfinite.float().argmax(), -1)
        numbers = [*(metrics.get(name, unknown) for name in METRICS), failed, gradient]
        sums = [value.detach().sum((1, 2)) for value in (features, result.logits)]  # finite if all values are
        return torch.cat([torch.stack([value.double() for value in numbers]), *sums])

    # Metrics

    def read(self) -> None:
        """Read the metrics of the steps since the last read from the device, which waits for these steps.

        Every `interval` steps, the means of the metrics become a row of the log.

        Raises:
            InputError: a step failed, and `options.on_failure` is "raise".
        """
        if not self._unread:
            return
        steps, values = zip(*self._unread, strict=True)
        local = [self._report(*each) for each in zip(steps, torch.stack(values).tolist(), strict=True)]
        self._unread, self._errors = [], {}
        for step, *reports in zip(steps, *self.processes.gather(local), strict=True):
            if any(each["failed"] for each in reports):
                self._fail(step, reports)
                if self.stopped:
                    self.step = step + 1  # a resumed run continues after it: later steps changed nothing
                    return
            else:
                self._pending.append({name: _combined(name, reports) for name in METRICS if name in reports[0]})
            if (step + 1) % self.interval == 0:
                self._log(step)

    def _report(self, step: int, values: list[float]) -> dict[str, Any]:
        """The metrics of a step in this process, whether the step failed and, if this process knows it, the cause."""
        count = len(METRICS)
        metrics = {name: value for name, value in zip(METRICS, values, strict=False) if value == value}
        failed, gradient, *sums = values[count:]
        report: dict[str, Any] = metrics | {"failed": failed > 0, "gradient": int(gradient)}
        if failed and (step in self._errors or not np.isfinite(values[0])):
            half = len(sums) // 2
            features, logits = (np.flatnonzero(~np.isfinite(part)).tolist() for part in (sums[:half], sums[half:]))
            error = self._errors.get(step, {"tasks": features or logits, "cause": f"a loss of {values[0]}"})
            tasks = error["tasks"] or range(half)
            report["tasks"] = [self.processes.rank + task * self.processes.count for task in tasks]
            report["cause"] = error["cause"]
        return report

    def _fail(self, step: int, reports: list[dict[str, Any]]) -> None:
        failures = [
            {"step": step, "tasks": each["tasks"], "cause": each["cause"]} for each in reports if "cause" in each
        ]
        if not failures:
            name = next(self._trained[each["gradient"]] for each in reports if each["gradient"] >= 0)
            failures = [{"step": step, "tasks": [], "cause": f"the gradient of {name}"}]
        if self.options.on_failure == "raise":
            raise_failure(failures[0])
        self.stopped = self.options.on_failure == "stop"
        self.failures += failures
        for failure in failures if self.processes.first else ():
            action = "training ends at" if self.stopped else "skipped"
            _log.warning("%s %s (%s)", action, format_step(failure), failure["cause"])

    def _log(self, step: int) -> None:
        """Add a row to the log: the means of the metrics that were read, and the largest duality gap."""
        names = [name for name in METRICS if any(name in each for each in self._pending)]
        row = {name: _combined(name, self._pending) for name in names}
        if self.options.on_failure == "skip":
            row["skipped"] = float(len({failure["step"] for failure in self.failures}))
        if row:
            self.rows[step] = row
        self._pending = []

    # Validation and checkpoints

    def validate(self, data: ImageSet) -> bool:
        """Log the accuracy on validation classes, from 0 to 1, and return whether it is the highest so far."""
        options, processes = self.options, self.processes
        processes.share([*self.buffers.values(), *self.averages.values()])
        with self._averaged():
            result = evaluate(
                self.head,
                embed(self.backbone, data.images.to(self.device), progress=False),
                data.labels.to(self.device),
                ways=options.ways,
                shots=options.validation_shots,
                queries=options.test_queries,
                episodes=options.validation_episodes,
                seed=options.seed,
                rank=processes.rank,
                world_size=processes.count,
                progress=False,
            )
        accuracy = float(np.mean(processes.gather(result.accuracy)))
        self.rows.setdefault(self.step - 1, {})["val_accuracy"] = accuracy
        improved, self.best = accuracy > self.best, max(accuracy, self.best)
        return improved

    def _state(self) -> dict[str, Tensor]:
        """The state of backbone and head, keyed by the names that checkpoints use."""
        return dict(_named(self.backbone, self.head, nn.Module.state_dict))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within this context, backbone and head hold the averages, if there are any."""
        before = {name: self._state()[name].clone() for name in self.averages}
        self.load_weights(self._state() | self.averages)
        try:
            yield
        finally:
            self.load_weights(self._state() | before)

    def weights(self) -> dict[str, Tensor]:
        """The state of backbone and head on the CPU, with the averages if there are any."""
        return {name: value.cpu() for name, value in (self._state() | self.averages).items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load the state that `weights` returned."""
        for prefix, module in (("backbone.", self.backbone), ("head.", self.head)):
            state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            module.load_state_dict(state)

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically: if that fails, the previous one remains."""
        momentum = {
            f"momentum.{name}": self.optimizer.state[value]["momentum_buffer"].cpu()
            for name, value in self.parameters.items()
        }
        state = {name: value.cpu() for name, value in self._state().items()}
        averages = {f"average.{name}": value.cpu() for name, value in self.averages.items()}
        names = ("step", "seconds", "best", "rows", "failures", "_pending")
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"options": self.options.record()} | {name: getattr(self, name) for name in names}
        _storage.save(path, state | momentum | averages, record, **KIND)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            OSError, ValueError, LookupError: there is no checkpoint, it is damaged, or it is another kind of file.
        """
        tensors, record = _storage.load(path, **KIND)
        self.load_weights(tensors)
        for name, value in self.parameters.items():
            self.optimizer.state[value]["momentum_buffer"].copy_(tensors[f"momentum.{name}"])
        for name, value in self.averages.items():
            value.copy_(tensors[f"average.{name}"])
        del record["options"]
        record["rows"] = {int(step): row for step, row in record["rows"].items()}
        vars(self).update(record)


def train(options: Options, data: dict[str, ImageSet], training: Training, *, deadline: float = float("inf")) -> None:
    """Take all remaining steps; write the log and checkpoints to the output folder.

    If there are validation classes, the run ends with the weights that were best on them.

    Args:
        options: the options of the run.
        data: "val", if the data set has validation classes, is evaluated every `options.validate_every` steps.
        training: a new training run, or one that was loaded from a checkpoint.
        deadline: when to stop early and write a checkpoint, by `time.monotonic()`. Default: never.

    Raises:
        ConvexHeadsError: a step failed, and `options.on_failure` is not "skip".
    """
    total, first, best = options.total_steps, training.processes.first, options.checkpoint.with_name("best.safetensors")
    begin, before = time.monotonic(), training.seconds
    with (
        _board(options, training) as log,
        tqdm(
            total=total, initial=training.step, desc="meta-training", unit="step", disable=not first, mininterval=0.5
        ) as bar,
    ):
        drawn = training.episodes.draw(training.step) if training.step < total else None
        while drawn is not None and not training.stopped:
            training.take(drawn)
            done, late = training.step, time.monotonic() > deadline
            # Draw the next batch while the device is still busy with the step.
            drawn = training.episodes.draw(done) if done < total and not late else None
            validates = "val" in data and done % options.validate_every == 0
            saves = done % options.checkpoint_every == 0 or drawn is None
            if validates or saves or done % training.interval == 0:
                training.read()
                if validates and not training.stopped and training.validate(data["val"]) and first:
                    best.parent.mkdir(parents=True, exist_ok=True)
                    _storage.save(best, training.weights(), {"step": done}, **KIND)
                training.seconds = before + time.monotonic() - begin
                log(bar)
                if (saves or training.stopped) and first:
                    training.save(options.checkpoint)
                    write_log(training.rows, options.folder / "metrics.csv")
    if training.stopped:
        training.processes.gather(None)  # the other processes end after the first one has written the checkpoint
        failure = training.failures[-1]
        why = f"step {failure['step']} failed ({failure['cause']}), training has stopped"
        raise ConvexHeadsError(f"{why}; {options.checkpoint} is from before the step; --resume continues after it")
    if first and training.step == total:
        training.load_weights(_storage.load(best, **KIND)[0] if best.is_file() else training.weights())


class _Gram(nn.Module):
    """A kernel that returns given matrices: one of the support with itself, and one of the queries with the support."""

    support: Tensor
    query: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.support if x is y else self.query


def _loss_on_host(head: ClassificationHead, features: Tensor, episodes: Episodes, **settings: Any) -> EpisodeLoss:
    """The `episode_loss` of features `(tasks, n, d)`, computed on the CPU from their Gram matrices."""
    device, episode = features.device, episodes.split(features.double())
    both = torch.cat([episode.support, episode.query], 1) @ episode.support.mT
    size, gram, kernel = episode.support.shape[1], _Gram(), head.kernel
    gram.support, gram.query = both.cpu().tensor_split([size], 1)
    support, query = (torch.zeros(*part.shape[:2], 1, dtype=part.dtype) for part in (gram.support, gram.query))
    try:
        head.kernel = gram
        labels = episode.support_labels.cpu(), episode.query_labels.cpu()
        result = episode_loss(head, Episode(support, labels[0], query, labels[1]), **settings)
    finally:
        head.kernel = kernel
    metrics = {name: value.to(device) for name, value in result.metrics.items()}
    return EpisodeLoss(result.loss.to(device), metrics, result.logits.to(device))


def write_log(rows: dict[int, dict[str, float]], path: Path) -> None:
    """Write the rows of the log as CSV, sorted by step."""
    table = pandas.DataFrame.from_dict(rows, orient="index").sort_index().sort_index(axis="columns")
    _storage.atomic_write(path, table.to_csv(index_label="step").encode())


@contextmanager
def _board(options: Options, training: Training) -> Iterator[Callable[[tqdm], None]]:
    """A function that shows the newest rows on the progress bar and in TensorBoard, if that is installed."""
    writer, seen = None, max(training.rows, default=-1)
    if training.processes.first and find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        writer = SummaryWriter(str(options.folder / "tensorboard"), purge_step=training.step)

    def log(bar: tqdm) -> None:
        nonlocal seen
        new = {step: row for step, row in training.rows.items() if step > seen}
        for step, row in new.items():
            for name, value in row.items():
                if writer is not None:
                    writer.add_scalar(name, value, step)
            shown = {name: f"{row[name]:.3f}" for name in ("loss", "accuracy", "val_accuracy") if name in row}
            bar.set_postfix(shown, refresh=False)
        seen = max(new, default=seen)
        bar.update(training.step - bar.n)

    try:
        yield log
    finally:
        if writer:
            writer.close()


def _named(backbone: nn.Module, head: nn.Module, names: Callable[[nn.Module], Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters, buffers or states of both modules, named as in checkpoints."""
    for prefix, module in (("backbone", backbone), ("head", head)):
        values = names(module)
        for name, value in values.items() if isinstance(values, dict) else values:
            yield f"{prefix}.{name}", value


def _combined(name: str, reports: list[dict[str, Any]]) -> float:
    values = [each[name] for each in reports if name in each]
    return float(max(values) if name == "gap" else np.mean(values))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
