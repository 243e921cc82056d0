"""What is done on a machine with a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.queue import shrink
from benchmarks.gpu.session import Session
from benchmarks.gpu.speed import speed
from benchmarks.solvers import LEFT_OUT
from benchmarks.train import run
from convexheads.errors import ConvexHeadsError

TESTS = Path(__file__).parent.parent.parent / "tests"
CHECKS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": []}
"""What compute-sanitizer checks, with the settings of each check."""
BIG_EVALUATION = {"backbone": "resnet12", "episodes": 100_000, "evaluations": 2}
BATCHED = ("ridge", "native", "native on the GPU", "native in torch", "interior point", "qpth", "published code")
COMPARED = {
    8: (("5w1s", "5w5s", "5w15s", "20w1s", "20w5s", "64w5s"), (*BATCHED, "moreau")),
    64: (("5w1s", "5w5s", "5w15s", "20w1s", "20w5s"), (*BATCHED, "moreau")),
    512: (("5w1s", "5w5s", "20w1s", "20w5s"), BATCHED),
}
"""By the number of tasks, the sizes and the contenders that are timed."""


def tests(session: Session) -> str:
    """Run the tests that need a GPU."""
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    settings = ["-m", "gpu", "--no-header", "-p", "no:cacheprovider", "--without-extras"]
    return session.command("tests", "-m", "pytest", *settings, *(files[-1:] if session.smoke else files))


def sanitizer(session: Session) -> str:
    """Look for invalid memory accesses, races and wrong barriers in the compiled kernels, on a small problem."""
    tool = _compute_sanitizer()
    if tool is None:
        return "compute-sanitizer is not installed; pip install nvidia-cuda-sanitizer-api brings it"
    test = [str(TESTS / "unit" / "test_team.py"), "-m", "gpu", "-k", "test_gpu_equals_cpu and separable"]
    outcomes = []
    for check, settings in CHECKS.items():
        under = [tool, "--tool", check, *settings, "--error-exitcode", "1", "--kernel-name", "kns=_solve_"]
        command = ["-m", "pytest", *test, "--no-header", "-p", "no:cacheprovider", "--without-extras"]
        outcomes.append(f"{check}: {session.command(check, *command, under=under, limit=120)}")
    return "; ".join(outcomes)


def _compute_sanitizer() -> str | None:
    """The path of compute-sanitizer, of the system or of a package from PyPI."""
    packages = find_spec("nvidia")
    folders = [] if packages is None else list(packages.submodule_search_locations or [])
    found = [path for folder in folders for path in sorted(Path(folder).glob("*/bin/compute-sanitizer"))]
    return shutil.which("compute-sanitizer") or next(map(str, found), None)


def overhead(session: Session) -> str:
    """Time calls, training steps and evaluations of each head."""
    sizes = {"repeats": 1, "episodes": 20, "evaluations": 1} if session.smoke else BIG_EVALUATION
    arguments = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    return _measure(session, "overhead", *arguments)


def solvers(session: Session) -> str:
    """Time the solvers of the SVM and ridge regression; a solver whose package is missing is left out and named."""
    outcomes = []
    for tasks, (sizes, names) in ({1: (["5w1s"], BATCHED)} if session.smoke else COMPARED).items():
        chosen = ["--tasks", f"[{tasks}]", "--sizes", f"[{','.join(sizes)}]", "--names", f"[{','.join(names)}]"]
        threads = ["--repeats", "1", "--threads", "1"] if session.smoke else ["--repeats", "5", "--threads", "4"]
        name = f"solvers-{tasks}"
        outcome = _measure(session, "solvers", *chosen, *threads, name=name)
        lines = (session.output / f"{name}.txt").read_text(errors="replace").splitlines()
        outcomes.append("; ".join([f"{tasks} tasks: {outcome}", *(line for line in lines if LEFT_OUT in line)]))
    return "; ".join(outcomes)


def float32(session: Session) -> str:
    """Compare float32 with float64."""
    return _measure(session, "float32", *(["--repeats", "1", "--tasks", "2"] if session.smoke else []))


def _measure(session: Session, script: str, *arguments: str, name: str = "") -> str:
    """Run a script of this package on the device, for at most four minutes."""
    name, where = name or script, "cuda" if torch.cuda.is_available() else "cpu"
    settings = ["--device", where, "--output", str(session.output / name)]
    return session.command(name, "-m", f"benchmarks.{script}", *arguments, *settings, limit=240)


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
            options = shrink(options)
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
    "sanitizer": sanitizer,
    "speed": speed,
    "overhead": overhead,
    "solvers": solvers,
    "float32": float32,
    "trainings": trainings,
}
"""The stages, in order of importance."""
