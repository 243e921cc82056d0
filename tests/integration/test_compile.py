"""`torch.compile` cannot trace the checks of shapes that conftest.py adds, so its tests run in a process without them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tasks import ROOT

pytest.importorskip("torch._dynamo")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("selected", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_heads_are_compiled(selected):
    command = [sys.executable, "-m", "pytest", "--quiet", "--noconftest", "-p", "no:cacheprovider"]
    file = ROOT / "tests" / "integration" / "compiled_heads.py"
    done = subprocess.run([*command, "-m", selected, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_compiler_is_not_loaded_before_it_is_needed():
    script = "import sys, convexheads; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=200)
