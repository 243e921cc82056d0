"""Compile the kernels for a GPU of a compute capability such as 9.0, and print how many registers each of them needs.

python tests/compile_for_gpu.py 9.0    # needs no GPU, but the extra `cuda`
"""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import numba
import torch
from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher

from convexheads.solvers import DualProblem
from convexheads.solvers.native import cuda_team, numba_backend


def main(architecture: str) -> None:
    """Compile the kernels and print their names and registers."""
    capability = tuple(map(int, architecture.split(".")))
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)

    def compile_only(kernel, warps, *arguments):
        signature = numba.types.void(*map(numba.typeof, numba_backend._as_arrays(arguments)))
        code, _ = cuda.compile(kernel.py_func, signature, cc=capability, abi="numba", output="ltoir", device=False)
        print(kernel.__name__, registers(code, capability))

    cuda_team.launch = compile_only
    numba_backend._is_on_cpu = lambda tensor: False
    one = torch.ones(1, 2, 2, dtype=torch.float64)
    limits = {"max_rounds": 12, "warm_rounds": 2, "refinements": 2}
    found = numba_backend.solve(DualProblem(one, one, upper=one), 1e-6, **limits)
    found.linearization.kkt.solve(one, one[..., 0], refinements=1)
    nowhere = torch.zeros_like(one, dtype=torch.bool)
    numba_backend.factorize(DualProblem(one, one, upper=one), nowhere, nowhere)


def registers(code: bytes, capability: tuple[int, ...]) -> int:
    """The number of registers of a kernel's machine code, which is linked as in a launch, with optimization."""
    options = ["-lto", "-verbose", f"-arch=sm_{''.join(map(str, capability))}"]
    options += [f"-maxrregcount={cuda_team.MAX_REGISTERS}"]
    linker = nvjitlink.create(len(options), options)
    nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), "kernel")
    nvjitlink.complete(linker)
    log = bytearray(nvjitlink.get_info_log_size(linker))
    nvjitlink.get_info_log(linker, log)
    found = re.search(r"Used (\d+) registers", log.decode())
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main(sys.argv[1])
