"""A run of the stages within a time limit."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.queue import Entry
from convexheads import _storage


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

    def command(
        self,
        name: str,
        *arguments: str,
        under: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        limit: float = math.inf,
    ) -> str:
        """Run a Python command, unless it ended well in an earlier run; write its output to a file.

        Args:
            name: of the files with its output and its end.
            arguments: of Python.
            under: the program that runs Python, with its arguments; none by default.
            variables: of the environment, besides those of this process.
            limit: the largest number of seconds, besides those that are left.

        Returns:
            The exit status and the last line of the output.
        """
        path, end_path = self.output / f"{name}.txt", self.output / f"{name}.end"
        if end_path.is_file():
            return end_path.read_text().strip()
        command, environment = [*under, sys.executable, *arguments], os.environ | dict(variables or {})
        with path.open("w") as file:
            try:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            except OSError as error:
                return str(error)
            try:
                status = process.wait(max(1, min(self.left, limit)))
            except BaseException as error:  # an interruption, too, ends the command and what it has started
                for pid in _with_descendants(process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    return "stopped at the time limit"
                raise
        lines = self.output_of(name)
        end = f"exit status {status}: {lines[-1] if lines else 'no output'}"
        if status == 0:
            _storage.atomic_write(end_path, f"{end}\n".encode())
        return end

    def forget(self, name: str) -> None:
        """Let the next call run a command again, even if it ended well."""
        (self.output / f"{name}.end").unlink(missing_ok=True)

    def output_of(self, name: str) -> list[str]:
        """The lines that a command has written."""
        return (self.output / f"{name}.txt").read_text(errors="replace").splitlines()


def _with_descendants(pid: int) -> Iterator[int]:
    """A process and, on Linux, all that it has started."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from _with_descendants(int(child))
    yield pid
