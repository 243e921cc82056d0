"""Do everything that needs a GPU, in order of importance, within a time limit.

python -m benchmarks.gpu --minutes 12 --data-root DIR --output OUT    # run it again to continue
python -m benchmarks.gpu --pack DIR2 --data-root DIR                  # pack the data into a few small files
python -m benchmarks.gpu --unpack OUT                                 # unpack results copied from another machine
python -m benchmarks.gpu --smoke                                      # every stage with tiny sizes, on any machine
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import experiment, report
from benchmarks.data import ImageSet
from benchmarks.data.sheets import pack
from benchmarks.loop import Training
from benchmarks.options import Options
from benchmarks.processes import Processes
from benchmarks.solvers import LEFT_OUT
from benchmarks.train import device, episodes, run
from convexheads import _storage
from convexheads.errors import ConvexHeadsError
from convexheads.models import build_model

TESTS = Path(__file__).parent.parent / "tests"
PART = 15_000_000
"""The largest size of a file of packed results, in bytes."""
SHORT = 10_000
"""Training steps of the rows of Table 4 and the points of Figure 2."""


@dataclass(frozen=True)
class Entry:
    """A training run in the queue.

    Attributes:
        name: the folder of its results.
        recipe: the name of its recipe.
        changes: options that override the recipe.
    """

    name: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)

    def options(self, **more: Any) -> Options:
        """The options of the run."""
        return Options.from_recipe(self.recipe, **(self.changes | more))


def _table4() -> Iterator[Entry]:
    """The rows of Table 4 on CIFAR-FS, named after what they add to plain training."""
    plain = {"augment": "none", "weight_decay": 0.0, "dropblock": "none", "steps": SHORT}
    added: dict[str, dict[str, Any]] = {
        "augmentation": {"augment": "flip-crop-jitter"},
        "decay": {"weight_decay": 5e-4},
        "dropblock": {"dropblock": "paper"},
        "smoothing": {"label_smoothing": 0.1},
        "trainval": {"trainval": True},
    }
    base = "table2/cifar-fs/resnet12/svm"
    yield Entry("table4_cifar-fs_resnet12_svm-none", base, plain)
    yield Entry("table4_cifar-fs_resnet12_svm-decay", base, plain | added["decay"])
    names, changes = "", plain
    for name, change in added.items():
        names, changes = f"{names}-{name}", changes | change
        yield Entry(f"table4_cifar-fs_resnet12_svm{names}", base, changes)


def _queue() -> Iterator[Entry]:
    first = [
        Entry(f"table2_cifar-fs_resnet12_{name}", f"table2/cifar-fs/resnet12/{name}")
        for name in ("svm", "ridge", "prototypes-5-shot", "prototypes-1-shot")
    ]
    yield from first
    yield Entry("table2_cifar-fs_r2d2_ridge", "table2/cifar-fs/resnet12/ridge", {"backbone": "r2d2"})
    for name in ("svm", "ridge", "prototypes-5-shot", "prototypes-1-shot"):
        yield Entry(f"table2_fc100_resnet12_{name}", f"table2/fc100/resnet12/{name}")
    # The row with DropBlock is the point of Figure 2 with 5 shots.
    yield from (each for each in _table4() if not each.name.endswith("-dropblock"))
    for head in ("svm", "prototypes"):
        for shots in (1, 5, 10, 15):
            name = f"{head}-{shots}-shot"
            yield Entry(f"figure2_cifar-fs_resnet12_{name}", f"figure2/cifar-fs/resnet12/{name}", {"steps": SHORT})
    for dataset in ("cifar-fs", "fc100"):
        yield Entry(f"table2_{dataset}_resnet12_svm-trainval", f"table2/{dataset}/resnet12/svm-trainval")
    for head in ("svm", "ridge", "prototypes"):
        yield Entry(f"fast_cifar-fs_resnet12_{head}", f"fast/cifar-fs/resnet12/{head}")
    for seed in (1, 2):
        yield from (Entry(f"{each.name}-seed-{seed}", each.recipe, {"seed": seed}) for each in first[:3])


QUEUE = tuple(_queue())
"""The training runs, in order of importance."""
SMOKE_QUEUE = (
    Entry("smoke_svm", "table2/cifar-fs/resnet12/svm"),
    Entry("smoke_ridge", "table2/cifar-fs/resnet12/ridge"),
)


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
NETWORK = "none: the network alone"


@dataclass(frozen=True)
class Session:
    """A run of this script.

    Attributes:
        output: folder for all results.
        data_root: folder of the data.
        deadline: when to stop, by `time.monotonic()`.
        smoke: whether to use tiny sizes.
        queue: the training runs.
        changes: options that override those of all training runs in the queue.
    """

    output: Path
    data_root: Path | None
    deadline: float
    smoke: bool
    queue: tuple[Entry, ...]
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def command(self, name: str, *arguments: str) -> str:
        """Run a Python command, unless an earlier run finished it; write its output to a file.

        Returns:
            The exit status and the last line of the output.
        """
        path, end_path = self.output / f"{name}.txt", self.output / f"{name}.end"
        if end_path.is_file():
            return end_path.read_text().strip()
        with path.open("w") as file:
            try:
                done = subprocess.run(
                    [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, timeout=max(1, self.left)
                )
                end = f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                return "stopped at the time limit"
        lines = path.read_text(errors="replace").splitlines()
        end = f"{end}: {lines[-1] if lines else 'no output'}"
        _storage.atomic_write(end_path, f"{end}\n".encode())
        return end


def tests(session: Session) -> str:
    """Run the tests that need a GPU."""
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    settings = ["-m", "gpu", "--no-header", "-p", "no:cacheprovider", "--without-extras"]
    return session.command("tests", "-m", "pytest", *settings, *(files[-1:] if session.smoke else files))


def solvers(session: Session) -> str:
    """Time the solvers of the SVM and ridge regression; a solver whose package is missing is left out and named."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = ["[5w1s]", "--repeats", "1"] if session.smoke else ["[5w1s,5w5s,20w5s]", "--repeats", "5"]
    names = ["--names", "[ridge,native,native on the GPU,native in torch,interior point,qpth]"]
    settings = ["--device", where, "--threads", "1" if session.smoke else "4", "--output"]
    output = str(session.output / "solvers")
    outcome = session.command("solvers", "-m", "benchmarks.solvers", "--sizes", *sizes, *names, *settings, output)
    lines = (session.output / "solvers.txt").read_text(errors="replace").splitlines()
    return "; ".join([outcome, *(line for line in lines if LEFT_OUT in line)])


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
    todo = [(variant, head) for variant in VARIANTS for head in ("svm", "prototypes", NETWORK)]
    flop = None
    for variant, head in todo:
        if (variant.name, head) in known or session.left < (0 if session.smoke else 45):
            continue
        if session.smoke and variant.compile != "none" and (head != "svm" or variant.name == "captured"):
            continue  # compiling takes a minute, and the CPU has no CUDA graphs
        changes: dict[str, Any] = {"precision": variant.precision, "compile": variant.compile}
        changes["head"] = "prototypes" if head == NETWORK else head
        options = _small(entry.options(**changes)) if session.smoke else entry.options(**changes)
        training = _on_noise(options, channels_last=variant.channels_last)
        flop = flop or _flop(training)
        ms, first = _time(training, steps, warmup, network_only=head == NETWORK)
        measured = {"threads": torch.get_num_threads(), "ms": ms, "first_step_s": first}
        rows.append(changes | {"variant": variant.name, "head": head} | measured)
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
        return "no time left"
    best = min((row for row in rows if row["head"] != NETWORK), key=lambda row: row["ms"])
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
    Console().print(table, note)
    report.write_markdown(table, note, path)


