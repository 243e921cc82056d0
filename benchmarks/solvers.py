"""Compare the solvers of the SVM: times, errors and memory, measured alternately in one process.

python -m benchmarks.solvers
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pandas
import torch
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report

SIZES = {"5w1s": (5, 1), "5w5s": (5, 5), "5w15s": (5, 15), "20w1s": (20, 1), "20w5s": (20, 5), "64w5s": (64, 5)}
C = 0.1
# Above this n * k, qpth has one thread: our adapter then solves task by task, which is fastest so, and the batched
# factorization of torch may hang on several.
_ONE_THREAD = 150
_QPTH = ("qpth", "published code")
# Above this n * k, Moreau, the reference, uses an interior-point method: its gradients have at most two good digits.
_OWN_GRADIENTS = 500
# Above this n * k, Moreau takes minutes.
_REFERENCE = 2500
# A pass that takes more seconds than this is repeated only three times.
_SLOW = 0.3
# A pass that takes more seconds than this is not repeated. The first run, usually a warm-up, is the result.
_VERY_SLOW = 5.0
PRECISIONS = ["float64", "float32", "bfloat16"]
ON_GPU = "native on the GPU"
_SETTINGS = ("sizes", "tasks", "precisions", "names", "device", "features", "queries", "repeats", "threads")


class Contender(NamedTuple):
    """A function to time, from support, labels and query to logits.

    Attributes:
        call: the function.
        largest: the n * k above which it is left out for 8 tasks, because it would take minutes.
        exact: whether it solves the SVM of the paper, so that its error can be measured.
    """

    call: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    largest: float = math.inf
    exact: bool = True


def contenders() -> dict[str, Contender]:
    """The contenders whose packages are installed."""
    return {name: made for name, made in _made().items() if isinstance(made, Contender)}


def missing() -> dict[str, ch.MissingDependencyError]:
    """The contenders whose packages are not installed, with the error that says how to install them."""
    return {name: made for name, made in _made().items() if isinstance(made, ch.MissingDependencyError)}


def _made() -> dict[str, Contender | ch.MissingDependencyError]:
    """The SVM of the paper on each solver, learn2learn's smoothed SVM in a loop, and ridge regression as a floor."""

    def of(head: ch.ClassificationHead) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
        return lambda support, labels, query, ways: head(support, labels, query, ways=ways)

    def looped(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        from learn2learn.nn import SVClassifier

        logits = []
        for x, y, q in zip(support.float(), labels, query.float(), strict=True):
            classifier = SVClassifier()
            classifier.fit_(x, y, ways)
            logits.append(classifier(q))
        return torch.stack(logits)

    def batched() -> Contender:
        if find_spec("qpth") is None:
            raise ch.MissingDependencyError("qpth", "qpth", "the solver of the published code")
        return Contender(as_published, largest=2000, exact=False)

    def learn2learn() -> Contender:
        if find_spec("learn2learn") is None:
            raise ch.MissingDependencyError("learn2learn", "learn2learn", "SVClassifier")
        return Contender(looped, largest=375, exact=False)

    makers: dict[str, Callable[[], Contender]] = {
        "ridge": lambda: Contender(of(ch.RidgeHead()), exact=False),
        "native": lambda: Contender(of(ch.SVMHead(C))),
        ON_GPU: lambda: Contender(of(ch.SVMHead(C, solver=ch.solvers.NativeSolver(backend="cuda")))),
        "native in torch": lambda: Contender(of(ch.SVMHead(C, solver=ch.solvers.NativeSolver(backend="torch")))),
        "interior point": lambda: Contender(
            of(ch.SVMHead(C, solver=ch.solvers.InteriorPointSolver(max_iterations=100)))
        ),
        "moreau": lambda: Contender(of(ch.SVMHead(C, solver=ch.solvers.MoreauSolver())), largest=2500),
        "qpth": lambda: Contender(of(ch.SVMHead(C, solver=ch.solvers.QpthSolver(max_iterations=15))), largest=2000),
        "published code": batched,
        "cvxpylayers": lambda: Contender(
            of(ch.SVMHead(C, solver=ch.solvers.CvxpylayersSolver(on_failure="return"))), largest=375
        ),
        "learn2learn": learn2learn,
    }
    made: dict[str, Contender | ch.MissingDependencyError] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except ch.MissingDependencyError as error:
            made[name] = error
    return made


def as_published(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """The SVM as in the code of Lee et al. 2019: qpth once for all tasks, in float32, smoothed by 1."""
    from qpth.qp import QPFunction

    x, (tasks, n) = support.float(), labels.shape
    own = torch.nn.functional.one_hot(labels, ways).to(x)
    hessian = torch.einsum("tij,kl->tikjl", x @ x.mT, torch.eye(ways).to(x)).reshape(tasks, n * ways, n * ways)
    every = torch.eye(n * ways).to(x)
    sums = torch.kron(torch.eye(n), torch.ones(1, ways)).to(x)
    bounds, equations = (part.expand(tasks, -1, -1) for part in (every, sums))
    solve = QPFunction(verbose=False, maxIter=15)
    coef = solve(hessian + every, -own.flatten(1), bounds, (C * own).flatten(1), equations, torch.zeros(tasks, n).to(x))
    return query.float() @ x.mT @ coef.reshape(tasks, n, ways)


def episode(tasks: int, ways: int, shots: int, features: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Support, labels and query of random tasks with a little structure, in float64."""
    torch.manual_seed(0)
    labels = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    centers = torch.randn(tasks, ways, features, dtype=torch.float64) / features**0.5
    noise = torch.randn(tasks, ways * shots, features, dtype=torch.float64) / features**0.5
    query = torch.randn(tasks, ways * queries, features, dtype=torch.float64) / features**0.5
    return centers.repeat_interleave(shots, 1) + noise, labels, query


def once(call: Callable[..., Tensor], support: Tensor, labels: Tensor, query: Tensor, ways: int):
    """Seconds of the forward pass and of both passes, the logits, and the gradient of the support."""
    support = support.detach().requires_grad_()
    begin = report.now(support)
    logits = call(support, labels, query, ways)
    forward = report.now(support) - begin
    (gradient,) = torch.autograd.grad(logits.square().sum(), support)
    return forward, report.now(support) - begin, logits.detach(), gradient


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """The peak memory of a call in bytes, beyond what was in use before; None if the system does not report it."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak from here on
        before = _resident("VmRSS")
        run()
        return max(0.0, _resident("VmHWM") - before)
    except OSError:
        return None


def _give_back() -> None:
    """Return freed memory to the system, if the C library can, because its reuse would not be counted."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(name))


class Reference(NamedTuple):
    """The reference for errors: Moreau at a tight tolerance, and its gradient if that is exact."""

    logits: Tensor
    gradient: Tensor | None

    def errors(self, logits: Tensor, gradient: Tensor) -> tuple[float, float | None]:
        """The largest relative errors of logits and gradient."""
        of_gradient = None if self.gradient is None else relative_error(gradient, self.gradient)
        return relative_error(logits, self.logits), of_gradient


def reference(data: tuple[Tensor, Tensor, Tensor], ways: int, nk: int) -> Reference:
    """Solve with Moreau at a tight tolerance."""
    head = ch.SVMHead(C, solver=ch.solvers.MoreauSolver(tolerance=1e-8))
    _, _, logits, gradient = once(lambda s, y, q, k: head(s, y, q, ways=k), *data, ways)
    return Reference(logits, gradient if nk <= _OWN_GRADIENTS else None)


def measure(
    *,
    sizes: list[str],
    tasks: list[int],
    precisions: list[str],
    names: list[str],
    device: str,
    features: int,
    queries: int,
    repeats: int,
    threads: int,
    keep: Callable[[pandas.DataFrame], None] = lambda rows: None,
) -> pandas.DataFrame:
    """One row per size, number of tasks, precision and contender: median seconds, errors and memory.

    A contender that raises an error is left out. After each case, `keep` gets the rows so far.
    """
    rows, available = [], contenders()
    every = list(itertools.product(sizes, tasks, precisions))
    for name in names:  # compiles all kernels
        support, labels, query = (value.to(device) for value in episode(1, 2, 1, 4, 1))
        try:
            once(available[name].call, support, labels, query, 2)
        except Exception as error:
            report.leave_out(name, error)
            del available[name]
    for size, count, precision in (bar := tqdm(every, unit="case")):
        bar.set_description(f"{size}, {count} tasks, {precision}")
        ways, shots = SIZES[size]
        exact = episode(count, ways, shots, features, queries)
        dtype = getattr(torch, precision)
        support, labels, query = exact
        data = support.to(device, dtype), labels.to(device), query.to(device, dtype)
        nk = ways * ways * shots
        cost = nk * max(1.0, count / 8) ** (1 / 3)  # the n * k at which 8 tasks would take as long
        taking_part = {name: own for name, own in available.items() if name in names and cost <= own.largest}
        forward: dict[str, list[float]] = {name: [] for name in taking_part}
        both: dict[str, list[float]] = {name: [] for name in taking_part}
        errors: dict[str, tuple[float, float | None]] = {}
        memory: dict[str, float | None] = {}
        judged = "moreau" in available and cost <= _REFERENCE and any(each.exact for each in taking_part.values())
        try:
            known = reference(exact, ways, nk) if judged else None
        except Exception as error:
            report.leave_out("moreau, the reference,", error)
            known = None
        for repeat in range(-2, repeats):
            for name, each in list(taking_part.items()):
                if both[name] and statistics.median(both[name]) > (_SLOW if repeat >= 3 else _VERY_SLOW):
                    continue
                torch.set_num_threads(1 if name in _QPTH and nk > _ONE_THREAD else threads)
                try:
                    if repeat == -1:
                        memory[name] = peak_memory(partial(once, each.call, *data, ways), device)
                        continue
                    first, second, found, slope = once(each.call, *data, ways)
                except Exception as error:
                    report.leave_out(name, f"{type(error).__name__} for {count} tasks of {size}: {error}")
                    del taking_part[name]
                    continue
                if repeat >= 0 or second > _VERY_SLOW:
                    forward[name].append(first)
                    both[name].append(second)
                if repeat < 0 and each.exact and known is not None:
                    errors[name] = known.errors(found.to(exact[0]), slope.to(exact[0]))
        for name in taking_part:
            row = {"size": size, "tasks": count, "precision": precision, "nk": nk, "contender": name}
            row |= {"forward": statistics.median(forward[name]), "both": statistics.median(both[name])}
            row |= {"repeats": len(both[name]), "memory": memory.get(name)}
            rows.append(
                row | dict(zip(("logits_error", "gradient_error"), errors.get(name, (None, None)), strict=True))
            )
        if rows:
            keep(pandas.DataFrame(rows))
    torch.set_num_threads(threads)
    return pandas.DataFrame(rows)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The largest error, relative to the largest entry."""
    return ((value - reference).abs().max() / reference.abs().max()).item()


def growth(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The growth of time and memory with n * k, as exponents of power laws, per contender with at least three sizes."""
    found = []
    for name, own in rows.groupby("contender", sort=False):
        own = own.sort_values("nk").groupby("nk", as_index=False)[["both", "memory"]].median()
        if len(own) < 3:
            continue
        nk = numpy.log(own["nk"])
        found.append({"contender": name, "time": numpy.polyfit(nk, numpy.log(own["both"]), 1)[0]})
        # Below a few megabytes, the system's count is not the memory that was requested.
        large = own[own["memory"] > 2**22]
        if len(large) >= 3:
            found[-1]["memory"] = numpy.polyfit(numpy.log(large["nk"]), numpy.log(large["memory"]), 1)[0]
    return pandas.DataFrame(found, columns=["contender", "time", "memory"])


def show(rows: pandas.DataFrame, title: str) -> Table:
    """Milliseconds of both passes, errors, and ratios to the times of the native solver and of ridge regression."""
    columns = ("size", "tasks", "precision", "", "forward, ms", "both, ms", "/ native", "/ ridge")
    columns += ("logits error", "gradient error", "memory, MB")
    table = report.new_table(title, columns, left=[""], no_wrap=True)
    cases = ["size", "tasks", "precision"]
    for _, own in rows.groupby(cases, sort=False):
        times = dict(zip(own["contender"], own["both"], strict=True))
        for row in own.to_dict("records"):
            cells = [f"{1e3 * row[t]:.1f}" for t in ("forward", "both")]
            cells += [f"{row['both'] / times[base]:.1f}" if base in times else "" for base in ("native", "ridge")]
            cells += ["" if pandas.isna(row[e]) else f"{row[e]:.0e}" for e in ("logits_error", "gradient_error")]
            cells.append("" if pandas.isna(row["memory"]) else f"{row['memory'] / 2**20:.0f}")
            table.add_row(*(str(row[case]) for case in cases), str(row["contender"]), *cells)
    return table


def draw(rows: pandas.DataFrame, title: str, path: Path) -> None:
    """Draw time against n * k, both logarithmic, and gradient error against time."""
    figure, (left, right) = report.panels(2, width=11, height=4.6)
    for name, own in rows.groupby("contender", sort=False):
        own = pandas.DataFrame(own[own["tasks"] == own["tasks"].max()]).sort_values("nk")
        left.loglog(own["nk"], 1e3 * own["both"], "o-", label=name)
        known = own.dropna(subset="gradient_error")
        right.loglog(1e3 * known["both"], known["gradient_error"].clip(lower=1e-17), "o", label=name)
    left.set(xlabel="examples x classes", ylabel="forward and backward, ms")
    right.set(xlabel="forward and backward, ms", ylabel="relative error of the gradient")
    for axes in (left, right):
        axes.grid(linewidth=0.3)
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def write(rows: pandas.DataFrame, settings: dict[str, Any], origin: dict[str, Any], output: Path) -> None:
    """Show the results, and write them as JSON, Markdown and a picture."""
    title = f"One pass of an SVM head, median of {settings['repeats']} (3 where slow, one above {_VERY_SLOW:.0f} s)"
    table, exponents = show(rows, title), growth(rows)
    fitted = "; ".join(
        f"{row['contender']} {row['time']:.1f}" + ("" if pandas.isna(row["memory"]) else f" and {row['memory']:.1f}")
        for row in exponents.to_dict("records")
    )
    errors = (
        "Errors are the largest, relative to the largest entry, against Moreau at tolerance 1e-8: for gradients up to "
        f"n k = {_OWN_GRADIENTS}, beyond which those of Moreau have at most two good digits; for logits up to n k = "
        f"{_REFERENCE}."
        if "moreau" in contenders()
        else "There are no errors, because Moreau, the reference, is not installed."
    )
    note = (
        f"C = {C}, {settings['features']} features, {settings['queries']} queries per class; "
        f"{experiment.place(origin, settings['device'])}, torch "
        f"{origin['versions']['torch']}. {errors} Memory: the peak of both passes beyond the memory in use before. "
        "`interior point` is `InteriorPointSolver` alone; qpth runs 15 iterations, as in the published code, and has "
        f"one thread above n k = {_ONE_THREAD}, where our adapter calls it task by task; `published code` calls qpth "
        "as the code of Lee et al. does, once for all tasks; it and `SVClassifier` of learn2learn are smoothed and in "
        "float32; sizes that would take minutes are left out. "
        + (f"Growth of time (and of memory) with n k, fitted exponents: {fitted}. " if fitted else "")
        + "Made by `python -m benchmarks.solvers`."
    )
    experiment.write(
        output,
        "solvers",
        table,
        note,
        record={"settings": settings, "results": report.records(rows), "growth": report.records(exponents), **origin},
        draw=partial(draw, rows, title),
        width=130,
    )


def main() -> None:
    """The command line."""
    absent = missing()
    every = [*contenders(), *absent]
    parser = experiment.parser("solvers", __doc__, "device", "threads", "output")
    parser.add_argument("--sizes", type=list[str], default=list(SIZES), help=f"some of {', '.join(SIZES)}")
    parser.add_argument("--tasks", type=list[int], default=[8], help="tasks solved at once, one or several numbers")
    parser.add_argument("--precisions", type=list[str], default=["float64"], help=f"some of {', '.join(PRECISIONS)}")
    text = "the contenders; those whose package is not installed are left out"
    parser.add_argument("--names", type=list[str], default=every, help=text)
    parser.add_argument("--features", type=int, default=640, help="feature dimension")
    parser.add_argument("--queries", type=int, default=15, help="query examples per class")
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats, after one that warms up")
    options = parser.parse_args()
    settings: dict[str, Any] = {name: options[name] for name in _SETTINGS}
    for name, known in {"sizes": SIZES, "names": every, "precisions": PRECISIONS}.items():
        experiment.refuse_unknown(name, settings[name], known)
    for name in settings["names"]:
        if name in absent:
            report.leave_out(name, str(absent[name]))
    if settings["device"] == "cpu" and ON_GPU in settings["names"]:
        report.leave_out(ON_GPU, "it needs --device cuda")
        settings["names"].remove(ON_GPU)
    settings["names"] = [name for name in settings["names"] if name not in absent]
    if not settings["names"]:
        raise SystemExit("error: names: the packages of all contenders are missing")
    torch.set_num_threads(options.threads)
    origin = report.provenance()

    def keep(rows: pandas.DataFrame) -> None:
        record = {"settings": settings, "results": report.records(rows), **origin}
        report.write_json(record, options.output / "solvers.json")  # in case that the command is killed later

    rows = measure(**settings, keep=keep)
    if rows.empty:
        raise SystemExit("error: every contender raised an error")
    write(rows, settings, origin, options.output)


if __name__ == "__main__":
    main()
