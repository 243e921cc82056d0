"""Show what this machine has, and compare what heads compute on its GPU with what they compute on its processor.

python -m benchmarks.gpu.machine
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import convexheads as ch
from benchmarks import report
from benchmarks.solvers import episode

PACKAGES = ("numba", "numba-cuda", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink", "triton", "pebble", "qpth", "moreau")
"""The packages that some stage uses, besides those of `report.PACKAGES`."""
HEADS: dict[str, Callable[[], ch.ClassificationHead]] = {
    "ridge regression": ch.RidgeHead,
    "SVM": ch.SVMHead,
    "SVM on the GPU": lambda: ch.SVMHead(solver=ch.solvers.NativeSolver(backend="cuda")),
}
CLOSE = 1e-6
"""The largest difference, relative to the largest entry."""


def step(head: ch.ClassificationHead, device: str) -> tuple[Tensor, Tensor]:
    """The logits of two tasks, and the gradient of the support."""
    support, labels, query = (part.to(device) for part in episode(2, 5, 5, 64, 3))
    logits = head(support.requires_grad_(), labels, query, ways=5)
    (gradient,) = torch.autograd.grad(logits.square().sum(), support)
    return logits.detach().cpu(), gradient.cpu()


def difference(name: str, device: str) -> float:
    """The largest relative difference between the device and the processor."""
    pairs = zip(step(HEADS[name](), device), step(HEADS[name](), "cpu"), strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def main() -> None:
    """Print versions and differences; exit with an error if a head fails or differs."""
    origin = report.provenance()
    versions = {"CUDA": torch.version.cuda} | origin["versions"]
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    print(", ".join(f"{name} {value}" for name, value in origin["machine"].items()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in HEADS:
        try:
            found = difference(name, device)
        except ch.MissingDependencyError as error:
            report.leave_out(name, str(error))
            continue
        print(f"{name}: the relative difference between {device} and cpu is {found:.0e}")
        if not found < CLOSE:
            raise SystemExit(f"error: {name}: expected a relative difference below {CLOSE}, got {found}")


if __name__ == "__main__":
    main()
