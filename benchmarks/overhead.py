"""Measure the cost of heads in a call, a training step and an evaluation, and the cost of training loops per step.

python -m benchmarks.overhead
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report
from benchmarks.data import ImageSet
from benchmarks.loop import Training
from benchmarks.options import Options
from benchmarks.processes import Processes
from benchmarks.train import episodes as make_episodes
from convexheads._sampling import sample_episodes
from convexheads.models import BACKBONES, Backbone, build_backbone, build_head
from convexheads.training import episode_loss

HEADS = ("prototypes", "ridge", "svm")
CALLED: dict[str, Callable[..., ch.ClassificationHead]]
CALLED = {"prototypes": ch.PrototypeHead, "ridge": ch.RidgeHead, "SVM": ch.SVMHead, "logistic": ch.LogisticHead}
VARIANTS = ("as it is", "with validate=False", "compiled", "by hand", "captured")
"""How heads are called: by default; without checks of values; so in a graph of `torch.compile`; their formula as a
researcher would write it for one experiment; and without checks in a replayed CUDA graph, which takes little more than
the time of the GPU."""
CAPTURED = ("prototypes", "ridge", "SVM on the GPU")
"""The heads that never wait for the GPU, so that a CUDA graph can capture them."""
CALL_FEATURES = 64
SCIKIT_LEARN = "LogisticRegression of scikit-learn in a loop"
EVALUATED = ("threads", "episodes", "evaluations", "queries", "features")
PARTS = ("training", "evaluation", "calls", "loops")
"""What can be measured."""
WAYS, SHOTS = 5, 5
BLOCK = 20
"""Consecutive calls or steps of a loop that are timed, a multiple of the steps after which `Training` reads metrics."""
ALONE, NEW_BATCH, PLAIN, LIGHTNING = "the step alone", "with a new batch", "the plain loop", "Lightning"


def step(
    backbone: nn.Module, head: ch.ClassificationHead, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    """Seconds of one training step: forward, backward and update, support and query in one batch."""
    begin = report.now(images)
    features = backbone(images.flatten(0, 1)).unflatten(0, labels.shape)
    support, support_labels, query, query_labels = ch.split_task(features, labels, shots=SHOTS)
    logits = head(support, support_labels, query, ways=WAYS)
    loss = functional.cross_entropy(logits.flatten(0, 1), query_labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return report.now(images) - begin


def training(*, backbone: str, device: str, episodes: int, queries: int, repeats: int) -> dict[str, float]:
    """Median seconds of a training step through each head, and the ratio of the step with the SVM to the others.

    The heads alternate. The ratio is the median, over repeats, of the ratio of two steps in the same round.
    """
    torch.manual_seed(0)
    images = torch.randint(0, 256, (episodes, WAYS * (SHOTS + queries), 3, 32, 32), dtype=torch.uint8)
    labels = (torch.arange(images.shape[1]) % WAYS).expand(episodes, -1).to(device)
    parts: dict[str, tuple[nn.Module, ch.ClassificationHead, torch.optim.Optimizer]] = {}
    for name in HEADS:
        network, head = build_backbone(backbone, images.flatten(0, 1)).to(device), build_head(name).to(device)
        parameters = [*network.parameters(), *head.parameters()]
        parts[name] = network, head, torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)
    images = images.to(device)
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    for repeat in tqdm(range(-2, repeats), desc="training steps", leave=False):
        for name, each in parts.items():
            taken = step(*each, images, labels)
            if repeat >= 0:
                seconds[name].append(taken)
    found = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name in ("prototypes", "ridge"):
        ratios = [svm / other for svm, other in zip(seconds["svm"], seconds[name], strict=True)]
        found[f"svm / {name}"] = statistics.median(ratios)
    return found


def evaluation(
    *, device: str, threads: int, episodes: int, evaluations: int, queries: int, features: int
) -> dict[str, list[float]]:
    """Seconds over the same episodes of random clustered features, on the CPU with one and with all threads.

    They are those of `convexheads.evaluate` for each head and, on the CPU, of the usual loop over episodes with
    scikit-learn's logistic regression, as in Tian et al. 2020, with the threads that it uses by default. A head that
    raises an error is left out.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(600)
    centers = torch.randn(20, features, generator=generator)
    cached = (centers[labels] + 2 * torch.randn(len(labels), features, generator=generator)).to(device)
    labels = labels.to(device)
    settings: dict[str, Any] = {"ways": WAYS, "shots": SHOTS, "queries": queries}
    heads = {name: build_head(name) for name in HEADS} | {"logistic": ch.LogisticHead()}
    if device == "cuda":
        heads |= {name: make() for name, make in called_heads(device).items() if name not in CALLED}
    counts = thread_counts(device, threads)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in counts] for name in heads}
    for _ in range(evaluations):
        for name in list(seconds):
            try:
                for count, taken in zip(counts, seconds[name], strict=True):
                    torch.set_num_threads(count)
                    ch.evaluate(heads[name], cached, labels, episodes=100, progress=False, **settings)  # warms up
                    begin = time.perf_counter()
                    ch.evaluate(heads[name], cached, labels, episodes=episodes, **settings)
                    taken.append(time.perf_counter() - begin)
            except Exception as error:
                report.leave_out(f"evaluation, {name},", error)
                del seconds[name]
    torch.set_num_threads(threads)
    found = {name: list(map(statistics.median, taken)) for name, taken in seconds.items()}
    if device == "cpu":
        drawn = list(sample_episodes(labels, WAYS, SHOTS + queries, episodes, seed=0))
        arrays, known = cached.numpy(), np.arange(WAYS)
        begin = time.perf_counter()
        for (chosen,) in tqdm(drawn, SCIKIT_LEARN, leave=False):
            support, query = (part.flatten().numpy() for part in (chosen[:, :SHOTS], chosen[:, SHOTS:]))
            model = LogisticRegression(max_iter=1000).fit(arrays[support], known.repeat(SHOTS))
            _ = (model.predict(arrays[query]) == known.repeat(queries)).mean()
        found[SCIKIT_LEARN] = [time.perf_counter() - begin]
    return found


