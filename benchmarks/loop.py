"""The training loop: steps that never wait for the device, logs, validations and checkpoints."""

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
from convexheads import storage
from convexheads.episodes import Episode, embed, evaluate
from convexheads.errors import ConvexHeadsError, InputError, SolverError
from convexheads.heads import ClassificationHead, MulticlassSVM
from convexheads.kernels import Linear
from convexheads.training import SCHEDULES, EpisodeLoss, episode_loss, refuse, tasks_with_bad_values, where

METRICS = ("loss", "accuracy", "gap", "certified", "iterations")
"""What a step may tell; see `convexheads.training.EpisodeLoss`."""
INTERVAL = 10
"""Steps between two readings of what the steps tell."""
KIND = {"key": "training", "needed_by": "benchmarks.train"}
"""What kind of file a checkpoint is, for `convexheads.storage`."""

_log = logging.getLogger(__name__)


class Training:
    """A backbone and a head in training: what a checkpoint holds, and how a step is taken.

    What a step tells stays on the device until `read`. A step whose loss or gradient is not finite changes nothing,
    and from then on, unless such steps are skipped, no other step does: `read` finds the state before that step.

    Args:
        options: of the run.
        backbone: from images to features; it and the head are moved to the device.
        head: fitted to every episode; its learnable parameters train along.
        episodes: the batches.
        processes: this process among those that share each step.

    Attributes:
        step: how many steps were taken.
        rows: what was logged, by the step that it was logged after.
        failures: the steps that failed, each a dictionary of "step", "tasks" (of all processes, numbered as
            `EpisodeLoader` shares them out) and "cause".
        best: the highest accuracy on validation classes so far.
        averages: with `options.average`, the moving averages of the weights and statistics, by the names that
            checkpoints have for them. They are what is validated and kept.
        seconds: what all of this took so far, over all resumptions.
        gram_on_host: whether only the Gram matrix of the features leaves the GPU, and the CPU does the rest of what the
            head has to do. So it is for SVMs, whose solver works there: the GPU waits for far fewer small operations.
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
        torch.backends.cudnn.benchmark = True  # every step has the same sizes: cuDNN may look for its fastest way
        self.network: Callable[[Tensor], Tensor] = nn.Sequential(episodes, self.backbone)
        if (mode := options.compilation(self.device)) != "none":
            self.network = torch.compile(self.network, mode=mode)
        linear = isinstance(head.kernel, Linear) and not head.kernel.normalize
        self.gram_on_host = self.device.type == "cuda" and isinstance(head, MulticlassSVM) and linear
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
        for value in self.parameters.values():  # else a first step that is skipped would leave it undefined
            self.optimizer.state[value]["momentum_buffer"] = torch.zeros_like(value)
        state = self._state() if options.average else {}
        self._latest = {name: value for name, value in state.items() if value.is_floating_point()}
        self.averages = {name: value.clone() for name, value in self._latest.items()}
        self.step, self.seconds, self.best = 0, 0.0, -1.0
        self.interval, self.stopped = min(INTERVAL, options.total_steps), False
        self.rows: dict[int, dict[str, float]] = {}
        self.failures: list[dict[str, Any]] = []
        self._trained: list[str] = []  # the parameters that have a gradient
        self._unread: list[tuple[int, Tensor]] = []
        self._pending: list[dict[str, float]] = []  # of steps that were read and are not in a row yet
        self._errors: dict[int, dict[str, Any]] = {}  # what this process's head said of the step of that number
        self._stuck = torch.zeros((), device=self.device)  # 1 from a failed step on, unless such steps are skipped

    # A step

    def take(self, drawn: Tensor) -> None:
        """Take a step on a batch of episodes, as `episodes.draw` has drawn it, without waiting for the device."""
        options = self.options
        before = [value.clone() for value in self.buffers.values()] if options.on_failure != "raise" else []
        torch.manual_seed(
            _seed(options.seed, self.step, self.processes.rank)
        )  # dropout, so that resuming needs no state
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * SCHEDULES[options.schedule](self.step / options.total_steps)
        features = self.features(drawn)
        found = self._loss(features)
        self.optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        with torch.no_grad():
            found_for = {name: value.grad for name, value in self.parameters.items() if value.grad is not None}
            self._trained, gradients = list(found_for), list(found_for.values())
            norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
            bad = ~torch.stack(norms).isfinite()
            failed = (bad.any() | ~found.loss.isfinite()).float()
            self.processes.average([*gradients, failed])
            failed = failed.ceil()
            if options.on_failure != "skip":
                failed = self._stuck.copy_(torch.maximum(self._stuck, failed))
            self.optimizer.found_inf = failed  # pyright: ignore[reportAttributeAccessIssue] # see torch.amp.GradScaler
            self.optimizer.step()
            for value, old in zip(self.buffers.values(), before, strict=bool(before)):
                value.copy_(torch.where(failed > 0, old, value))
            if self.averages:
                self._average(failed)
            self._unread.append((self.step, self._told(found, features, bad, failed)))
        self.step += 1

    def _average(self, failed: Tensor) -> None:
        """Move the averages toward the weights, unless the step failed."""
        decay = min(self.options.average, (1 + self.step) / (10 + self.step))  # at first, of few steps
        averages = list(self.averages.values())
        change = torch._foreach_sub(list(self._latest.values()), averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(change, (1 - decay) * (1 - failed))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, change)  # pyright: ignore[reportPrivateImportUsage]

    def features(self, drawn: Tensor) -> Tensor:
        """The features of a batch, `(tasks, n, d)`, in float32 or as precise as the backbone is."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            features = self.network(drawn)
        features = features.unflatten(0, tuple(self.episodes.labels.shape))
        return features.float() if features.dtype.itemsize < 4 else features  # logits are as precise as features

    def _loss(self, features: Tensor) -> EpisodeLoss:
        """The loss; NaN, and what the head said is kept, where the head can't be fitted to these values."""
        options, episode = self.options, self.episodes.split(features)
        settings = {"ways": options.ways, "label_smoothing": options.label_smoothing}
        try:
            if self.gram_on_host:
                return _loss_on_host(self.head, features, self.episodes, **settings)
            return episode_loss(self.head, episode, **settings)
        except (InputError, SolverError) as error:
            tasks = tasks_with_bad_values(features, 1)
            if isinstance(error, InputError) and not tasks:
                raise  # the values are not to blame
            if isinstance(error, SolverError) and error.solution is not None:
                tasks = (~error.solution.converged).flatten().nonzero().flatten().tolist()
            self._errors[self.step] = {"tasks": tasks, "cause": str(error)}
            values = (features, *self.parameters.values())
            loss = torch.nan * torch.stack([value.sum().to(features.dtype) for value in values]).sum()
            return EpisodeLoss(loss, {"loss": loss.detach()}, episode.query)

    def _told(self, found: EpisodeLoss, features: Tensor, bad: Tensor, failed: Tensor) -> Tensor:
        """What `_report` reads: numbers, and for each task the sums of its features and of its logits."""
        told = found.metrics | {"loss": found.loss.detach()}
        unknown = torch.full((), torch.nan, device=self.device)
        gradient = torch.where(bad.any(), bad.float().argmax(), -1)
        numbers = [*(told.get(name, unknown) for name in METRICS), failed, gradient]
        sums = [value.detach().sum((1, 2)) for value in (features, found.logits)]  # finite if all values are
        return torch.cat([torch.stack([value.double() for value in numbers]), *sums])

    # Reading

    def read(self) -> None:
        """Read from the device what the steps since the last reading told; this waits for them.

        After every so many steps, their means become a row of the log.

        Raises:
            InputError: a step failed, and `options.on_failure` is "raise".
        """
        if not self._unread:
            return
        steps, values = zip(*self._unread, strict=True)
        own = [self._report(*each) for each in zip(steps, torch.stack(values).tolist(), strict=True)]
        self._unread, self._errors = [], {}
        for step, *reports in zip(steps, *self.processes.gather(own), strict=True):
            if any(each["failed"] for each in reports):
                self._fail(step, reports)
                if self.stopped:
                    self.step = step + 1  # for resuming after it: the steps that follow changed nothing
                    return
            else:
                self._pending.append({name: _combined(name, reports) for name in METRICS if name in reports[0]})
            if (step + 1) % self.interval == 0:
                self._log(step)

    def _report(self, step: int, values: list[float]) -> dict[str, Any]:
        """What this process has to say of a step: its metrics, whether the step failed and, where it knows it, why."""
        count = len(METRICS)
        metrics = {name: value for name, value in zip(METRICS, values, strict=False) if value == value}
        failed, gradient, *sums = values[count:]
        report: dict[str, Any] = metrics | {"failed": failed > 0, "gradient": int(gradient)}
        if failed and (step in self._errors or not np.isfinite(values[0])):
            half = len(sums) // 2
            bad = [np.flatnonzero(~np.isfinite(part)).tolist() for part in (sums[:half], sums[half:])]
            error = self._errors.get(step, {"tasks": bad[0] or bad[1], "cause": f"a loss of {values[0]}"})
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
            refuse(failures[0])
        self.stopped = self.options.on_failure == "stop"
        self.failures += failures
        for failure in failures if self.processes.first else ():
            does = "the training stops before" if self.stopped else "skipped"
            _log.warning("%s %s (%s)", does, where(failure), failure["cause"])

    def _log(self, step: int) -> None:
        """Make the means of what was read a row of the log; of the duality gap, the largest."""
        names = [name for name in METRICS if any(name in each for each in self._pending)]
        row = {name: _combined(name, self._pending) for name in names}
        if self.options.on_failure == "skip":
            row["skipped"] = float(len({failure["step"] for failure in self.failures}))
        if row:
            self.rows[step] = row
        self._pending = []

    # Validation and checkpoints

    def validate(self, data: ImageSet) -> bool:
        """Log the accuracy on validation classes, 0 to 1, and say whether it is the highest so far."""
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
                part=(processes.rank, processes.count),
                progress=False,
            )
        accuracy = float(np.mean(processes.gather(result.mean)))
        self.rows.setdefault(self.step - 1, {})["val_accuracy"] = accuracy
        improved, self.best = accuracy > self.best, max(accuracy, self.best)
        return improved

    def _state(self) -> dict[str, Tensor]:
        """The state of backbone and head, by the names that checkpoints have for it."""
        return dict(_named(self.backbone, self.head, nn.Module.state_dict))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """In here, backbone and head have their averages, if there are any."""
        before = {name: self._state()[name].clone() for name in self.averages}
        self.load_weights(self._state() | self.averages)
        try:
            yield
        finally:
            self.load_weights(self._state() | before)

    def weights(self) -> dict[str, Tensor]:
        """The state of backbone and head that counts, averages if there are any, on the CPU."""
        return {name: value.cpu() for name, value in (self._state() | self.averages).items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over what `weights` returned."""
        for prefix, module in (("backbone.", self.backbone), ("head.", self.head)):
            own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            module.load_state_dict(own)

    def save(self, path: Path) -> None:
        """Write a checkpoint; it is complete, or the one that was there remains."""
        momentum = {
            f"momentum.{name}": self.optimizer.state[value]["momentum_buffer"].cpu()
            for name, value in self.parameters.items()
        }
        state = {name: value.cpu() for name, value in self._state().items()}
        averages = {f"average.{name}": value.cpu() for name, value in self.averages.items()}
        names = ("step", "seconds", "best", "rows", "failures", "_pending")
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"options": self.options.record()} | {name: getattr(self, name) for name in names}
        storage.save(path, state | momentum | averages, record, **KIND)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            OSError, ValueError, LookupError: there is no checkpoint, it is damaged, or it is something else.
        """
        tensors, record = storage.load(path, **KIND)
        self.load_weights(tensors)
        for name, value in self.parameters.items():
            self.optimizer.state[value]["momentum_buffer"].copy_(tensors[f"momentum.{name}"])
        for name, value in self.averages.items():
            value.copy_(tensors[f"average.{name}"])
        del record["options"]
        record["rows"] = {int(step): row for step, row in record["rows"].items()}
        vars(self).update(record)


def train(options: Options, data: dict[str, ImageSet], training: Training, *, deadline: float = float("inf")) -> None:
    """Take all the steps that are left, with logs, validations and checkpoints in the output folder.

    Where there are validation classes, the training ends with the weights that were best on them.

    Args:
        options: of the run.
        data: "val", if the data set has validation classes, is looked at every so many steps.
        training: at its start, or where a checkpoint left it.
        deadline: by `time.monotonic()`, when to stop in between, after writing a checkpoint.

    Raises:
        ConvexHeadsError: a step failed and `options.on_failure` is not "skip".
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
            # Drawn while the device is still busy with the step.
            drawn = training.episodes.draw(done) if done < total and not late else None
            validates = "val" in data and done % options.validate_every == 0
            saves = done % options.checkpoint_every == 0 or drawn is None
            if validates or saves or done % training.interval == 0:
                training.read()
                if validates and not training.stopped and training.validate(data["val"]) and first:
                    best.parent.mkdir(parents=True, exist_ok=True)
                    storage.save(best, training.weights(), {"step": done}, **KIND)
                training.seconds = before + time.monotonic() - begin
                log(bar)
                if (saves or training.stopped) and first:
                    training.save(options.checkpoint)
                    write_log(training.rows, options.folder / "metrics.csv")
    if training.stopped:
        training.processes.gather(None)  # the others end after the first one has written the checkpoint
        failure = training.failures[-1]
        why = f"step {failure['step']} failed ({failure['cause']}), training has stopped"
        raise ConvexHeadsError(f"{why}; {options.checkpoint} is from before the step, --resume goes on after it")
    if first and training.step == total:
        training.load_weights(storage.load(best, **KIND)[0] if best.is_file() else training.weights())


class _Gram(nn.Module):
    """A kernel whose matrices are known: of the support with itself, and of queries with the support."""

    support: Tensor
    query: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.support if x is y else self.query


def _loss_on_host(head: ClassificationHead, features: Tensor, episodes: Episodes, **settings: Any) -> EpisodeLoss:
    """As `episode_loss` on the features, `(tasks, n, d)`, computed on the CPU from their Gram matrices."""
    device, episode = features.device, episodes.split(features.double())
    both = torch.cat([episode.support, episode.query], 1) @ episode.support.mT
    size, gram, kernel = episode.support.shape[1], _Gram(), head.kernel
    gram.support, gram.query = both.cpu().tensor_split([size], 1)
    support, query = (torch.zeros(*part.shape[:2], 1, dtype=part.dtype) for part in (gram.support, gram.query))
    try:
        head.kernel = gram
        labels = episode.support_labels.cpu(), episode.query_labels.cpu()
        found = episode_loss(head, Episode(support, labels[0], query, labels[1]), **settings)
    finally:
        head.kernel = kernel
    metrics = {name: value.to(device) for name, value in found.metrics.items()}
    return EpisodeLoss(found.loss.to(device), metrics, found.logits.to(device))


def write_log(rows: dict[int, dict[str, float]], path: Path) -> None:
    """Write a line for each step that has values, with the steps in order."""
    table = pandas.DataFrame.from_dict(rows, orient="index").sort_index().sort_index(axis="columns")
    storage.write(path, table.to_csv(index_label="step").encode())


@contextmanager
def _board(options: Options, training: Training) -> Iterator[Callable[[tqdm], None]]:
    """A function that shows the newest rows on the bar and in TensorBoard, if that is installed."""
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
    """The parameters, buffers or states of both, under the names that checkpoints have for them."""
    for prefix, module in (("backbone", backbone), ("head", head)):
        found = names(module)
        for name, value in found.items() if isinstance(found, dict) else found:
            yield f"{prefix}.{name}", value


def _combined(name: str, reports: list[dict[str, Any]]) -> float:
    values = [each[name] for each in reports if name in each]
    return float(max(values) if name == "gap" else np.mean(values))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
