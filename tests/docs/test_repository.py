"""What GitHub reads from the repository: workflows run the Makefile's targets, and the code of the issue forms works."""

import re

import pytest
import torch
import yaml
from tasks import ROOT, crammer_singer, task

from convexheads import SVMHead
from convexheads.solvers import NativeSolver

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_of_the_makefile(path):
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert {name for command in commands for name in re.findall(r"\bmake ([a-z-]+)", command)} <= TARGETS


def test_the_code_of_the_issue_form_saves_a_problem_that_was_not_solved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "solver-failure.yml").read_text())
    of_head, of_solver = re.findall(r"```python\n(.*?)```", form["body"][0]["attributes"]["value"], re.DOTALL)
    # Beyond float64: no weights separate these classes, and C is huge.
    support, labels, _, _ = task(2, shots=(10, 10, 10), d=2)
    support.requires_grad_()

    exec(of_head, {"head": SVMHead(C=1e12), "support": support, "labels": labels})
    saved = torch.load("failure.zip", weights_only=True)
    assert saved["support"].equal(support)
    assert saved["labels"].equal(labels)
    assert saved["solution"]["gap"].shape == (2,)

    problem = crammer_singer(support, labels, C=1e12)
    exec(of_solver, {"solver": NativeSolver(), "problem": problem})
    saved = torch.load("failure.zip", weights_only=True)
    assert saved["problem"].keys() == {"gram", "linear", "upper"}
    assert saved["problem"]["gram"].equal(problem.gram)
    assert saved["rows_sum_to_zero"] is True


def test_results_contain_no_placeholder_of_a_format_string():
    found = {path.name: re.findall(r"\{[a-z_.]+\}", path.read_text()) for path in (ROOT / "benchmarks").rglob("*.md")}
    assert found
    assert not {name: placeholders for name, placeholders in found.items() if placeholders}
