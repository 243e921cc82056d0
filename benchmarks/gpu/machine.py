"""Show what this machine has, and compare what heads compute on its GPU with what they compute on its processor.

python -m benchmarks.gpu.machine
"""

from __future__ import annotations

import torch

from benchmarks import report
from benchmarks.solvers import ON_GPU, contenders, episode, missing, once, relative_error

PACKAGES = ("numba", "numba-cuda", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink", "triton", "pebble", "qpth", "moreau")
"""The packages that some stage uses, besides those of `report.PACKAGES`."""
COMPARED = ("ridge", "native", ON_GPU)
"""The contenders of `benchmarks.solvers` that have to work."""
CLOSE = 1e-6
"""The largest relative error of logits and gradients."""


def difference(name: str, device: str) -> float:
    """The largest relative error of a contender's logits and gradient on a device, compared with the processor."""
    call, (support, labels, query) = contenders()[name].call, episode(2, 5, 5, 64, 3)
    found, expected = (
        once(call, support.to(where), labels.to(where), query.to(where), 5)[2:] for where in (device, "cpu")
    )
    return max(relative_error(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def main() -> None:
    """Print versions and differences; exit with an error if a head fails or differs."""
    origin = report.provenance()
    versions = origin["versions"] | {name: report.installed(name) for name in PACKAGES}
    print(f"CUDA {torch.version.cuda}, " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    print(", ".join(f"{name} {value}" for name, value in origin["machine"].items()))
    device, absent = "cuda" if torch.cuda.is_available() else "cpu", missing()
    for name in COMPARED:
        if name in absent:
            report.leave_out(name, str(absent[name]))
            continue
        found = difference(name, device)
        print(f"{name}: the relative difference between {device} and cpu is {found:.0e}")
        if not found < CLOSE:
            raise SystemExit(f"error: {name}: expected a relative difference below {CLOSE}, got {found}")


if __name__ == "__main__":
    main()
