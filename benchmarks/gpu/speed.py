"""The time of training steps, by the way in which they are executed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.data import ImageSet
from benchmarks.gpu.queue import shrink
from benchmarks.gpu.session import Session
from benchmarks.loop import Training
from benchmarks.options import Options
from benchmarks.processes import Processes
from benchmarks.train import device, episodes
from convexheads.models import build_model

# In seconds, after which nothing else is measured. There are other stages.
_LIMIT = 200


@dataclass(frozen=True)
class Variant:
    """A way to execute training steps.

    Attributes:
        name: its name in the table.
        precision: the precision of the backbone.
        compile: the mode of `torch.compile` for the backbone.
        channels_last: whether the weights have the memory format `channels_last`, as images always do.
    """

    name: str
    precision: Literal["float32", "bfloat16"]
    compile: Literal["none", "default", "reduce-overhead"]
    channels_last: bool = True


VARIANTS = (
    Variant("captured", "bfloat16", "reduce-overhead"),
    Variant("compiled", "bfloat16", "default"),
    Variant("channels_last", "bfloat16", "none"),
    Variant("eager", "bfloat16", "none", channels_last=False),
    Variant("eager, float32", "float32", "none", channels_last=False),
)


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        name: its name in the table.
        head: the head.
        backend: that of the solver of an SVM. By default, SVMs are solved on the CPU.
        network_only: whether the head is left out.
    """

    name: str
    head: Literal["svm", "prototypes"]
    backend: Literal["auto", "cuda"] = "auto"
    network_only: bool = False


SUBJECTS = (
    Subject("svm", "svm"),
    Subject("svm on the GPU", "svm", backend="cuda"),
    Subject("prototypes", "prototypes"),
    Subject("none: the network alone", "prototypes", network_only=True),
)


def speed(session: Session) -> str:
    """Time training steps by variant, relative to the GPU's peak performance, with one processor thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _speed(session)
    finally:
        torch.set_num_threads(threads)


def _speed(session: Session) -> str:
    path = session.output / "speed" / "speed.json"
    entry = session.queue[0]
    steps, warmup = (1, 1) if session.smoke else (100, 12)
    where = device(Options())
    peak = _peak(where, 256 if session.smoke else 8192)
    rows: list[dict[str, Any]] = json.loads(path.read_text())["results"] if path.is_file() else []
    known = {(row["variant"], row["head"]) for row in rows}
    subjects = [each for each in SUBJECTS if each.backend != "cuda" or find_spec("numba_cuda")]
    flop, begin = None, time.monotonic()
    for variant, subject in product(VARIANTS, subjects):
        if (variant.name, subject.name) in known or session.left < (0 if session.smoke else 45):
            continue
        if time.monotonic() - begin > _LIMIT:  # the next call goes on
            break
        if session.smoke and variant.compile != "none" and (subject.name != "svm" or variant.name == "captured"):
            continue  # compiling takes a minute, and the CPU has no CUDA graphs
        changes: dict[str, Any] = {"precision": variant.precision, "compile": variant.compile}
        changes |= {"head": subject.head, "backend": subject.backend}
        options = shrink(entry.options(**changes)) if session.smoke else entry.options(**changes)
        try:
            training = _on_noise(options, channels_last=variant.channels_last)
            flop = flop or _flop(training)
            ms, first = _time(training, steps, warmup, network_only=subject.network_only)
        except Exception as error:
            report.leave_out(f"{variant.name}, {subject.name},", error)
            continue
        measured = {"threads": torch.get_num_threads(), "ms": ms, "first_step_s": first}
        rows.append(changes | {"variant": variant.name, "head": subject.name} | measured)
        floor = 1e3 * flop / peak
        origin = report.provenance()
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"results": rows, "flop": flop, "peak_flop_per_s": peak, "floor_ms": floor, "steps": steps, **origin}
        _write_speed(rows, record, path.with_suffix(".md"))
        # This file is written last, because its rows are not measured again.
        report.write_json(record, path)
        del training
        torch.cuda.empty_cache()
    if not rows:
        return "nothing was measured"
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    networks = {each.name for each in SUBJECTS if each.network_only}
    best = min((row for row in rows if row["head"] not in networks), key=lambda row: row["ms"], default=None)
    if best is None:
        return "no training step was measured"
    return f"{1e3 / best['ms']:.1f} steps per second at best ({best['variant']}, {best['head']})"


def _write_speed(rows: list[dict[str, Any]], record: dict[str, Any], path: Path) -> None:
    columns = ("variant", "head", "threads", "ms per step", "steps per second", "of the peak, %", "first step, s")
    table = report.new_table("Training steps of the paper's recipe", columns, left=("variant", "head"))
    for row in rows:
        share = 100 * record["floor_ms"] / row["ms"]
        numbers = (f"{row['ms']:.2f}", f"{1e3 / row['ms']:.1f}", f"{share:.0f}", f"{row['first_step_s']:.0f}")
        table.add_row(row["variant"], row["head"], str(row["threads"]), *numbers)
    machine, versions = record["machine"], record["versions"]
    note = (
        f"{machine['accelerator'] or machine['processor']}, torch {versions['torch']}; means of {record['steps']} "
        f"consecutive steps, with drawing, gathering and augmenting images. A step has {record['flop'] / 1e12:.2f} "
        f"TFLOP, which would take {record['floor_ms']:.2f} ms at {record['peak_flop_per_s'] / 1e12:.0f} TFLOP/s, as "
        "measured on a product of large bfloat16 matrices. Made by `python -m benchmarks.gpu`."
    )
    report.write_markdown(table, note, path)


def _on_noise(options: Options, *, channels_last: bool) -> Training:
    """A training run on random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64 * 30, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.arange(len(images)) % 64, tuple(map(str, range(64))))
    torch.manual_seed(0)
    training = Training(
        options, *build_model(options.record(), images), episodes(data, options, Processes()), Processes()
    )
    if not channels_last:
        training.backbone.to(memory_format=torch.contiguous_format)
    return training


def _flop(training: Training) -> int:
    """Floating-point operations of the forward and backward pass of the backbone in one step."""
    images = training.episodes(training.episodes.draw(0))
    with FlopCounterMode(display=False) as counter:
        training.backbone(images).sum().backward()
    return counter.get_total_flops()


def _time(training: Training, steps: int, warmup: int, *, network_only: bool) -> tuple[float, float]:
    """Milliseconds per step, and seconds of the first step.

    A step includes drawing its images and reading its metrics. With `network_only`, it is a forward and backward pass
    that gathers and augments the same images each time, without an update.
    """
    drawn = training.episodes.draw(0)
    begin, first = report.now(drawn), 0.0
    for step in range(warmup + steps):
        if step == warmup:
            begin = report.now(drawn)
        if network_only:
            training.optimizer.zero_grad()  # a captured graph may overwrite the gradients of an earlier step
            training.features(drawn).sum().backward()
        else:
            training.take(drawn)
            drawn = training.episodes.draw(step + 1)
            if training.step % training.interval == 0:
                training.read()
        if step == 0:
            first = report.now(drawn) - begin
    return 1e3 * (report.now(drawn) - begin) / steps, first


def _peak(where: torch.device, size: int) -> float:
    """Floating-point operations per second of a product of bfloat16 matrices."""
    left, right = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(8):
        begin = report.now(left)
        torch.mm(left, right)
        times.append(report.now(left) - begin)
    return 2 * size**3 / sorted(times)[2]
