"""Try every head and solver on thousands of hard tasks, and count correct, reported and silently wrong answers.

python -m benchmarks.honesty
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pandas
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks import experiment, report
from benchmarks.honesty.attempts import PRECISE, VERDICTS, WRONG, WRONG_GRADIENT, attempts
from benchmarks.honesty.contenders import contenders
from benchmarks.honesty.tasks import Set


def measure(name: str, of: Set, tasks: int, limit: float, workers: int, device: str = "cpu") -> dict[str, Any]:
    """The row of one contender."""
    begin, counts, notable, gradients = time.perf_counter(), Counter(), [], []
    title = f"{name}, {of}"
    for seed, (what, why, error) in enumerate(
        tqdm(attempts(name, of, range(tasks), limit, workers, device), title, total=tasks, leave=False)
    ):
        counts[what] += 1
        if error is not None:
            gradients.append(error)
            if not error <= WRONG_GRADIENT:
                notable.append({"seed": seed, "verdict": "wrong gradient", "detail": f"relative error {error:.0e}"})
        if what not in ("solved", "left out"):
            notable.append({"seed": seed, "verdict": what, "detail": why.split("\n")[0][:160]})
    wrong = sum(not error <= WRONG_GRADIENT for error in gradients)
    return {
        "contender": name,
        "set": of,
        "tasks": tasks,
        **{each: counts[each] for each in VERDICTS},
        "gradients": len(gradients),
        "wrong gradients": wrong,
        "seconds": round(time.perf_counter() - begin),
        "notable": notable,
    }


def show(rows: list[dict[str, Any]], title: str) -> Table:
    """Counts of each verdict; percentages refer to the tasks that were tried."""
    columns = ("contender", "set", "tried", "solved, %", *VERDICTS[1:-1], "gradients", "wrong ones")
    table = report.new_table(title, columns, left=("contender", "set"), no_wrap=True)
    for row in rows:
        tried = row["tasks"] - row["left out"]
        share = f"{100 * row['solved'] / tried:.2f}" if tried else ""
        counts = [str(row[verdict]) for verdict in VERDICTS[1:-1]]
        looked = [str(row["gradients"]), str(row["wrong gradients"])] if row["gradients"] else ["", ""]
        table.add_row(row["contender"], row["set"], f"{tried:,}", share, *counts, *looked)
    return table


def main() -> None:
    """The command line."""
    parser = experiment.parser("honesty", __doc__, "device", "output")
    tried = contenders()
    known = list(tried)
    parser.add_argument("--tasks", type=int, default=5000, help="hard tasks, with the seeds 0, 1, 2, ...")
    parser.add_argument("--other", type=int, default=500, help="hard tasks of another make")
    parser.add_argument("--beyond", type=int, default=500, help="tasks with C beyond what float64 can express")
    parser.add_argument("--peer-tasks", type=int, default=300, help="hard tasks for contenders on other solvers")
    parser.add_argument("--names", type=list[str], default=known, help=f"contenders to try, of {', '.join(known)}")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a task, after which it counts as hung")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    experiment.refuse_unknown("names", options.names, known)
    rows = []
    for name in options.names:
        tasks = options.peer_tasks if tried[name].peer else options.tasks
        rows.append(measure(name, "hard", tasks, options.limit, options.workers, options.device))
        others: tuple[tuple[Set, int], ...] = (("other", options.other), ("beyond", options.beyond))
        for of, count in () if tried[name].peer else others:
            if count:
                rows.append(measure(name, of, count, options.limit, options.workers, options.device))
        Console().print(show(rows[-1:], ""))
    write(rows, options)


def write(rows: list[dict[str, Any]], options: Any) -> None:
    """Show the results, and write them as Markdown, JSON and, with the seeds of all that wasn't solved, CSV."""
    origin = report.provenance()
    table = show(rows, "Hard tasks: who is right, who says that it failed, who is wrong without a word")
    note = (
        f"Solved: a relative duality gap of at most {PRECISE:.0e}, judged from the features in extended precision with "
        "no code of the library (of prototypes, linear discriminant and Mahalanobis: that error of the logits). "
        "Flagged: a documented error, or a status that says so. Imprecise: said to be solved, with a gap up to "
        f"{WRONG:.0e}; silently wrong: beyond that. Crashed: any other error, or the end of the process. Hung: more "
        f"than {options.limit:.0f} s. Gradients: directional derivatives of hard tasks in float64, at regular points "
        "(strictly complementary, free coefficients determined), wrong if they are off by more than "
        f"{WRONG_GRADIENT:.0%} from central differences with every step. Tried: those tasks that are not too large for "
        "the contender, and of which every class has an example where it needs one. Tasks are those of the seeds from "
        "0 on; `notable.csv` has the seeds of all that wasn't solved. "
        + ("" if options.device == "cpu" else f"Solved on {origin['machine']['accelerator']}. ")
        + "Made by `python -m benchmarks.honesty`."
    )
    names = ("tasks", "other", "beyond", "peer_tasks", "names", "limit", "workers", "device")
    plain = [{key: value for key, value in row.items() if key != "notable"} for row in rows]
    record = {"settings": {name: options[name] for name in names}, "results": plain, **origin}
    experiment.write(options.output, "honesty", table, note, record=record, width=160)
    notable = [{"contender": row["contender"], "set": row["set"], **each} for row in rows for each in row["notable"]]
    columns = ["contender", "set", "seed", "verdict", "detail"]
    pandas.DataFrame(notable, columns=columns).to_csv(options.output / "notable.csv", index=False)


if __name__ == "__main__":
    main()
