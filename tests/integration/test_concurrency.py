"""From threads, from forked processes, and run again: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from unittest.mock import patch

import pytest
import torch
from tasks import ROOT, task
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import convexheads as ch
from convexheads.solvers.native import numba_backend

HEADS = {
    "svm": lambda: ch.SVMHead(ch.Learnable(0.3), scale=ch.Learnable(1.5)),
    "svm-in-torch": lambda: ch.SVMHead(ch.Learnable(0.3), solver=ch.solvers.NativeSolver(backend="torch")),
    "interior-point": lambda: ch.SVMHead(ch.Learnable(0.3), solver=ch.solvers.InteriorPointSolver(max_iterations=5)),
    "weston-watkins": lambda: ch.WestonWatkinsSVMHead(ch.Learnable(0.3), kernel=ch.kernels.RBF()),
    "logistic": lambda: ch.LogisticHead(ch.Learnable(0.5)),
    "ridge": lambda: ch.RidgeHead(ch.Learnable(2.0), kernel=ch.kernels.RBF(ch.Learnable(3.0))),
    "mahalanobis": lambda: ch.MahalanobisHead(ch.Learnable(0.7)),
}
heads = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[] if name in ("svm", "ridge") else pytest.mark.slow)
        for name, make in HEADS.items()
    ],
)
SEEDS = range(24)


def answers(head: ch.ClassificationHead, seed: int) -> list[Tensor]:
    """Logits, and gradients for everything that has one."""
    support, labels, query, ways = task(4, shots=((5, 5, 5), (2, 3), (1, 4, 2, 6))[seed % 3], d=9, seed=seed)
    inputs = support.requires_grad_(), query.requires_grad_(), *head.parameters()
    logits = head(support, labels, query, ways=ways)
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), inputs)]


def same(found: list[Tensor], expected: list[Tensor], accuracy: float = 0.0) -> bool:
    """To the bit, or to an accuracy relative to the largest entry."""
    pairs = zip(found, expected, strict=True)
    return all(((one - other).abs().max() <= accuracy * other.abs().max()).item() for one, other in pairs)


@heads
@pytest.mark.parametrize("inner", [1, 2], ids=["one thread each", "threads in threads"])
def test_one_head_shared_by_eight_threads(make, inner):
    head, barrier = make(), Barrier(8)

    def start() -> None:
        torch.set_num_threads(inner)  # of this thread only
        barrier.wait(timeout=60)

    accuracy = 0.0 if inner == 1 else 1e-12  # torch's own threads may add numbers up in another order
    expected = [answers(head, seed) for seed in SEEDS]
    with patch.object(numba_backend, "_MIN_FLOPS_FOR_THREADS", 0), ThreadPoolExecutor(8, initializer=start) as pool:
        for _ in range(2):
            found = pool.map(lambda seed: answers(head, seed), SEEDS)
            assert all(map(partial(same, accuracy=accuracy), found, expected))


class Answers(Dataset):
    def __init__(self, head: ch.ClassificationHead) -> None:
        self.head = head

    def __len__(self) -> int:
        return len(SEEDS)

    def __getitem__(self, seed: int) -> list[Tensor]:
        return answers(self.head, seed)


@heads
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, wherever a thread was started before
def test_forked_workers_of_a_data_loader(make):
    """Also with threads of our own in them; those of torch don't survive a fork, and a worker has one."""
    head = make()
    with (
        patch.object(numba_backend, "_MIN_FLOPS_FOR_THREADS", 0),
        patch.object(torch, "get_num_threads", return_value=2),
    ):
        expected = [answers(head, seed) for seed in SEEDS]  # starts threads, which the workers don't inherit
        loader = DataLoader(Answers(head), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        assert all(map(same, loader, expected))


DETERMINISTIC = """
import hashlib
import torch
from convexheads.solvers.native import numba_backend
from test_concurrency import HEADS, task
numba_backend._MIN_FLOPS_FOR_THREADS = 0
torch.use_deterministic_algorithms(True)
for threads in (1, 2):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    digest = hashlib.sha256()
    for make in HEADS.values():
        backbone, head = torch.nn.Linear(60, 40), make()
        support, labels, query, ways = task(6, shots=(12, 9, 11, 8, 10), d=60, dtype=torch.float32)
        logits = head(backbone(support), labels, backbone(query), ways=ways)
        inputs = *backbone.parameters(), *head.parameters()
        for value in (logits, *torch.autograd.grad(logits.square().sum(), inputs)):
            digest.update(value.detach().numpy().tobytes())
    print(digest.hexdigest())
"""


@pytest.mark.slow
def test_deterministic_from_run_to_run():
    """On one thread and on two."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))}
    environment["OMP_WAIT_POLICY"] = "passive"  # or waiting threads spin, on cores that others need
    command = [sys.executable, "-c", DETERMINISTIC]
    done = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    digests = [each.stdout.split() for each in done]
    assert [len(digest) for digest in digests[0]] == [64, 64]
    assert digests[0] == digests[1]