def prototypes_by_hand(support: Tensor, labels: Tensor, query: Tensor, *, ways: int) -> Tensor:
    """Prototypes, without checks and options, in the precision of the heads."""
    x, q, targets = support.double(), query.double(), functional.one_hot(labels, ways).double()
    prototypes = targets.mT @ x / targets.sum(-2).unsqueeze(-1)
    return -(q.unsqueeze(-2) - prototypes.unsqueeze(-3)).square().sum(-1).to(query.dtype)


def ridge_by_hand(support: Tensor, labels: Tensor, query: Tensor, *, ways: int) -> Tensor:
    """Ridge regression with the head's default settings, without checks, options and certificate, in its precision."""
    x, q, targets = support.double(), query.double(), functional.one_hot(labels, ways).double()
    system = x @ x.mT + 50 * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    coef = torch.cholesky_solve(targets, torch.linalg.cholesky(system))
    return (q @ (x.mT @ coef)).to(query.dtype)


BY_HAND = {"prototypes": prototypes_by_hand, "ridge": ridge_by_hand}


def thread_counts(device: str, threads: int) -> list[int]:
    """The numbers of threads with which evaluations are timed."""
    return [1, threads] if device == "cpu" and threads > 1 else [threads]


def called_heads(device: str) -> dict[str, Callable[..., ch.ClassificationHead]]:
    """The heads whose calls are timed; by default, an SVM whose tensors are on a GPU is solved on the CPU."""
    if device == "cpu" or find_spec("numba_cuda") is None:
        return CALLED
    solver = ch.solvers.NativeSolver(backend="cuda", on_failure="return")
    return CALLED | {"SVM on the GPU": partial(ch.SVMHead, solver=solver)}


