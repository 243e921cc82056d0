"""Several processes that share the steps of one training run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables in which PyTorch and its launchers pass the rank of a process and the address of the others."""
FIRST_PROCESS = "CONVEXHEADS_FIRST_PROCESS"
"""The variable in which the process that starts the others passes its id."""

GRACE = 10
"""Seconds in which the first process may end with its own error after another process has ended with one."""


@dataclass(frozen=True)
class Processes:
    """This process, one of those that share a training run.

    Attributes:
        rank: the number of this process, which is 0 for the first one.
        count: the number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over all processes, in place, with one message per data type."""
        if self.count == 1:
            return
        kinds = defaultdict(list)
        for each in tensors:
            kinds[each.dtype].append(each)
        for own in kinds.values():
            flat = torch.cat([each.flatten() for each in own])
            distributed.all_reduce(flat)
            flat /= self.count
            for each, mean in zip(own, flat.split([each.numel() for each in own]), strict=True):
                each.copy_(mean.view_as(each))

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Copy the values of the first process to every process, in place."""
        for each in tensors if self.count > 1 else ():
            distributed.broadcast(each, 0)

    def gather(self, value: Any) -> list[Any]:
        """Collect the value of every process, in the order of ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found


def join(count: int, device: torch.device) -> Processes:
    """Start the other processes by running this command again, or join the one that has started this one.

    When one of them ends with an error or is killed, the others end too.
    """
    if count == 1:
        return Processes()
    if "LOCAL_RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared[FIRST_PROCESS] = str(os.getpid())
        for rank in range(1, count):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            other = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment)
            threading.Thread(target=_end_with_child, args=(other,), daemon=True).start()
        os.environ.update(shared | {"RANK": "0", "LOCAL_RANK": "0"})
    elif FIRST_PROCESS in os.environ:
        threading.Thread(target=_end_with_parent, args=(int(os.environ[FIRST_PROCESS]),), daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size())


def leave() -> None:
    """End the connection to the other processes, if there is one. This process may then join others again."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        for name in (*ENVIRONMENT, FIRST_PROCESS):
            os.environ.pop(name, None)


def _end_with_parent(process: int) -> None:
    while os.getppid() == process:
        time.sleep(1)
    print("error: the first process is gone, so this process ends too", file=sys.stderr, flush=True)
    os._exit(1)


def _end_with_child(child: subprocess.Popen[bytes]) -> None:
    if code := child.wait():
        if code > 0:  # the first process may end with the same error, and then reports it
            time.sleep(GRACE)
        print(f"error: process {child.pid} ended with status {code}, so all processes end", file=sys.stderr, flush=True)
        os._exit(1)
