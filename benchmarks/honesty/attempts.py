"""Attempts of contenders at hard tasks, in processes that may crash or hang."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import TimeoutError
from functools import partial
from multiprocessing import get_context

import torch
from pebble import ProcessExpired, ProcessPool

from benchmarks.honesty.contenders import Answer, contenders
from benchmarks.honesty.tasks import Set, hard_task

PRECISE, WRONG, WRONG_GRADIENT = 1e-6, 1e-4, 1e-2
VERDICTS = ("solved", "flagged", "imprecise", "silently wrong", "crashed", "hung", "left out")


def _set_up() -> None:
    torch.set_num_threads(1)


def attempt(name: str, of: Set, seed: int, *, device: str = "cpu") -> tuple[str, str, float | None]:
    """The verdict, its reason, and the error of the gradient if it was checked."""
    contender, task = contenders()[name], hard_task(seed, of)
    if task.size > contender.largest or not contender.suits(task):
        return "left out", "", None
    try:
        answer = contender.answer(task.to(device))
    except contender.documented as error:
        return "flagged", f"{type(error).__name__}: {error}", None
    except Exception as error:  # any other error counts as a crash
        return "crashed", f"{type(error).__name__}: {error}", None
    # Beyond float64, differences of logits are noise.
    return verdict(answer), f"gap {answer.gap:.0e}", None if of == "beyond" else answer.gradient_error


def verdict(answer: Answer) -> str:
    """One of `VERDICTS`."""
    if not answer.solved:
        return "flagged"
    return "solved" if answer.gap <= PRECISE else "imprecise" if answer.gap <= WRONG else "silently wrong"


def attempts(
    name: str, of: Set, seeds: range, limit: float, workers: int, device: str = "cpu"
) -> Iterator[tuple[str, str, float | None]]:
    """Call `attempt` for each seed, in processes that may crash or hang."""
    context = get_context("spawn" if device == "cuda" else None)  # CUDA doesn't work in forked processes
    with ProcessPool(max_workers=workers, initializer=_set_up, context=context) as pool:
        results = pool.map(partial(attempt, name, of, device=device), seeds, timeout=limit).result()
        for _ in seeds:
            try:
                yield next(results)
            except TimeoutError:
                yield "hung", f"beyond {limit:.0f} s", None
            except ProcessExpired as error:
                yield "crashed", f"process ended with {error.exitcode}", None