def _small(options: Options) -> Options:
    """The same options with a network and sizes that take seconds on any machine."""
    return replace(
        options,
        dataset="digits",
        backbone="conv4",
        steps=4,
        tasks=2,
        queries=1,
        shots=1,
        validate_every=2,
        validation_episodes=4,
        test_episodes=8,
        checkpoint_every=1,
    )


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
    that gathers and augments the same images each time.
    """
    drawn = training.episodes.draw(0)
    begin, first = report.now(drawn), 0.0
    for step in range(warmup + steps):
        if step == warmup:
            begin = report.now(drawn)
        if network_only:
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


def trainings(session: Session) -> str:
    """Run the queue, resuming each training run from its last checkpoint."""
    finished = 0
    for entry in session.queue:
        folder = session.output / entry.name
        if (folder / "result.json").is_file():
            finished += 1
            continue
        if session.left < 20:
            break
        usual = {"precision": "bfloat16", "checkpoint_every": 5000, "threads": 1}
        where = {"data_root": session.data_root, "output": folder}
        options = entry.options(**(usual | session.changes | where))
        if session.smoke:
            options = _small(options)
        options = replace(options, resume=options.checkpoint.is_file())
        try:
            rows = run(options, deadline=session.deadline - (0 if session.smoke else 15))
        except ConvexHeadsError as error:
            print(f"{entry.name}: {error}", flush=True)  # the other training runs continue
            continue
        finished += bool(rows)
    return f"{finished} of {len(session.queue)} training runs are finished"


STAGES: dict[str, Callable[[Session], str]] = {
    "tests": tests,
    "speed": speed,
    "solvers": solvers,
    "trainings": trainings,
}
"""The stages, in order of importance."""


def pack_results(output: Path) -> list[Path]:
    """Pack all results except checkpoints into one archive, split into parts; large weights become float16.

    Returns:
        The parts, `OUT/home/part-NN`.
    """
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(output.rglob("*")):
            name = path.relative_to(output)
            if not path.is_file() or path.name[0] == "." or {"checkpoints", "tensorboard", "home"} & set(name.parts):
                continue
            content = _in_half_precision(path) if path.name == "model.safetensors" else path.read_bytes()
            information = tarfile.TarInfo(str(name))
            information.size = len(content)
            tar.addfile(information, BytesIO(content))
    folder, content = output / "home", archive.getvalue()
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    parts = []
    for number, start in enumerate(range(0, len(content), PART)):
        parts.append(folder / f"part-{number:02}")
        _storage.atomic_write(parts[-1], content[start : start + PART])
    return parts


def unpack_results(folder: Path, output: Path) -> list[str]:
    """Unpack the parts that `pack_results` wrote, and return the names of the files."""
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("part-*")))
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


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = experiment.parser("gpu", __doc__, "data_root", "output")
    parser.add_argument("--minutes", type=float, default=12.0, help="time limit for all stages together")
    parser.add_argument(
        "--stages", type=list[Literal[tuple(STAGES)]], default=list(STAGES), help="the stages to run, in this order"
    )
    parser.add_argument("--only", type=list[str], default=[], help="names of the training runs; default: all")
    text = "options that override those of all training runs, as in '{steps: 10000}'"
    parser.add_argument("--changes", type=dict[str, Any], default={}, help=text)
    parser.add_argument("--smoke", action="store_true", help="run every stage with tiny sizes, on any machine")
    text = "only pack the data into small files in this folder"
    parser.add_argument("--pack", type=Path | None, default=None, help=text)
    text = "only unpack the packed results in this output folder"
    parser.add_argument("--unpack", type=Path | None, default=None, help=text)
    chosen = parser.parse_args(arguments)
    if chosen.pack:
        for dataset in ("cifar-fs", "fc100"):
            pack(dataset, chosen.data_root, chosen.pack, progress=True)
        return
    if chosen.unpack:
        print(*unpack_results(chosen.unpack / "home", chosen.unpack), sep="\n")
        return
    queue = SMOKE_QUEUE if chosen.smoke else tuple(e for e in QUEUE if not chosen.only or e.name in chosen.only)
    deadline = time.monotonic() + 60 * chosen.minutes
    session = Session(chosen.output, chosen.data_root, deadline, chosen.smoke, queue, chosen.changes)
    session.output.mkdir(parents=True, exist_ok=True)
    for name in chosen.stages:
        if session.left < 10:
            print(f"{name}: no time left", flush=True)
            continue
        begin = time.monotonic()
        outcome = STAGES[name](session)
        print(f"{name}: {outcome} ({time.monotonic() - begin:.0f} s)", flush=True)
    parts = pack_results(session.output)
    unfinished = [entry.name for entry in queue if not (session.output / entry.name / "result.json").is_file()]
    print(f"Packed results: {', '.join(str(part) for part in parts)}")
    print(f"Next: {unfinished[0]}; run this again to continue" if unfinished else "All training runs are finished")


if __name__ == "__main__":
    main()