class Captured:
    """A function that replays what a call does on the GPU. It is captured when it is first called."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.graph = call, None

    def __call__(self) -> None:
        if self.graph is None:
            self.graph = self.capture()
        self.graph.replay()

    def capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.call()  # compiles kernels, and allocates memory
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.call()
        return graph


def calls(*, device: str, tasks: int, queries: int, features: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of a call of each head, alone and with its gradient, by the names in `VARIANTS`.

    They are medians over blocks of calls, which alternate between the variants. Only on a GPU, a head may be captured.
    A variant that raises an error is left out.
    """
    labels = torch.arange(WAYS).repeat_interleave(SHOTS).expand(tasks, -1).contiguous().to(device)
    truth = torch.arange(WAYS).repeat_interleave(queries).repeat(tasks).to(device)
    torch.manual_seed(0)
    support, query = (
        torch.randn(tasks, WAYS * count, features, device=device, requires_grad=True) for count in (SHOTS, queries)
    )

    def forward(head: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            head(support, labels, query, ways=WAYS)

    def with_gradient(head: Callable[..., Tensor]) -> None:
        logits = head(support, labels, query, ways=WAYS)
        torch.autograd.grad(functional.cross_entropy(logits.flatten(0, 1), truth), (support, query))

    found = {}
    for name, make in called_heads(device).items():
        unchecked = make(validate=False)
        heads = make(), unchecked, torch.compile(unchecked, fullgraph=True)
        for title, way in (("forward", forward), ("forward and backward", with_gradient)):
            timed: dict[str, Callable[[], object]]
            timed = {variant: partial(way, head) for variant, head in zip(VARIANTS, heads, strict=False)}
            if name in BY_HAND:
                timed["by hand"] = partial(way, BY_HAND[name])
            if device == "cuda" and name in CAPTURED:
                timed["captured"] = Captured(partial(way, unchecked))
            seconds: dict[str, list[float]] = {variant: [] for variant in timed}
            for repeat in tqdm(range(-2, repeats), desc=f"calls of {name}", leave=False):
                for variant in list(seconds):
                    try:
                        begin = report.now(support)
                        for _ in range(BLOCK):
                            timed[variant]()
                        taken = (report.now(support) - begin) / BLOCK
                    except Exception as error:
                        report.leave_out(f"{name}, {title}, {variant},", error)
                        del seconds[variant]
                        continue
                    if repeat >= 0:
                        seconds[variant].append(taken)
            if seconds:
                medians = {variant: statistics.median(taken) for variant, taken in seconds.items()}
                found[f"{name}, {title}"] = medians
    return found


def show_calls(seconds: dict[str, dict[str, float]], title: str) -> Table:
    """A line for each head and direction."""
    variants = [variant for variant in VARIANTS if any(variant in each for each in seconds.values())]
    table = report.new_table(title, ("call", *(f"{variant}, ms" for variant in variants)), left=["call"])
    for name, each in seconds.items():
        table.add_row(name, *(f"{1e3 * each[variant]:.2f}" if variant in each else "" for variant in variants))
    return table


class OneLayer(Backbone):
    """64 features that are linear in the pixels of 32 x 32 images, so that the loop itself takes most of the time."""

    def make_layers(self) -> tuple[nn.Module, int]:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64)), 64


def one_layer_training(*, device: Literal["cpu", "cuda"], tasks: int, queries: int, steps: int) -> Training:
    """A training run of one layer through prototypes, on 32 x 32 pixels of noise."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64 * 30, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(len(images)) % 64, tuple(map(str, range(64))))
    options = Options(
        device=device,
        head="prototypes",
        ways=WAYS,
        shots=SHOTS,
        queries=queries,
        tasks=tasks,
        steps=steps,
        learning_rate=1e-3,
        schedule="constant",
        augment="none",
        compile="none",
    )
    batches = make_episodes(data, options, Processes())
    return Training(options, OneLayer(), build_head(options.head), batches, Processes())


def step_alone(own: Training, images: Tensor) -> None:
    """Forward, loss, backward and optimizer on images `(tasks * n, ...)`, and nothing else."""
    features = own.backbone(images).unflatten(0, own.episodes.labels.shape)
    found = episode_loss(own.head, own.episodes.split(features), ways=WAYS)
    own.optimizer.zero_grad()
    found.loss.backward()
    own.optimizer.step()


def alone(own: Training, steps: int) -> float:
    """Seconds of a number of steps on one batch."""
    images = own.episodes(own.episodes.draw(0))
    begin = report.now(images)
    for _ in range(steps):
        step_alone(own, images)
    return report.now(images) - begin


def with_a_new_batch(own: Training, steps: int) -> float:
    """Seconds of a number of steps, each on the images of newly drawn episodes."""
    begin = report.now(own.episodes.images)
    for number in range(steps):
        step_alone(own, own.episodes(own.episodes.draw(number)))
    return report.now(own.episodes.images) - begin


def in_the_plain_loop(own: Training, steps: int) -> float:
    """Seconds of a number of steps in the loop of `benchmarks.loop.train`."""
    drawn = own.episodes.draw(own.step)
    begin = report.now(drawn)
    for _ in range(steps):
        own.take(drawn)
        drawn = own.episodes.draw(own.step)
        if own.step % own.interval == 0:
            own.read()
    return report.now(drawn) - begin


def in_lightning(own: Training, steps: int) -> float:
    """Seconds of a number of steps of `EpisodicModule`, after a first one, in a trainer without logs and bars."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import LambdaCallback

    from convexheads.integrations.lightning import EpisodicModule

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    ends: list[float] = []

    def end(_: Any, __: Any, ___: Any, batch: tuple[Tensor, Tensor], number: int) -> None:
        if number in (0, steps):
            ends.append(report.now(batch[0]))

    settings: dict[str, Any] = {"learning_rate": own.options.learning_rate, "schedule": own.options.schedule}
    module = EpisodicModule(own.backbone, own.head, ways=WAYS, shots=SHOTS, total_steps=steps + 1, **settings)
    trainer = pl.Trainer(
        accelerator="gpu" if own.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=steps + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_batch_end=end)],
    )
    own.episodes.loader.load_state_dict({"step": 0})
    trainer.fit(module, own.episodes.loader)
    return ends[1] - ends[0]


