"""What is done on a machine with a GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.queue import shrink
from benchmarks.gpu.session import Session
from benchmarks.gpu.speed import speed
from benchmarks.report import LEFT_OUT, leave_out
from benchmarks.train import run

TESTS = Path(__file__).parent.parent.parent / "tests"
KERNELS = TESTS / "unit" / "test_team.py"
"""The tests of the kernels that solve problems on a GPU."""
# A test that never ends cannot be interrupted from its own thread while it waits for the GPU.
TESTING = ["-m", "pytest", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", "--without-extras"]
TESTING += ["--timeout", "90", "-o", "timeout_method=thread"]
CHECKS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": []}
"""What compute-sanitizer checks, with the settings of each check; racecheck looks at the shared memory of teams."""
COSTS = {
    "calls": (["calls"], {}),
    "evaluation": (["evaluation"], {"episodes": 100_000, "evaluations": 1}),
    "steps": (["training", "loops"], {"backbone": "resnet12"}),
}
"""The parts of `benchmarks.overhead` that are measured together, with their settings."""
BATCHED = ("ridge", "native", "native on the GPU", "native in torch", "interior point", "qpth", "published code")
COMPARED = {
    8: (("5w1s", "5w5s", "5w15s", "20w1s", "20w5s", "64w5s"), (*BATCHED, "moreau")),
    64: (("5w1s", "5w5s", "5w15s", "20w1s", "20w5s"), (*BATCHED, "moreau")),
    512: (("5w1s", "5w5s", "20w1s", "20w5s"), BATCHED),
}
"""By the number of tasks, the sizes and the contenders that are timed."""


def machine(session: Session) -> str:
    """Show the machine's packages, and solve a few problems on its GPU; without that, no other stage begins."""
    session.forget("machine")  # this may be another machine
    outcome = session.command("machine", "-m", "benchmarks.gpu.machine", limit=120)
    print(*session.output_of("machine"), sep="\n", flush=True)
    return outcome


def kernels(session: Session) -> str:
    """Run the tests of the kernels that solve problems on a GPU."""
    return session.command("kernels", *TESTING, str(KERNELS), limit=120)


def tests(session: Session) -> str:
    """Run the other tests that need a GPU."""
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    others = [str(path) for path in files if path != KERNELS]
    return session.command("tests", *TESTING, *(others[-1:] if session.smoke else others), limit=240)


def sanitizer(session: Session) -> str:
    """Look for wrong memory accesses, races and barriers in the kernels, on a small problem and its gradient."""
    tool = _compute_sanitizer()
    if tool is None:
        return "compute-sanitizer is not installed; pip install nvidia-cuda-sanitizer-api brings it"
    command = [*TESTING, str(KERNELS), "-k", "test_gpu_equals_cpu and separable"]
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else, tensors are parts of one piece of memory
    outcomes = []
    for check, settings in CHECKS.items():
        under = [tool, "--tool", check, *settings, "--error-exitcode", "1", "--kernel-name", "kns=cuda_team"]
        under += ["--launch-timeout", "0"]
        outcome = session.command(check, *command, under=under, variables=variables, limit=90)
        ran = any("1 passed" in line for line in session.output_of(check))
        if not ran:
            session.forget(check)
        outcomes.append(f"{check}: {outcome}" + ("" if ran else ", but no test has run to its end"))
    return "; ".join(outcomes)


def _compute_sanitizer() -> str | None:
    """The path of compute-sanitizer, of the system, of CUDA's folder or of a package from PyPI."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    if (own := shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=home)) is not None:
        return own
    packages = find_spec("nvidia")
    folders = [] if packages is None else list(packages.submodule_search_locations or [])
    found = [path for folder in folders for path in sorted(Path(folder).glob("*/bin/compute-sanitizer"))]
    return next(map(str, found), None)


def overhead(session: Session) -> str:
    """Time calls, training steps and evaluations of each head."""
    smoke, outcomes = {"repeats": 1, "episodes": 20, "evaluations": 1}, []
    for name, (parts, settings) in COSTS.items():
        sizes = {"parts": f"[{','.join(parts)}]", "threads": 4, **(smoke if session.smoke else settings)}
        arguments = [text for option, value in sizes.items() for text in (f"--{option}", str(value))]
        outcomes.append(f"{name}: {_measure(session, 'overhead', *arguments, name=f'overhead-{name}')}")
    return "; ".join(outcomes)


def solvers(session: Session) -> str:
    """Time the solvers of the SVM and ridge regression; a solver whose package is missing is left out and named."""
    outcomes = []
    for tasks, (sizes, names) in ({1: (["5w1s"], BATCHED)} if session.smoke else COMPARED).items():
        chosen = ["--tasks", f"[{tasks}]", "--sizes", f"[{','.join(sizes)}]", "--names", f"[{','.join(names)}]"]
        threads = ["--repeats", "1", "--threads", "1"] if session.smoke else ["--repeats", "5", "--threads", "4"]
        outcomes.append(f"{tasks} tasks: {_measure(session, 'solvers', *chosen, *threads, name=f'solvers-{tasks}')}")
    return "; ".join(outcomes)


def float32(session: Session) -> str:
    """Compare float32 with float64."""
    return _measure(
        session, "float32", "--threads", "4", *(["--repeats", "1", "--tasks", "2"] if session.smoke else [])
    )


def _measure(session: Session, script: str, *arguments: str, name: str = "") -> str:
    """Run a script of this package on the device, for at most three minutes; also return what it has left out."""
    name, where = name or script, "cuda" if torch.cuda.is_available() else "cpu"
    settings = ["--device", where, "--output", str(session.output / name)]
    outcome = session.command(name, "-m", f"benchmarks.{script}", *arguments, *settings, limit=180)
    return "; ".join([outcome, *(line for line in session.output_of(name) if LEFT_OUT in line)])


def trainings(session: Session) -> str:
    """Run the queue, resuming each training run from its last checkpoint."""
    finished = 0
    for entry in session.queue:
        folder = session.output / entry.name
        if (folder / "result.json").is_file():
            finished += 1
            continue
        if session.left < (10 if session.smoke else 90):  # compiling takes a minute
            break
        usual = {"precision": "bfloat16", "checkpoint_every": 5000, "threads": 1}
        where = {"data_root": session.data_root, "output": folder}
        options = entry.options(**(usual | session.changes | where))
        if session.smoke:
            options = shrink(options)
        options = replace(options, resume=options.checkpoint.is_file())
        try:
            rows = run(options, deadline=session.deadline - (0 if session.smoke else 15))
        except Exception as error:  # the other training runs continue
            leave_out(entry.name, error)
            continue
        finished += bool(rows)
    return f"{finished} of {len(session.queue)} training runs are finished"


STAGES: dict[str, Callable[[Session], str]] = {
    "machine": machine,
    "kernels": kernels,
    "speed": speed,
    "overhead": overhead,
    "solvers": solvers,
    "tests": tests,
    "sanitizer": sanitizer,
    "float32": float32,
    "trainings": trainings,
}
"""The stages, in order of importance."""
