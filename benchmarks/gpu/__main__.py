"""Do everything that needs a GPU, in order of importance, within a time limit.

python -m benchmarks.gpu --minutes 8 --data-root DIR --output OUT     # run it again to continue
python -m benchmarks.gpu --pack DIR2 --data-root DIR                  # pack the data into a few small files
python -m benchmarks.gpu --unpack OUT                                 # unpack results copied from another machine
python -m benchmarks.gpu --smoke                                      # every stage with tiny sizes, on any machine
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks import experiment
from benchmarks.data.sheets import pack
from benchmarks.gpu.archive import pack_results, unpack_results
from benchmarks.gpu.queue import QUEUE, SMOKE_QUEUE
from benchmarks.gpu.session import Session
from benchmarks.gpu.stages import STAGES


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = experiment.parser("gpu", __doc__, "data_root", "output")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit for all stages together")
    parser.add_argument(
        "--stages", type=list[Literal[tuple(STAGES)]], default=list(STAGES), help="the stages to run, in this order"
    )
    parser.add_argument("--only", type=list[str], default=[], help="names of the training runs; default: all")
    text = "options that override those of all training runs, as in '{steps: 10000}'"
    parser.add_argument("--changes", type=dict[str, Any], default={}, help=text)
    parser.add_argument("--smoke", action="store_true", help="run every stage with tiny sizes, on any machine")
    text = "folder of the packed results; default: the folder `home` in that of the results"
    parser.add_argument("--home", type=Path | None, default=None, help=text)
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
        print(*unpack_results(chosen.home or chosen.unpack / "home", chosen.unpack), sep="\n")
        return
    queue = SMOKE_QUEUE if chosen.smoke else tuple(e for e in QUEUE if not chosen.only or e.name in chosen.only)
    deadline = time.monotonic() + 60 * chosen.minutes
    session = Session(chosen.output, chosen.data_root, deadline, chosen.smoke, queue, chosen.changes)
    session.output.mkdir(parents=True, exist_ok=True)
    home = chosen.home or session.output / "home"
    for name in chosen.stages:
        if session.left < 10:
            print(f"{name}: no time left", flush=True)
            continue
        begin = time.monotonic()
        outcome = attempt(partial(STAGES[name], session))
        attempt(partial(pack_results, session.output, home))  # because this command may be killed in the next stage
        print(f"{name}: {outcome} ({time.monotonic() - begin:.0f} s)", flush=True)
        if name == "machine" and not outcome.startswith("exit status 0"):
            raise SystemExit("error: the machine cannot solve problems on its GPU, so no other stage begins")
    parts = pack_results(session.output, home)
    unfinished = [entry.name for entry in queue if not (session.output / entry.name / "result.json").is_file()]
    print(f"Packed results: {', '.join(str(part) for part in parts)}")
    if "trainings" in chosen.stages:
        print(f"Next: {unfinished[0]}; run this again to continue" if unfinished else "All training runs are finished")


def attempt(action: Callable[[], Any]) -> Any:
    """What an action returns or, if it fails, a word about that, because what follows has to go on."""
    try:
        return action()
    except Exception as error:
        traceback.print_exc()
        return f"failed, {type(error).__name__}"


if __name__ == "__main__":
    main()