def loops(
    *, device: Literal["cpu", "cuda"], tasks: int, queries: int, repeats: int, steps: int = BLOCK
) -> dict[str, float]:
    """Seconds of a step alone and in each loop: medians over blocks of steps, which alternate between the loops."""
    ways: dict[str, Callable[[Training, int], float]]
    ways = {ALONE: alone, NEW_BATCH: with_a_new_batch, PLAIN: in_the_plain_loop}
    if find_spec("pytorch_lightning"):
        ways[LIGHTNING] = in_lightning
    sizes: dict[str, Any] = {"device": device, "tasks": tasks, "queries": queries, "steps": steps * (repeats + 1)}
    blocks = {name: partial(way, one_layer_training(**sizes), steps) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for repeat in tqdm(range(-1, repeats), desc="loops", leave=False):
        for name, block in blocks.items():
            taken = block() / steps
            if repeat >= 0:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def show_loops(seconds: dict[str, float], title: str) -> Table:
    """A line for the step alone, with a new batch, and in each loop."""
    columns = ("", "ms per step", f"more than {ALONE}, ms", f"more than {NEW_BATCH}, ms")
    table = report.new_table(title, columns, left=[""])
    for name, taken in seconds.items():
        more = [f"{1e3 * (taken - seconds[base]):.2f}" for base in (ALONE, NEW_BATCH)]
        shown = {ALONE: 0, NEW_BATCH: 1}.get(name, 2)
        table.add_row(name, f"{1e3 * taken:.2f}", *more[:shown])
    return table


def show(steps: dict[str, float], evaluations: dict[str, list[float]], threads: list[int], title: str) -> Table:
    """A line for each head."""
    named = [f"evaluation, {count} thread{'s' if count > 1 else ''}, s" for count in threads]
    timed = ["training step, ms"] if steps else []
    table = report.new_table(title, ("head", *timed, *named), left=["head"])
    for name in dict.fromkeys([*(name for name in steps if "/" not in name), *evaluations]):
        seconds = evaluations.get(name, [])
        missing = [""] * (len(threads) - len(seconds))
        step_time = [f"{1e3 * steps[name]:.1f}" if name in steps else ""] if steps else []
        table.add_row(name, *step_time, *missing, *(f"{each:.1f}" for each in seconds))
    return table


def main() -> None:
    """The command line."""
    parser = experiment.parser("overhead", __doc__, "device", "threads", "output")
    parser.add_argument("--backbone", type=Literal[tuple(BACKBONES)], default="conv4", help="network that is trained")
    parser.add_argument(
        "--tasks", type=int, default=8, help="episodes of a training step, 5-way 5-shot, 32 x 32 pixels"
    )
    parser.add_argument("--train-queries", type=int, default=6, help="query images per class in a training step")
    parser.add_argument(
        "--repeats",
        type=int,
        default=25,
        help=f"timed training steps per head, and blocks of {BLOCK} calls per head and of {BLOCK} steps per loop",
    )
    parser.add_argument("--episodes", type=int, default=10_000, help="episodes of the evaluation, 5-way 5-shot")
    parser.add_argument("--evaluations", type=int, default=5, help="timed evaluations of each head")
    parser.add_argument("--queries", type=int, default=15, help="query examples per class in the evaluation")
    parser.add_argument("--features", type=int, default=640, help="feature dimension in the evaluation")
    text = "what to measure"
    parser.add_argument("--parts", type=list[Literal[PARTS]], default=list(PARTS), help=text)
    options = parser.parse_args()
    if not options.parts:
        raise SystemExit(f"error: parts: expected some of {', '.join(PARTS)}, got none")
    torch.set_num_threads(options.threads)
    where = {"device": options.device}
    names = ("backbone", "device", "tasks", "train_queries", "repeats", *EVALUATED)
    sizes = where | {"tasks": options.tasks, "queries": options.train_queries, "repeats": options.repeats}
    measured: dict[str, Any] = {}
    if "training" in options.parts:
        network = {"backbone": options.backbone, "episodes": options.tasks, "queries": options.train_queries}
        measured["training"] = training(**where, **network, repeats=options.repeats)
    if "evaluation" in options.parts:
        measured["evaluation"] = evaluation(**where, **{name: options[name] for name in EVALUATED})
    if "loops" in options.parts:
        measured["loops"] = loops(**sizes)
    if "calls" in options.parts:
        measured["calls"] = calls(**sizes, features=CALL_FEATURES)
    if not all(measured.values()):
        raise SystemExit("error: a part has no result, because all that it measures raised errors")
    origin = report.provenance()
    (table, note), *more = sections(measured, options, origin)
    record = {"settings": {name: options[name] for name in names}, **measured, **origin}
    experiment.write(options.output, "overhead", table, note, more=more, record=record)


def sections(measured: dict[str, Any], options: Any, origin: dict[str, Any]) -> list[tuple[Table, str]]:
    """The tables of what was measured, each with a note."""
    found = []
    place = f"{experiment.place(origin, options.device)}, torch {origin['versions']['torch']}. "
    place += "Made by `python -m benchmarks.overhead`."
    steps, evaluations = measured.get("training", {}), measured.get("evaluation", {})
    note = ""
    if steps:
        note += (
            f"Training step: a {options.backbone} on {options.tasks} episodes of 32 x 32 images, "
            f"{options.train_queries} queries per class, SGD; medians of {options.repeats} steps, the heads in turn. "
            f"In the same round, the step with the SVM takes {steps['svm / prototypes']:.3f} times as long as that "
            f"with prototypes and {steps['svm / ridge']:.3f} times as long as that with ridge regression (medians). "
        )
    if evaluations:
        note += (
            f"Evaluation: `convexheads.evaluate` over {options.episodes:,} episodes of {options.features} cached "
            f"features, {options.queries} queries per class, median of {options.evaluations} runs"
        )
        loop = "; scikit-learn's logistic regression has its default tolerance and number of threads, and ran once"
        note += (loop if SCIKIT_LEARN in evaluations else "") + ". "
    if note:
        counts = thread_counts(options.device, options.threads) if evaluations else []
        found.append((show(steps, evaluations, counts, "What a head costs, 5-way 5-shot"), note + place))
    if "calls" in measured:
        note = (
            f"{options.tasks} episodes of {CALL_FEATURES} random features in float32, {options.train_queries} queries "
            f"per class; medians over {options.repeats} blocks of {BLOCK} calls, the variants in turn. Heads have "
            "their default settings. Compiled: `torch.compile(head, fullgraph=True)` of a head with `validate=False`. "
            "By hand: the same formula in a few lines of PyTorch, without checks, options and certificate, in float64. "
            "Backward: the gradient of the cross-entropy with respect to the features of support and queries. "
        )
        if options.device == "cuda":
            note += "Captured: a replayed CUDA graph of the call, which takes little more than the time of the GPU. "
        found.append((show_calls(measured["calls"], "What a call costs, 5-way 5-shot"), note + place))
    if "loops" in measured:
        note = (
            f"A step: {options.tasks} episodes of 32 x 32 pixels of noise, {options.train_queries} queries per class, "
            f"through one linear layer and prototypes, with SGD; medians over {options.repeats} blocks of {BLOCK} "
            f"steps, all lines in turn. {ALONE.capitalize()} is forward, loss, backward and optimizer on one and the "
            "same batch. A new batch is drawn and gathered without augmentation, as in both loops. The plain loop is "
            "`benchmarks.loop`, with its checks and readings, without validations and checkpoints. "
        )
        note += (
            "Lightning runs `EpisodicModule` on `EpisodeLoader` without logger, progress bar and checkpoints. "
            if LIGHTNING in measured["loops"]
            else "pytorch-lightning is not installed, so it has no line. "
        )
        found.append((show_loops(measured["loops"], "What a loop costs, 5-way 5-shot"), note + place))
    return found


if __name__ == "__main__":
    main()
